"""LlamaIndex: the LLM class :class:`RASDLLM`, for query engines, chat engines and plain calls.

The only part of the package that names LlamaIndex. Everything it does goes through
:class:`rasd_integrations.runtime.rasd.RASD`.
"""

from __future__ import annotations

from rasd_integrations.errors import MissingDependencyError

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as err:
    missing = err.name or ""
    if missing not in {"llama_index", "llama_index.core"}:
        raise
    raise MissingDependencyError(missing, "llama-index") from err

from rasd_integrations.llama_index.base import RASDLLM
from rasd_integrations.llama_index.packing import configure_settings
from rasd_integrations.llama_index.quotes import quoted_nodes, response_quotes

__all__ = ["RASDLLM", "configure_settings", "quoted_nodes", "response_quotes"]
