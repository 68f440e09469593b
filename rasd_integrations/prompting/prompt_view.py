"""A text or chat prompt as a list of message texts, with edits of their content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rasd_integrations.prompting.hints import Prompt

_HUMAN_ROLES = frozenset({"user", "human"})
_TOOL_ROLES = frozenset({"tool", "function", "ipython"})
_OBSERVATION = "Observation:"  # how ReAct agents hand a tool's result back, as a user message


@dataclass(frozen=True, slots=True)
class Span:
    """A range of one message's text, in characters."""

    message: int
    start: int
    end: int

    def __len__(self) -> int:
        """Return the length in characters."""
        return self.end - self.start

    def contains(self, other: Span) -> bool:
        """Return True if ``other`` lies within."""
        same = self.message == other.message
        return same and self.start <= other.start and other.end <= self.end


@dataclass(frozen=True, slots=True)
class PromptView:
    """A prompt with the text and role of each message; a plain text is one user message."""

    prompt: Prompt
    texts: tuple[str, ...]
    roles: tuple[str, ...]

    @classmethod
    def of(cls, prompt: Prompt) -> PromptView:
        """View ``prompt``. Content that is not text reads as empty and stays unchanged."""
        if isinstance(prompt, str):
            return cls(prompt, (prompt,), ("user",))
        contents = [message.get("content") for message in prompt]
        texts = tuple(content if isinstance(content, str) else "" for content in contents)
        return cls(prompt, texts, tuple(str(message.get("role", "")) for message in prompt))

    @property
    def chars(self) -> int:
        """Total length of all texts."""
        return sum(map(len, self.texts))

    def is_human(self, message: int) -> bool:
        """Return True for the user's own words."""
        return self.roles[message] in _HUMAN_ROLES and not self._is_observation(message)

    def is_tool(self, message: int) -> bool:
        """Return True for a tool's result."""
        return self.roles[message] in _TOOL_ROLES or self._is_observation(message)

    def _is_observation(self, message: int) -> bool:
        text = self.texts[message]
        return self.roles[message] in _HUMAN_ROLES and text.startswith(_OBSERVATION)

    def last_human(self) -> int | None:
        """Return the index of the last message in the user's own words."""
        indices = reversed(range(len(self.texts)))
        return next((i for i in indices if self.is_human(i) and self.texts[i].strip()), None)

    def text(self, span: Span) -> str:
        """Return the text of ``span``."""
        return self.texts[span.message][span.start : span.end]

    def edited(self, texts: Mapping[int, str]) -> Prompt:
        """Return a copy of the prompt with other texts in the given messages."""
        if isinstance(self.prompt, str):
            return texts.get(0, self.prompt)
        return [
            {**message, "content": texts[i]} if i in texts else message
            for i, message in enumerate(self.prompt)
        ]


def hulls(spans: Sequence[Span]) -> list[Span]:
    """Return one span per message that covers all of its ``spans``."""
    groups: defaultdict[int, list[Span]] = defaultdict(list)
    for span in spans:
        groups[span.message].append(span)
    return [Span(i, min(s.start for s in g), max(s.end for s in g)) for i, g in groups.items()]


def clean(view: PromptView, regions: Sequence[Span]) -> list[Span]:
    """Return ``regions`` sorted, stripped of white space and without empty ones."""
    cleaned = []
    for region in sorted(regions, key=lambda r: (r.message, r.start)):
        text = view.text(region)
        start = region.start + len(text) - len(text.lstrip())
        cleaned.append(replace(region, start=start, end=start + len(text.strip())))
    return [region for region in cleaned if len(region)]


def without(regions: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """Return the parts of ``regions`` outside the spans ``taken``."""
    gaps = []
    for region in regions:
        at = region.start
        inside = (s for s in taken if s.message == region.message and s.end > region.start)
        for span in sorted(inside, key=lambda s: s.start):
            if at < min(span.start, region.end):
                gaps.append(replace(region, start=at, end=min(span.start, region.end)))
            at = max(at, span.end)
        if at < region.end:
            gaps.append(replace(region, start=at))
    return gaps
