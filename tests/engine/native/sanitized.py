"""Run random cases through a library built with sanitizers, which end the process at the first fault."""

from __future__ import annotations

import sys
from pathlib import Path

import openvino  # noqa: F401 - the library needs its own
from native_attention import cases, loaded

if __name__ == "__main__":
    code, names = loaded(Path(sys.argv[1])), sys.argv[2:]
    count = 0
    for case in cases(300, 3):
        case.run(code, names[count % len(names)])
        count += 1
    sys.stdout.write(f"{count} cases\n")
