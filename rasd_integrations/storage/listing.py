"""``rasd cache``: lists and removes our folders by kind, model, size and last use."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.storage.marked import Kind, MarkedFolder, foreign, marked_folders, shortened

_DAY_S = 86400
KINDS = (*get_args(Kind), "earlier")  # in the order of the list


def table(root: Path) -> str:
    """Return our folders in ``root`` as aligned lines, by kind and the largest first, and their total."""
    found = sorted(marked_folders(root), key=lambda own: (KINDS.index(own.kind), -own.nbytes))
    rows = [("kind", "model", "size", "last used")]
    rows += [(own.kind, own.model, _size(own.nbytes), _when(own.last_used)) for own in found]
    rows.append(("total", "", _size(sum(own.nbytes for own in found)), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{kind:<{widths[0]}}  {model:<{widths[1]}}  {size:>{widths[2]}}  {used}".rstrip()
        for kind, model, size, used in rows
    ]
    lines += ["", f"in {root}"]
    if others := foreign(root):
        lines.append(f"not ours, never removed: {shortened(others)}")
    return "\n".join(lines)


def chosen(
    root: Path,
    names: Sequence[str] = (),
    *,
    everything: bool = False,
    older_than_days: float | None = None,
) -> list[MarkedFolder]:
    """Return our folders in ``root`` that a user selected to clear.

    Args:
        root: The cache folder.
        names: Kinds and models as in the table; only folders of one of the kinds and of one of the models.
        everything: Needed if neither ``names`` nor ``older_than_days`` is given.
        older_than_days: Only folders not used for so long.

    Raises:
        ConfigurationError: Nothing is selected, or there is no such model.
    """
    if not names and not everything and older_than_days is None:
        msg = (
            "Nothing is named to be cleared. Name a kind or a model as 'rasd cache' lists it, or --older-than DAYS, "
            "or --all."
        )
        raise ConfigurationError(msg)
    if names and everything:
        msg = f"--all is everything, but {names[0]!r} is named, too. Leave one of them out."
        raise ConfigurationError(msg)
    found = list(marked_folders(root))
    kinds = [name for name in names if name in KINDS]
    models = [name for name in names if name not in KINDS]
    known = sorted({own.model for own in found})
    for model in models:
        if model not in known:
            msg = (
                f"There is nothing of {model!r} in {root}. Kinds are {', '.join(KINDS)}; models there: "
                f"{', '.join(known) or 'none'}."
            )
            raise ConfigurationError(msg)
    latest = time.time() - (older_than_days or 0) * _DAY_S
    return [
        own
        for own in found
        if (not kinds or own.kind in kinds)
        and (not models or own.model in models)
        and (older_than_days is None or own.last_used <= latest)
    ]


def clear(folders: Iterable[MarkedFolder]) -> str:
    """Remove our files in ``folders``; return what was removed as lines."""
    lines, freed = [], 0
    for own in folders:
        nbytes = own.remove()
        freed += nbytes
        lines.append(f"removed {own.model} ({own.kind}): {_size(nbytes)}")
        if own.path.exists():
            lines.append(
                f"  {own.path} stays: it holds files that are not ours or cannot be removed"
            )
    return "\n".join([*lines, f"{_size(freed)} are free now"])


def described(folders: Sequence[MarkedFolder]) -> str:
    """Return names and size of what would be removed."""
    names = ", ".join(sorted({f"{own.model} ({own.kind})" for own in folders}))
    return f"{names}: {_size(sum(own.nbytes for own in folders))}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
