"""What vLLM asks for drafts (``method: custom_class``): rows of its batch to requests and their drafts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.vllm.drafting import MEMORY, REQUEST, RequestDrafts, Source
from rasd_integrations.vllm.memory import Namespaces
from rasd_integrations.vllm.options import Asked, Options

logger = logging.getLogger(__name__)

Tokens = NDArray[np.integer[Any]]


class Batch(Protocol):
    """The part of vLLM's ``InputBatch`` that is read."""

    req_ids: Sequence[str]


class Runner(Protocol):
    """The part of vLLM's model runner that is read.

    Attributes:
        input_batch: Request ids by row.
        requests: State of each request that has not finished, running or preempted: ``prompt_token_ids``,
            ``num_prompt_tokens``, ``sampling_params``.
    """

    input_batch: Batch
    requests: Mapping[str, Any]


@dataclass
class _Live:
    """A request that was drafted for.

    Attributes:
        state: vLLM's own; another request with the same id has another.
        drafts: ``None`` if it gets none.
        seen: How many of its tokens were observed.
    """

    state: Any
    drafts: RequestDrafts | None
    seen: int = 0


class Proposer:
    """Drafts for each request of vLLM's batch; a fault costs its request's drafts only.

    vLLM 0.32 and 0.33 import it by its dotted path. Until :meth:`bind` it drafts nothing: what vLLM passes names no
    request.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Read vLLM's configuration.

        Raises:
            ConfigurationError: An option under ``additional_config["rasd"]`` is unknown or out of range.
        """
        self.options = Options.read(vllm_config.additional_config)
        self.most: int = vllm_config.speculative_config.num_speculative_tokens
        self._window: int = vllm_config.model_config.max_model_len
        self._vocabulary: int = vllm_config.model_config.get_vocab_size()
        self._runner: Runner | None = None
        self._namespaces: Namespaces | None = None
        self._sources = {name: Source() for name in (REQUEST, MEMORY)}
        self._live: dict[str, _Live] = {}
        self._refused = self._faults = 0
        self._said: set[str] = set()

    def load_model(self, *_: Any, **__: Any) -> None:
        """Load nothing; vLLM's CPU runner calls it without asking."""

    def bind(self, runner: Runner, tokenizer: Any) -> None:
        """Draft for the requests of ``runner``; fed texts are read with the target's ``tokenizer``."""
        if self._namespaces is None:
            options = self.options
            self._namespaces = Namespaces(
                tokenizer, most=options.namespaces, max_tokens=options.memory_tokens
            )
        self._runner = runner

    @property
    def namespaces(self) -> Namespaces:
        """What is drafted from besides a request's own text.

        Raises:
            ConfigurationError: Nothing is bound yet.
        """
        if self._namespaces is None:
            msg = "The proposer has no requests to draft for yet. Call collective_rpc('rasd_bind') first."
            raise ConfigurationError(msg)
        return self._namespaces

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Tokens,
        token_ids_cpu: Tokens,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return a draft for each row of the batch; never raise into vLLM's loop.

        Args:
            sampled_token_ids: This step's new tokens by row; none while a prompt is read.
            num_tokens_no_spec: Tokens by row, the new ones included.
            token_ids_cpu: The tokens by row.
            slot_mappings: Of keys and values; not read.
        """
        try:
            return self._propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception as error:  # noqa: BLE001 - vLLM's loop would end, and its server
            self._note_fault(error)
            return [[] for _ in sampled_token_ids]

    def forget(self, text: str | None, namespace: str | None) -> int:
        """Forget as :meth:`Namespaces.forget` does; return how many texts and answers.

        Answers of requests that run, which may hold the text, are not remembered; the last one counts as running until
        the next step, since vLLM tells of its end then.
        """
        for live in self._live.values():
            if live.drafts is not None:
                live.drafts.remember_nothing()
        return self.namespaces.forget(text, namespace)

    def stats(self) -> dict[str, Any]:
        """Return what was drafted and accepted by source, what was refused, and what is kept."""
        return {
            "bound": self._runner is not None,
            "running": len(self._live),
            "sources": {
                name: {"drafted": source.drafted, "accepted": source.accepted}
                for name, source in self._sources.items()
            },
            "refused_requests": self._refused,
            "faults": self._faults,
            "memory": {} if self._namespaces is None else self._namespaces.sizes(),
        }

    def _propose(
        self, sampled: Sequence[Sequence[int]], ends: Tokens, tokens: Tokens
    ) -> list[list[int]]:
        runner = self._runner
        if runner is None:
            self._say("Nothing is drafted before collective_rpc('rasd_bind'); vLLM 0.33 calls it.")
            return [[] for _ in sampled]
        self._close_finished(runner)
        ids = runner.input_batch.req_ids
        return [
            self._row(runner, ids[row], tokens[row, : int(ends[row])]) if new else []
            for row, new in enumerate(sampled)
        ]

    def _close_finished(self, runner: Runner) -> None:
        """Remember the answers of requests that vLLM holds no more; one that is preempted it holds."""
        for request, live in [*self._live.items()]:
            if runner.requests.get(request) is not live.state:
                del self._live[request]
                if live.drafts is not None:
                    try:
                        live.drafts.close()
                    except Exception as error:  # noqa: BLE001 - as above
                        self._note_fault(error)

    def _row(self, runner: Runner, request: str, tokens: Tokens) -> list[int]:
        live = self._live.get(request)
        try:
            if live is None:
                state = runner.requests[request]
                live = self._live[request] = _Live(state, None)
                live.drafts, live.seen = self._started(state, tokens), state.num_prompt_tokens
            if live.drafts is None:
                return []
            new = tokens[live.seen :].tolist()
            live.drafts.observe(new)
            live.seen = len(tokens)
            draft = live.drafts.propose(min(self.most, self._room(live.state, len(tokens))))
            # The tokenizer may know ids that the model has no row for; vLLM does not look.
            return [*takewhile(lambda token: token < self._vocabulary, draft)]
        except Exception as error:  # noqa: BLE001 - as above
            self._note_fault(error)
            if live is not None:
                live.drafts = None
            return []

    def _started(self, state: Any, tokens: Tokens) -> RequestDrafts | None:
        """Return the drafts of a request; ``None`` if it wants none, is malformed, or its prompt has no ids."""
        try:
            asked = Asked.read(state.sampling_params.extra_args, self._vocabulary)
        except ConfigurationError as error:
            self._refused += 1
            self._say(f"A request gets no drafts: {error}")
            return None
        if asked.off or state.prompt_token_ids is None:
            return None
        space = self.namespaces.of(asked.namespace)
        prompt = tokens[: state.num_prompt_tokens].tolist()
        least = self.options.least_probability
        return RequestDrafts(prompt, asked.chunks, space, self._sources, least)

    def _room(self, state: Any, length: int) -> int:
        """Return how many drafted tokens could be of use: each step adds one more."""
        most = self._window - length
        if (wanted := state.sampling_params.max_tokens) is not None:
            most = min(most, wanted - (length - state.num_prompt_tokens))
        return max(most - 1, 0)

    def _note_fault(self, error: Exception) -> None:
        self._faults += 1
        self._say(f"A fault costs drafts, no answer: {type(error).__name__}: {error}")

    def _say(self, text: str) -> None:
        """Log a warning, each text once, and at most 32 of them."""
        if text not in self._said and len(self._said) < 32:
            self._said.add(text)
            logger.warning(text)
