"""Compares our steps with the stock module's own at load: an architecture is right or refused.

Two comparisons. The model itself runs a short text in its own dtype: this sees that every layer goes through our
attention, and changes made to this object. A small model of its config (:mod:`.shrinking`) runs a text over all
windows, chunks and rope borders, against its own forward and cache, in float32: one verdict for each class and config,
remembered in the process. If no small model can be made of a config that names a border, the model itself runs a text
that crosses it (docs/adr/0016-a-family-is-right-or-refused.md).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.executors.base import StepOutput
from rasd_integrations.engine.executors.shrinking import BORDER, longest_border, small_model
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.state import attending
from rasd_integrations.engine.long_rope import long_rope_border
from rasd_integrations.engine.module_copy import shared_copy
from rasd_integrations.errors import ConfigurationError

Step = Callable[..., StepOutput]
"""The eager executor's :meth:`~rasd_integrations.engine.executors.base.Executor.step`."""

_STEP = 4  # tokens of a decoding step; the model itself runs one behind a prefix of as many
_LONG = 3 * BORDER + 5
_PIECE = 512
_LONGEST = 8192  # most tokens that the model itself is run on
# Largest error of the median row, in units of the spread of its logits. Rounding alone is below a hundredth of it in
# float32, and below a fifth in half precision; a wrong mask, angle or missing term is about 1.
_FAR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05}
_FAR_ELSE = 0.2
_CACHES = ("cache", "past_key_values")  # names in outputs, from transformers 5.24 and before
_STATES = ("linear", "mamba", "conv", "recurrent", "ssm")

_verdicts: dict[tuple[type, bool, str], str | None] = {}
_deciding = threading.Lock()


def check_agreement(
    model: PreTrainedModel,
    step: Step,
    step_of: Callable[[PreTrainedModel], Step],
    *,
    in_one_piece: bool = False,
) -> KVBuffer:
    """Compare ``step`` with ``model``'s own forward.

    Args:
        model: The stock module.
        step: Ours.
        step_of: Makes the step of another model.
        in_one_piece: Prompts are read so, and tokens behind them one by one.

    Returns:
        Keys, values and states of a short text.

    Raises:
        ConfigurationError: They differ, or one of them cannot be run; says why.
    """
    text = model.config.get_text_config()
    if not isinstance(getattr(text, "max_position_embeddings", None), int):
        raise refusal(
            model,
            "its config names no max_position_embeddings, so its window is not known (add the field to its config)",
        )
    try:
        reason, buffer = _difference(model, step, 2 * _STEP, in_one_piece=in_one_piece)
        reason = reason or _verdict(model, step, step_of, in_one_piece=in_one_piece)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as err:
        # The model's own code may raise anything over a cache and an attention that it does not know.
        said = str(err).strip().splitlines() or [""]
        raise refusal(
            model,
            _known(model)
            or f"it does not run over our cache and attention ({type(err).__name__}: {said[0]})",
        ) from err
    if reason is not None:
        raise refusal(model, _known(model) or reason)
    return buffer


def comparison_text(length: int, vocab_size: int) -> Tensor:
    """Return the ids ``[length]`` of the comparison, the same at every load."""
    return (7 + 97 * torch.arange(length)) % vocab_size


def refusal(model: PreTrainedModel, why: str) -> ConfigurationError:
    """Return the error for a model that cannot be a target."""
    family = model.config.get_text_config().model_type
    msg = (
        f"{type(model).__name__} (model_type {family!r}) cannot run speculative steps: {why}. Use a model of another "
        f"family; docs/reference/families.md lists them."
    )
    return ConfigurationError(msg)


def _known(model: PreTrainedModel) -> str | None:
    """Return the reason that the config itself shows, if any."""
    text = model.config.get_text_config()
    kinds = [str(kind) for kind in getattr(text, "layer_types", None) or ()]
    states = [kind for kind in dict.fromkeys(kinds) if any(state in kind for state in _STATES)]
    if states:
        return f"layers of type {states[0]!r} keep a state that steps cannot go on from"
    if getattr(type(model), "_is_stateful", False):
        return "some of its layers keep a state that steps cannot go on from"
    return None


def _verdict(
    model: PreTrainedModel,
    step: Step,
    step_of: Callable[[PreTrainedModel], Step],
    *,
    in_one_piece: bool,
) -> str | None:
    """Return how a text over all borders differs, if it does; computed once for each class and config."""
    said = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    key = type(model), in_one_piece, said
    with _deciding:
        if key not in _verdicts:
            _verdicts[key] = _over_borders(model, step, step_of, in_one_piece=in_one_piece)
        return _verdicts[key]


def _over_borders(
    model: PreTrainedModel,
    step: Step,
    step_of: Callable[[PreTrainedModel], Step],
    *,
    in_one_piece: bool,
) -> str | None:
    try:
        small = small_model(model)
        theirs = _own_rows(small, _text(small, _LONG), thorough=True)
    except Exception as err:  # noqa: BLE001 - a config class may refuse numbers in any way
        border = longest_border(model.config)
        length = min(border + _STEP, int(model.config.get_text_config().max_position_embeddings))
        if border == 0 or border >= length:
            return None  # the model's own short text has shown all that there is
        if length > _LONGEST:
            return (
                f"steps across its border at {border} tokens cannot be compared with its own forward, since no small "
                f"model can be made of its config ({str(err).strip().splitlines()[0]})"
            )
        return _difference(model, step, length, in_one_piece=in_one_piece)[0]
    return _difference(small, step_of(small), _LONG, theirs, in_one_piece=in_one_piece)[0]


