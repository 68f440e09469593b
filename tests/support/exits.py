"""Ends processes in the midst of answers, and reports how they ended: ``exits.py EXECUTOR RUNS [CASE ...]``.

Everything is imported once; each run is a fork, which loads its own model and then ends as any program does,
through the interpreter's own shutdown. The answers would take minutes, so whoever waits for one hangs.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from tiny import tiny_llama, tiny_tokenizer  # noqa: E402

from rasd_integrations.langchain import RASDLLM, ChatRASD  # noqa: E402

LONG_S = 300.0  # a process that is still there after this time hangs, however busy the machine is
QUESTIONS = ["one", "two", "three", "four"]
_BEGUN, _DONE = os.pipe()


def made(kind: type, executor: str) -> ChatRASD | RASDLLM:
    """Return a model whose answers never end, and which says when one has begun."""
    model = tiny_llama(
        hidden_size=240, intermediate_size=512, num_hidden_layers=4, eos_token_id=None,
        max_position_embeddings=100_000,
    )  # fmt: skip
    options = {"drafter": None, "executor": executor, "max_tokens": 50_000}
    llm = kind.from_model(model, tiny_tokenizer(), **options)
    target = llm._rasd._engine.decoder().target
    step, steps = target.step, []

    def counted(*args, **kwargs):
        steps.append(None)
        if len(steps) == 8:
            os.write(_DONE, b".")
        return step(*args, **kwargs)

    target.step = counted
    return llm


def begun(event: threading.Thread | None = None) -> None:
    """Wait here, in the run itself, until its answer has begun."""
    while event is None or event.is_alive():
        if select.select([_BEGUN], [], [], 0.01)[0]:
            return


async def left_early(llm) -> None:
    async for _ in llm.astream("hello"):
        break


async def consumed(llm) -> None:
    async for _ in llm.astream("hello"):
        pass


def loop_left_open(llm) -> None:
    """Leave an event loop in the midst of a stream, neither run to its end nor closed."""
    loop = asyncio.new_event_loop()
    stream = llm.astream("hello")
    loop.run_until_complete(anext(stream))
    globals()["kept"] = loop, stream


def in_a_daemon(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    begun(thread)


def failing(llm) -> None:
    in_a_daemon(lambda: llm.invoke("hello"))
    sys.exit("the program says so")


# What the run does, and whether Ctrl-C comes in the midst of it.
CASES: dict[str, tuple[type, Callable[..., object], bool]] = {
    "stream left early": (ChatRASD, lambda llm: next(llm.stream("hello")), False),
    "astream left early": (ChatRASD, lambda llm: asyncio.run(left_early(llm)), False),
    "event loop left open": (ChatRASD, loop_left_open, False),
    "Ctrl-C in invoke": (ChatRASD, lambda llm: llm.invoke("hello"), True),
    "Ctrl-C in ainvoke": (ChatRASD, lambda llm: asyncio.run(llm.ainvoke("hello")), True),
    "Ctrl-C in stream": (ChatRASD, lambda llm: list(llm.stream("hello")), True),
    "Ctrl-C in astream": (ChatRASD, lambda llm: asyncio.run(consumed(llm)), True),
    "Ctrl-C in ChatRASD.batch": (ChatRASD, lambda llm: llm.batch(QUESTIONS), True),
    "Ctrl-C in RASDLLM.batch": (RASDLLM, lambda llm: llm.batch(QUESTIONS), True),
    "Ctrl-C in batch_as_completed": (
        ChatRASD,
        lambda llm: list(llm.batch_as_completed(QUESTIONS)),
        True,
    ),
    "Ctrl-C in abatch": (ChatRASD, lambda llm: asyncio.run(llm.abatch(QUESTIONS)), True),
    "exit in mid-answer": (ChatRASD, lambda llm: in_a_daemon(lambda: llm.invoke("hello")), False),
    "exit with an error in mid-answer": (ChatRASD, failing, False),
    "exit with a running batch": (
        ChatRASD,
        lambda llm: in_a_daemon(lambda: llm.batch(QUESTIONS)),
        False,
    ),
    "exit with a running abatch": (
        ChatRASD,
        lambda llm: in_a_daemon(lambda: asyncio.run(llm.abatch(QUESTIONS))),
        False,
    ),
}


def outcome(pid: int, errors: int, *, interrupted: bool) -> dict[str, object]:
    """Wait for a run, interrupt it where asked, and return how it ended; a shell's codes."""
    if interrupted and select.select([_BEGUN], [], [], LONG_S)[0]:
        os.read(_BEGUN, 1)
        os.kill(pid, signal.SIGINT)
    began = time.monotonic()
    while time.monotonic() - began < LONG_S:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.01)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        code = "hangs"
    took = time.monotonic() - began
    while select.select([_BEGUN], [], [], 0)[0]:  # what a run of several answers said besides
        os.read(_BEGUN, 1)
    with os.fdopen(errors) as stderr:
        said = stderr.read()
    if isinstance(code, int) and code < 0:
        code = 128 - code
    return {"code": code, "seconds": round(took, 2), "stderr": said[-2000:]}


if __name__ == "__main__":
    executor, runs, *names = sys.argv[1:]
    child: Callable[[], object] | None = None
    for name in names or CASES:
        kind, work, interrupted = CASES[name]
        for _ in range(int(runs)):
            readable, writable = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.dup2(writable, 2)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                child = lambda kind=kind, work=work: work(made(kind, executor))  # noqa: E731
                break
            os.close(writable)
            report = outcome(pid, readable, interrupted=interrupted)
            print(json.dumps({"case": name, **report}), flush=True)  # noqa: T201
        if child is not None:
            break
    if child is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        child()
