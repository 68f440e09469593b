"""What the classes of both frameworks share: their options, and what answers a call."""
