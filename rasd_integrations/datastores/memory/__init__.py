"""What the answers of a namespace are drafted from: the store's collection, and the answers given before."""

from __future__ import annotations

from rasd_integrations.datastores.memory.memory import Memories, Memory

__all__ = ["Memories", "Memory"]
