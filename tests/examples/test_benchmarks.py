"""The benchmarks: prompts, figures, tables, and that each command runs once, in its smallest size."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import floor
import metrics
import pytest
import report
import run
import streams
import tasks
import torch
import worker
from answers import Answer
from catalog import ENGINES
from document import Part, Questions, Run
from tasks import Example
from tiny import EOS, tiny_gemma3, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
SIZE = floor.StepBytes(weights=1000, kv_token=10, windows=(None, None), bits=16)


def rows(count: int = 4, size: int = 120) -> list[tasks.Row]:
    """Return documents of one letter each with two questions."""
    return [tasks.Row(chr(97 + i) * size, ("Who?", "Where?")) for i in range(count)]


def answer(
    ids: list[int], *, cached: int = 0, steps: int | None = 2, seconds: float = 2.0
) -> Answer:
    """Return an answer whose first token took one second."""
    return Answer(ids, 100, cached, steps, 1.0, seconds)


def raw(ids: list[int], seconds: float = 2.0) -> dict[str, Any]:
    """Return an answer as a worker writes it: each token a step."""
    arrivals = [[1.0 + i * (seconds - 1) / max(len(ids) - 1, 1), 1] for i in range(len(ids))]
    return {
        "ids": ids, "prompt_tokens": 6, "cached_tokens": 0, "steps": len(ids), "first_s": 1.0,
        "total_s": seconds, "stats": {}, "arrivals": arrivals,
    }  # fmt: skip


def part(engine: str, *answers: dict[str, Any], context: int = 8) -> Part:
    """Return what a process of ``engine`` gave."""
    result = {"about": {"weights": "bfloat16"}, "load_s": 1.0, "answers": list(answers)}
    return Part(engine, context, result | {"peak_memory_mib": 100.0})


def run_of(*parts: Part, skipped: str = "") -> Run:
    """Return a run of two tasks with one question each."""
    asked = [
        Questions(task, 8, (Example(0, "?", ({"role": "user", "content": "?"},), prompt),))
        for task, prompt in (("scientific_qa", (1, 2, 3, 4, 5, 6)), ("multidoc_qa", (9,) * 6))
    ]
    engines = list(dict.fromkeys(p.engine for p in parts))
    header = {"machine": {}, "options": {"engines": engines}, "model": "tiny"}
    return Run(header, asked, frozenset({0}), SIZE, [1e6], list(parts))


def test_prompts_have_the_wanted_length_and_share_their_document() -> None:
    """Padding fills up to the wanted tokens, the question ends the prompt, and two questions share the rest."""
    examples = tasks.build_examples(rows(), tiny_tokenizer(), 400, 4)
    assert [(e.document, e.question) for e in examples] == [
        (0, "Who?"), (0, "Where?"), (1, "Who?"), (1, "Where?"),
    ]  # fmt: skip
    for example in examples:
        text = example.messages[0]["content"]
        assert text.endswith(f"{chr(97 + example.document) * 120}\n\n{example.question}")
        assert abs(len(example.ids) - 400) <= 8
    first, second = (e.ids for e in examples[:2])
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert shared > 0.85 * len(first)
    cut = tasks.shortened([tasks.Row("x" * 900, ("Who?",)), *rows(1)], tiny_tokenizer(), 600)
    assert [len(row.document) for row in cut] == [600 - tasks.QUESTION_TOKENS, 120]


def test_real_files_are_read(data_folder: Path) -> None:
    """Every task's file is there and has questions."""
    for name in tasks.FILES:
        found = tasks.load_rows(name, data_folder)
        assert all(row.questions and row.questions[0] for row in found)
        assert bool(found[0].document) == (not name.startswith("specbench"))


def test_a_summary_separates_cold_from_cached_and_means_from_medians() -> None:
    """First tokens are grouped by what was cached; means weigh tokens, medians questions; unknown is not one."""
    summary = metrics.summary([answer([1, 2, 3]), Answer([1, 2, 3], 100, 95, 2, 0.1, 1.1)])
    assert (summary["first_token_cold_s"], summary["first_token_cached_s"]) == (1.0, 0.1)
    assert (summary["tokens_per_step"], summary["step_ms"]) == (1.5, 1000.0)
    assert (summary["decode_ms_per_token"], summary["decode_tokens_per_s"]) == (500.0, 2.0)
    slow = answer([1] * 11, seconds=11.0)
    summary = metrics.summary([answer([1, 2]), answer([1, 2], seconds=1.5), slow])
    assert summary["decode_ms_per_token"] == 1000.0
    assert summary["decode_ms_per_token_mean"] == pytest.approx(11500 / 12)
    silent = metrics.summary([answer([1, 2, 3], steps=None)])
    assert (silent["tokens_per_step"], silent["step_ms"]) == (None, None)


