"""A network by name, from this package or from elsewhere."""
