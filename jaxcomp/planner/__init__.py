"""Planning: what a compressed model takes on devices that are not here, from their compiler."""