def test_answers_are_compared_up_to_their_first_difference() -> None:
    """A shorter answer parts where it ends; what is copied is counted in runs of four tokens."""
    cases = [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)]
    for ours, theirs, index in cases:
        assert metrics.first_difference(ours, theirs) == index
    found = metrics.agreement([answer([1]), answer([1, 2])], [answer([1]), answer([1, 3])])
    assert found == {"identical": 1, "of": 2, "first_differences": [1]}
    assert metrics.copied([1, 2, 3, 4, 5, 9], [0, 1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert metrics.copied([1, 2, 3], [1, 2, 3, 4]) == 0.0


def test_the_floor_is_bytes_over_bandwidth(tmp_path: Path) -> None:
    """All weights but an untied input embedding, and the keys and values that each layer's window leaves."""
    answers = [answer([1, 2, 3, 4], steps=2, seconds=1.01)]
    found = metrics.floor_figures(metrics.summary(answers), answers, SIZE, 1e6, {})
    assert found["floor_ms"] == pytest.approx(2.02)  # 1 000 bytes and 10 a token of 102 at 1 MB/s
    assert found["multiple_of_floor"] == pytest.approx(2.02 / (10 / 3))
    assert found["engine_efficiency"] == pytest.approx(2.02 / 10)
    for make, untied in ((tiny_llama, True), (tiny_gemma3, False)):
        model = make()
        model.save_pretrained(tmp_path)
        size = floor.step_bytes(tmp_path, "float32")
        embedding = model.get_input_embeddings().weight.numel() if untied else 0
        assert size.weights == 4 * (sum(p.numel() for p in model.parameters()) - embedding)
    layer = (
        2 * 2 * 8 * 4
    )  # Gemma's: two heads of eight float32 numbers; three layers look back on 16 tokens
    assert size.at(100) - size.weights == layer * (3 * 16 + 100)


def test_a_step_of_ours_is_broken_down() -> None:
    """Drafting, verifying and the rest add up to what is neither prefill nor retrieval."""
    stats = {
        "target_steps": 2, "draft_s": 0.002, "verify_s": 0.04, "prefill_s": 1.0, "retrieve_s": 0.5,
        "total_s": 1.546,
    }  # fmt: skip
    told = Answer([1, 2], 100, 0, 2, 1.0, 2.0, stats)
    assert metrics.breakdown([told]) == pytest.approx({"draft": 1.0, "verify": 20.0, "rest": 2.0})
    assert metrics.breakdown([answer([1, 2])]) is None


def test_a_document_has_rows_by_task_in_all_and_where_nothing_was_copied() -> None:
    """Repetitions are pooled, end tokens not compared, and what transformers copied decides the last row."""
    copying, fresh = raw([1, 2, 3, 4, 5]), raw([7, 7, 7, 7])
    theirs = part("transformers", copying, fresh)
    ours = [part("rasd", raw([1, 2, 3, 4, 5, 0], s), raw([7, 7, 8, 7], s)) for s in (1.5, 1.7)]
    document = run_of(theirs, *ours).document()
    cells = {(c["engine"], c["task"]): c for c in document["cells"]}
    assert [task for engine, task in cells if engine == "rasd"] == [
        "scientific_qa", "multidoc_qa", "all", "nothing copied",
    ]  # fmt: skip
    found = cells["rasd", "all"]
    assert found["same_as_transformers"] == {"identical": 1, "of": 2, "first_differences": [2]}
    assert (found["questions"], found["repeats"]) == (2, 2)
    assert found["times_transformers"] == pytest.approx((16 / 2.4) / (7 / 2), rel=1e-4)
    assert found["decode_ms_spread"] == pytest.approx([1000 / 8, 1400 / 8], rel=1e-4)
    assert cells["rasd", "nothing copied"]["answer_tokens"] == 8
    assert cells["transformers", "nothing copied"]["answer_tokens"] == 4
    json.dumps(document)


def test_every_table_is_even_and_names_what_is_missing(tmp_path: Path) -> None:
    """All rows of a table have its number of columns; an engine that cannot run is a row with its reason."""
    parts = [part("transformers", raw([1, 2]), raw([2, 3])), part("rasd", raw([1]), raw([2]))]
    parts[0].result["step_ms"] = {"1": 2.0, "8": 3.0}
    made = run_of(*parts, Part("vllm", 8, skipped="vllm is not installed"))
    document = json.loads(json.dumps(made.document()))
    for name in report.TABLES:
        assert len({line.count("|") for line in report.table(document, name).splitlines()}) == 1
    assert "| vLLM | skipped: vllm is not installed |" in report.table(document, "engines")
    with pytest.raises(ValueError, match="choose from engines"):
        report.table(document, "speed")
    (tmp_path / "run.json").write_text(json.dumps(document), encoding="utf-8")
    page = "# Results\n\n<!-- table tasks@8 from run.json -->\nold\n<!-- end -->\n\nText.\n"
    filled = report.filled(page, tmp_path)
    assert report.table(document, "tasks@8") in filled
    assert "old" not in filled
    assert report.filled(filled, tmp_path) == filled


def test_drafters_are_summed_over_steps_and_tokens() -> None:
    """A mean over cells weighs what each of them did."""
    cell = {"task": "a", "drafter": "suffix", "draft_ms_per_step": 1.0, "verify_ms_per_step": 9.0}
    few = cell | {
        "tokens": 10, "answer_tokens": 10, "tokens_per_step": 1.0, "drafted_per_step": 0.0,
        "acceptance": None, "decode_ms_per_token": 20.0,
    }  # fmt: skip
    many = cell | {
        "tokens": 20, "answer_tokens": 40, "tokens_per_step": 2.0, "drafted_per_step": 4.0,
        "acceptance": 0.25, "decode_ms_per_token": 10.0, "draft_ms_per_step": 4.0,
    }  # fmt: skip
    lines = report.table({"cells": [few, many]}, "drafters").splitlines()
    # 50 tokens in 30 steps; 20 of 80 drafted tokens; 10 + 80 ms of drafting
    assert lines[2] == "| suffix | 1.00, 20.0 | 2.00, 10.0 | 1.67, 12.0 | 0.25 | 3.0 |"
    by_task = report.table({"cells": [few, many]}, "drafters_by_task").splitlines()
    assert by_task[2] == "| suffix | 1.67, 12.0 | 1.67, 12.0 |"


@pytest.mark.parametrize("page", ["README.md", "docs/explanation/results.md"])
def test_the_figures_of_a_page_are_those_of_the_committed_files(page: str) -> None:
    """Every marked table is what the report makes of its file; ``report.py PAGE`` sets it right."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert report.filled(text) == text
    assert text.count("<!-- table ") == len(report.MARKED.findall(text))


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path) -> None:
    """Three pictures of a result, also where a step is not broken down."""
    pytest.importorskip("matplotlib")
    import plot

    engines = [part(name, raw([1, 2]), raw([2, 3])) for name in ENGINES]
    stats = {"target_steps": 2, "draft_s": 0.1, "verify_s": 0.2, "prefill_s": 0, "retrieve_s": 0}
    for told in (engines[3].result["answers"][0], engines[4].result["answers"][0]):
        told["stats"] = stats | {"total_s": 0.4}
    for document in (run_of(*engines).document(), run_of(engines[0]).document()):
        paths = plot.draw(document, tmp_path / "result")
        assert [p.name for p in paths] == [
            "result_decode.png", "result_tokens_per_step.png", "result_breakdown.png",
        ]  # fmt: skip
        for path in paths:
            assert path.read_bytes().startswith(b"\x89PNG")
            path.unlink()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's threads back: engines set their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_answers_at_once_are_timed_and_compared(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same tokens in float32; the table has a row for each number of streams."""
    monkeypatch.setattr(streams, "data_or_exit", lambda: tmp_path)
    monkeypatch.setattr(streams, "load_rows", lambda *_: rows())
    out = tmp_path / "streams.json"
    streams.main(
        ["--model", str(model), "--tokens", "200", "--streams", "2", "3", "--rounds", "1",
         "--max-tokens", "8", "--dtype", "float32", "--executor", "eager", "--out", str(out)]
    )  # fmt: skip
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [(c["drafter"], c["streams"], c["equal_answers"]) for c in document["cells"]] == [
        ("plain", 2, 2), ("drafting", 2, 2), ("plain", 3, 3), ("drafting", 3, 3),
    ]  # fmt: skip
    assert {c["answer_tokens"] for c in document["cells"]} == {16, 24}
    assert len(report.table(document, "streams").splitlines()) == 2 + 4


def test_a_peer_needs_no_package_of_ours() -> None:
    """The worker and the peers' room import the standard library alone."""
    code = (
        "import sys; import worker, peers; "
        "print(*sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=BENCHMARKS,
    )
    assert set(out.stdout.split()) <= {"__main__", "answers", "catalog", "peers", "worker"}


def test_a_peer_is_asked_by_ids_and_its_tokens_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's class on a scripted library: greedy, cut at the budget, the kept prefix counted."""
    asked: list[dict[str, Any]] = []

    class Llama:
        metadata = types.MappingProxyType({"general.file_type": "3"})

        def __init__(self, path: str, **options: Any) -> None:
            asked.append(options)

        def token_eos(self) -> int:
            return EOS

        def generate(self, ids: list[int], **options: Any) -> Iterator[int]:
            asked.append(options)
            while True:
                yield ids[-1]

    fake = types.ModuleType("llama_cpp")
    fake.Llama = Llama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    examples = tasks.build_examples(rows(2), tiny_tokenizer(), 200, 2)
    prompts = [{"messages": e.messages, "ids": list(e.ids)} for e in examples]
    job = {
        "engine": "llama_cpp", "model": __file__, "assistant": None, "dtype": "float32", "threads": 1,
        "max_tokens": 12, "ignore_eos": True, "ends": [EOS], "widths": (), "warmup": prompts[0],
        "prompts": prompts,
    }  # fmt: skip
    found = worker.run(job)
    assert asked[0]["n_ctx"] > 12 + len(prompts[0]["ids"])
    assert asked[1]["temp"] == 0.0
    assert [a["ids"] for a in found["answers"]] == [[p["ids"][-1]] * 12 for p in prompts]
    assert found["answers"][1]["cached_tokens"] > 150
    assert found["about"]["weight_bytes"] == Path(__file__).stat().st_size


def command(folder: Path, model: Path, *engines: str) -> list[str]:
    """Return a command line on two tasks whose documents are made up."""
    data = folder / "leval"
    data.mkdir()
    for task in ("scientific_qa", "multidoc_qa"):
        lines = [
            json.dumps(
                {
                    "input": f"{task} {i}: Station {i} lies in the north, opened in {1900 + i}. "
                    * 3,
                    "instructions": [f"When was station {i} opened?", "Where does it lie?"],
                }
            )
            for i in range(3)
        ]
        (data / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [
        sys.executable, str(BENCHMARKS / "run.py"), "--data", str(folder), "--model", str(model),
        "--dtype", "float32", "--task", "scientific_qa", "multidoc_qa", "--contexts", "500",
        "--questions", "2", "--max-tokens", "8", "--steps", "--threads", "1", "--buffer-mib", "16",
        "--cache", str(folder / "cache"), "--out", str(folder / "out" / "result.json"),
        "--engines", *engines,
    ]  # fmt: skip


def test_repetitions_rotate_and_ask_no_engine_that_cannot_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each repetition begins with another engine; one that failed, or is to run once, is not asked again."""
    asked: list[str] = []

    def ask(name: str, context: int, *_: object) -> Part:
        asked.append(name)
        found = [raw([1, 2])] * 4
        return (
            Part(name, context, skipped="no")
            if name == "vllm"
            else part(name, *found, context=context)
        )

    monkeypatch.setattr(run, "ask", ask)
    monkeypatch.setattr(run, "bandwidth", lambda *_: 1e6)
    engines = ["transformers", "plain", "vllm", "rasd"]
    line = command(tmp_path, model, *engines)[2:]
    made = run.measure(run.parse([*line, "--repeats", "3", "--once", "transformers"]))
    assert asked == [*engines, "plain", "rasd", "rasd", "plain"]
    cells = {c["engine"]: c for c in made.document()["cells"] if c["task"] == "all"}
    assert {name: cell["repeats"] for name, cell in cells.items()} == {
        "transformers": 1, "plain": 3, "rasd": 3,
    }  # fmt: skip
    assert made.document()["bandwidth_gb_s"] == [0.001, 0.001]


@pytest.mark.slow
def test_one_command_compares_engines_exactly(tmp_path: Path, model: Path) -> None:
    """Our tokens are transformers'; a missing peer is a row; a fault of ours is an error, told at the end."""
    engines = ("transformers", "prompt_lookup", "plain", "rasd", "llama_cpp", "assisted")
    line = command(tmp_path, model, *engines)
    line += ["--python", "llama_cpp=nowhere", "--assistant", str(tmp_path / "missing")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Failed: assisted." in done.stderr
    document = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    cells = {(c["engine"], c["task"]): c for c in document["cells"]}
    for name in engines[:4]:
        same = cells[name, "all"]["same_as_transformers"]
        assert same == {"identical": 4, "of": 4, "first_differences": []}
    ours = cells["rasd", "all"]
    assert ours["first_token_cached_s"] is not None
    assert cells["transformers", "all"]["first_token_cached_s"] is None
    assert ours["breakdown_ms"]["verify"] > 0
    assert {"transformers", "rasd"} <= {s["engine"] for s in document["steps"]}
    assert "no interpreter" in document["engines"]["llama_cpp"]["skipped"]
    assert document["engines"]["assisted"]["skipped"].startswith("failed: ")
    assert document["machine"]["torch"] == document["engines"]["rasd"]["torch"] == torch.__version__
