"""Ways to answer that choose among prompts or answers: the models' option ``mode``."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from typing_extensions import Self

from rasd_integrations.config import ContextMode, check_value
from rasd_integrations.errors import ConfigurationError, DecodingError
from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.runtime.pipeline import Gate, Pipeline, Request, encode, joined
from rasd_integrations.runtime.together import until_left, with_beats
from rasd_integrations.stats import Candidate, DecodingStats, Reward
from rasd_integrations.types import Chunk, TextDelta

Pipelines: TypeAlias = Callable[[ContextMode], Pipeline]
"""Returns the pipeline whose target reads the prompt as sent, or the documents of its chunks."""

# LaRA: the whole text is better for comparison and for what is spread over it.
_WHOLE = re.compile(
    r"\b(summar\w+|overview|outline|overall|main (?:idea|point|theme|topic|contribution|finding)s?|in total"
    r"|how many (?:times|of the)|list (?:all|every)|compar\w+|differ(?:s|ences?)? (?:from|between)|throughout)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:\b(?:not|no|cannot|unable|unclear|unknown|insufficient)|n't)\b.{0,40}\b(?:mention|state|provid|specif|given|contain"
    r"|found|information|context|answer|determin|know)",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 160  # characters; later a "not" is part of an answer
_BEAT_S = 0.05
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Mode(ABC):
    """Answers a request by one answer of a pipeline or by several."""

    @abstractmethod
    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Check and plan now, decode lazily, as :meth:`Pipeline.answer` does.

        Answers that are not returned are counted by :meth:`DecodingStats.add_work`.
        """

    def reading(self, context: ContextMode | None) -> Mode:
        """Return the mode of a request that asks for ``context``; ``None`` asks for none.

        Raises:
            ConfigurationError: This mode chooses itself.
        """
        if context is None:
            return self
        msg = f"context is {context!r} for this call, but mode={self!r} chooses what is read. Leave it out."
        raise ConfigurationError(msg)

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

    def reading(self, context: ContextMode | None) -> Mode:
        """Return one answer to what ``context`` says."""
        return self if context is None else Plain(context)

    def check_one_answer(self) -> None:
        """Return."""


