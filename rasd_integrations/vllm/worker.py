"""Methods that vLLM adds to its worker (``worker_extension_cls``), for ``collective_rpc``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rasd_integrations.config import check_value
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.vllm.proposer import Proposer

TESTED = "vLLM 0.32 (CPU); its contract is also that of 0.33"
# What is read of vLLM: attributes of attributes of the worker.
HOOKS = ("model_runner.requests", "model_runner.input_batch.req_ids", "model_config.max_model_len")


class WorkerExtension:
    """Connects the proposer to its worker; feeds, forgets and reports.

    Attributes:
        model_runner: The worker's.
        model_config: The worker's.
    """

    model_runner: Any
    model_config: Any

    def init_worker_extension(self) -> None:
        """Bind; vLLM 0.33 calls it when the device is ready."""
        self.rasd_bind()

    def rasd_bind(self) -> None:
        """Hand the proposer the runner, whose batch says which request a row is; harmless if done before.

        Raises:
            ConfigurationError: The proposer is another, or vLLM has no longer what is read of it.
        """
        proposer = _proposer(self)
        for path in HOOKS:
            _check_hook(self, path)
        from vllm.tokenizers import cached_tokenizer_from_config

        proposer.bind(self.model_runner, cached_tokenizer_from_config(self.model_config))

    def rasd_feed(self, texts: Sequence[str], namespace: str = "") -> int:
        """Draft from ``texts`` in all requests of a namespace; return how many are new.

        Raises:
            ConfigurationError: ``texts`` is no list of texts, or nothing is kept.
        """
        is_texts = isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts)
        check_value(is_texts, "texts", str(texts)[:80], "a list of texts")
        space = _proposer(self).namespaces.of(namespace)
        if space is None:
            msg = (
                "memory_tokens is 0, so texts are not kept. Raise it in additional_config['rasd']."
            )
            raise ConfigurationError(msg)
        return space.texts.add(texts)

    def rasd_forget(self, text: str | None = None, namespace: str | None = None) -> int:
        """Forget a text and each answer that holds it, or all of a namespace; return how many texts and answers.

        Answers that run are not remembered.

        Args:
            text: ``None`` forgets all.
            namespace: ``None`` is every one.
        """
        return _proposer(self).forget(text, namespace)

    def rasd_stats(self) -> dict[str, Any]:
        """Return what was drafted and accepted since the start, and what is kept."""
        return _proposer(self).stats()


def _proposer(worker: WorkerExtension) -> Proposer:
    drafter = getattr(getattr(worker, "model_runner", None), "drafter", None)
    if not isinstance(drafter, Proposer):
        msg = (
            f"vLLM's proposer is {type(drafter).__name__}, but must be Proposer. Start with speculative_config="
            f"{{'method': 'custom_class', 'model': 'rasd_integrations.vllm.Proposer', 'num_speculative_tokens': 8}}."
        )
        raise ConfigurationError(msg)
    return drafter


def _check_hook(worker: Any, path: str) -> None:
    found = worker
    for name in path.split("."):
        if not hasattr(found, name):
            msg = (
                f"vLLM's worker has no {path}, which drafts need: its contract has changed. Use a tested version: "
                f"{TESTED}."
            )
            raise ConfigurationError(msg)
        found = getattr(found, name)
