"""Our own files: written atomically, read with checks, listed and removed. No other file is ever deleted."""
