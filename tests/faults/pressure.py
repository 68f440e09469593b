"""Cases about processes, threads and memory: forks, many threads, a close under streams, short memory."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from files import DOCUMENTS, question
from forked import Row, Said, finish, run, start
from tiny import WINDOW, tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, RASDError, SamplingParams

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
THREADS = 50
FORK_S = 60.0


def made(executor: str = "eager", **options: Any) -> RASD:
    """Return an engine over a tiny model."""
    return RASD.from_model(tiny_llama(), tiny_tokenizer(), executor=executor, **options)


def answer(rasd: RASD) -> str:
    """Answer the first question."""
    return rasd.generate(question(DOCUMENTS[0]), PARAMS).text


def once() -> str:
    """Answer the first question in a new engine, without drafts."""
    return answer(made(drafter=None))


def in_child(rasd: RASD) -> Said:
    """Fork this process as user code does, and answer in the child."""
    process, ours = start(answer, rasd)
    return finish(process, ours, FORK_S)


def fork_before() -> Said:
    """Fork before anything was run."""
    return in_child(made())


def fork_after() -> Said:
    """Fork after an answer."""
    rasd = made()
    answer(rasd)
    return in_child(rasd)


def fork_during() -> Said:
    """Fork while another thread's answer is under way; that one must end, too."""
    rasd = made()
    stream = rasd.stream(question(DOCUMENTS[1]), LONG)
    next(stream)
    other = threading.Thread(target=lambda: list(stream))
    other.start()
    said = in_child(rasd)
    other.join(FORK_S)
    return Said(error="the parent's own answer hangs") if other.is_alive() else said


def many_threads() -> list[str]:
    """Answer in many threads at once; return what differs from the answers alone."""
    rasd = made()
    prompts = [f"{DOCUMENTS[i % 3]}\n\nQuestion {i}?" for i in range(THREADS)]
    alone = made(drafter=None, prefix_cache_bytes=0)
    expected = [alone.generate(p, PARAMS).text for p in prompts]
    said: list[str] = [""] * THREADS

    def one(i: int) -> None:
        try:
            said[i] = rasd.generate(prompts[i], PARAMS).text
        except BaseException as err:  # noqa: BLE001 - to say what came is the purpose
            said[i] = repr(err)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FORK_S)
    return [f"{s} != {e}" for s, e in zip(said, expected, strict=True) if s != e]


def close_under_streams() -> list[str]:
    """Close an engine under ten streams; return what ended neither whole nor by an error of ours."""
    rasd = made()
    prompts = [f"{DOCUMENTS[i % 3]}\n\nQuestion {i}?" for i in range(10)]
    alone = made(drafter=None, prefix_cache_bytes=0)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    expected = [alone.generate(p, params).text for p in prompts]
    bad: list[str] = []

    def one(i: int) -> None:
        try:
            text = "".join(c.text for c in rasd.stream(prompts[i], params))
            if text != expected[i]:
                bad.append(f"{text!r} != {expected[i]!r}")
        except RASDError:
            pass
        except BaseException as err:  # noqa: BLE001 - to say what came is the purpose
            bad.append(repr(err))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(10)]
    for i, thread in enumerate(threads):
        thread.start()
        if i == 6:
            rasd.close()
    for thread in threads:
        thread.join(FORK_S)
    return bad + ["hung"] * sum(t.is_alive() for t in threads)


def short_memory(executor: str, room: int) -> tuple[str, str]:
    """Ask for a long answer with ``room`` more bytes of address space, then for a short one without the limit.

    Returns:
        What became of the long one ("right", "refused"), and the short one's text.
    """
    rasd = made(executor)
    answer(rasd)
    prompt = [{"role": "user", "content": (DOCUMENTS[2] * 20)[: WINDOW - 300]}]
    whole = made(drafter=None, prefix_cache_bytes=0).generate(prompt, PARAMS).text
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        ended = "right" if rasd.generate(prompt, PARAMS).text == whole else "wrong"
    except (RASDError, MemoryError) as err:
        ended = "refused" if isinstance(err, RASDError) else repr(err)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return ended, answer(rasd)


def process_cases(_work: Path, runs: int) -> Iterator[Row]:
    """Fork at every moment, run many threads, close under streams."""
    expected = run(once).value
    for name, case in (("before", fork_before), ("after", fork_after), ("during", fork_during)):
        row = Row(f"fork {name} an answer, and ask in the child")
        for _ in range(runs):
            said = run(case)
            row.judge(
                said.value if isinstance(said.value, Said) else said, expected, may_refuse=True
            )
        yield row
    for name, action in (
        (f"{THREADS} threads at once", many_threads), ("close() under ten streams", close_under_streams)
    ):  # fmt: skip
        row = Row(name)
        for _ in range(runs):
            row.judge(run(action), [])
        yield row


def memory_cases(_work: Path, runs: int) -> Iterator[Row]:
    """Take memory away in the middle of work, then give it back."""
    expected = run(once).value
    for executor in ("eager", "openvino"):
        row = Row(f"memory runs short, {executor}")
        for i in range(runs):
            said = run(short_memory, executor, 1 << (10 + 2 * (i % 10)))
            if said.value is not None and said.value[0] == "refused":
                row.refused += 1
                said = Said(("right", said.value[1]))
            row.judge(said, ("right", expected))
        yield row
