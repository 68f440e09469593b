"""Files of our own: how they are written, read and cleared away. Nothing else is ever deleted."""