@torch.inference_mode()
def _difference(
    model: PreTrainedModel,
    step: Step,
    length: int,
    theirs: Tensor | None = None,
    *,
    in_one_piece: bool = False,
) -> tuple[str | None, KVBuffer]:
    """Return how a text of ``length`` tokens differs, if it does, and our keys and values.

    Args:
        model: The stock module.
        step: Ours.
        length: A prompt, and :data:`_STEP` tokens behind it.
        theirs: The stock module's logits of all tokens, the last ones run one by one, as ``generate`` does. Without
            them only the last ones are compared, unless prompts are read in one piece.
        in_one_piece: See :func:`check_agreement`.
    """
    text = model.config.get_text_config()
    ids, thorough = _text(model, length), in_one_piece or theirs is not None
    buffer, border = KVBuffer(length), long_rope_border(model.config)
    buffer.long_rope = border is not None and length - _STEP > border
    if theirs is None:
        theirs = _own_rows(shared_copy(model), ids, thorough=thorough)
    pieces = 1 if in_one_piece else 3
    ours = _our_rows(step, ids, buffer, thorough=thorough, pieces=pieces)
    layers = range(int(text.num_hidden_layers))
    wanted = attending(model.config) if buffer.snapshots else {*layers}
    if not wanted <= buffer.attending:
        return (
            f"only {len(wanted & buffer.attending)} of its {len(wanted)} layers attend over keys and values by "
            f"transformers' attention interface"
        ), buffer
    far = _FAR.get(model.dtype, _FAR_ELSE)
    spread = (theirs - theirs.mean(1, keepdim=True)).norm(dim=1)
    off = (ours - theirs).norm(dim=1) / spread
    # In half precision a router may send single rows to other experts.
    most = float(off.max() if far < _FAR_ELSE else off.median())
    if most <= far:
        return None, buffer
    return (
        f"over {length} tokens its logits are {most:.2g} of their spread off those of its own forward (at most "
        f"{far:.2g}), so it has a mask, window or term that it does not tell its attention function, or a state that "
        f"it does not go on from"
    ), buffer


def _text(model: PreTrainedModel, length: int) -> Tensor:
    device = next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))
    return comparison_text(length, int(model.config.get_text_config().vocab_size)).to(device)


@torch.inference_mode()
def _own_rows(model: PreTrainedModel, ids: Tensor, *, thorough: bool) -> Tensor:
    """Return logits of the stock module: of the last :data:`_STEP` tokens, or of all."""
    if not thorough:
        last: Tensor = model(input_ids=ids[None], use_cache=True, logits_to_keep=_STEP).logits
        return last[0, -_STEP:].float()
    prompt = len(ids) - _STEP
    out = model(input_ids=ids[None, :prompt], use_cache=True)
    rows = [out.logits[0]]
    places = "position_ids" in signature(model.forward).parameters  # generate gives them, too
    for position, token in enumerate(ids[prompt:], start=prompt):
        name = next(name for name in _CACHES if getattr(out, name, None) is not None)
        known = {name: out[name]}
        if places:
            known["position_ids"] = torch.full((1, 1), position, device=ids.device)
        out = model(input_ids=token[None, None], **known, use_cache=True)
        rows.append(out.logits[0, -1:])
    return torch.cat(rows).float()


def _our_rows(
    step: Step, ids: Tensor, buffer: KVBuffer, *, thorough: bool, pieces: int = 3
) -> Tensor:
    """Return the same logits from a prefill in pieces, a chain and, if ``thorough``, a tree.

    Where states are kept, from a step of one token and another chain in the place of the tree: both go on from
    where the first chain did.
    """
    prompt, rows = len(ids) - _STEP, []
    size = -(-prompt // pieces) if thorough else _PIECE
    for start in range(0, prompt, size):
        piece = ids[start : min(start + size, prompt)]
        rows.append(_run(step, piece, buffer, num_logits=len(piece) * thorough))
        buffer.commit(range(len(piece)))
    chain = _run(step, ids[prompt:], buffer, num_logits=_STEP)
    if not thorough:
        return chain.float()
    if buffer.snapshots:
        rows.append(_run(step, ids[prompt : prompt + 1], buffer, num_logits=1))
        buffer.commit(range(1))
        rest = _run(step, ids[prompt + 1 :], buffer, num_logits=_STEP - 1)
        return torch.cat([*rows, chain[1:2], rest[1:]]).float()
    # Row 1 of the tree is a branch that the text does not take.
    order = torch.tensor([0, 0, 1, 2], device=ids.device)
    mask = torch.ones(_STEP, _STEP, dtype=torch.bool).tril()
    mask[2:, 1] = False
    depths = torch.tensor([0, 1, 1, 2])
    tree = _run(step, ids[prompt:][order], buffer, num_logits=_STEP, depths=depths, mask=mask)
    return torch.cat([*rows, tree[[0, 2, 3]], chain[3:]]).float()


def _run(
    step: Step,
    ids: Tensor,
    buffer: KVBuffer,
    *,
    num_logits: int,
    depths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    positions = (torch.arange(len(ids)) if depths is None else depths) + buffer.length
    positions = positions.to(ids.device)
    segment = Segment(buffer, positions, None if mask is None else mask.to(ids.device))
    return step(ids, StepContext(positions, (segment,)), num_logits=num_logits).logits
