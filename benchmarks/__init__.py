"""What the README claims, one command each: see README.md here."""
