"""The engine: token ids in, blocks of token ids out. Knows no text, no store and no framework."""
