"""Keep one engine in this process and answer line by line, whichever interpreter it is.

``pipelines.py`` starts it: ``python pipelines_worker.py JOB``, a JSON file. It writes a line when the engine is
there; then each line of standard input is a prompt and each line of standard output its answer, all JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from answers import peak_mib
from catalog import PIPELINE_ENGINES


def main() -> None:
    """Build the engine and answer until standard input ends."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    spec = PIPELINE_ENGINES[job["engine"]]
    started = time.perf_counter()
    engine = getattr(importlib.import_module(spec.module), spec.cls)(job, **spec.options)
    say(
        about={"python": platform.python_version()} | engine.about(),
        load_s=time.perf_counter() - started,
        load_peak_mib=peak_mib(),
        store_mib=getattr(engine, "store_mib", 0.0),
        follows_schemas=getattr(engine, "follows_schemas", False),
    )
    for line in sys.stdin:
        prompt = json.loads(line)
        answer = asdict(engine.answer(prompt, prompt["max_tokens"]))
        say(answer=answer, reply=getattr(engine, "reply", None), peak_mib=peak_mib())


if __name__ == "__main__":
    main()
