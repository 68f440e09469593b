"""Mapped weights leave memory once they were read, and are the same when they are read again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rasd_integrations.engine.mapped import release

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="release() does nothing elsewhere")
COUNT = 1 << 20


class Mapped(nn.Module):
    """A weight in a mapped file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.write_bytes(torch.arange(COUNT, dtype=torch.float32).numpy().tobytes())
        self.weight = nn.Parameter(torch.from_file(str(path), size=COUNT), requires_grad=False)


def resident(path: Path) -> int:
    """Return the bytes of the file that are in memory as the process's own."""
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    kept = (part for part in parts if str(path) in part.partition("\n")[0])
    return sum(1024 * int(re.search(r"Rss:\s+(\d+)", part)[1]) for part in kept)


def test_a_read_weight_leaves_memory_and_comes_back(tmp_path):
    """Its values are those of the file."""
    model = Mapped(tmp_path / "weights")
    wanted = model.weight.sum()
    assert resident(tmp_path / "weights") >= 4 * COUNT
    release(model, None)
    assert resident(tmp_path / "weights") == 0
    assert model.weight.sum() == wanted


def test_a_changed_weight_stays(tmp_path):
    """What was written into a private mapping is nowhere else."""
    model = Mapped(tmp_path / "weights")
    model.weight[7] = -1
    release(model, None)
    assert model.weight[7] == -1
    assert model.weight[8] == 8


def test_files_of_a_folder_leave_memory(tmp_path):
    """Those beside it stay."""
    kept, gone = tmp_path / "kept", tmp_path / "graph" / "graph.bin"
    gone.parent.mkdir()
    weights = [Mapped(path).weight for path in (kept, gone)]
    assert weights[0].sum() == weights[1].sum()
    assert min(resident(kept), resident(gone)) > 0
    release(nn.Module(), gone.parent)
    assert resident(gone) == 0
    assert resident(kept) > 0
