"""The benchmark of pipelines: what is asked, figures with intervals, and that the command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pipelines
import pipelines_work as work
import pytest
import report
from answers import Answer
from folders import name_rotary_base
from langchain_core.documents import Document
from pipelines_figures import Measured, Timed, ratio
from tiny import tiny_llama, tiny_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


class Store:
    """Finds numbered chunks, whatever is searched for."""

    def similarity_search(self, query: str, k: int) -> list[Document]:
        """Return ``k`` chunks."""
        return [Document(f"chunk {i}") for i in range(k)]


def write_data(folder: Path, count: int = 8) -> None:
    """Write a set of documents, none like another, with two questions each."""
    (folder / "leval").mkdir()
    rows = [
        {
            "input": f"Station {i} lies in the north and was opened in {1900 + i}. " * 8,
            "instructions": [f"When was station {i} opened?", f"Where does station {i} lie?"],
        }
        for i in range(count)
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "leval" / "made.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def documents(tmp_path: Path) -> work.Documents:
    """Return six made documents in bytes as tokens."""
    write_data(tmp_path)
    return work.Documents.read(tmp_path, "made,1", 6, tiny_tokenizer(), work.TINY)


def asked(kinds: str, documents: work.Documents, count: int) -> list[work.Ask]:
    """Return what is asked where every answer is numbered and calls the first tool."""
    found: list[work.Ask] = []
    for turns in work.conversation(kinds, documents, Store(), count):  # type: ignore[arg-type]
        reply = None
        while True:
            try:
                found.append(next(turns) if reply is None else turns.send(reply))
            except StopIteration:
                break
            calls = [("search_orders", '{"customer": "Ada"}')] if found[-1].tools else []
            reply = work.Reply(f"answer {len(found)}", calls)
    return found


@pytest.mark.parametrize("kind", work.KINDS)
def test_each_kind_asks_as_often_as_wanted_and_never_the_same(documents, kind):
    """Also where the number is no multiple of the turns of a conversation."""
    for count in (1, 6):
        asks = asked(kind, documents, count)
        assert [a.kind for a in asks] == [kind] * count
        assert len({json.dumps(a.messages) for a in asks}) == count


def test_later_turns_build_on_the_replies(documents):
    """Chat holds the answers before, the agent its calls and their results; the next conversation holds neither."""
    chat = asked("e", documents, 6)
    assert [len(a.messages) for a in chat] == [1, 3, 5, 7, 1, 3]
    assert [m["content"] for m in chat[3].messages if m["role"] == "assistant"] == [
        "answer 1", "answer 2", "answer 3",
    ]  # fmt: skip
    agent = asked("d", documents, 6)
    assert [len(a.messages) for a in agent] == [2, 4, 6, 8, 2, 4]
    call, result = agent[1].messages[2:]
    assert call["tool_calls"][0]["id"] == result["tool_call_id"]
    order = json.loads(result["content"])[0]
    assert order["item"] in agent[1].messages[1]["content"]


def test_rewordings_hold_the_question_and_its_chunks(documents):
    """The questions of (b) are those of (a) in other words; every other has a chunk less."""
    first, second = asked("a", documents, 4), asked("b", documents, 4)
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        question = one.messages[0]["content"].rpartition("Question: ")[2]
        assert question in other.messages[0]["content"]
        assert other.messages[0]["content"].count("chunk ") == 2 - number % 2


def test_documents_are_chosen_and_cut(documents, tmp_path):
    """The offset counts documents; chunks and passages have their sizes; too few documents or questions are told."""
    assert documents.rows[0][0].startswith("Station 1 ")
    assert "".join(documents.chunks()) == "".join(text for text, _ in documents.rows)
    assert max(map(len, documents.chunks())) == work.TINY.chunk
    passages = [documents.passage(number, 60) for number in range(12)]
    assert len(set(passages)) == 12
    assert all(55 <= len(text) <= 60 for text in passages)
    with pytest.raises(ValueError, match="made has 2 documents from 6 on, and 6 questions take 6"):
        work.Documents.read(tmp_path, "made,6", 6, tiny_tokenizer(), work.TINY)
    with pytest.raises(ValueError, match="have 12 questions, not 13"):
        documents.questions(13)


def timed(engine: str, number: int, seconds: float, tokens: int, **more: Any) -> Timed:
    """Return an answer of ours in so many seconds of drafting and verifying, a quarter of them drafting."""
    stats = {"draft_s": seconds / 4, "verify_s": 3 * seconds / 4}
    stats["drafters"] = {"suffix": {"drafted": 4, "accepted": 2}}
    ids = list(range(tokens))
    arrivals = [(1.0, 1), (2.0, tokens - 1)]
    answer = Answer(ids, 10, 0, tokens // 2, 1.0, 2.0, more.pop("stats", stats), arrivals)
    return Timed("a", engine, number, more.pop("round", 0), answer, 100.0 + number)


def test_a_ratio_is_time_a_token_and_has_an_interval():
    """Ours are compared by drafting and verifying, at the median of rounds; a peer by what a reader waits."""
    found = Measured({}, {"plain": {}, "auto": {}, "openvino_genai": {}})
    for number in range(4):
        found.answers.append(timed("plain", number, 10.0, 10))
        for turn, seconds in enumerate((4.0, 5.0, 30.0)):
            found.answers.append(
                timed("auto", number, seconds, 10 + 10 * (number == 3), round=turn)
            )
        found.answers.append(timed("openvino_genai", number, 0.0, 11, stats={}))
    plain, auto, peer = json.loads(json.dumps(found.document()))["cells"]
    assert plain["times_plain"] == 1.0
    # 10 s for 10 tokens against 5 s for 10, and once for 20
    assert auto["times_plain"] == pytest.approx(1 / (20 / 50))
    low, high = auto["times_plain_interval"]
    assert 2.0 <= low < auto["times_plain"] < high <= 4.0
    assert auto["same_as_plain"] == {"identical": 3, "of": 4, "first_differences": [10]}
    assert auto["drafters"] == {"suffix": {"drafted": 48, "accepted": 24}}
    assert (auto["tokens_per_step"], auto["peak_memory_mib"], auto["questions"]) == (2.0, 103.0, 4)
    assert peer["times_plain"] == pytest.approx((1 / 9) / (1 / 10))
    assert peer["decode_ms_per_token"] == peer["wall_ms_per_token"] == pytest.approx(100.0)
    assert auto["times_openvino_genai"] == pytest.approx((4 / 40) / (4 / (3 * 9 + 19)))
    assert auto["times_best_genai"] == auto["times_openvino_genai"]
    assert ratio([((2.0, 1), (1.0, 1)), ((2.0, 1), (3.0, 1))]) == 1.0


def test_tables_have_every_kind_and_name_what_did_not_run(tmp_path):
    """All rows have their number of columns; an engine without a figure has no column in the short table."""
    engines = {name: {"label": name, "skipped": {}} for name in ("plain", "auto", "vllm")}
    answers = [
        timed(name, n, s, 10) for n in range(2) for name, s in (("plain", 2.0), ("auto", 1.0))
    ]
    document = Measured({}, engines, answers).document()
    for name in ("pipelines", "pipelines_summary", "pipelines_detail"):
        made = report.table(document, name)
        assert len({line.count("|") for line in made.splitlines()}) == 1
        assert report.PIPELINE_KINDS["a"] in made
    line = report.table(document, "pipelines").splitlines()[2]
    assert line == "| first questions over a collection | 200.0 | 2.00 (2.00 to 2.00) |"
    pytest.importorskip("matplotlib")
    import plot

    picture = plot.draw_pipelines(document, tmp_path / "picture.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_options_that_cannot_be_met_are_refused(capsys):
    """(b) needs (a), edits have no long prompts, an unknown letter is named."""
    for line, said in (
        (["--kinds", "b"], "b without a"),
        (["--kinds", "f", "--prompt", "7k"], "there are a,b,c,e"),
        (["--kinds", "a,x"], "names x"),
        (["--questions", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            pipelines.parse(line)
        assert said in capsys.readouterr().err
    assert pipelines.parse(["--prompt", "7k"]).kinds == list("abce")
    assert pipelines.parse(["--engines", "auto"]).engines == ["plain", "auto"]


def test_a_process_that_ends_is_told_with_its_last_line(tmp_path):
    """An engine that is unknown to the worker ends it."""
    with pytest.raises(pipelines.Failed, match="KeyError: 'nobody'"):
        pipelines.Process("nobody", sys.executable, {}, tmp_path)


@pytest.mark.slow
@pytest.mark.real
def test_the_command_compares_engines_exactly(tmp_path):
    """Memory changes nothing that is said; answers are drafted from; a missing peer is told; a picture is drawn."""
    write_data(tmp_path)
    model, tokenizer = tmp_path / "model", tiny_tokenizer()
    tokenizer.model_max_length = 16384
    tiny_llama(max_position_embeddings=16384).save_pretrained(model)
    tokenizer.save_pretrained(model)
    out = tmp_path / "out.json"
    line = [
        sys.executable, str(BENCHMARKS / "pipelines.py"), "--tiny", "--float32", "--model", str(model),
        "--kinds", "a,b,d", "--questions", "3", "--data", "made", "--collection", "made,2", "--out", str(out),
        "--engines", "auto", "vllm",
    ]  # fmt: skip
    environment = {"RASD_DATA": str(tmp_path)}
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        env=pipelines.environment(sys.executable) | environment,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == document
    cells = {(c["kind"], c["engine"]): c for c in document["cells"]}
    assert set(cells) == {(kind, engine) for kind in "abd" for engine in ("plain", "auto")}
    for kind in "abd":
        same = cells[kind, "auto"]["same_as_plain"]
        assert same == {"identical": 3, "of": 3, "first_differences": []}
    assert cells["d", "auto"]["drafters"]["answers"]["drafted"] > 0
    assert "vllm is not installed" in document["engines"]["vllm"]["skipped"]["all"]
    assert out.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        ({"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 1e5}),
        (
            {"rope_theta": 1e5, "rope_type": "yarn", "factor": 2.0},
            {
                "rope_theta": 1e5,
                "rope_scaling": {"rope_theta": 1e5, "rope_type": "yarn", "factor": 2.0},
            },
        ),
        (None, {}),
    ],
    ids=["plain", "scaled", "none"],
)
def test_peers_with_an_older_transformers_read_the_same_rotary_base(
    tmp_path: Path, rope: dict[str, Any] | None, told: dict[str, Any]
) -> None:
    """Version 4 looks for it beside ``rope_parameters``, and else takes its own default."""
    path = tmp_path / "config.json"
    config = {"hidden_size": 4} | ({"rope_parameters": rope} if rope else {})
    path.write_text(json.dumps(config), encoding="utf-8")
    name_rotary_base(path)
    assert config | told == json.loads(path.read_text(encoding="utf-8"))
