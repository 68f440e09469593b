"""What a drafter looks up: texts as token ids, and hidden states of texts."""
