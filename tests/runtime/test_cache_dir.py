"""The option ``cache_dir``: where all classes keep what later processes find again, and what they never write."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer
from tiny_gguf import write_gguf

from rasd_integrations import RASD, SamplingParams, langchain, llama_index
from rasd_integrations.cli import main
from rasd_integrations.storage.marked import foreign, marked, marked_folders

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
DOCUMENT = "Room 7 holds the owl and its keeper, who sleeps till noon. " * 4
ASK = [{"role": "user", "content": f"{DOCUMENT}\n\nWho sleeps?"}]
KINDS = {
    "core": RASD,
    "chat": langchain.ChatRASD,
    "llm": langchain.RASDLLM,
    "llama_index": llama_index.RASDLLM,
}
every_class = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def users(tmp_path, monkeypatch) -> Path:
    """Return the user's cache folder, which is not there yet."""
    monkeypatch.setenv("RASD_CACHE", str(tmp_path / "users"))
    return tmp_path / "users"


@pytest.fixture
def gguf(tmp_path) -> Path:
    """Return a model that has to be converted."""
    pytest.importorskip("gguf")
    return write_gguf(tmp_path / "tiny.gguf")


def kinds(root: Path) -> list[str]:
    """Return the kinds of our folders, each of which lies where its kind says."""
    found = list(marked_folders(root))
    assert all(own.kind in (own.path.name, own.path.parent.name) for own in found)
    return sorted({own.kind for own in found})


def core(llm) -> RASD:
    return llm if isinstance(llm, RASD) else llm._rasd


@every_class
def test_everything_is_kept_in_the_folder_that_is_named(kind, users, gguf, tmp_path):
    """Conversions, notes of digests and warmed documents lie there, and nothing in the user's folder."""
    root = tmp_path / "named"
    options = {"model_kwargs": {"dtype": "float32"}, "executor": "eager", "cache_dir": root}
    rasd = core(kind(gguf, **options))
    assert rasd.window  # read before the weights are
    assert rasd.tokenizer
    rasd.warm([DOCUMENT])
    assert kinds(root) == ["digests", "models", "prefixes"]
    assert foreign(root) == []
    assert not users.exists()


@every_class
def test_no_text_is_written_where_no_folder_is_named(kind, users, gguf):
    """Models are kept in the user's folder; warmed documents stay in memory."""
    options = {"model_kwargs": {"dtype": "float32"}, "executor": "eager"}
    rasd = core(kind(gguf, **options))
    rasd.warm([DOCUMENT])
    assert rasd.generate(ASK, PARAMS).stats.cached_prompt_tokens > len(DOCUMENT)
    assert kinds(users) == ["digests", "models"]


@pytest.mark.slow
def test_compiled_graphs_lie_there_too(users, tmp_path):
    """A graph is as large as the weights in float32, so it goes where the user has room."""
    pytest.importorskip("openvino")
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    options = {"model_kwargs": {"dtype": "float32"}, "executor": "openvino"}
    RASD.load(model, cache_dir=tmp_path / "named", **options)
    assert kinds(tmp_path / "named") == ["graphs"]
    assert not users.exists()


@every_class
def test_the_folder_changes_no_key(kind, tmp_path):
    """Where files lie changes no answer: caches' keys are the same, and settings that are dumped name it."""
    plain, named = kind("m"), kind("m", cache_dir=str(tmp_path), prefix_disk_bytes=5)
    assert core(plain).identity == core(named).identity
    if kind is not RASD:
        dumped = named.model_dump()
        assert (dumped["cache_dir"], dumped["prefix_disk_bytes"]) == (str(tmp_path), 5)
    if isinstance(named, langchain.ChatRASD | langchain.RASDLLM):
        assert plain._identifying_params == named._identifying_params  # a key of LangChain's cache


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Give up root's rights for a while; a user who is not root has none over folders without permissions."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["eager", "openvino"])
def test_a_folder_whose_files_belong_to_another_user_costs_time_only(executor, users, caplog):
    """What cannot be read is made again for this process, with warnings; answers are right, nothing is lost."""
    if executor == "openvino":
        pytest.importorskip("openvino")
    root = Path(tempfile.mkdtemp())  # where another user can look
    root.chmod(0o777)
    options = {"model_kwargs": {"dtype": "float32"}, "executor": executor, "cache_dir": root}
    first = RASD(write_gguf(root / "first.gguf"), **options)
    first.warm([DOCUMENT])
    expected = first.generate(ASK, PARAMS).text
    ours = {path for path in root.rglob("*") if path.is_file()}
    (root / "second.gguf").write_bytes((root / "first.gguf").read_bytes())
    folders = [path for path in root.iterdir() if path.is_dir()]
    for folder in folders:
        folder.chmod(0)
    with as_another_user(), pytest.warns(RuntimeWarning, match="is converted again"):
        second = RASD.load(root / "second.gguf", **options)
    with as_another_user():
        second.warm([DOCUMENT])
        second.clear_cache()
        answer = second.generate(ASK, PARAMS)
    assert (answer.text, answer.stats.cached_prompt_tokens) == (expected, 0)
    assert "is not kept in" in caplog.text
    for folder in folders:
        folder.chmod(0o700)
    assert ours < {path for path in root.rglob("*") if path.is_file()}
    shutil.rmtree(root)


PROCESS = """
import sys
sys.path[:0] = {paths!r}
import torch; torch.set_num_threads(1)
import test_cache_dir as t
options = {{"model_kwargs": {{"dtype": "float32"}}, "executor": "eager", "prefix_cache_bytes": 0}}
rasd = t.RASD.load({gguf!r}, cache_dir={root!r}, **options)
for _ in range(20):
    rasd.warm([t.DOCUMENT])
    print(*rasd.generate(t.ASK, t.PARAMS).token_ids)
"""


@pytest.mark.slow
def test_two_processes_share_a_folder_that_a_third_clears(users, gguf, tmp_path):
    """Every answer is right, nothing fails, and whatever is left is ours and listed."""
    root, here = tmp_path / "named", Path(__file__)
    paths = [str(here.parent), str(here.parents[1] / "support")]
    code = PROCESS.format(paths=paths, gguf=str(gguf), root=str(root))
    command = [sys.executable, "-W", "ignore", "-c", code]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    clear = ["clear", "prefixes", "digests", "--yes"]
    while any(process.poll() is None for process in pair):
        assert main(["cache", "--dir", str(root), *clear]) == 0
        time.sleep(0.02)
    said = [process.communicate()[0].splitlines() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    options = {"model_kwargs": {"dtype": "float32"}, "executor": "eager", "drafter": None}
    expected = " ".join(map(str, RASD.load(gguf, **options).generate(ASK, PARAMS).token_ids))
    assert said == [[expected] * 20] * 2
    assert foreign(root) == []
    assert all(marked(path.parent) for path in root.rglob("*.rasd-prefix"))
