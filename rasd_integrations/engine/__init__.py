"""One step of one model: token ids in, logits out. Knows no text, no store and no framework."""
