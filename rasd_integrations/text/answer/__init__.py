"""Turns token ids into text, reasoning and tool calls."""
