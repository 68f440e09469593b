"""``make demo``: a real model, real stores, both frameworks, one table."""
