"""Drafters of papers that are exact but do not pay yet on any machine measured (docs/reference/drafters.md)."""
