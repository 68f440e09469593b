"""Ours as a pipeline uses it: over its store, with grammars and tools."""

from __future__ import annotations

from typing import Any

from answers import Answer, Recorder, peak_mib
from engines import Ours

from rasd_integrations import Grammar, SamplingParams
from rasd_integrations.response_format import ToolUse
from rasd_integrations.runtime.pipeline import joined


class Pipeline(Ours):
    """:class:`rasd_integrations.RASD` with default options, except those under comparison.

    Attributes:
        reply: Text and tool calls of the last answer.
        store_mib: What opening the store took.
    """

    follows_schemas = True

    def __init__(self, job: dict[str, Any], *, store: bool = False, **options: Any) -> None:
        """Open the store, if wanted, and load the weights."""
        before = peak_mib()
        if store:
            from pipelines_work import open_store

            options["store"] = open_store(job["store"])
        self.store_mib = peak_mib() - before
        if job["dtype"] == "float32":
            options["executor"] = "eager"
        super().__init__(job, **options)
        self.reply: dict[str, Any] = {}

    def answer(self, prompt: dict[str, Any], max_tokens: int) -> Answer:
        """Decode with ``stream``."""
        tools, schema = prompt.get("tools"), prompt.get("schema")
        use = ToolUse(tools=tuple(tools), choice="required", parallel=False) if tools else None
        grammar = Grammar.json_schema(schema) if schema and not tools else None
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=self.ignore_eos, grammar=grammar
        )
        recorder, pieces = Recorder(), []
        for piece in self.rasd.stream(prompt["messages"], params, tools=use):
            recorder.add(piece.token_ids)
            pieces.append(piece)
        whole = joined(pieces)
        stats = whole.stats
        if stats.prompt_tokens != len(prompt["ids"]):
            msg = f"Our prompt has {stats.prompt_tokens} tokens, theirs {len(prompt['ids'])}."
            raise RuntimeError(msg)
        calls = [(call.name, call.arguments) for call in whole.tool_calls]
        self.reply = {"text": whole.text, "calls": calls}
        told = stats.as_dict() | {"quotes": len(stats.quotes)}
        cached = stats.cached_prompt_tokens
        return recorder.answer(stats.prompt_tokens, cached, stats.target_steps, told)
