r"""Time six kinds of work of a pipeline, engines by turns, against plain decoding.

They are (a) first questions over a collection, (b) the same reworded, (c) objects of one schema, (d) an agent with
tools, (e) chat that comes back to earlier answers, (f) edits of a document. For each pipeline ((a) and (b) are one)
and each round every engine is a fresh process; all are asked one question after the other, by turns, so that memory
fills as it would. Prints tables, then one JSON document as the last line.

Example::

    python examples/benchmarks/pipelines.py --model coder --python openvino_genai=PEERS/bin/python \
        --out examples/benchmarks/results/pipelines_coder.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from answers import Answer
from catalog import PIPELINE_ENGINES
from folders import Unavailable, weights
from machine import Cpu, machine
from pipelines_figures import BASELINE, Measured, Timed
from pipelines_work import (
    KINDS,
    LONG,
    PIPELINES,
    SIZES,
    TINY,
    Ask,
    Documents,
    Reply,
    build_store,
    conversation,
    temporary,
)
from report import table
from run import environment, interpreter, last_line
from tasks import data_or_exit
from typing_extensions import Self

from rasd_integrations.demo.models import DEFAULT, demo_model
from rasd_integrations.loading import load_tokenizer
from rasd_integrations.storage.cache_folder import cache_root
from rasd_integrations.text.prompt.template import ChatTemplate

WORKER = Path(__file__).with_name("pipelines_worker.py")
WARMUP = Ask("", [{"role": "user", "content": "Tell me how a day passes in a harbour."}], 48)
SETTLE_S, CHUNKS_A_SECOND = 3.0, 500
ENGINES = [name for name, e in PIPELINE_ENGINES.items() if e.module != "engines"]


class Failed(Exception):  # noqa: N818 - a reason, not a fault
    """An engine's process ended; the message says why."""