@dataclass(frozen=True, slots=True)
class Route(Mode):
    """Answer from the prompt as sent; if that is in doubt, from the whole documents behind its chunks.

    ``stats.route`` is "prompt" or "documents", ``stats.route_reason`` says why. The first answer is shown only once it
    is judged.

    Attributes:
        least_probability: Of the first answer's tokens, the geometric mean that is trusted, in [0, 1].
    """

    least_probability: float = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        value = self.least_probability
        check_value(0 <= value <= 1, "least_probability", value, "in [0, 1]")

    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Choose by the question, or by an answer from the chunks."""
        short, whole = pipelines("prompt"), pipelines("documents")
        plan = whole.plan(request)
        if request.bound or not plan.documents:
            why = "a grammar or tools" if request.bound else "no documents were found to read"
            stats.route, stats.route_reason = "prompt", why
            return short.answer(request, stats, gate)
        if asked := _asks_for_the_whole(plan.question):
            stats.route, stats.route_reason = "documents", asked
            return whole.answer(request, stats, gate, plan)
        tried = DecodingStats()
        scored = replace(request, params=replace(request.params, scored=True))
        first = short.answer(scored, tried, gate)
        # Checked now, so that its errors are the call's.
        second = whole.answer(request, stats, gate, plan)
        return self._judged(first, second, tried, stats)

    def _judged(
        self,
        first: Generator[TextDelta, None, None],
        second: Generator[TextDelta, None, None],
        tried: DecodingStats,
        stats: DecodingStats,
    ) -> Generator[TextDelta, None, None]:
        with closing(second):
            deltas: list[TextDelta] = []
            with closing(first):
                for delta in first:
                    deltas.append(delta)
                    yield TextDelta("")  # a consumer that left is noticed here
            doubt = self.doubt(None, joined(deltas).text, tried)
            if doubt is None:
                stats.add(tried)
                stats.route, stats.route_reason = "prompt", "the answer from the chunks is likely"
                yield from deltas[:-1]
                yield replace(deltas[-1], stats=stats)
                return
            stats.route, stats.route_reason = "documents", doubt
            for delta in second:
                if delta.stats is not None:
                    stats.add_work(tried)
                yield delta

    def doubt(self, question: str | None, text: str, tried: DecodingStats) -> str | None:
        """Return why the documents should be read after the answer ``text`` from the chunks, if they should.

        ``tried`` has the answer's ``logprob`` and tokens.
        """
        if asked := _asks_for_the_whole(question):
            return asked
        if not text.strip():
            return "the answer from the chunks is empty"
        if _REFUSAL.search(text[:_REFUSAL_WITHIN]):
            return "the answer from the chunks says that they do not tell"
        probability = math.exp((tried.logprob or 0.0) / max(tried.generated_tokens, 1))
        if probability >= self.least_probability:
            return None
        return (
            f"the tokens of the answer from the chunks have a probability of {probability:.2f} on average, under "
            f"least_probability={self.least_probability:g}"
        )


def _asks_for_the_whole(question: str | None) -> str | None:
    """Return which words of the question do, if any."""
    asked = _WHOLE.search(question or "")
    return None if asked is None else f"the question says {asked[0]!r}"


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

        jobs: list[Callable[[], list[TextDelta]]] = [
            partial(list, until_left(answer)) for answer in answers
        ]
        found: dict[int, list[TextDelta]] = {}
        with closing(with_beats(jobs, len(jobs), _BEAT_S)) as ended:
            for one in ended:
                if one is None:
                    yield TextDelta("")  # a consumer that left is noticed here
                else:
                    found[one[0]] = one[1]
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


class Step(str):
    """A step's text, for scorers that read no more than that.

    Attributes:
        before: The answer up to it.
        prompt: What is answered.
    """

    __slots__ = ("before", "prompt")
    before: str
    prompt: Prompt

    def __new__(cls, text: str, before: str, prompt: Prompt) -> Self:
        """Return the step ``text``."""
        self = super().__new__(cls, text)
        self.before, self.prompt = before, prompt
        return self


@dataclass(frozen=True, slots=True)
class RewardGuided(Mode):
    """Let the teacher write each step, and the target where a scorer gives it less than ``least``.

    The teacher is a drafter model, or the target itself, on the retrieved chunks; it reads less and may be smaller.
    ``stats.rewards`` has every step's reward and who wrote it.

    Attributes:
        scorer: Maps a :class:`Step` to a number: a function, or a LangChain runnable whose output is a number, or a
            text or message with one in it (the first counts).
        least: Of a step that is kept.
        ends: What ends a step.
        most_steps: After so many the target writes the rest.
    """

    scorer: Any
    least: float = 0.7
    ends: str = "\n\n"
    most_steps: int = 100

    def __post_init__(self) -> None:
        """Check the values."""
        usable = callable(self.scorer) or callable(getattr(self.scorer, "invoke", None))
        check_value(usable, "scorer", self.scorer, "a function of a step's text, or a runnable")
        check_value(bool(self.ends), "ends", self.ends, "a non-empty text")
        check_value(self.most_steps >= 1, "most_steps", self.most_steps, "at least 1")

    def answer(
        self, pipelines: Pipelines, request: Request, stats: DecodingStats, gate: Gate | None
    ) -> Generator[TextDelta, None, None]:
        """Answer by a pipeline whose decoder writes in steps."""
        from rasd_integrations.decoding.stepwise import StepwiseDecoder

        pipeline = pipelines("prompt")
        rewards: list[Reward] = []

        def keeps(before: str, text: str) -> bool:
            reward = self._reward(Step(text, before, request.prompt))
            rewards.append(Reward(reward, reward >= self.least))
            stats.rewards = tuple(rewards)
            return reward >= self.least

        tokenizer = pipeline.template.tokenizer

        def decode(ids: Any) -> str:
            return str(tokenizer.decode([*ids], skip_special_tokens=True))

        decoder = StepwiseDecoder(pipeline.decoder, decode, self.ends, self.most_steps, keeps)
        return replace(pipeline, decoder=decoder, teaches=True).answer(request, stats, gate)

    def _reward(self, step: Step) -> float:
        """Return the scorer's number.

        Raises:
            DecodingError: It failed, or returned none.
        """
        try:
            invoke = getattr(self.scorer, "invoke", None)
            said = self.scorer(step) if invoke is None else invoke(step)
        except Exception as err:  # the user's own code
            msg = f"The scorer {self.scorer!r} failed: {type(err).__name__}: {err}"
            raise DecodingError(msg) from err
        said = getattr(said, "content", said)
        found = _NUMBER.search(said) if isinstance(said, str) else None
        try:
            return float(said if found is None else found[0])
        except (TypeError, ValueError) as err:
            msg = f"The scorer {self.scorer!r} returned {said!r} for a step, but must return a number."
            raise DecodingError(msg) from err


_MODES = {"route": Route, "speculative-rag": SpeculativeRAG}
_OBJECT = "<mode: "


def mode_of(spec: Any, context: ContextMode) -> Mode:
    """Return the mode that ``spec`` names; ``None`` is one answer to what ``context`` says.

    Raises:
        ConfigurationError: It names none, or contradicts ``context``.
    """
    if spec is None:
        return Plain(context)
    if context != "prompt":
        msg = f"mode is {spec!r} and context {context!r}, but a mode chooses what is read. Leave context out."
        raise ConfigurationError(msg)
    if isinstance(spec, Mode):
        return spec
    if isinstance(spec, str) and spec in _MODES:
        return _MODES[spec]()
    msg = f"mode is {spec!r}, but must be None, {', '.join(map(repr, _MODES))}, or a Mode."
    raise ConfigurationError(msg)


def mode_name(spec: Any) -> str | None:
    """Return ``spec`` as settings and cache keys hold it; an object, which cannot be read back, is marked as one."""
    if spec is None or isinstance(spec, Plain):
        return None
    return spec if isinstance(spec, str) else f"{_OBJECT}{spec!r}>"
