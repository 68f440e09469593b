"""The guided tour behind ``make demo``: real model, real stores, both frameworks, one table."""
