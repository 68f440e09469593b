"""LangChain's face of the package: a chat model and a plain-text model over one shared engine."""

from __future__ import annotations

from rasd_integrations.errors import MissingDependencyError

try:
    import langchain_core  # noqa: F401 - only to name the extra when it is absent
except ModuleNotFoundError as err:
    if err.name != "langchain_core":
        raise
    raise MissingDependencyError(err.name, extra="langchain") from err

from rasd_integrations.langchain.chat_models import ChatRASD
from rasd_integrations.langchain.llms import RASDLLM

__all__ = ["RASDLLM", "ChatRASD"]
