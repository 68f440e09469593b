"""``rasd batch`` over the machines of a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray.data

from rasd_integrations.config import check_value
from rasd_integrations.serving.batch import Line, Write, answer_lines, fill
from rasd_integrations.serving.server.engines import engines_for
from rasd_integrations.serving.server.formats import Json, encoded
from rasd_integrations.serving.server.settings import ServerSettings

_LINES = 8  # of a part, for each stream: a stop loses one part of each worker at most


def batch(
    source: str | Path,
    target: str | Path,
    *,
    workers: int = 1,
    config: str | Path | None = None,
    resources: Mapping[str, Any] | None = None,
    bar: bool = True,
    **settings: Any,
) -> tuple[int, int]:
    """Answer a file of requests on Ray's workers; return how many were answered and how many failed.

    The files, their order and what is asked again after a stop are those of ``rasd batch``. They are read and written
    here; each worker loads the model once, and is sent neighbours of that order together.

    Args:
        source: Requests, one a line, in OpenAI's batch format.
        target: Answers.
        workers: Processes with a copy of the model each.
        config: A file of settings.
        resources: What a worker takes, as Ray Data's ``map_batches`` has it: ``num_cpus``, ``num_gpus``, ...
        bar: Show the progress on stderr.
        **settings: Of ``rasd serve``, by name; ``streams`` are each worker's.

    Raises:
        ConfigurationError: Settings that cannot work, or requests that cannot be read.
    """
    check_value(workers >= 1, "workers", workers, "at least 1")
    read = ServerSettings.read(settings, config)
    spread = partial(
        _spread, settings=read.model_dump(), workers=workers, resources=resources or {}
    )
    return fill(Path(source), Path(target), spread, bar=bar)


def _spread(
    lines: Sequence[Line],
    write: Write,
    *,
    settings: Json,
    workers: int,
    resources: Mapping[str, Any],
) -> None:
    """Have Ray Data's actors answer parts of the lines, and write the entries of each part as it ends."""
    if not lines:
        return
    # As text of JSON, since a request may hold what no column can: half of a surrogate pair, two kinds of one name.
    rows = [{"line": json.dumps([line.custom_id, line.url, line.body])} for line in lines]
    parts = max(min(workers, len(rows)), len(rows) // (settings["streams"] * _LINES))
    data = ray.data.from_items(rows, override_num_blocks=parts)
    data.context.enable_progress_bars = False
    answered = data.map_batches(
        _Worker,
        fn_constructor_args=(settings,),
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=None,  # a whole part, so that its streams have neighbours
        **resources,
    )
    for row in answered.iter_rows():
        write(json.loads(row["entry"]))


class _Worker:
    """A copy of the model in one of Ray's processes."""

    def __init__(self, settings: Json) -> None:
        self.settings = read = ServerSettings.read(settings)
        self.engines = engines_for(read)
        self.engines.get("", {}).ensure_loaded()

    def __call__(self, part: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Return the entries of one part."""
        made: list[bytes] = []
        answer_lines(
            [Line(*json.loads(line)) for line in part["line"]],
            lambda entry: made.append(encoded(entry)),
            engines=self.engines,
            name=self.settings.name or self.settings.model,
            streams=self.settings.streams,
        )  # fmt: skip
        return {"entry": made}
