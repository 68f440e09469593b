"""A checkpoint's ``generation_config``: sampling options, masks and penalties."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from transformers import (
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from rasd_integrations.config import Sampling
from rasd_integrations.errors import ConfigurationError

logger = logging.getLogger(__name__)

_SAME_NAME = ("top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size")
_TOP_K_OF_GENERATE = 50  # transformers' default if a checkpoint samples without top_k
_MASKS = (
    "sequence_bias", "bad_words_ids", "min_length", "min_new_tokens",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
# Values that do not change an answer.
_OFF: Mapping[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1, "num_beam_groups": 1,
    "num_return_sequences": 1, "guidance_scale": 1, "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0, "penalty_alpha": 0.0, "token_healing": False,
}  # fmt: skip
_OF_DRAWS = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
_CHANGES_THE_ANSWER = (
    *_OFF, "forced_bos_token_id", "forced_eos_token_id", "top_h", "watermarking_config", "dola_layers",
    "constraints", "force_words_ids", "max_time", "max_length",
)  # fmt: skip

_reported: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def checkpoint_sampling(model: PreTrainedModel) -> dict[str, Any]:
    """Return :func:`sampling_of` a model's checkpoint.

    The first call for a model logs what changes its answers, and warns of options that are not followed.
    """
    config = getattr(model, "generation_config", None)
    found = sampling_of(config)
    if config is not None and model not in _reported:
        _reported.add(model)
        _report(config, found, getattr(model, "name_or_path", "") or type(model).__name__)
    return found


def sampling_of(config: GenerationConfig | None) -> dict[str, Any]:
    """Return the options that ``config`` sets, by their names in `SamplingParams`."""
    found: dict[str, Any] = {name: getattr(config, name, None) for name in _SAME_NAME}
    found["max_tokens"] = getattr(config, "max_new_tokens", None)
    stops = getattr(config, "stop_strings", None)
    found["stop"] = (stops,) if isinstance(stops, str) else stops
    if getattr(config, "do_sample", None):
        given = getattr(config, "temperature", None)
        found["temperature"] = 1.0 if given is None else given
        if found["top_k"] is None:
            found["top_k"] = _TOP_K_OF_GENERATE
    return {name: value for name, value in found.items() if value is not None}


def logits_processors(
    model: PreTrainedModel, sampling: Sampling, prompt_length: int, eos_ids: Collection[int]
) -> LogitsProcessorList:
    """Return the processors of one answer, in the order of ``generate``; empty if it needs none.

    Raises:
        ConfigurationError: transformers refuses a value of the checkpoint.
    """
    config = getattr(model, "generation_config", None) if sampling.use_generation_config else None
    asked: dict[str, Any] = {name: getattr(config, name, None) for name in _MASKS}
    asked["repetition_penalty"] = float(sampling.repetition_penalty)
    asked["no_repeat_ngram_size"] = sampling.no_repeat_ngram_size
    ends, device = sorted(eos_ids), str(model.device)
    makers: dict[str, Callable[[Any], Any]] = {  # in the order of `generate`
        "sequence_bias": SequenceBiasLogitsProcessor,
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, ends),
        "min_length": lambda least: MinLengthLogitsProcessor(least, ends, device),
        "min_new_tokens": lambda least: MinNewTokensLengthLogitsProcessor(
            prompt_length, least, ends, device
        ),
        "remove_invalid_values": lambda _: InfNanRemoveLogitsProcessor(),
        "exponential_decay_length_penalty": lambda decay: ExponentialDecayLengthPenalty(
            tuple(decay), ends, prompt_length
        ),
        "suppress_tokens": lambda tokens: SuppressTokensLogitsProcessor(tokens, device),
        "begin_suppress_tokens": lambda tokens: SuppressTokensAtBeginLogitsProcessor(
            tokens, prompt_length, device
        ),
    }
    needs_end = () if ends else ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
    found = LogitsProcessorList()
    try:
        for name, make in makers.items():
            value = asked[name]
            if (
                value
                and name not in needs_end
                and not (name == "repetition_penalty" and value == 1)
            ):
                found.append(make(value))
        if found:  # some check their arguments at the first row only
            vocab = int(model.config.get_text_config().vocab_size)
            ids = cast("torch.LongTensor", torch.zeros(1, 1, dtype=torch.int64, device=device))
            found(ids, cast("torch.FloatTensor", torch.zeros(1, vocab, device=device)))
    except (ValueError, TypeError, IndexError, RuntimeError) as err:
        msg = (
            f"The checkpoint's generation_config cannot be followed: {err} Correct it, or pass it over with "
            f"use_generation_config=False."
        )
        raise ConfigurationError(msg) from err
    return found


def _report(config: GenerationConfig, sampling: Mapping[str, Any], name: str) -> None:
    asked = {**sampling, **{n: value for n in _MASKS if (value := getattr(config, n, None))}}
    if asked:
        told = ", ".join(f"{option}={value!r}" for option, value in asked.items())
        logger.info(
            "generation_config of %s is followed where a call sets nothing else: %s", name, told
        )
    draws = getattr(config, "do_sample", None)
    left_out = [
        f"{option}={value!r}"
        for option in _CHANGES_THE_ANSWER
        if (draws or option not in _OF_DRAWS)
        and (value := getattr(config, option, None)) is not None
        and value != _OFF.get(option)
    ]
    if left_out:
        logger.warning(
            "generation_config of %s sets what is not followed here: %s. Answers may differ from those of "
            "model.generate().",
            name, ", ".join(left_out),
        )  # fmt: skip
