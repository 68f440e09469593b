"""The engines of a server: one model, an engine for each namespace and way of writing prompts."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from rasd_integrations.process import locked
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.serving.server.settings import ServerSettings
from rasd_integrations.serving.server.stores import open_store

_MOST = 64  # engines kept; they share the weights, so each is small

MakeEngine = Callable[[str, Mapping[str, Any]], RASD]
"""Returns a new engine of a namespace, with options for the chat template."""


class Engines:
    """Engines by namespace and chat template options; all share one loaded model."""

    def __init__(self, make: MakeEngine) -> None:
        """Make none yet."""
        self._make = make
        self._known: OrderedDict[tuple[str, str], RASD] = OrderedDict()
        self._lock = threading.Lock()

    @locked
    def get(self, namespace: str, template_kwargs: Mapping[str, Any]) -> RASD:
        """Return the engine of a namespace.

        Raises:
            ConfigurationError: An option that the chat template cannot be given.
        """
        key = namespace, json.dumps(template_kwargs, sort_keys=True)
        if key not in self._known:
            self._known[key] = self._make(namespace, template_kwargs)
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)  # answers that run keep it until they end
        return self._known[key]

    @locked
    def close(self) -> None:
        """Close all of them."""
        for engine in self._known.values():
            engine.close()


def engines_of(model: str, options: Mapping[str, Any], store: object) -> Engines:
    """Return the engines of a model, which share ``options`` and ``store``."""

    def make(namespace: str, template_kwargs: Mapping[str, Any]) -> RASD:
        return RASD(
            model,
            store=store,
            namespace=namespace,
            chat_template_kwargs=template_kwargs,
            **options,
        )

    return Engines(make)


def engines_for(settings: ServerSettings) -> Engines:
    """Return the engines that settings describe.

    Raises:
        RetrievalError: The store cannot be opened.
    """
    store = None if settings.store is None else open_store(settings.store)
    return engines_of(settings.model, settings.engine_options(), store)