class Process:
    """An engine in a process of its own.

    Attributes:
        hello: What it said of itself.
    """

    def __init__(self, name: str, python: str, job: dict[str, Any], folder: Path) -> None:
        """Start it and wait until it is ready.

        Raises:
            Failed: It ended.
        """
        path = folder / f"{name}.json"
        path.write_text(json.dumps(job | {"engine": name}), encoding="utf-8")
        self._errors = (folder / f"{name}.txt").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(  # noqa: S603
            [python, str(WORKER), str(path)], env=environment(python), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        try:
            self.hello: dict[str, Any] = self._read()
        except Failed:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, ask: Ask) -> dict[str, Any]:
        """Return what it answers.

        Raises:
            Failed: It ended.
        """
        with suppress(BrokenPipeError):  # it ended: reading says why
            print(json.dumps(asdict(ask)), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        if line := cast("IO[str]", self._process.stdout).readline():
            found: dict[str, Any] = json.loads(line)
            return found
        self._errors.seek(0)
        said = self._errors.read()
        sys.stderr.write(said)
        raise Failed(last_line(said))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kinds", default="", help=f"letters of {','.join(KINDS)} (default: all)")
    parser.add_argument(
        "--model",
        default="small",
        help="small (SmolLM2-135M), coder (Qwen2.5-Coder-0.5B), or a path",
    )
    parser.add_argument("--prompt", choices=list(SIZES), default="1k", help="length of the prompts")
    parser.add_argument("--questions", type=int, default=24, help="answers of each kind")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions, in fresh processes")
    parser.add_argument(
        "--data", default="scientific_qa", metavar="SET,OFFSET",
        help="file of leval/ and the first document (default: scientific_qa,0)",
    )  # fmt: skip
    parser.add_argument(
        "--collection", metavar="SET,OFFSET",
        help="documents of the store that drafts come from, where other than --data",
    )  # fmt: skip
    parser.add_argument(
        "--engines", nargs="+", choices=list(PIPELINE_ENGINES), default=ENGINES,
        help=f"{BASELINE} always runs; transformers only where it is named, because it is slow",
    )  # fmt: skip
    parser.add_argument("--float32", action="store_true", help="eager, where all must say the same")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to try the command")
    parser.add_argument("--python", nargs="+", action="extend", default=[], metavar="LIBRARY=PATH",
                        help="interpreter of a peer's own environment")  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, default=cache_root() / "benchmarks", help="for exports"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON document and a picture here")
    args = parser.parse_args(argv)
    long = args.prompt != "1k"
    args.kinds = sorted(set(args.kinds.replace(",", "")) or (set(LONG) if long else set(KINDS)))
    allowed = LONG if long else "".join(KINDS)
    if unknown := sorted(set(args.kinds) - set(allowed)):
        parser.error(
            f"--kinds names {','.join(unknown)}; with --prompt {args.prompt} there are {','.join(allowed)}."
        )
    if "b" in args.kinds and "a" not in args.kinds:
        parser.error("--kinds names b without a: reworded questions come after the first ones.")
    if args.questions < 1 or args.rounds < 1:
        parser.error("--questions and --rounds must be at least 1.")
    args.pythons = dict(item.partition("=")[::2] for item in args.python)
    args.engines = [n for n in PIPELINE_ENGINES if n == BASELINE or n in args.engines]
    return args


class Benchmark:
    """One run: the work, the engines that can do it, and what was found."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Cut the documents, embed the collection, look for engines."""
        self.args, self.folder = args, folder
        self.model = demo_model(DEFAULT if args.model == "coder" else args.model)
        self.dtype = "float32" if args.float32 else "bfloat16"
        self.tokenizer = load_tokenizer(self.model)
        self.template = ChatTemplate(self.tokenizer)
        sizes = TINY if args.tiny else SIZES[args.prompt]
        data = data_or_exit()

        def documents(chosen: str) -> Documents:
            return Documents.read(data, chosen, args.questions, self.tokenizer, sizes)

        self.documents = documents(args.data)
        self.store = build_store(folder / "store", self.documents.chunks())
        self.attached, chunks = folder / "store", self.documents.chunks()
        if args.collection:
            self.attached, chunks = folder / "attached", documents(args.collection).chunks()
            build_store(self.attached, chunks)
        self.settle_s = SETTLE_S + len(chunks) / CHUNKS_A_SECOND
        said = (
            "kinds",
            "model",
            "prompt",
            "questions",
            "rounds",
            "data",
            "collection",
            "float32",
            "tiny",
            "threads",
        )
        header = {
            "machine": machine(), "options": {name: getattr(args, name) for name in said},
            "model": Path(self.model).name, "chunks": len(chunks),
        }  # fmt: skip
        self.found = Measured(header, {})
        self.paths: dict[str, tuple[str, str]] = {}
        for name in args.engines:
            engine = PIPELINE_ENGINES[name]
            self.found.engines[name] = {"label": engine.label, "skipped": {}}
            try:
                python = interpreter(engine, args.pythons)
                form = weights(engine.weights, self.model, self.dtype, args.cache, python)
                self.paths[name] = python, str(form)
            except Unavailable as err:
                self._skip(name, "all", str(err))

    def run(self) -> None:
        """Do all pipelines, as often as wanted; what fails is noted."""
        for number in range(self.args.rounds):
            for kinds in PIPELINES:
                chosen = "".join(k for k in kinds if k in self.args.kinds)
                if chosen:
                    cpu = Cpu()
                    self._pipeline(chosen, number)
                    stolen = cpu.stolen() or 0.0
                    header = self.found.header
                    header["stolen"] = max(stolen, header.get("stolen", 0.0))
                    self.write()

    def write(self) -> dict[str, Any]:
        """Return the document, and write it where that is wanted."""
        document = self.found.document()
        if self.args.out:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            self.args.out.write_text(json.dumps(document) + "\n", encoding="utf-8")
        return document

    def _skip(self, engine: str, kind: str, reason: str) -> None:
        print(f"{engine}, {kind}: {reason}", file=sys.stderr)
        self.found.engines[engine]["skipped"].setdefault(kind, reason)

    def _pipeline(self, kinds: str, number: int) -> None:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            engines: dict[str, Process] = {}
            for name in self.paths:
                try:
                    engines[name] = stack.enter_context(self._start(name, Path(scratch)))
                    engines[name].ask(self._encoded(WARMUP))
                except Failed as err:
                    self._skip(name, kinds, f"failed: {err}")
                    engines.pop(name, None)
                    continue
                about = self.found.engines[name]
                about |= engines[name].hello.pop("about")
                about |= {
                    k: engines[name].hello[k] for k in ("load_s", "load_peak_mib", "store_mib")
                }
            if BASELINE not in engines:
                return
            time.sleep(0 if self.args.tiny else self.settle_s)
            for kind, turns in zip(
                kinds,
                conversation(kinds, self.documents, self.store, self.args.questions),
                strict=True,
            ):
                reply, place = None, 0
                try:
                    while True:
                        ask = next(turns) if reply is None else turns.send(reply)
                        reply = self._turn(self._encoded(ask), engines, place, number)
                        place += 1
                except StopIteration:
                    print(
                        f"{kind}, round {number + 1}: {place} answers", file=sys.stderr, flush=True
                    )

    def _start(self, name: str, scratch: Path) -> Process:
        python, model = self.paths[name]
        longest = (
            self.documents.sizes.k * self.documents.sizes.chunk
            + self.documents.sizes.passage
            + 2000
        )
        job = {
            "model": model, "assistant": None, "dtype": self.dtype, "threads": self.args.threads,
            "ignore_eos": False, "ends": [], "store": str(self.attached),
            "max_tokens": self.documents.sizes.bound, "prompts": [{"ids": [0] * longest}],
        }  # fmt: skip
        return Process(name, python, job, scratch)

    def _encoded(self, ask: Ask) -> Ask:
        ids = self.template.encode_messages(ask.messages, tools=ask.tools)
        return replace(ask, ids=tuple(ids))

    def _turn(self, ask: Ask, engines: dict[str, Process], place: int, number: int) -> Reply:
        """Ask every engine, another one first each time; return what plain decoding says."""
        names = list(engines)
        first = place % len(names)
        said: dict[str, Any] = {}
        for name in names[first:] + names[:first]:
            if ask.schema and not engines[name].hello["follows_schemas"]:
                self._skip(name, ask.kind, "it is not given a grammar here")
                continue
            try:
                told = engines[name].ask(ask)
            except Failed as err:
                self._skip(name, ask.kind, f"failed: {err}")
                del engines[name]
                if name == BASELINE:
                    raise
                continue
            timed = Timed(ask.kind, name, place, number, Answer(**told["answer"]), told["peak_mib"])
            self.found.answers.append(timed)
            if name == BASELINE:
                said = told["reply"]
        return Reply(said["text"], [tuple(call) for call in said["calls"]])


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for; fail where an engine of this environment failed."""
    args = parse(argv)
    with temporary() as folder:
        benchmark = Benchmark(args, Path(folder))
        benchmark.run()
    document = benchmark.write()
    for name in ("pipelines", "pipelines_detail"):
        print(f"\n{table(document, name)}", file=sys.stderr)
    if args.out:
        from plot import draw_pipelines

        draw_pipelines(document, args.out.with_suffix(".png"))
    print(json.dumps(document))
    own = [n for n, e in document["engines"].items()
           if e["skipped"] and PIPELINE_ENGINES[n].module == "pipelines_engine"]  # fmt: skip
    if own:
        sys.exit(f"Failed: {', '.join(own)}.")


if __name__ == "__main__":
    main()
