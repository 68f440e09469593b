"""vLLM's worker as the proposer sees it: a batch of rows, and a target that says what it is told to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from rasd_integrations.vllm import Proposer, WorkerExtension

VOCABULARY, WINDOW, DRAFT = 1000, 400, 4


class Letters:
    """A tokenizer: each character is its code, but for what the model has no row for."""

    def convert_ids_to_tokens(self) -> None: ...

    def __call__(self, text: Any, **_: Any) -> Any:
        if isinstance(text, str):
            return {"input_ids": [ord(c) for c in text]}
        return {"input_ids": [[ord(c) for c in t] for t in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


def config(options: Any = None, draft: int = DRAFT) -> Any:
    return SimpleNamespace(
        additional_config={} if options is None else {"rasd": options},
        speculative_config=SimpleNamespace(num_speculative_tokens=draft),
        model_config=SimpleNamespace(max_model_len=WINDOW, get_vocab_size=lambda: VOCABULARY),
    )


class Worker(WorkerExtension):
    """Runs requests; each step verifies the last drafts as a greedy target does.

    Attributes:
        drafts: Of the last step, by request.
    """

    def __init__(self, options: Any = None, draft: int = DRAFT) -> None:
        self.model_config = config(options, draft).model_config
        self.proposer = Proposer(config(options, draft))
        batch = SimpleNamespace(req_ids=[])
        self.model_runner = SimpleNamespace(
            requests={}, input_batch=batch, drafter=self.proposer, row=np.zeros(0)
        )
        self.proposer.bind(self.model_runner, Letters())
        self.answers: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}

    def add(self, name: str, prompt: str, answer: str, **extra: Any) -> None:
        """Start a request that will be answered so."""
        self.model_runner.requests[name] = SimpleNamespace(
            prompt_token_ids=ids(prompt),
            num_prompt_tokens=len(prompt),
            output_token_ids=[],
            sampling_params=SimpleNamespace(extra_args=extra or None, max_tokens=len(answer)),
        )
        self.model_runner.input_batch.req_ids.append(name)
        self.answers[name] = ids(answer)

    def step(self) -> None:
        """Commit the right part of each draft and one token more; ask for new drafts."""
        names = self.model_runner.input_batch.req_ids
        tokens = np.zeros((8, WINDOW), np.int32)
        ends, sampled = np.zeros(8, np.int32), []
        for row, name in enumerate(names):
            state = self.model_runner.requests[name]
            left = self.answers[name][len(state.output_token_ids) :]
            draft = self.drafts.get(name, [])
            right = next((i for i, t in enumerate(draft) if t != left[i]), len(draft))
            sampled.append(left[: right + 1])
            state.output_token_ids += sampled[-1]
            text = [*state.prompt_token_ids, *state.output_token_ids]
            tokens[row, : len(text)], ends[row] = text, len(text)
        drafts = self.proposer.propose(sampled, ends, tokens, slot_mappings=None)
        self.drafts = dict(zip(names, drafts, strict=True))

    def finish(self, name: str) -> None:
        """Take a request out, as vLLM does at the start of a step."""
        self.model_runner.requests.pop(name)
        self.model_runner.input_batch.req_ids.remove(name)
        self.drafts.pop(name, None)

    def run(self, name: str, prompt: str, answer: str, **extra: Any) -> int:
        """Answer one request; return in how many steps."""
        self.add(name, prompt, answer, **extra)
        state, steps = self.model_runner.requests[name], 0
        while len(state.output_token_ids) < len(answer):
            self.step()
            steps += 1
        assert state.output_token_ids == ids(answer)
        self.finish(name)
        return steps
