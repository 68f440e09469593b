"""From token ids to text, reasoning and tool calls."""
