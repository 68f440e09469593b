"""Which drafted tokens stand: pure functions over logits."""
