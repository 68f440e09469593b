"""The drafter protocol: a drafter starts one session an answer; sessions never share state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock


class DraftSession(Protocol):
    """A drafter at work on one answer."""

    def propose(self, budget: int) -> Draft:
        """Return a draft of at most ``budget`` tokens for what follows the committed tokens.

        An empty draft says that there is nothing to propose. The draft may depend on the committed
        tokens and on the drafter's own draws, never on a token it drew and then dropped.
        """
        ...

    def observe(self, block: TokenBlock) -> None:
        """Learn what the target committed."""
        ...

    def close(self) -> None:
        """Free what the session holds."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """A source of drafts, shared by all answers of an engine."""

    name: str

    def start(self, context: DraftContext) -> DraftSession:
        """Begin an answer."""
        ...


class Helper(Protocol):
    """What a model drafter asks of the cheap drafter that drafts for it."""

    def propose_after(self, extra: Sequence[int], budget: int) -> tuple[int, ...]:
        """Return what may follow the committed tokens and ``extra``; change nothing."""
        ...

    def observe(self, block: TokenBlock) -> None:
        """Learn what the target committed."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


def check_drafter_spec(drafter: object) -> None:
    """See that ``drafter`` is something a drafter can be made of.

    Raises:
        ConfigurationError: It is not.
    """
    if (
        drafter is None
        or isinstance(drafter, str | Path)
        or callable(getattr(drafter, "start", None))
    ):
        return
    msg = (
        f"drafter is {drafter!r}, but must be 'auto', None, 'self', a model's hub id or path, or an object "
        f"with the Drafter protocol (name, start(context))."
    )
    raise ConfigurationError(msg)
