"""Small arithmetic with spans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from rasd_integrations.prompting.prompt_view import PromptView, Span


def hulls(spans: Sequence[Span]) -> list[Span]:
    """Return, for each message, what lies between its first and its last span."""
    groups: defaultdict[int, list[Span]] = defaultdict(list)
    for span in spans:
        groups[span.message].append(span)
    return [Span(i, min(s.start for s in g), max(s.end for s in g)) for i, g in groups.items()]


def clean(view: PromptView, regions: Sequence[Span]) -> list[Span]:
    """Return ``regions`` in order, without the white space at their ends and without empty ones."""
    cleaned = []
    for region in sorted(regions, key=lambda r: (r.message, r.start)):
        text = view.text(region)
        start = region.start + len(text) - len(text.lstrip())
        cleaned.append(replace(region, start=start, end=start + len(text.strip())))
    return [region for region in cleaned if len(region)]


def without(regions: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """Return what is left of ``regions`` between the spans ``taken``."""
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
