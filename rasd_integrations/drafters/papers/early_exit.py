"""LITE: the target's first layers draft through its own last norm and output layer (arXiv 2310.18581).

The layers are the target's, so they read its keys and values: no prefill, no copy. The verifying step runs the first
layers again. Continuing from the drafted states would enter the stock module in the middle, with rows made one at a
time: other roundings than the plain step's, so greedy ids could change, and no trees or batches. It would save the
first layers' share of one step, whose weights are read once for all its rows.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from rasd_integrations.config import check_value
from rasd_integrations.drafters.base import Drafter, Helper
from rasd_integrations.drafters.chain import ChainSession
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.module_copy import shared_copy
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock


class EarlyExitDrafter(Drafter):
    """Drafts chains with the first layers of the target.

    Models that were not trained to exit early agree little with their own first layers
    (docs/explanation/experiments.md).
    """

    name = "early_exit"

    def __init__(self, layers: int, *, confidence: float = 0.1) -> None:
        """Stop after the first ``layers``.

        Args:
            layers: At least 1, and fewer than the target has (checked when an answer starts).
            confidence: A drafted token less likely than this, 0 to 1, ends the draft and stays in it.

        Raises:
            ConfigurationError: A value out of its range.
        """
        check_value(layers >= 1, "layers", layers, "at least 1")
        check_value(0 <= confidence <= 1, "confidence", confidence, "in 0..1")
        self.layers = layers
        self.confidence = confidence
        self._models: WeakKeyDictionary[TargetModel, TargetModel] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def start(self, context: DraftContext, helper: Helper | None = None) -> EarlyExitSession:
        """Start an answer; ``helper`` drafts for this drafter."""
        return EarlyExitSession(self, context, helper)

    def first_layers(self, target: TargetModel) -> TargetModel:
        """Return the model that stops early, made once per target; it shares all weights.

        Raises:
            ConfigurationError: The target has too few layers, or no list of them.
        """
        with self._lock:
            if target not in self._models:
                self._models[target] = TargetModel(shallow(target.model, self.layers))
            return self._models[target]


class EarlyExitSession(ChainSession):
    """State of one answer: the target's own buffer."""

    def __init__(
        self, drafter: EarlyExitDrafter, context: DraftContext, helper: Helper | None
    ) -> None:
        """Made by :meth:`EarlyExitDrafter.start`."""
        super().__init__(drafter.name, context, drafter.confidence, helper)
        self._drafter = drafter
        self._last = context.prompt_ids[-1]
        self._live: KVBuffer | None = None

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Receive the model and its keys and values.

        Raises:
            ConfigurationError: As :meth:`EarlyExitDrafter.first_layers`, or the keys and values are in 8 bits, or
                layers keep recurrent states.
        """
        target.check_stateless("Early exit")
        if target.layout.in_8_bits:
            msg = (
                "Early exit runs the target's first layers eagerly, which cannot read keys and values in 8 bits. "
                "Use executor='openvino', or another drafter."
            )
            raise ConfigurationError(msg)
        self._model, self._live = self._drafter.first_layers(target), buffer

    @torch.inference_mode()
    def propose(self, budget: int) -> Draft:
        """Return a chain of at most ``budget`` tokens; the verifying step overwrites its keys and values."""
        if self._live is None:
            return self._fallback(budget)
        self._live.reserve(budget + 1)
        rows = self._live.pinned(self._live.capacity)
        rows.length = self._live.length
        return self._chain(rows, [self._last], budget)

    def observe(self, block: TokenBlock) -> None:
        """Advance over what the target committed."""
        self._last = block.token_ids[-1]
        super().observe(block)

    def close(self) -> None:
        """Release the target's buffer."""
        self._live = None
        super().close()


def shallow(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return a copy of ``model`` with its first ``layers`` only, over the same weights.

    Raises:
        ConfigurationError: It has no more layers than that, or no list of them.
    """
    body = model.base_model
    total = int(model.config.get_text_config().num_hidden_layers)
    if layers >= total:
        msg = f"layers is {layers}, but the target has {total}. Stop after fewer."
        raise ConfigurationError(msg)
    names = [
        name
        for name, part in body.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == total
    ]
    prefix = model.base_model_prefix
    if len(names) != 1 or getattr(model, prefix, None) is not body:
        msg = (
            f"{type(model).__name__} does not keep its {total} layers in one list of {type(body).__name__}, "
            f"so it cannot stop early. Use another drafter."
        )
        raise ConfigurationError(msg)
    new = shared_copy(model)
    text = new.config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    stack = getattr(new.base_model, names[0])
    setattr(new.base_model, names[0], nn.ModuleList(list(stack)[:layers]))
    return new
