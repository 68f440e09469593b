"""The table of ``weights.py``."""

from __future__ import annotations

from typing import Any

Row = list[str]


def weights_rows(document: dict[str, Any]) -> list[Row]:
    """Return a row for each form of a model's weights."""
    columns = {
        "first load, s": "first_load_s", "its peak, MiB": "first_peak_mib", "later load, s": "load_s",
        "its peak, MiB ": "load_peak_mib", "kept on disk, MiB": "disk_mib",
    }  # fmt: skip
    widths = document["rows"][0]["steps_ms"]
    steps = [f"{n} row{'s' * (n != '1')}, ms" for n in widths]
    rows: list[Row] = [["weights", *columns, *steps, "nats a token against dense"]]
    for row in document["rows"]:
        figures = [f"{row[name]:,.{1 if name.endswith('_s') else 0}f}" for name in columns.values()]
        rows.append(
            [row["form"], *figures, *(f"{ms:.1f}" for ms in row["steps_ms"].values()), row["nats"]]
        )
    return rows
