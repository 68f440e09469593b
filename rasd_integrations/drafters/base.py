"""The drafter protocol: a drafter starts one session an answer; sessions never share state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

if TYPE_CHECKING:
    from torch import Tensor

    from rasd_integrations.engine.kv.buffer import KVBuffer
    from rasd_integrations.engine.target import TargetModel


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


_OBJECT = "<drafter object: "


@runtime_checkable
class Drafter(Protocol):
    """A source of drafts, shared by all answers of an engine."""

    name: str

    def start(self, context: DraftContext) -> DraftSession:
        """Begin an answer."""
        ...


@runtime_checkable
class TargetReader(Protocol):
    """A session that reads the target at work, as far as it has come.

    A drafter whose sessions read :meth:`KVBuffer.hidden` says so by ``reads_hidden = True``.
    """

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Take the target and the answer's keys and values; called once, before the first draft.

        Whenever a draft is asked for, the buffer holds all committed tokens but the last. It is read only: the
        session must not commit to it, may run steps on a :meth:`KVBuffer.view` of it, and must not keep views of it
        beyond :meth:`DraftSession.observe`.
        """
        ...


@runtime_checkable
class StepLearner(Protocol):
    """A session that learns from what the target thought of each token that it ran, refused ones too."""

    def learn(self, draft: Draft, logits: Tensor) -> None:
        """Learn from ``[1 + len(draft), vocab]``: row 0 follows the last committed token, row 1 + i node i.

        Called after each step, before :meth:`DraftSession.observe`.
        """
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


def drafter_name(drafter: object) -> str | None:
    """Return what ``drafter`` is in dumped settings; an object, which cannot be read back, is marked as one."""
    if drafter is None or isinstance(drafter, str | Path):
        return None if drafter is None else str(drafter)
    return f"{_OBJECT}{type(drafter).__name__}>"


def check_drafter_spec(
    drafter: object, device: str | None = None, *, lossless: bool = True
) -> None:
    """See that ``drafter`` is something a drafter can be made of, for a lossy distribution and on a device where asked.

    Raises:
        ConfigurationError: It is not.
    """
    is_name = isinstance(drafter, str | Path)
    if isinstance(drafter, str) and drafter.startswith(_OBJECT):
        msg = (
            f"drafter is {drafter!r}: settings hold no objects. Give the drafter again, or 'auto'."
        )
        raise ConfigurationError(msg)
    if device is not None and (not is_name or drafter in ("auto", "self")):
        msg = (
            f"drafter_device is {device!r}, but drafter {drafter!r} loads no model of its own. Give a drafter "
            f"model's hub id or path; one that is loaded already stands where it stands."
        )
        raise ConfigurationError(msg)
    if drafter is None and not lossless:
        msg = "knowledge_transfer needs a drafter that reads the chunks. Use drafter='self' or a model."
        raise ConfigurationError(msg)
    if drafter is None or is_name or callable(getattr(drafter, "start", None)):
        return
    msg = (
        f"drafter is {drafter!r}, but must be 'auto', None, 'self', a model's hub id or path, or an object "
        f"with the Drafter protocol (name, start(context))."
    )
    raise ConfigurationError(msg)
