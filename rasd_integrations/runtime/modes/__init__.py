"""Ways to answer that choose among prompts or answers; each is a mode of the models' option ``mode``."""

from __future__ import annotations

from typing import Any

from rasd_integrations.config import ContextMode
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.runtime.modes.base import Mode, Plain
from rasd_integrations.runtime.modes.ranked import SpeculativeRAG
from rasd_integrations.runtime.modes.rewarded import RewardGuided, Step
from rasd_integrations.runtime.modes.route import Route

__all__ = ["Mode", "RewardGuided", "Route", "SpeculativeRAG", "Step", "mode_name", "mode_of"]

_MODES = {"route": Route, "speculative-rag": SpeculativeRAG}
_OBJECT = "<mode: "


def mode_of(spec: Any, context: ContextMode) -> Mode:
    """Return the mode that ``spec`` names; ``None`` is one answer to what ``context`` says.

    Raises:
        ConfigurationError: It names none, or contradicts ``context``.
    """
    if spec is None:
        return Plain(context)
    if context != "prompt":
        msg = f"mode is {spec!r} and context {context!r}, but a mode chooses what is read. Leave context out."
        raise ConfigurationError(msg)
    if isinstance(spec, Mode):
        return spec
    if isinstance(spec, str) and spec in _MODES:
        return _MODES[spec]()
    msg = f"mode is {spec!r}, but must be None, {', '.join(map(repr, _MODES))}, or a Mode."
    raise ConfigurationError(msg)


def mode_name(spec: Any) -> str | None:
    """Return ``spec`` as settings and cache keys hold it; an object, which cannot be read back, is marked as one."""
    if spec is None or isinstance(spec, Plain):
        return None
    return spec if isinstance(spec, str) else f"{_OBJECT}{spec!r}>"
