"""Local LLM classes for LangChain and LlamaIndex with retrieval-augmented speculative decoding.

The framework classes are in :mod:`rasd_integrations.langchain` and :mod:`rasd_integrations.llama_index`.
This module is the framework-free core; it imports no framework or vector store, and torch only when
:class:`RASD` is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rasd_integrations._version import __version__
from rasd_integrations.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rasd_integrations.errors import (
    ConfigurationError,
    ContextOverflowError,
    DecodingError,
    DeviceMemoryError,
    MissingDependencyError,
    ModelLoadError,
    PromptError,
    PromptTooLongError,
    RASDError,
    RetrievalError,
    StorageError,
    VocabularyMismatchError,
)
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.stats import DecodingStats, Quote
from rasd_integrations.types import (
    Chunk,
    Draft,
    DraftContext,
    Generation,
    GrammarState,
    TextDelta,
    TokenBlock,
    ToolCall,
    ToolCallDelta,
)

if TYPE_CHECKING:
    from rasd_integrations.drafters.base import Drafter, DraftSession
    from rasd_integrations.prompting import PromptHints
    from rasd_integrations.retrieval import ChunkSource, as_chunk_source
    from rasd_integrations.runtime.rasd import RASD
    from rasd_integrations.text.answer.explanation import Explanation

_LAZY = {
    "RASD": "rasd_integrations.runtime.rasd",
    "PromptHints": "rasd_integrations.prompting",
    "Explanation": "rasd_integrations.text.answer.explanation",
    "ChunkSource": "rasd_integrations.retrieval",
    "as_chunk_source": "rasd_integrations.retrieval",
    "Drafter": "rasd_integrations.drafters.base",
    "DraftSession": "rasd_integrations.drafters.base",
}

__all__ = [
    "RASD",
    "Chunk",
    "ChunkSource",
    "ConfigurationError",
    "ContextOverflowError",
    "DecodingError",
    "DecodingStats",
    "DeviceMemoryError",
    "Draft",
    "DraftContext",
    "DraftSession",
    "Drafter",
    "Explanation",
    "Generation",
    "Grammar",
    "GrammarState",
    "MissingDependencyError",
    "ModelLoadError",
    "PromptError",
    "PromptHints",
    "PromptTooLongError",
    "Quote",
    "RASDError",
    "RetrievalConfig",
    "RetrievalError",
    "SamplingParams",
    "SpeculationConfig",
    "StorageError",
    "TextDelta",
    "TokenBlock",
    "ToolCall",
    "ToolCallDelta",
    "ToolUse",
    "VocabularyMismatchError",
    "__version__",
    "as_chunk_source",
]


def __getattr__(name: str) -> object:
    """Import names that need torch on first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
