"""Verification: which drafted tokens are accepted. Pure functions over logits."""
