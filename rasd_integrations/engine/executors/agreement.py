"""Whether our steps say what the stock module says: an architecture is right or refused, at load.

Two comparisons. The model itself runs a short text, ours against its own forward, in its own dtype: this sees that
every layer goes through our attention, and what somebody did to this object. A small model of its config
(:mod:`.shrinking`) runs a text over all windows, chunks and rope borders, against its own forward and cache, in
float32: one verdict for a class and config, kept for the process. Where no small model can be made of a config that
names a border, the model itself runs a text that crosses it (docs/adr/0016-a-family-is-right-or-refused.md).
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.executors.shrinking import BORDER, longest_border, small_model
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.module_copy import shared_copy
from rasd_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from rasd_integrations.engine.executors.eager import EagerExecutor

_SHORT = 16  # tokens of the model itself
_LONG = 3 * BORDER + 5
_STEP = 4  # rows of a decoding step
_PIECE = 512
_LONGEST = 8192  # tokens that the model itself is run on at most
# Most that the median row may be off, of the spread of its logits. What rounding alone does is below a hundredth of
# it in float32, and below a fifth in half precision; a wrong mask, angle or missing term is about 1.
_FAR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05}
_FAR_ELSE = 0.2
_CACHES = ("cache", "past_key_values")  # what outputs call it, before and after transformers 5.24
_STATES = ("linear", "mamba", "conv", "recurrent", "ssm")

_verdicts: dict[tuple[type, str], str | None] = {}
_deciding = threading.Lock()


def check_agreement(model: PreTrainedModel, executor: EagerExecutor) -> None:
    """Compare steps of ``executor`` with ``model``'s own forward.

    Raises:
        ConfigurationError: They differ, or one of them cannot be run; says why.
    """
    text = model.config.get_text_config()
    if not isinstance(getattr(text, "max_position_embeddings", None), int):
        raise refusal(
            model, "its config names no max_position_embeddings, so its window is not known"
        )
    try:
        reason = _difference(model, executor, _SHORT) or _verdict(model, executor)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as err:
        # The module's own code meets a cache and an attention that it may not know: it may raise anything.
        said = str(err).strip().splitlines() or [""]
        raise refusal(
            model,
            _known(model)
            or f"it does not run over our cache and attention ({type(err).__name__}: {said[0]})",
        ) from err
    if reason is not None:
        raise refusal(model, _known(model) or reason)


def comparison_text(length: int, vocab_size: int) -> Tensor:
    """Return the ids ``[length]`` that are read for the comparison, the same at every load."""
    return (7 + 97 * torch.arange(length)) % vocab_size


def refusal(model: PreTrainedModel, why: str) -> ConfigurationError:
    """Return the error that says why a model cannot be a target."""
    family = model.config.get_text_config().model_type
    msg = (
        f"{type(model).__name__} (model_type {family!r}) cannot run speculative steps: {why}. Use a model of another "
        f"family; docs/reference/families.md lists them."
    )
    return ConfigurationError(msg)


def _known(model: PreTrainedModel) -> str | None:
    """Return the reason that the config itself gives, if it does."""
    text = model.config.get_text_config()
    kinds = [str(kind) for kind in getattr(text, "layer_types", None) or ()]
    states = [kind for kind in dict.fromkeys(kinds) if any(state in kind for state in _STATES)]
    if states:
        return f"layers of type {states[0]!r} keep a state that is not keys and values"
    if getattr(type(model), "_is_stateful", False):
        return "some of its layers keep a state that is not keys and values (linear attention, state space)"
    return None


def _verdict(model: PreTrainedModel, executor: EagerExecutor) -> str | None:
    """Return what is wrong with a text over all borders, if anything; known once for a class and config."""
    config = model.config.to_dict()
    key = type(model), json.dumps(config, sort_keys=True, default=str)
    with _deciding:
        if key not in _verdicts:
            _verdicts[key] = _over_borders(model, executor)
        return _verdicts[key]


def _over_borders(model: PreTrainedModel, executor: EagerExecutor) -> str | None:
    try:
        small = small_model(model)
    except Exception as err:  # noqa: BLE001 - a config class may refuse numbers in any way
        border = longest_border(model.config)
        length = min(border + _SHORT, int(model.config.get_text_config().max_position_embeddings))
        if border == 0 or border >= length:
            return None  # the short text has shown all that there is
        if length > _LONGEST:
            return (
                f"steps across its border at {border} tokens cannot be compared with its own forward, since no small "
                f"model can be made of its config ({str(err).strip().splitlines()[0]})"
            )
        return _difference(model, executor, length)
    return _difference(small, type(executor)(small, checked=False), _LONG, thorough=True)


@torch.inference_mode()
def _difference(
    model: PreTrainedModel, executor: EagerExecutor, length: int, *, thorough: bool = False
) -> str | None:
    """Return how a text of ``length`` tokens differs, if it does.

    Args:
        model: The stock module.
        executor: Ours.
        length: A prompt, and :data:`_STEP` tokens behind it.
        thorough: Compare all rows, and let the stock module run the last ones one by one, as ``generate`` does.
    """
    text = model.config.get_text_config()
    ids = comparison_text(length, int(text.vocab_size)).to(executor.device)
    theirs = _own_rows(shared_copy(model), ids, thorough=thorough)
    layers, ours = _our_rows(executor, ids, thorough=thorough)
    if layers != int(text.num_hidden_layers):
        return (
            f"only {layers} of its {text.num_hidden_layers} layers attend over keys and values by transformers' "
            f"attention interface"
        )
    far = _FAR.get(model.dtype, _FAR_ELSE)
    spread = (theirs - theirs.mean(1, keepdim=True)).norm(dim=1)
    off = (ours - theirs).norm(dim=1) / spread
    # In half precision a router may send single rows to other experts.
    most = float(off.max() if far < _FAR_ELSE else off.median())
    if most <= far:
        return None
    return (
        f"over {length} tokens its logits are {most:.2g} of their spread off those of its own forward (at most "
        f"{far:.2g}), so it has a mask, window or term that it does not tell its attention function"
    )


def _own_rows(model: PreTrainedModel, ids: Tensor, *, thorough: bool) -> Tensor:
    """Return logits of the stock module: of the last :data:`_STEP` rows, or of all."""
    if not thorough:
        last: Tensor = model(input_ids=ids[None], use_cache=True, logits_to_keep=_STEP).logits
        return last[0, -_STEP:].float()
    prompt = len(ids) - _STEP
    out = model(input_ids=ids[None, :prompt], use_cache=True)
    rows = [out.logits[0]]
    for token in ids[prompt:]:
        name = next(name for name in _CACHES if getattr(out, name, None) is not None)
        out = model(input_ids=token[None, None], **{name: out[name]}, use_cache=True)
        rows.append(out.logits[0, -1:])
    return torch.cat(rows).float()


def _our_rows(executor: EagerExecutor, ids: Tensor, *, thorough: bool) -> tuple[int, Tensor]:
    """Return how many layers attended, and the same rows from a prefill in pieces, a chain and a tree."""
    prompt, buffer = len(ids) - _STEP, KVBuffer(len(ids))
    border = executor.long_rope_border
    buffer.long_rope = border is not None and prompt > border
    rows = []
    size = -(-prompt // 3) if thorough else _PIECE
    for start in range(0, prompt, size):
        piece = ids[start : min(start + size, prompt)]
        rows.append(_run(executor, piece, buffer, None, num_logits=len(piece) * thorough))
        buffer.commit(range(len(piece)))
    chain = _run(executor, ids[prompt:], buffer, None, num_logits=_STEP)
    if not thorough:
        return buffer.num_layers, chain.float()
    # A branch that the text does not take stands between the last token and the one that follows.
    order = torch.tensor([0, 0, 1, 2], device=ids.device)
    tree = _run(executor, ids[prompt:][order], buffer, order.tolist(), num_logits=_STEP)
    off_the_branch = tree[[0, 2, 3]]
    return buffer.num_layers, torch.cat([*rows, off_the_branch, chain[3:]]).float()


def _run(
    executor: EagerExecutor,
    ids: Tensor,
    buffer: KVBuffer,
    depths: list[int] | None,
    *,
    num_logits: int,
) -> Tensor:
    n = len(ids)
    places, mask = torch.arange(n), None
    if depths is not None:  # row 1 is beside the path that the others are on
        places = torch.tensor(depths)
        places[1] = 1
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        mask[2:, 1] = False
        mask = mask.to(ids.device)
    positions = (places + buffer.length).to(ids.device)
    context = StepContext(positions, (Segment(buffer, positions, mask),))
    return executor.step(ids, context, num_logits=num_logits).logits
