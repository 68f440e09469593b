"""Steps in eager torch, on any device: the reference for other executors.

It runs a copy of the stock transformers module (``engine/module_copy.py``) with our attention
(``engine/attention.py``) and a cache object that keeps nothing, so every architecture written against
transformers' attention interface works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rasd_integrations.engine.attention import NAME, StepContext
from rasd_integrations.engine.executors.agreement import check_agreement, refusal
from rasd_integrations.engine.executors.base import Executor, StepOutput
from rasd_integrations.engine.kv.buffer import KVLayout
from rasd_integrations.engine.long_rope import always_long, long_rope_border
from rasd_integrations.engine.module_copy import Switches, shared_copy


class NoCache(Cache):
    """Passes a step's keys and values on to our attention, which reads the prefix."""

    def __init__(self) -> None:
        """Make a cache without layers."""
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given."""
        return 0


class EagerExecutor(Executor):
    """Runs a copy of the stock module over the same weights.

    Attributes:
        model: Its copy of the modules.
        device: Of a step's ids.
    """

    shares_weights = True

    def __init__(self, model: PreTrainedModel, *, checked: bool = True) -> None:
        """Copy ``model``'s modules and route the attention of the copy through ours.

        Args:
            model: It is not changed.
            checked: Compare steps with the model's own forward (:mod:`.agreement`).

        Raises:
            ConfigurationError: The architecture cannot run speculative steps.
        """
        self.model = own = shared_copy(model)
        if not own._can_set_attn_implementation():
            raise refusal(model, "its code does not use transformers' attention interface")
        own.set_attn_implementation(NAME)
        border = long_rope_border(model.config)
        self._long = own if border is None else always_long(own, border)
        self._switches = Switches(model, *{id(m): m for m in (own, self._long)}.values())
        self._cache = NoCache()
        self._cache_argument = cache_argument(own.base_model)
        self.device = input_device(model)
        # transformers passes a four-dimensional mask on as it is; ours is not read.
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        if checked:
            step = partial(EagerExecutor.step, self)  # not a subclass's
            layers = check_agreement(
                model, step, lambda small: EagerExecutor(small, checked=False).step
            )
            self.layout = KVLayout(layers, int(model.config.get_text_config().hidden_size))

    def step(self, ids: Tensor, context: StepContext, *, num_logits: int) -> StepOutput:
        """Run one forward of the stock module."""
        self._switches.follow()
        model = self._long if context.segments[0].buffer.long_rope else self.model
        body = model.base_model
        module: nn.Module = model if num_logits else body
        keep = {"logits_to_keep": num_logits} if num_logits else {}
        with outputs_of(body) as seen:
            out = module(
                input_ids=ids[None],
                position_ids=context.positions[None],
                attention_mask=self._mask,
                use_cache=True,
                rasd_step=context,
                **{self._cache_argument: self._cache},
                **keep,
            )
        hidden = seen[0].last_hidden_state[0]
        if not num_logits:
            return StepOutput(torch.empty(0, self._vocab_size), hidden)
        return StepOutput(out.logits[0, -num_logits:], hidden)


def cache_argument(module: nn.Module) -> str:
    """Return the name of the cache argument of ``module``'s forward.

    transformers takes the old name ``past_key_values`` until 5.40; a checkpoint's own code may keep it.
    """
    return "cache" if "cache" in signature(module.forward).parameters else "past_key_values"


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of a step's ids and logits.

    A multi-device model's hooks move each layer's inputs; offloaded parameters (on the meta device) are skipped.
    """
    places = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(places, torch.device("cpu"))


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """Collect the outputs of ``module`` inside the block."""
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def rows_at(n: int, row_multiple: int) -> int:
    """Return the width of a step of ``n`` tokens: the next ``1 + k * row_multiple``."""
    return 1 + row_multiple * -(-(n - 1) // row_multiple)
