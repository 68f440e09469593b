"""Builds the kernels as an extension of OpenVINO with the machine's own compiler, and keeps it in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TypeAlias

from rasd_integrations.errors import StorageError
from rasd_integrations.storage.cache_folder import cache_folder, is_whole
from rasd_integrations.storage.marked import made_folder

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_FILE = "librasd_attention.so"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wno-psabi", "-fno-math-errno")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_VARIANTS: dict[str, tuple[str, ...]] = {"base": ()}  # flags of each set of instructions
if platform.machine() in {"x86_64", "AMD64"}:
    _BF16 = (*_AVX512, "-mavx512bf16")
    _VARIANTS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _BF16}
    _VARIANTS |= {"amx_bf16": (*_BF16, "-mamx-tile", "-mamx-bf16")}  # GCC 11, Clang 12
_MOST_S = 300.0  # of one call of the compiler
_NBYTES = 4_000_000  # room that a build needs


Shown: TypeAlias = Callable[[str], AbstractContextManager[object]]


class BuildError(Exception):
    """The compiler fails on the kernels."""


@cache
def library(
    openvino: Path, version: str, cache_dir: Path | None, shown: Shown = nullcontext
) -> Path | None:
    """Return the built extension, ``None`` if it cannot be had here.

    Args:
        openvino: Folder of the ``openvino`` package, whose headers and libraries it is built with.
        version: Of OpenVINO.
        cache_dir: Where it is kept; default the user's cache folder.
        shown: Makes of a title what shows that it is being built.
    """
    compiler = _compiler() if sys.platform == "linux" else None
    if compiler is None:
        logger.info("no C++ compiler on this %s: attention is OpenVINO's own", sys.platform)
        return None
    try:
        path = cache_folder("native", cache_dir) / _name(compiler, version)
        if is_whole(path):
            return path / _FILE
        with (
            shown("Building the attention kernel, once"),
            made_folder(path, "native", f"OpenVINO {version}", _NBYTES) as new,
        ):
            build(compiler, openvino, new / _FILE)
            variants(new / _FILE)  # it can be loaded
    except (BuildError, OSError, StorageError, subprocess.SubprocessError) as error:
        logger.warning("attention is OpenVINO's own, as its kernel cannot be built: %s", error)
        return None
    return path / _FILE


def variants(built: Path) -> list[str]:
    """Return the sets of instructions of a built library that this processor has, the quickest to come last.

    Raises:
        OSError: It cannot be loaded.
    """
    code = ctypes.CDLL(str(built))
    return [name for name in _VARIANTS if code.rasd_can_run(name.encode())]


def build(compiler: str, openvino: Path, to: Path, more: Sequence[str] = ()) -> None:
    """Compile the kernels to the shared library ``to``; ``more`` are further flags.

    Raises:
        BuildError: The compiler fails, or takes too long.
    """
    libraries = [*(openvino / "libs").glob("libopenvino.so.*")]
    libraries += (openvino / "libs").glob("libtbb.so.*")
    if len(libraries) != 2:
        msg = f"{openvino / 'libs'} does not hold OpenVINO's libraries."
        raise BuildError(msg)
    sources = {
        name: ("variant.cpp", *flags, f"-DRASD_VARIANT={name}")
        for name, flags in _VARIANTS.items()
        if _knows(compiler, flags)
    }
    sources["dispatch"] = ("dispatch.cpp",)
    sources["operation"] = ("openvino_op.cpp", f"-I{openvino / 'include'}")
    with tempfile.TemporaryDirectory() as folder:

        def compiled(name: str) -> str:
            source, *flags = sources[name]
            out = f"{folder}/{name}.o"
            _run([compiler, *_FLAGS, *flags, *more, "-c", str(_HERE / source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # The base variant first: of a template that several variants instantiate the linker keeps the first.
            objects = [*pool.map(compiled, sources)]
        path = f"-Wl,-rpath,{openvino / 'libs'}"
        _run([compiler, "-shared", *more, *objects, *map(str, libraries), path, "-o", str(to)])


def _knows(compiler: str, flags: Sequence[str]) -> bool:
    try:
        _run([compiler, *flags, "-E", "-x", "c++", os.devnull])
    except BuildError:
        return not flags  # what fails without any shows its error when it compiles
    return True


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_MOST_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        msg = f"{command[0]} took longer than {_MOST_S:.0f} s."
        raise BuildError(msg) from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        msg = f"{command[0]}: {first}"
        raise BuildError(msg)


def _compiler() -> str | None:
    names = filter(None, (os.environ.get("CXX"), *_COMPILERS))
    return next((found for name in names if (found := shutil.which(name))), None)


def _name(compiler: str, version: str) -> str:
    """Return a name for what this compiler makes of the sources on this kind of machine."""
    said = subprocess.run(  # noqa: S603
        [compiler, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    how = version, said.stdout, platform.machine(), _FLAGS, _VARIANTS
    digest = hashlib.blake2b(repr(how).encode(), digest_size=12)
    for source in sorted(_HERE.glob("*.[ch]pp")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
