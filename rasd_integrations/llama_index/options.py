"""The options and the life cycle of the LlamaIndex LLM."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.schema import BaseNode, MetadataMode
from pydantic import BaseModel, PrivateAttr, PydanticUserError
from typing_extensions import Self

from rasd_integrations.config import SamplingParams
from rasd_integrations.edges.call_options import FrameworkModel
from rasd_integrations.edges.engine import NEVER_KEPT
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.llama_index.messages import to_messages
from rasd_integrations.response_format import Grammar
from rasd_integrations.text.grammar.schema import without_unique_items

_ALIAS = "max_new_tokens"


class RASDOptions(FrameworkModel, FunctionCallingLLM):
    """What :class:`RASDLLM` is made of; it adds the endpoints."""

    _store_given: bool = PrivateAttr(default=False)

    def __init__(self, model: str | Path = "", **options: Any) -> None:
        """Check the options. Load no weights and touch no network; the first call does, or ``load()``.

        Raises:
            ConfigurationError: An unknown option, a value out of its range, or a contradiction.
        """
        super().__init__(model, **_one_name(options))
        # A server searches a store of its own, or none.
        self._store_given = self.store is not None or self.base_url is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leave secrets out of a pickle."""
        state = super().__getstate__()
        for name in NEVER_KEPT:
            state["__dict__"].pop(name, None)
        return state

    @classmethod
    def class_name(cls) -> str:
        """Return the name that serialised objects carry."""
        return "RASDLLM"

    @property
    def max_new_tokens(self) -> int | None:
        """``max_tokens``, by its other name."""
        return self.max_tokens

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        return self._rasd.encode(text)

    def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Return the tokens of ``messages`` as the model reads them, chat template included."""
        if self._rasd.has_chat_template:
            return self._rasd.count_tokens(to_messages(messages))
        return self._rasd.count_tokens(messages_to_prompt(messages))

    def template_tokens(self) -> int:
        """Return the number of tokens around a system and a user message, or around a plain text."""
        letter = "a"
        size = len(self.encode(letter))
        if not self._rasd.has_chat_template:
            return self._rasd.count_tokens(letter) - size
        messages = [{"role": role, "content": letter} for role in ("system", "user")]
        return self._rasd.count_tokens(messages) - 2 * size

    async def aload(self) -> Self:
        """Load the weights in a thread; return itself.

        Await it when a server starts: ``metadata``, which LlamaIndex reads on the event loop, is then known.
        """
        await asyncio.to_thread(self._rasd.ensure_loaded)
        return self

    def attach(self, pipeline: Any) -> Self:
        """Search chunks in the store inside ``pipeline``; return itself.

        Args:
            pipeline: An index, retriever, query engine, chat engine or retriever tool, or any store.

        Raises:
            RetrievalError: There is no store in it that can be searched.
        """
        self._rasd.attach(_retriever_in(pipeline))
        self._store_given = True
        return self

    def _document_text(self, document: str | BaseNode) -> str:
        if isinstance(document, str):
            return document
        return document.get_content(metadata_mode=MetadataMode.LLM)

    def _sampling(self, changes: Mapping[str, Any]) -> SamplingParams:
        return super()._sampling(_one_name(changes))

    def _grammar(self, response_format: Any) -> Grammar | None:
        if not (isinstance(response_format, type) and issubclass(response_format, BaseModel)):
            return Grammar.of_response_format(response_format)
        try:
            schema = response_format.model_json_schema()
        except PydanticUserError as err:
            msg = f"response_format is {response_format.__name__}, which has no JSON schema: {err}."
            raise ConfigurationError(msg) from err
        return Grammar.json_schema(without_unique_items(schema))


def _retriever_in(pipeline: Any) -> Any:
    """Return the retriever that a query engine, chat engine or tool asks, else ``pipeline`` itself."""
    for name in ("_query_engine", "_retriever"):
        if (inner := getattr(pipeline, name, None)) is not None:
            return _retriever_in(inner)
    return pipeline


def _one_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with ``max_new_tokens`` under its first name.

    Raises:
        ConfigurationError: Both names are given and differ.
    """
    renamed = dict(options)
    if _ALIAS not in renamed:
        return renamed
    value = renamed.pop(_ALIAS)
    if renamed.setdefault("max_tokens", value) != value:
        msg = f"max_tokens is {renamed['max_tokens']} and {_ALIAS} is {value}; give one of them."
        raise ConfigurationError(msg)
    return renamed
