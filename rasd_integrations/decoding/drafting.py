"""Runs a drafter, maybe the user's own: its faults cost speed, never the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from rasd_integrations.decoding.drafts import checked
from rasd_integrations.drafters.base import Drafter, DraftSession
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, DraftContext, TokenBlock

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Drafting:
    """A drafter's session; without one, or after a fault, drafts are empty.

    Attributes:
        is_on: A session is there to propose drafts.
    """

    def __init__(self, target: TargetModel, stats: DecodingStats) -> None:
        """Draft for ``target``; faults go to ``stats``."""
        self._target, self._stats = target, stats
        self._name = ""
        self._session: DraftSession | None = None

    @property
    def is_on(self) -> bool:
        """True until a fault or :meth:`close`."""
        return self._session is not None

    def start(self, drafter: Drafter, context: DraftContext, buffer: KVBuffer) -> None:
        """Start a session on the prompt."""
        self._name = type(drafter).__name__  # until its own is known: to read it may fail

        def start() -> None:
            self._name = str(drafter.name)
            self._session = drafter.start(context)
            self._session.attach(self._target, buffer)

        self._guarded(start, None)

    def propose(self, budget: int) -> Draft:
        """Return a draft of at most ``budget`` tokens with a source."""
        session = self._session
        if session is None or budget <= 0:
            return Draft()
        vocab_size = self._target.vocab_size
        draft = self._guarded(lambda: checked(session.propose(budget), budget, vocab_size), Draft())
        return draft if draft.source or not len(draft) else replace(draft, source=self._name)

    def observe(self, block: TokenBlock, draft: Draft, logits: Tensor | None) -> None:
        """Hand over what was committed, and the step's logits unless drafting is off."""
        session = self._session
        if session is None:
            return

        def observe() -> None:
            if logits is not None:
                session.learn(draft, logits)
            session.observe(block)

        self._guarded(observe, None)

    def close(self) -> None:
        """Close the session; an error is logged."""
        session, self._session = self._session, None
        if session is None:
            return
        try:
            session.close()
        except Exception:
            logger.exception("closing a drafter's session failed")

    def _guarded(self, call: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return call()
        except Exception as err:
            fault = f"drafter {self._name!r} failed: {type(err).__name__}: {err}"
            logger.warning("%s; decoding goes on without it", fault, exc_info=err)
            self._stats.faults = (*self._stats.faults, fault)
            self._stats.off_reason = fault
            self.close()
            return otherwise
