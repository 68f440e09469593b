"""Chunks from the pipeline's own store, behind one interface; each store has one adapter."""

from __future__ import annotations

from rasd_integrations.retrieval.base import ChunkSource, JoinedSource
from rasd_integrations.retrieval.documents import join_chunks
from rasd_integrations.retrieval.factory import as_chunk_source
from rasd_integrations.retrieval.guard import GuardedSource

__all__ = ["ChunkSource", "GuardedSource", "JoinedSource", "as_chunk_source", "join_chunks"]
