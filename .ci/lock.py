"""Print version pins for pip's ``-c``: the lock, or the lowest versions that pyproject.toml allows.

    python .ci/lock.py TORCH MODEL ...      # what the Makefile installs, resolved by pip on each supported Python
    python .ci/lock.py --lowest             # every direct dependency at its lower bound

The lock needs an interpreter of each supported Python on the PATH. Nothing is installed: pip resolves in an empty
virtual environment and reports. A version that differs between Pythons gets a marker. torch and what only its CUDA
builds need are left out: the Makefile's TORCH says which build a machine gets.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
BUILDS_OF_TORCH = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|rasd-integrations)$")


def run(*command: str | Path) -> None:
    """Run a command; its output goes to stderr, since stdout is the lock."""
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)


def resolved(version: str, wanted: list[str]) -> dict[str, str]:
    """Return name and version of what pip would install on Python ``version``."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], check=False).returncode:
        sys.exit(f"python{version} is not on the PATH; the lock covers {', '.join(PYTHONS)}.")
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        pip = [Path(folder, "bin", "python"), "-m", "pip", "--quiet"]
        run(*pip, "install", "--upgrade", "pip>=25.1")
        report = Path(folder, "report.json")
        run(*pip, "install", "--dry-run", "--report", report, *wanted)
        install = json.loads(report.read_text(encoding="utf-8"))["install"]
        show = subprocess.run([*pip, "--version"], check=True, capture_output=True, text=True)
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in install}
    found["pip"] = show.stdout.split()[1]
    names = {re.sub(r"[-_.]+", "-", name).lower(): v for name, v in found.items()}
    return {name: v for name, v in names.items() if not BUILDS_OF_TORCH.match(name)}


def lock(torch: str, models: list[str]) -> list[str]:
    """Return the lines of the lock."""
    build = project()["build-system"]["requires"]
    pins: dict[str, dict[str, list[str]]] = {}  # name -> version -> Pythons
    for python in PYTHONS:
        found = resolved(python, [torch, "-e", ".[all]", "--group", "dev", *build])
        found |= resolved(python, ["--no-deps", *models])
        for name, version in found.items():
            pins.setdefault(name, {}).setdefault(version, []).append(python)
    lines = []
    for name, versions in sorted(pins.items()):
        for version, pythons in sorted(versions.items()):
            everywhere = len(pythons) == len(PYTHONS)
            marks = " or ".join(f'python_version == "{python}"' for python in pythons)
            lines.append(f"{name}=={version}" + ("" if everywhere else f" ; {marks}"))
    return lines


def lowest() -> list[str]:
    """Return each direct dependency at its lower bound."""
    table = project()
    wanted = list(table["project"]["dependencies"])
    for extra in table["project"]["optional-dependencies"].values():
        wanted += extra
    bounds = (re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:>=|==)([\w.]+)", line) for line in wanted)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


def project() -> dict:
    """Return pyproject.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--lowest"]:
        print("\n".join(lowest()))
    else:
        lines = lock(sys.argv[1], sys.argv[2:])
        print(
            "# Written by `make lock`; pip's constraints for everything that the Makefile installs."
        )
        print("\n".join(lines))
