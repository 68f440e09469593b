"""LangChain's standard options of remote services.

Code that builds any chat model passes them; a local model has no key, address, network timeout or retries
that they could mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

_OPTIONS = frozenset({"api_key", "base_url", "timeout", "max_retries"})
_told: set[str] = set()


def without_remote(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` without these; each that is set is warned of once a process, by name."""
    new = sorted(n for n in _OPTIONS - _told if options.get(n) is not None)
    _told.update(new)
    if new:
        them = "it" if len(new) == 1 else "them"
        msg = f"{', '.join(new)}: without effect, because the model runs in this process. Leave {them} out."
        warnings.warn(msg, UserWarning, stacklevel=3)
    return {name: value for name, value in options.items() if name not in _OPTIONS}
