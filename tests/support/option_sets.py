"""Random option sets, good and bad: of a constructor and of one call, by a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rasd_integrations.errors import RASDError

GOOD: Mapping[str, list[Any]] = {
    "temperature": [0, 0.0, 0.7, None],
    "top_p": [1.0, 0.5, None],
    "top_k": [0, 5, None],
    "max_tokens": [1, 4, 8],
    "stop": [None, "x", ["x", "yz"], []],
    "seed": [None, 0, 7],
    "logprobs": [None, True],
}
OF_ENGINE: Mapping[str, list[Any]] = {
    "drafter": ["auto", None, "self"],
    "context": ["prompt", "documents"],
    "store": [None, ["one text", "another text"]],
    "knowledge_transfer": [None, "none", "cautious", "rapid:5"],
    "chat_template_kwargs": [{}, {"enable_thinking": False}],
    "num_draft_tokens": [None, 3],
    "retrieval": [{}, {"k": 3}],
    "speculation": [{}, {"max_draft_tokens": 4}],
    "prefix_cache_bytes": [None, 0, 1 << 20],
    "namespace": ["", "tenant"],
    "memory": [True, False],
    "executor": ["auto", "eager"],
}
OF_CALL: Mapping[str, list[Any]] = {
    "drafter": [None],
    "knowledge_transfer": [None, "none", "mixture"],
    "response_format": [None, {"type": "text"}],
    "tools": [None, []],
    "top_logprobs": [None, 0],
    "rasd": [None, {"question": "Who?"}, {"chunks": ["one text"]}],
}
BAD: list[Any] = [
    None, True, -1, 0.5, 10**9, math.nan, math.inf, "", "hot", "\ud800", b"x", [], [1], [None], {}, {"a": 1}, {1: 2},
    object(), lambda text: text, int, (1, 2), {"type": "json_schema"}, [{"type": "function"}],
]  # fmt: skip
STRANGE = [
    "device", "context_window", "generate_kwargs", "model_name", "n_ctx", "temprature", "tokenizer_name", "api_base",
    "max_length", "do_sample", "callbak", "a b", "self_", "kwargs", "_loaded", "_rasd", "rasd_", "loaded_model",
]  # fmt: skip


def option_set(seed: int, names: Mapping[str, list[Any]]) -> tuple[dict[str, Any], bool]:
    """Return options, and whether each has a good name and a good value."""
    draw = random.Random(seed)
    options = {}
    good = True
    for name in draw.sample(sorted(names), k=draw.randint(0, 4)):
        options[name] = draw.choice(names[name])
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        good = False
        known = draw.random() < 0.7
        name = draw.choice(sorted(names) if known else STRANGE)
        options[name] = draw.choice(BAD)
    return options, good


def faults(
    make: Callable[..., Any],
    ask: Callable[..., Any],
    seeds: Iterable[int],
    of_call: Mapping[str, list[Any]] = OF_CALL,
) -> list[str]:
    """Return what is wrong: foreign errors, and good options that are refused.

    Args:
        make: Makes an LLM of a constructor's options.
        ask: Asks it with a call's.
        seeds: One constructor and one call each.
        of_call: Options of a call besides :data:`GOOD`.
    """
    found = []
    for seed in seeds:
        made, good_made = option_set(seed, {**GOOD, **OF_ENGINE})
        called, good_called = option_set(seed + 10_000, {**GOOD, **of_call})
        try:
            ask(make(**made), **called)
        except RASDError as error:
            if good_made and good_called:
                found.append(f"{seed}: {made} {called}: {error!r}")
        except Exception as error:  # noqa: BLE001 - a foreign error is what is looked for
            found.append(f"{seed}: {made} {called}: {error!r}")
    return found
