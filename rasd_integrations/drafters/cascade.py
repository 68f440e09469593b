"""A cheap drafter drafts for the model drafter, so that one drafter forward checks several tokens.

The draft is token for token (sampled: in distribution) what the model drafter alone would propose; only the
number of its forwards falls.
"""

from __future__ import annotations

from typing import Protocol

from rasd_integrations.drafters.base import Drafter, DraftSession, Helper, Needs
from rasd_integrations.types import DraftContext


class HelperDrafter(Protocol):
    """A drafter whose sessions can look ahead of a partial draft."""

    name: str

    def start(self, context: DraftContext) -> Helper:
        """Begin an answer."""
        ...


class HelpedDrafter(Protocol):
    """A drafter that can be drafted for."""

    name: str
    needs: Needs
    gives_logits: bool

    def start(self, context: DraftContext, helper: Helper | None = None) -> DraftSession:
        """Begin an answer."""
        ...


class CascadeDrafter(Drafter):
    """``model`` drafts for the target, ``helper`` drafts for ``model``."""

    name = "cascade"

    def __init__(self, model: HelpedDrafter, helper: HelperDrafter) -> None:
        """Join the two."""
        self.model = model
        self.helper = helper
        self.needs = model.needs
        self.gives_logits = model.gives_logits

    def start(self, context: DraftContext) -> DraftSession:
        """Begin an answer."""
        return self.model.start(context, self.helper.start(context))
