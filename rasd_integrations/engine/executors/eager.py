"""Steps in eager torch, on any device: the reference for other executors.

It runs a copy of the stock transformers module (``engine/module_copy.py``) with our attention
(``engine/attention.py``) and a cache object that keeps no keys and values, so every architecture written against
transformers' attention interface works. Layers with a recurrent state find it there, as transformers keeps it.
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
from transformers.cache_utils import DynamicLayer

from rasd_integrations.engine.attention import NAME, Segment, StepContext
from rasd_integrations.engine.executors.agreement import Step, check_agreement, refusal
from rasd_integrations.engine.executors.base import Executor, StepOutput
from rasd_integrations.engine.kv.buffer import KVBuffer, KVLayout
from rasd_integrations.engine.kv.state import StateLayers, attending, copied, empty_states
from rasd_integrations.engine.long_rope import always_long, long_rope_border
from rasd_integrations.engine.module_copy import Switches, shared_copy
from rasd_integrations.errors import ConfigurationError

# Rows that a scan of states reads at once; it fills up the last chunk. A step of 5 rows of a Granite of 140M takes as
# long as two of one row, but as five with the model's own chunks of 256. A power of two, as kernels of a GPU ask.
_SHORT_CHUNK = 16
_FEW_ROWS = 64


class NoCache(Cache):
    """Passes a step's keys and values on to our attention, which reads the prefix."""

    def __init__(self, states: StateLayers | None = None, num_layers: int = 0) -> None:
        """Make a cache without layers, or of those that keep ``states``, which the step changes."""
        known = states or {}
        super().__init__(layers=[known.get(i, DynamicLayer()) for i in range(num_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the step's own length: the prefix is no matter of the mask."""
        return query_length, 0


class EagerExecutor(Executor):
    """Runs a copy of the stock module over the same weights.

    Attributes:
        model: Its copy of the modules.
        device: Of a step's ids.
    """

    shares_weights = True

    def __init__(
        self, model: PreTrainedModel, *, checked: bool = True, one_by_one: bool = False
    ) -> None:
        """Copy ``model``'s modules and route the attention of the copy through ours.

        Args:
            model: It is not changed.
            checked: Compare steps with the model's own forward (:mod:`.agreement`).
            one_by_one: Run the tokens of a step behind a recurrent state one after another.

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
        self._empty = empty_states(own.config)
        self._cache_argument = cache_argument(own.base_model)
        self.device = input_device(model)
        # transformers passes a four-dimensional mask on as it is; ours is not read. Without attention there is none.
        only_states = bool(self._empty) and not attending(own.config)
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self._mask = None if only_states else mask
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._one_by_one = one_by_one
        scans = own.modules() if self._empty else ()
        sizes = ((vars(module), vars(module).get("chunk_size")) for module in scans)
        self._scans = [(fields, size) for fields, size in sizes if isinstance(size, int)]
        if checked:
            seen = self._agreed(model)
            self.layout = KVLayout(
                seen.layers,
                int(model.config.get_text_config().hidden_size),
                state_nbytes=seen.snapshots.nbytes_each,
                one_by_one=self._one_by_one,
            )

    def _agreed(self, model: PreTrainedModel) -> KVBuffer:
        """Return what the comparisons left in a buffer; where only single tokens go on from states, take these."""
        step = partial(EagerExecutor.step, self)  # not a subclass's

        def step_of(small: PreTrainedModel) -> Step:
            return EagerExecutor(small, checked=False, one_by_one=self._one_by_one).step

        try:
            return check_agreement(model, step, step_of)
        except ConfigurationError:
            if not self._empty:
                raise
        self._one_by_one = True
        return check_agreement(model, step, step_of, in_one_piece=True)

    def step(self, ids: Tensor, context: StepContext, *, num_logits: int) -> StepOutput:
        """Run one forward of the stock module, or one of each token."""
        if self._one_by_one and len(ids) > 1 and context.segments[0].buffer.length:
            return self._steps(ids, context, num_logits)
        self._switches.follow()
        model = self._long if context.segments[0].buffer.long_rope else self.model
        body = model.base_model
        module: nn.Module = model if num_logits else body
        keep = {"logits_to_keep": num_logits} if num_logits else {}
        cache, states = self._cache, self._states_for(context)
        if states:
            cache = NoCache(states, self._num_layers)
        for fields, size in self._scans:
            fields["chunk_size"] = size if len(ids) > _FEW_ROWS else min(size, _SHORT_CHUNK)
        with outputs_of(body) as seen:
            out = module(
                input_ids=ids[None],
                position_ids=context.positions[None],
                attention_mask=self._mask,
                use_cache=True,
                rasd_step=context,
                **{self._cache_argument: cache},
                **keep,
            )
        hidden = seen[0].last_hidden_state[0]
        if states:
            buffer = context.segments[0].buffer
            buffer.snapshots.write(buffer.length, len(ids), states)
        if not num_logits:
            return StepOutput(torch.empty(0, self._vocab_size), hidden)
        return StepOutput(out.logits[0, -num_logits:], hidden)

    def _steps(self, ids: Tensor, context: StepContext, num_logits: int) -> StepOutput:
        """Run tokens one after another, in a view of the buffer that is committed one by one."""
        buffer = context.segments[0].buffer
        view = buffer.pinned(buffer.capacity)
        view.length, view.snapshots = buffer.length, buffer.snapshots.copy()
        rows = []
        for token, position in zip(ids.split(1), context.positions.split(1), strict=True):
            one = StepContext(position, (Segment(view, position, None),))
            rows.append(EagerExecutor.step(self, token, one, num_logits=1))
            view.commit(range(1))
        buffer.snapshots.write(buffer.length, len(ids), view.snapshots.at(view.length))
        logits = torch.cat([row.logits for row in rows])
        return StepOutput(logits[len(ids) - num_logits :], torch.cat([row.hidden for row in rows]))

    def _states_for(self, context: StepContext) -> StateLayers:
        """Return copies of the recurrent states that the step goes on from; empty without such layers."""
        if not self._empty:
            return {}
        if len(context.segments) > 1 or not context.segments[0].is_chain:
            msg = "Layers with a recurrent state run chains, one text at a time."
            raise ConfigurationError(msg)
        buffer = context.segments[0].buffer
        return copied(buffer.snapshots.at(buffer.length) if buffer.length else self._empty)


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
