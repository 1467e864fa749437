"""``python -m jaxcomp``: the command line."""

from jaxcomp.cli import main

if __name__ == "__main__":
    main()
