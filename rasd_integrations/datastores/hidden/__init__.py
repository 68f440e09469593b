"""The target's hidden states over some texts, and the tokens that followed each."""

from __future__ import annotations

from rasd_integrations.datastores.hidden.build import Reader
from rasd_integrations.datastores.hidden.store import DenseStore, Neighbour, nearest

__all__ = ["DenseStore", "Neighbour", "Reader", "nearest"]
