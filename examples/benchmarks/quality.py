r"""Measure what knowledge transfer does to answers: likelihood, F1, exact match and ROUGE-L, by rule.

The target reads a whole document, the teacher the chunks that are retrieved for the question. Of each question: the
reference answer's negative log-likelihood under every rule, and with ``--answers`` greedy answers. Results are written
question by question, and a run that was killed goes on where it was.

    python examples/benchmarks/quality.py --questions 25 --out quality.jsonl                 # under ten minutes
    python examples/benchmarks/quality.py --questions 200 --answers 28 --out examples/benchmarks/results/quality.jsonl
    python examples/benchmarks/quality.py --model coder-0.5b --teacher coder-1.5b --questions 50 --out larger.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import machine
from quality_cases import HALVES, RETRIEVALS, Documents, Question, by_turns, key_of
from quality_figures import TITLES, draw_quality, summary
from quality_pair import BEST, CHUNKS, RULES, TARGET, Pair, measures
from report import table
from tasks import data_or_exit

from rasd_integrations.demo.models import demo_model

TASKS = ("scientific_qa", "multidoc_qa")
ANSWERED = (TARGET, CHUNKS, "rapid 10", "mixture 0.5", "confidence", "cautious", "agreement")
UNDRAFTED = ", undrafted"
_SETS, _REFERENCE_TOKENS = 3, 64


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0].removeprefix("r")
    )
    parser.add_argument(
        "--model", default="small", help="target: small (SmolLM2-135M), coder-0.5b, or a path"
    )
    parser.add_argument(
        "--teacher", help="reads the chunks: coder-1.5b or a path (default: the target)"
    )
    parser.add_argument("--data", type=Path, help="folder with leval/ (default: RASD_DATA)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="files of leval/, by commas")
    parser.add_argument("--half", choices=HALVES, default="all", help="documents by number")
    parser.add_argument("--questions", type=int, default=200, help="most of each task")
    parser.add_argument(
        "--retrieval", default="good", help=f"of {', '.join(RETRIEVALS)}, by commas"
    )
    parser.add_argument("--chunks", default="6", help="chunks that the teacher reads, by commas")
    parser.add_argument("--longest", type=int, default=6800, help="tokens of a document")
    parser.add_argument(
        "--answers", type=int, default=0, help="tokens of an answer; 0: likelihood only"
    )
    parser.add_argument(
        "--rules",
        default=";".join(ANSWERED),
        help="what answers, by semicolons; with ', undrafted' behind it without drafts",
    )
    parser.add_argument(
        "--further", action="store_true", help="also joint distributions of more than two"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="results, one a line; read if it exists"
    )
    args = parser.parse_args(argv)
    args.retrieval = args.retrieval.split(",")
    args.chunks = [int(k) for k in args.chunks.split(",")]
    args.rules = [] if not args.answers else args.rules.split(";")
    for name, known in (("retrieval", RETRIEVALS), ("rules", (TARGET, CHUNKS, BEST, *RULES))):
        given = [value.removesuffix(UNDRAFTED) for value in getattr(args, name)]
        for odd in [value for value in given if value not in known]:
            parser.error(f"--{name}: {odd!r} is none of {', '.join(known)}")
    if BEST in args.rules and not args.further:
        parser.error(f"--rules: {BEST!r} needs --further")
    return args


def done(path: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results in ``path``; a line that a kill cut short is dropped from the file.

    Ends the program if they are of a run with other options.
    """
    if not path.exists():
        path.write_text(
            json.dumps({"options": options, "machine": machine()}) + "\n", encoding="utf-8"
        )
        return []
    rows: list[dict[str, Any]] = []
    whole = ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith("\n"):
            rows.pop()
            break
        whole += line
    if not rows or rows[0].get("options") != options:
        sys.exit(
            f"{path} holds results of a run with other options. Give another --out, or remove it."
        )
    path.write_text(whole, encoding="utf-8")
    return rows[1:]


def prompts(
    documents: Documents, question: Question, args: argparse.Namespace
) -> Iterator[tuple[str, int, list[int], dict[str, list[int]]]]:
    """Yield retrieval, chunks, the teacher's prompt, and those for further distributions."""
    for retrieval in args.retrieval:
        for k in args.chunks if retrieval != "empty" else [0]:
            others: dict[str, list[int]] = {}
            if args.further:
                others["empty"] = documents.short(question, "empty", 0)
                size = max(k // _SETS, 1)
                for n in range(_SETS):
                    others[f"set {n}"] = documents.short(question, retrieval, size, n * size)
            yield retrieval, k, documents.short(question, retrieval, k), others


def measured(
    pair: Pair, documents: Documents, question: Question, known: set[str], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a question's results that are not among the ``known`` keys."""
    whole = documents.whole(question, pair.room)
    for retrieval, k, short, others in prompts(documents, question, args):
        key = key_of(question, retrieval, k)
        if json.dumps(key) in known:
            continue
        reference = pair.template.tokenizer.decode(
            pair.template.encode_chunk(question.reference)[:_REFERENCE_TOKENS]
        )
        likely = pair.likelihood(whole, short, str(reference), others=others)
        row: dict[str, Any] = {
            "key": key, "question": question.text, "reference": question.reference,
            "near": documents.near(question, k), "prompt_tokens": len(whole), "short_tokens": len(short),
            "nats": {name: round(value, 5) for name, value in likely.nats.items()}, "tokens": likely.tokens,
        }  # fmt: skip
        if likely.extra:
            row["extra"] = likely.extra
        for rule in args.rules:
            name, drafts = rule.removesuffix(UNDRAFTED), not rule.endswith(UNDRAFTED)
            if name == BEST:
                sets = [prompt for other, prompt in others.items() if other.startswith("set")]
                text, stats = pair.best(whole, sets, args.answers)
            else:
                text, stats = pair.answer(name, whole, short, args.answers, drafting=drafts)
            row.setdefault("answers", {})[rule] = {"text": text, **measures(stats)}
        yield row


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then write summary, tables and picture."""
    args = parse(argv)
    folder = data_or_exit(args.data)
    options = {n: v for n, v in vars(args).items() if n not in ("out", "data", "questions")}
    rows = done(args.out, options)
    known = {json.dumps(row["key"]) for row in rows}
    pair = Pair(demo_model(args.model), args.teacher and demo_model(args.teacher), args.longest)
    tasks = [
        Documents(folder, task, args.half, args.questions, pair.template)
        for task in args.tasks.split(",")
    ]
    total, started = sum(len(t.questions) for t in tasks), time.monotonic()
    with args.out.open("a", encoding="utf-8") as out:
        for number, (documents, question) in enumerate(by_turns(tasks), 1):
            for row in measured(pair, documents, question, known, args):
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
            print(
                f"{number} of {total} questions, {time.monotonic() - started:.0f} s",
                file=sys.stderr,
            )
    found = {"benchmark": "quality", "options": options, "machine": machine(), **summary(rows)}
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for metric in TITLES if args.answers else ("nats",):
        print(table(found, f"quality_{metric}"), end="\n\n")
    draw_quality(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
