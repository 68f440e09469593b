"""The drafter protocol: a drafter starts one session per answer; sessions never share state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

if TYPE_CHECKING:
    from torch import Tensor

    from rasd_integrations.engine.kv.buffer import KVBuffer
    from rasd_integrations.engine.target import TargetModel


class Needs(NamedTuple):
    """What a drafter needs from the pipeline and the decoder.

    Attributes:
        prompt: The retrieved chunks: ``DraftContext.chunk_ids``, and a short prompt of its own made of them.
        hidden: The target's final hidden states, kept beside keys and values (:meth:`KVBuffer.hidden`).
        timing: The clock: its drafts depend on measured times, so two processes may draft differently.
    """

    prompt: bool = False
    hidden: bool = False
    timing: bool = False


class DraftSession(ABC):
    """State of a drafter for one answer."""

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:  # noqa: B027
        """Receive the target and the answer's keys and values; called once, before the first draft.

        Whenever a draft is asked for, the buffer holds all committed tokens but the last. It is read-only: a
        session commits nothing to it and keeps no view of it beyond :meth:`observe`.
        """

    @abstractmethod
    def propose(self, budget: int) -> Draft:
        """Return a draft of at most ``budget`` tokens to follow the committed tokens; an empty one is fine.

        The draft may depend on the committed tokens and on the drafter's own draws, never on a token that was
        drawn and then dropped.
        """

    def learn(self, draft: Draft, logits: Tensor) -> None:  # noqa: B027
        """Receive the target's logits ``[1 + len(draft), vocab]``, rejected nodes included.

        Row 0 predicts the token after the last committed one, row ``1 + i`` the one after node ``i``. Called
        after each step, before :meth:`observe`.
        """

    def observe(self, block: TokenBlock) -> None:  # noqa: B027
        """Receive what the target committed."""

    def close(self) -> None:  # noqa: B027
        """Free what the session holds."""


class Drafter(ABC):
    """A source of drafts, shared by all answers of an engine.

    Attributes:
        name: Name in the statistics; of a class that sets none, the class's.
        needs: What it needs from pipeline and decoder.
    """

    name: str = ""
    needs: Needs = Needs()

    def __init_subclass__(cls, **options: Any) -> None:
        """Give a class without a name its own."""
        super().__init_subclass__(**options)
        if not cls.name:
            cls.name = cls.__name__

    @abstractmethod
    def start(self, context: DraftContext) -> DraftSession:
        """Start an answer."""


class Helper(Protocol):
    """A session that can also draft for a model drafter."""

    def propose_after(self, extra: Sequence[int], budget: int) -> tuple[int, ...]:
        """Return what may follow the committed tokens and ``extra``; change nothing."""
        ...

    def observe(self, block: TokenBlock) -> None:
        """Receive what the target committed."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


def as_drafter(drafter: Any) -> Drafter:
    """Return ``drafter``; an object with the right methods that subclasses nothing gets the defaults.

    Raises:
        ConfigurationError: It is no such object.
    """
    if isinstance(drafter, Drafter):
        return drafter
    if not _is_drafter(drafter):
        msg = f"A drafter is {drafter!r}, but must be an object (not a class) with start(context)."
        raise ConfigurationError(msg)
    return _DuckDrafter(drafter)


def _is_drafter(drafter: object) -> bool:
    return callable(getattr(drafter, "start", None)) and not isinstance(drafter, type)


class _DuckDrafter(Drafter):
    def __init__(self, drafter: Any) -> None:
        self._drafter = drafter
        self.name = getattr(drafter, "name", type(drafter).__name__)
        self.needs = getattr(drafter, "needs", Needs())

    def start(self, context: DraftContext) -> DraftSession:
        session = self._drafter.start(context)
        return session if isinstance(session, DraftSession) else _DuckSession(session)


class _DuckSession(DraftSession):
    def __init__(self, session: Any) -> None:
        self._session = session
        for method in ("attach", "learn", "observe", "close"):
            if hasattr(session, method):
                setattr(self, method, getattr(session, method))

    def propose(self, budget: int) -> Draft:
        draft: Draft = self._session.propose(budget)
        return draft


_OBJECT = "<drafter object: "


def drafter_name(drafter: object) -> str | None:
    """Return ``drafter`` as dumped settings hold it; an object, which cannot be read back, is marked as one."""
    if drafter is None or isinstance(drafter, str | Path):
        return None if drafter is None else str(drafter)
    return f"{_OBJECT}{type(drafter).__name__}>"


def check_drafter_spec(drafter: object, device: str | None = None) -> None:
    """Raise unless a drafter can be made from ``drafter``.

    Raises:
        ConfigurationError: It cannot, or not on ``device``.
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
            f"model's hub id or path; one that is already loaded stays where it is."
        )
        raise ConfigurationError(msg)
    if drafter is None or is_name or _is_drafter(drafter):
        return
    msg = (
        f"drafter is {drafter!r}, but must be 'auto', None, 'self', a model's hub id or path, or an object "
        f"(not a class) with start(context), such as a Drafter."
    )
    raise ConfigurationError(msg)
