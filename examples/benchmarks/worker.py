"""Run one engine on one job in this process, whichever interpreter it is.

``run.py`` starts it: ``python worker.py JOB RESULT``, both JSON files. Nothing is imported but the standard
library and what the engine itself needs. Warm-up comes first: one question that shares nothing with the others.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from answers import Answer, peak_mib
from catalog import ENGINES

WARMUP_TOKENS = 16


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine, warm it up, ask every question once."""
    spec = ENGINES[job["engine"]]
    room = importlib.import_module(spec.module)
    started = time.perf_counter()
    engine = getattr(room, spec.cls)(job, **spec.options)
    load_s = time.perf_counter() - started
    engine.answer(job["warmup"], WARMUP_TOKENS)
    answers: list[Answer] = []
    for number, prompt in enumerate(job["prompts"], start=1):
        answers.append(engine.answer(prompt, job["max_tokens"]))
        print(f"{job['engine']} {number}/{len(job['prompts'])}", file=sys.stderr, flush=True)
    out: dict[str, Any] = {
        "about": {"python": platform.python_version()} | engine.about(),
        "load_s": load_s,
        "answers": [asdict(answer) for answer in answers],
        "peak_memory_mib": getattr(engine, "peak_mib", peak_mib)(),
    }
    if job["widths"] and hasattr(engine, "step_ms"):
        prefix = min(len(prompt["ids"]) for prompt in job["prompts"])
        out["step_ms"] = engine.step_ms(prefix, job["widths"])
    return out


def main() -> None:
    """Read the job, write the result."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(run(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
