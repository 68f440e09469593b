"""A cheap drafter drafts for the model drafter, so that one drafter forward verifies several tokens.

Greedy drafts are the model drafter's own, sampled ones have its distribution; only the number of forwards falls.
"""

from __future__ import annotations

from typing import Protocol

from rasd_integrations.drafters.base import Drafter, DraftSession, Helper, Needs
from rasd_integrations.types import DraftContext


class HelperDrafter(Protocol):
    """A drafter whose sessions can continue a partial draft."""

    def start(self, context: DraftContext) -> Helper:
        """Start an answer."""
        ...


class HelpedDrafter(Protocol):
    """A drafter that takes a helper."""

    needs: Needs

    def start(self, context: DraftContext, helper: Helper | None = None) -> DraftSession:
        """Start an answer."""
        ...


class CascadeDrafter(Drafter):
    """``model`` drafts for the target, ``helper`` drafts for ``model``."""

    name = "cascade"

    def __init__(self, model: HelpedDrafter, helper: HelperDrafter) -> None:
        """Combine the two."""
        self.model = model
        self.helper = helper
        self.needs = model.needs

    def start(self, context: DraftContext) -> DraftSession:
        """Start an answer."""
        return self.model.start(context, self.helper.start(context))
