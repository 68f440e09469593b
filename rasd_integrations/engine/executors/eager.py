"""Steps in eager torch, on any device: the reference for other executors.

It runs a copy of the stock transformers module (``engine/module_copy.py``) with our attention
(``engine/attention.py``) and a cache object that keeps nothing, so every architecture written against
transformers' attention interface works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rasd_integrations.engine.attention import NAME, Segment, StepContext
from rasd_integrations.engine.executors.agreement import check_agreement, refusal
from rasd_integrations.engine.executors.base import Executor, StepOutput
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.long_rope import always_long, long_rope_border
from rasd_integrations.engine.module_copy import Switches, shared_copy
from rasd_integrations.errors import ConfigurationError


class NoCache(Cache):
    """A cache that passes a step's keys and values on to the attention, which knows the prefix."""

    def __init__(self) -> None:
        """Hold no layer."""
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what came."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given."""
        return 0


class EagerExecutor(Executor):
    """Runs a copy of the stock module over the same weights.

    Attributes:
        model: The modules that it runs, of its own, over the weights of the model it was given.
        device: Where ids of a step belong.
        long_rope_border: See :func:`~rasd_integrations.engine.long_rope.long_rope_border`.
    """

    shares_weights = True

    def __init__(self, model: PreTrainedModel, *, checked: bool = True) -> None:
        """Copy ``model``'s modules, over the same weights, and route the attention of the copy through ours.

        Args:
            model: On any device, of any dtype; it is not changed.
            checked: Compare steps with the model's own forward (:mod:`.agreement`).

        Raises:
            ConfigurationError: The architecture cannot take an attention function, or not in the way that steps need.
        """
        self.model = own = shared_copy(model)
        if not own._can_set_attn_implementation():
            raise refusal(model, "its code does not use transformers' attention interface")
        own.set_attn_implementation(NAME)
        self.long_rope_border = border = long_rope_border(model.config)
        self._long = own if border is None else always_long(own, border)
        self._switches = Switches(model, *{id(m): m for m in (own, self._long)}.values())
        self._cache = NoCache()
        self._cache_argument = cache_argument(own.base_model)
        self.device = input_device(model)
        # Masks that are already four-dimensional pass through transformers untouched; ours is unread.
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        if checked:
            check_agreement(model, EagerExecutor(model, checked=False))  # not a subclass's step

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
    """Return the name under which ``module``'s forward takes its cache.

    transformers renamed ``past_key_values`` to ``cache`` in 5.24 or before and takes the old name until 5.40; code of
    a checkpoint's own may still have it.
    """
    return "cache" if "cache" in signature(module.forward).parameters else "past_key_values"


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a step's ids belong, and where its logits come back to.

    Hooks of a model over several devices move what each layer reads; offloaded weights stand nowhere.
    """
    places = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(places, torch.device("cpu"))


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what ``module`` returns inside the block."""
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def check_attention(executor: Executor, num_layers: int, device: torch.device) -> int:
    """Run two tokens and see that every layer went through our attention.

    Returns:
        Bytes of the keys and values of one token.

    Raises:
        ConfigurationError: Some layer keeps a state that is not keys and values.
    """
    buffer = KVBuffer(2)
    positions = torch.arange(2, device=device)
    executor.step(
        torch.zeros(2, dtype=torch.long, device=device),
        StepContext(positions, (Segment(buffer, positions, None),)),
        num_logits=0,
    )
    seen = buffer.num_layers
    if seen != num_layers:
        msg = (
            f"Only {seen} of the model's {num_layers} layers attend over keys and values; layers with another "
            f"state (linear attention, state space) cannot verify drafts. Use a model with attention in every layer."
        )
        raise ConfigurationError(msg)
    return buffer.row_nbytes


def rows_at(n: int, row_multiple: int) -> int:
    """Return the width of a step of ``n`` tokens: the next ``1 + k * row_multiple``."""
    return 1 + row_multiple * -(-(n - 1) // row_multiple)
