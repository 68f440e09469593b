"""What figures depend on besides the code: the machine, its libraries, and who else it served."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    info = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "torch_config": " ".join(torch.__config__.show().partition("- Build settings")[0].split()),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name(0)
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


class Cpu:
    """How the machine's processors spent their time between two looks."""

    def __init__(self) -> None:
        """Look now."""
        self._before = _jiffies()

    def stolen(self) -> float | None:
        """Return the share of time that the host gave to others since then; ``None`` where it is not told."""
        now = _jiffies()
        if not now or not self._before:
            return None
        spent = [b - a for a, b in zip(self._before, now, strict=True)]
        return spent[7] / sum(spent) if sum(spent) else 0.0


def _jiffies() -> list[int]:
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return []
    return [int(n) for n in first.split()[1:9]]


def _commit() -> str | None:
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
