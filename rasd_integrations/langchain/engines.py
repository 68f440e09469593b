"""Engines that a model shares with the copies that LangChain builds of it, one a call with options of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain.loaded import LoadedName
from rasd_integrations.runtime.rasd import RASD

_PASSED_ON = (
    "drafter",
    "drafter_device",
    "executor",
    "store",
    "context",
    "knowledge_transfer",
    "deterministic",
    "chat_template_kwargs",
    "retrieval",
    "namespace",
)
_DEFAULTED = (
    "prefix_cache_bytes",
    "prefix_cache_dir",
    "prefix_cache_dir_bytes",
)  # None: the engine's own
_MOST = 8  # engines that are kept; others live as long as a model that uses them


class Engines:
    """Engines by their options, alive as long as the model that made the first or one of its copies.

    ``configurable_fields`` builds a model from the fields of another and drops it after the call. Its answers
    come from the engine that is there: weights, kept prompts, what drafters learnt and statistics stay.
    """

    def __init__(self) -> None:
        """Hold none yet."""
        self._known: list[tuple[Mapping[str, Any], RASD]] = []  # last used last
        self._closed = False
        self._lock = threading.Lock()

    def get(self, options: Mapping[str, Any]) -> RASD:
        """Return the engine of ``options``, made where there is none; a closed one stays closed.

        Raises:
            ConfigurationError: The options contradict each other.
        """
        with self._lock:
            rasd = next((rasd for known, rasd in self._known if _same(known, options)), None)
            if rasd is None:
                rasd = _new_engine(options)
                if self._closed:
                    rasd.close()
            self._put(options, rasd)
            return rasd

    def rename(self, rasd: RASD, options: Mapping[str, Any]) -> None:
        """Say that an engine has other options by now."""
        with self._lock:
            self._put(options, rasd)

    def close(self) -> None:
        """Close all of them, and all that are asked for later."""
        with self._lock:
            self._closed = True
            for _, rasd in self._known:
                rasd.close()

    def _put(self, options: Mapping[str, Any], rasd: RASD) -> None:
        others = [known for known in self._known if known[1] is not rasd]
        self._known = [*others, (options, rasd)][-_MOST:]


def _new_engine(fields: Mapping[str, Any]) -> RASD:
    options: dict[str, Any] = {name: fields[name] for name in _PASSED_ON}
    options |= {name: fields[name] for name in _DEFAULTED if fields[name] is not None}
    options["speculation"] = fields["speculation"].with_draft_tokens(fields["num_draft_tokens"])
    loaded = fields["model"]
    if not isinstance(loaded, LoadedName):
        return RASD(loaded, model_kwargs=fields["model_kwargs"], **options)
    if fields["model_kwargs"]:
        msg = f"model_kwargs {sorted(fields['model_kwargs'])} come too late: the model is loaded."
        raise ConfigurationError(msg)
    return RASD.from_model(loaded.model, loaded.tokenizer, loaded.drafter_model, **options)


def _same(known: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    try:
        return all(_equal(mine, options[name]) for name, mine in known.items())
    except Exception:  # noqa: BLE001 -- stores and options are of anybody's classes, whose == may do anything
        return False


def _equal(mine: Any, theirs: Any) -> bool:
    """Whether two options are one; loaded objects are told by themselves, not by their name."""
    if isinstance(mine, LoadedName) or isinstance(theirs, LoadedName):
        return mine is theirs
    return mine is theirs or bool(mine == theirs)
