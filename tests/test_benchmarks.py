"""The benchmarks: prompts, figures, and that the whole command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import metrics
import pytest
import tasks
import torch
from metrics import Answer
from tiny import tiny_tokenizer

from rasd_integrations.engine.target import TargetModel

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


def rows(count: int = 4, size: int = 120) -> list[tasks.Row]:
    """Return documents of one letter each with two questions."""
    return [tasks.Row(chr(97 + i) * size, ("Who?", "Where?")) for i in range(count)]


def answer(ids: list[int], *, cached: int = 0, steps: int = 2, seconds: float = 2.0) -> Answer:
    """Return an answer whose first token took one second."""
    return Answer(ids, 100, cached, steps, 1.0, seconds)


def test_prompts_have_the_wanted_length_and_end_in_the_question() -> None:
    """Padding fills up to the wanted tokens; the own document stands behind it."""
    examples = tasks.build_examples(rows(), tiny_tokenizer(), 400, 4)
    assert [(e.document, e.question) for e in examples] == [
        (0, "Who?"), (0, "Where?"), (1, "Who?"), (1, "Where?"),
    ]  # fmt: skip
    for example in examples:
        text = example.messages[0]["content"]
        assert text.endswith(f"{chr(97 + example.document) * 120}\n\n{example.question}")
        assert abs(len(example.ids) - 400) <= 8


def test_two_questions_on_a_document_share_all_but_their_ends() -> None:
    """The second question's prompt starts like the first one's."""
    first, second = tasks.build_examples(rows(), tiny_tokenizer(), 400, 2)
    shared = next(i for i, (a, b) in enumerate(zip(first.ids, second.ids, strict=False)) if a != b)
    assert shared > 0.85 * len(first.ids)


def test_documents_over_the_wanted_length_are_skipped() -> None:
    """A document is never cut."""
    mixed = [tasks.Row("x" * 500, ("Who?",)), *rows(2)]
    examples = tasks.build_examples(mixed, tiny_tokenizer(), 300, 10)
    assert {e.document for e in examples} == {1, 2}


def test_real_files_are_read(data_folder: Path) -> None:
    """Every task's file is there and has questions."""
    for name in tasks.FILES:
        found = tasks.load_rows(name, data_folder)
        assert all(row.questions and row.questions[0] for row in found)
        assert bool(found[0].document) == (not name.startswith("specbench"))


def test_a_summary_separates_cold_from_cached() -> None:
    """First tokens are grouped by how much of the prompt was cached."""
    cold, warm = answer([1, 2, 3]), Answer([1, 2, 3], 100, 95, 2, 0.1, 1.1)
    summary = metrics.summary([cold, warm])
    assert (summary["first_token_cold_s"], summary["first_token_cached_s"]) == (1.0, 0.1)
    assert summary["tokens_per_step"] == 1.5
    assert summary["decode_ms_per_token"] == 500.0
    assert summary["decode_tokens_per_s"] == 2.0


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)],
)
def test_answers_part_at_their_first_difference(
    ours: list[int], theirs: list[int], place: int | None
) -> None:
    """A shorter answer parts where it ends."""
    assert metrics.first_difference(ours, theirs) == place


def test_agreement_counts_identical_answers() -> None:
    """Agreement says how many are the same and where the others part."""
    found = metrics.agreement([answer([1]), answer([1, 2])], [answer([1]), answer([1, 3])])
    assert found == {"identical": 1, "of": 2, "first_differences": [1]}


def test_the_gpu_script_finds_our_engine_right_and_times_it() -> None:
    """In its toy size the script runs whole: correctness, steps, prefill."""
    size = gpu.setting(tiny=True)
    assert gpu.faults(gpu.correctness(size)) == []
    costs = gpu.costs(size)
    assert list(costs["prefixes"]) == list(size.prefixes)
    for figures in costs["prefixes"].values():
        assert list(figures["ours_ms"]) == list(figures["transformers_ms"]) == list(size.widths)


def test_the_gpu_script_notices_a_wrong_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where siblings see each other, trees and the paths kept of them fail, the rest holds."""
    right = TargetModel._layout

    def wrong(self: TargetModel, n: int, parents: Any, length: int) -> Any:
        positions, mask = right(self, n, parents, length)
        return positions, mask if mask is None else torch.ones_like(mask).tril()

    monkeypatch.setattr(TargetModel, "_layout", wrong)
    found = gpu.faults(gpu.correctness(gpu.setting(tiny=True)))
    assert {fault.partition(":")[0] for fault in found} == {
        "float32, 16 cached, tree",
        "float32, 16 cached, committed path",
        "float32, 599 cached, tree",
    }


@pytest.mark.real
@pytest.mark.slow
def test_one_command_compares_engines_exactly(tmp_path: Path) -> None:
    """The last line of the run is its JSON; in float32 our tokens are transformers' tokens."""
    data = tmp_path / "leval"
    data.mkdir()
    lines = [
        json.dumps(
            {
                "input": f"Station {i} lies in the north and was opened in {1900 + i}. " * 12,
                "instructions": [f"When was station {i} opened?", "Where does it lie?"],
            }
        )
        for i in range(3)
    ]
    (data / "scientific_qa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [
        sys.executable, str(BENCHMARKS / "run.py"), "--data", str(tmp_path), "--dtype", "float32",
        "--tokens", "500", "--questions", "2", "--max-tokens", "12", "--steps",
        "--engines", "transformers", "rasd", "--out", str(tmp_path / "result.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    ours = document["engines"]["rasd"]
    assert ours["same_as_transformers"] == {"identical": 2, "of": 2, "first_differences": []}
    assert ours["first_token_cached_s"] < ours["first_token_cold_s"]
    assert set(ours["step_ms"]) == {str(n) for n in (1, 2, 4, 8, 9, 12, 16, 32)}
    assert document["machine"]["torch"] == torch.__version__

    pytest.importorskip("matplotlib")
    import plot

    plot.draw(document, tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
