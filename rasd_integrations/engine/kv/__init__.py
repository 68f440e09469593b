"""Keys and values of prompts and answers, in memory and on disk."""
