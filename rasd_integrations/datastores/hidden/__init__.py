"""Texts as the target read them: what it thought at each place, and the tokens that followed."""

from __future__ import annotations

from rasd_integrations.datastores.hidden.build import Reader
from rasd_integrations.datastores.hidden.store import DenseStore, Neighbour, nearest

__all__ = ["DenseStore", "Neighbour", "Reader", "nearest"]
