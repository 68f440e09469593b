"""What a mode is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

from rasd_integrations.config import ContextMode
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.runtime.pipeline import Gate, Pipeline, Request
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import TextDelta

Pipelines: TypeAlias = Callable[[ContextMode], Pipeline]
"""Returns the pipeline whose target reads the prompt as sent, or the documents of its chunks."""


class Mode(ABC):
    """Answers a request by one answer of a pipeline or by several."""

    @abstractmethod
    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Check and plan now, decode lazily, as :meth:`Pipeline.answer` does.

        Answers that are not returned are counted by :meth:`DecodingStats.add_work`.
        """

    def check_one_answer(self) -> None:
        """Raise unless a request has one answer, whose steps can be explained.

        Raises:
            ConfigurationError: This mode makes several.
        """
        msg = f"mode is {self!r}, which makes several answers, but explain() shows the steps of one. Leave mode out."
        raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Plain(Mode):
    """One answer.

    Attributes:
        context: What the target reads.
    """

    context: ContextMode

    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Answer by the pipeline."""
        return pipelines(self.context).answer(request, stats, gate)

    def check_one_answer(self) -> None:
        """Return."""
