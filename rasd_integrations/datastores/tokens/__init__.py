"""Texts as token ids, indexed by context: finds all occurrences of the last tokens."""

from __future__ import annotations

from rasd_integrations.datastores.tokens.encoding import chunk_key, tokenizer_fingerprint
from rasd_integrations.datastores.tokens.store import TokenStore

__all__ = ["TokenStore", "chunk_key", "tokenizer_fingerprint"]
