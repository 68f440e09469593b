"""Forks a process before, after and during answers, and prints what became of each child: ``forks.py``."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from tiny import tiny_llama, tiny_tokenizer  # noqa: E402

from rasd_integrations import RASD, SamplingParams  # noqa: E402

LONG_S = 300.0  # a process that is still there after this time hangs, however busy the machine is
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
FOREVER = SamplingParams(max_tokens=90_000, ignore_eos=True)


def made() -> RASD:
    model = tiny_llama(max_position_embeddings=100_000)
    return RASD.from_model(model, tiny_tokenizer(), drafter=None)


def ask(engine: RASD) -> list[int]:
    return list(engine.generate("hello", PARAMS).token_ids)


def forked(case: str, child: Callable[[], object]) -> None:
    """Run ``child`` in a forked process and print what it returns or raises, or that it hangs."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = child()
        except Exception as err:  # noqa: BLE001
            said = f"{type(err).__name__}: {err}"
        os.write(writable, json.dumps(said).encode())
        os._exit(0)
    os.close(writable)
    deadline = time.monotonic() + LONG_S
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    print(json.dumps({"case": case, "said": json.loads(text) if text else "hangs"}), flush=True)  # noqa: T201


def one_thread() -> list[int]:
    torch.set_num_threads(1)
    return ask(made())


if __name__ == "__main__":
    torch.set_num_threads(2)
    forked("before any answer", lambda: ask(made()))
    mine = made()
    forked("loaded before", lambda: ask(mine))
    answer = ask(mine)
    print(json.dumps({"case": "parent", "said": answer}))  # noqa: T201
    forked("after an answer", lambda: ask(mine))
    forked("after an answer, another model", lambda: ask(made()))
    forked("after an answer, another model, one thread", one_thread)
    begun = threading.Event()

    def endless() -> None:
        for chunk in mine.stream("hello", FOREVER):
            if chunk.token_ids:
                begun.set()

    threading.Thread(target=endless, daemon=True).start()
    begun.wait()
    for _ in range(10):
        forked("during an answer", lambda: ask(mine))
    forked("during an answer, another model, one thread", one_thread)
    print(json.dumps({"case": "parent", "said": ask(mine)}))  # noqa: T201
