"""Several answers, each from a part of the chunks; the target ranks them (Speculative RAG, arXiv 2407.08223)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rasd_integrations.config import check_value
from rasd_integrations.prompting import PromptHints
from rasd_integrations.runtime.modes.base import Mode, Pipelines
from rasd_integrations.runtime.pipeline import Gate, Pipeline, Request, encode, joined
from rasd_integrations.runtime.together import as_they_end
from rasd_integrations.stats import Candidate, DecodingStats
from rasd_integrations.types import Chunk, TextDelta


@dataclass(frozen=True, slots=True)
class SpeculativeRAG(Mode):
    """Answer from several subsets of the prompt's chunks at once, and return the best answer.

    An answer's score is the mean log-probability of its tokens given its own chunks, plus that given the whole prompt,
    which the target computes for all answers in one step. ``stats.candidates`` has all of them, best first. The paper's
    rationales need a drafter that was trained for them; answers are compared without.

    Attributes:
        subsets: How many; chunks are dealt out by rank, so that each subset has some of the best.
    """

    subsets: int = 3

    def __post_init__(self) -> None:
        """Check the range."""
        check_value(self.subsets >= 2, "subsets", self.subsets, "at least 2")

    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Answer the prompt with each subset of its chunks; plain if it has fewer than two chunks."""
        pipeline = pipelines("prompt")
        hints = request.hints or PromptHints()
        parts = () if request.bound else pipeline.planner.parts(request.prompt, hints, self.subsets)
        if len(parts) < 2:
            why = (
                "a grammar or tools"
                if request.bound
                else "fewer than two chunks were found in the prompt"
            )
            stats.route_reason = why
            return pipeline.answer(request, stats, gate)
        params = replace(request.params, scored=True)
        requests = [
            replace(request, prompt=prompt, params=params, hints=_only(hints, chunks))
            for prompt, chunks in parts
        ]
        counted = [DecodingStats() for _ in requests]
        answers = [
            pipeline.answer(asked, told, gate)
            for asked, told in zip(requests, counted, strict=True)
        ]
        return self._best(pipeline, request, answers, counted, stats)

    def _best(
        self,
        pipeline: Pipeline,
        request: Request,
        answers: Sequence[Generator[TextDelta, None, None]],
        counted: Sequence[DecodingStats],
        stats: DecodingStats,
    ) -> Generator[TextDelta, None, None]:
        from rasd_integrations.decoding.scoring import scores

        jobs: list[Callable[[], list[TextDelta]]] = [partial(list, answer) for answer in answers]
        found = dict(as_they_end(jobs, len(jobs)))
        texts = [joined(found[n]) for n in range(len(jobs))]
        prompt = encode(pipeline.template, request.prompt, request.tools)
        given_all = scores(
            pipeline.decoder, prompt, [text.token_ids for text in texts], pipeline.namespace
        )
        candidates = [
            Candidate(text.text, (told.logprob or 0.0) / max(len(text.token_ids), 1), score)
            for text, told, score in zip(texts, counted, given_all, strict=True)
        ]
        order = sorted(range(len(jobs)), key=lambda n: -candidates[n].score)
        stats.add(counted[order[0]])
        for n in order[1:]:
            stats.add_work(counted[n])
        stats.candidates = tuple(candidates[n] for n in order)
        *most, last = found[order[0]]
        yield from most
        yield replace(last, stats=stats)


def _only(hints: PromptHints, chunks: Sequence[Chunk]) -> PromptHints:
    """Return hints of a prompt that holds these chunks alone."""
    return replace(hints, chunks=tuple(chunks), context=None, rerender=None)
