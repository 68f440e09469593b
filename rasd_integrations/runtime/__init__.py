"""RASD: one answer from prompt to text, and the models behind it."""
