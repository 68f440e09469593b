"""Run random cases through a library built with sanitizers, which end the process at the first fault.

Keys and values end where a page begins that nobody may touch: sanitizers do not see what tiles of AMX read.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import openvino  # noqa: F401 - the library needs its own
import torch
from native_attention import BLOCK, Case, cases, loaded
from torch import Tensor

PROT_NONE = 0
CODE = ctypes.CDLL(None, use_errno=True)


def guarded(memory: Tensor) -> Tensor:
    """Return ``memory`` without its spare block, at the end of its pages."""
    kept = memory[:, :-BLOCK].contiguous()
    nbytes = kept.nbytes
    pages = mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
    guard = len(pages) - mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    if CODE.mprotect(ctypes.c_void_p(address + guard), mmap.PAGESIZE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    found = torch.frombuffer(pages, dtype=torch.uint8)[guard - nbytes : guard]
    return found.view(kept.dtype).view_as(kept).copy_(kept)


def fenced(case: Case) -> Case:
    """Return ``case`` over memory with a guard page behind it."""
    case.keys, case.values = guarded(case.keys), guarded(case.values)
    case.capacity -= BLOCK
    return case


if __name__ == "__main__":
    code, names = loaded(Path(sys.argv[1])), sys.argv[2:]
    count = 0
    for case in cases(300, 3):
        fenced(case).run(code, names[count % len(names)])
        count += 1
    sys.stdout.write(f"{count} cases\n")
