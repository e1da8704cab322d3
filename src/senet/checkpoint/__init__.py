"""A network with all that is needed to use it again: written, opened, its gates as an adapter."""
