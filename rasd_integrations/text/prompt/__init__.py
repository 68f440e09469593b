"""Turns messages into token ids."""
