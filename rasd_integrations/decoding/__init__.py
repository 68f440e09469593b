"""The loop that drafts, verifies and commits, and the schedule that sets draft lengths."""
