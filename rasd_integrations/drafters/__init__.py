"""Drafters: sources of drafts. They never import one another; cascades and fusions are given theirs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rasd_integrations.drafters.base import Drafter, DraftSession, Needs
    from rasd_integrations.drafters.cascade import CascadeDrafter
    from rasd_integrations.drafters.datastore import (
        AnswersDrafter,
        CollectionDrafter,
        DatastoreDrafter,
    )
    from rasd_integrations.drafters.fused import FusedDrafter
    from rasd_integrations.drafters.model import ModelDrafter
    from rasd_integrations.drafters.papers.dense import DenseDrafter
    from rasd_integrations.drafters.papers.early_exit import EarlyExitDrafter
    from rasd_integrations.drafters.papers.sparse_kv import SparseKVDrafter
    from rasd_integrations.drafters.papers.translated import TranslatedDrafter
    from rasd_integrations.drafters.recycling import RecyclingDrafter
    from rasd_integrations.drafters.suffix import SuffixDrafter

_LAZY = {
    "AnswersDrafter": "datastore",
    "CascadeDrafter": "cascade",
    "CollectionDrafter": "datastore",
    "DatastoreDrafter": "datastore",
    "DenseDrafter": "papers.dense",
    "DraftSession": "base",
    "Drafter": "base",
    "EarlyExitDrafter": "papers.early_exit",
    "FusedDrafter": "fused",
    "ModelDrafter": "model",
    "Needs": "base",
    "RecyclingDrafter": "recycling",
    "SparseKVDrafter": "papers.sparse_kv",
    "SuffixDrafter": "suffix",
    "TranslatedDrafter": "papers.translated",
}

__all__ = [
    "AnswersDrafter",
    "CascadeDrafter",
    "CollectionDrafter",
    "DatastoreDrafter",
    "DenseDrafter",
    "DraftSession",
    "Drafter",
    "EarlyExitDrafter",
    "FusedDrafter",
    "ModelDrafter",
    "Needs",
    "RecyclingDrafter",
    "SparseKVDrafter",
    "SuffixDrafter",
    "TranslatedDrafter",
]


def __getattr__(name: str) -> object:
    """Import a drafter when it is first asked for; most of them need torch."""
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
