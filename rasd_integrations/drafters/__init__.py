"""Drafters: sources of drafts. They never import one another; cascades compose."""
