"""RemoteRASD: the calls of ``RASD`` on a model behind HTTP."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NoReturn

from rasd_integrations.config import ContextMode
from rasd_integrations.errors import ConfigurationError, ServerError
from rasd_integrations.process import locked
from rasd_integrations.prompting import Prompt
from rasd_integrations.response_format import ToolUse
from rasd_integrations.runtime.aio import iterate_in_own_loop
from rasd_integrations.runtime.pipeline import Request, joined
from rasd_integrations.runtime.together import check_not_left, is_part
from rasd_integrations.serving.client.connection import Connection, ServerOptions
from rasd_integrations.serving.client.foreign import foreign_body
from rasd_integrations.serving.client.replies import Reply
from rasd_integrations.serving.client.served import Served, served_in
from rasd_integrations.serving.client.sessions import session_headers
from rasd_integrations.serving.wire import write_chat, write_completion, write_messages
from rasd_integrations.stats import DecodingStats
from rasd_integrations.transfer import rule_name
from rasd_integrations.types import Generation, TextDelta

_WORD = 64  # characters
_MOST_WORDS = 1 << 14
_MOST_TEXTS = 8
_NOT_HERE = {
    "tokenizer": "it is in the server's process. Count with get_num_tokens() or count_tokens(), or load one with "
    "transformers' AutoTokenizer",
    "explain": "the records of its steps stay in the server's process. Read acceptance per drafter in the answer's "
    "statistics, or explain where the model is loaded",
    "attach": "a store is searched by the process that has the model. What a chain retrieves travels by itself; for "
    "more, start the server with the store",
    "warm": "the server's process keeps what it read. Ask about each document once, with max_tokens=1",
    "forget": "the server's process keeps earlier answers, for all who ask it. Forget there",
    "clear_cache": "the server's process keeps earlier prompts, for all who ask it. Clear it there",
}


class RemoteRASD:
    """A model behind HTTP, with the calls of :class:`~rasd_integrations.runtime.rasd.RASD` that the edges make.

    The server is asked for its models once, before the first answer.
    """

    def __init__(
        self,
        server: ServerOptions,
        model: str = "",
        *,
        context: ContextMode = "prompt",
        knowledge_transfer: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Open no connection yet.

        Args:
            server: Where it is.
            model: Its name there; empty: the only one that is served.
            context: What the model reads, for requests that do not say.
            knowledge_transfer: A rule's name, or a rule, likewise.
            chat_template_kwargs: For the server's chat template.
        """
        self._connection = Connection(server)
        self._address = server.base_url
        self._asked = model
        self._context, self._rule = context, knowledge_transfer
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._lock = threading.RLock()
        self._known: Served | None = None
        # LlamaIndex packs contexts by the tokens of each word in them, and counts a query's whole context four times,
        # on the event loop.
        self._word_ids = lru_cache(_MOST_WORDS)(self._ids)
        self._text_ids = lru_cache(_MOST_TEXTS)(self._ids)
        self.stats = DecodingStats()

    # --- what the server says of itself ---

    @property
    def model_name(self) -> str:
        """The model's name there; empty where none was given and the server was not asked yet."""
        return self._asked or (self._known.name if self._known else "")

    @property
    def identity(self) -> dict[str, Any]:
        """All that affects the output besides prompt and sampling and is known here; asks no server."""
        return {
            "base_url": self._address,
            "model": self._asked,
            "context": self._context,
            "knowledge_transfer": rule_name(self._rule),
            "chat_template_kwargs": self._template_kwargs,
        }

    @property
    def window(self) -> int | None:
        """Longest sequence of prompt and answer, in tokens, if the server says it."""
        return self._served().window

    @property
    def max_tokens(self) -> int:
        """Longest answer of a call without ``max_tokens``."""
        return self._served().max_tokens

    @property
    def has_chat_template(self) -> bool:
        """True if messages can be formatted, by the server's template or an option's."""
        return "chat_template" in self._template_kwargs or self._served().has_chat_template

    @property
    def has_reasoning(self) -> bool:
        """True if the server says that its model marks reasoning in the output."""
        return self._served().has_reasoning

    def ensure_loaded(self) -> None:
        """Ask the server for its models, unless it was asked.

        Raises:
            ModelLoadError: It does not serve this one.
            ServerError: It cannot be reached.
        """
        self._served()

    def _served(self) -> Served:
        self._connection.check_open()
        if self._known is None or not self._known.is_final:
            client = self._connection.for_threads()
            with self._connection.errors():
                try:
                    listed = client.get("/models", cast_to=object)
                except Exception as err:  # noqa: BLE001  (raised again)
                    listed = self._unlisted(err)
            self._known = served_in(listed, self._asked, self._address)
        return self._known

    async def _aserved(self) -> Served:
        self._connection.check_open()
        if self._known is None or not self._known.is_final:
            client = await self._connection.for_this_loop()
            with self._connection.errors():
                try:
                    listed = await client.get("/models", cast_to=object)
                except Exception as err:  # noqa: BLE001  (raised again)
                    listed = self._unlisted(err)
            self._known = served_in(listed, self._asked, self._address)
        return self._known

    def _unlisted(self, err: Exception) -> object:
        """Return what a server without a list of models would list, if a model was named."""
        if self._asked and getattr(err, "status_code", None) in (404, 405, 501):
            return {"data": [{"id": self._asked}]}
        raise err

    # --- answers ---

    def stream(self, request: Request) -> Generator[TextDelta, None, None]:
        """Send the request now and read the answer lazily; closing the iterator ends the request.

        Raises:
            RASDError: What the server raised before the answer, as in process.
        """
        deltas = self._deltas(request)
        next(deltas)
        return deltas

    def stream_to_end(self, request: Request) -> Generator[TextDelta, None, None]:
        """Stream an answer that is read to its end at once.

        In a batch, the request ends as soon as the batch is left, also while the server is silent.
        """
        if not is_part():
            return self.stream(request)
        return iterate_in_own_loop(self.astream(request), check_not_left)

    def generate(self, request: Request) -> Generation:
        """Return the whole answer."""
        return joined(list(self.stream(request)))

    async def agenerate(self, request: Request) -> Generation:
        """Return the whole answer without blocking the event loop."""
        return joined([delta async for delta in self.astream(request)])

    def _deltas(self, request: Request) -> Generator[TextDelta, None, None]:
        """Yield an empty piece once the server has taken the request, then the answer."""
        from openai import Stream

        path, body = self._written(request, self._served())
        client, reply = self._connection.for_threads(), Reply(self._address)
        with self._connection.errors(body):
            events = client.post(
                path,
                body=body,
                options={"headers": self._headers(request)},
                cast_to=object,
                stream=True,
                stream_cls=Stream[object],
            )
            try:
                yield TextDelta("")
                for event in events:
                    if (delta := reply.push(event)) is not None:
                        yield delta
            finally:
                events.close()
            yield self._counted(reply.end())

    async def astream(self, request: Request) -> AsyncGenerator[TextDelta, None]:
        """Stream without blocking the event loop; cancelling ends the request."""
        from openai import AsyncStream

        path, body = self._written(request, await self._aserved())
        client, reply = await self._connection.for_this_loop(), Reply(self._address)
        with self._connection.errors(body):
            events = await client.post(
                path,
                body=body,
                options={"headers": self._headers(request)},
                cast_to=object,
                stream=True,
                stream_cls=AsyncStream[object],
            )
            try:
                while (event := await anext(events, None)) is not None:
                    if (delta := reply.push(event)) is not None:
                        yield delta
            finally:
                await events.close()
            yield self._counted(reply.end())

    def _written(self, request: Request, served: Served) -> tuple[str, dict[str, Any]]:
        """Return path and body of a request.

        Raises:
            ConfigurationError: An option would change the answer, and the server does not know it.
        """
        request = self._completed(request)
        if isinstance(request.prompt, str):
            path, body = "/completions", write_completion(request)
        else:
            path, body = "/chat/completions", write_chat(request, self._template_kwargs)
        if served.kind != "rasd":
            body = foreign_body(body, is_vllm=served.kind == "vllm", address=self._address)
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return path, {**body, "model": served.name, **streamed}

    def _headers(self, request: Request) -> dict[str, str]:
        own = self._connection.options.client_kwargs.get("default_headers") or {}
        return session_headers(request, own)

    def _completed(self, request: Request) -> Request:
        params = request.params
        if self._rule is not None and params.knowledge_transfer is None:
            params = replace(params, knowledge_transfer=self._rule)
        own = None if self._context == "prompt" else self._context
        return replace(request, params=params, context=request.context or own)

    @locked
    def _counted(self, last: TextDelta) -> TextDelta:
        if last.stats is not None:
            self.stats.add(last.stats)
        return last

    # --- tokens ---

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens.

        Raises:
            ConfigurationError: The server has no endpoint for it.
        """
        if not text:
            return []
        kept = self._word_ids if len(text) <= _WORD else self._text_ids
        return list(kept(text))

    def _ids(self, text: str) -> tuple[int, ...]:
        found = self._tokenized("tokens", list, {"prompt": text, "add_special_tokens": False})
        return tuple(map(int, found))

    def count_tokens(self, prompt: Prompt, tools: ToolUse | None = None) -> int:
        """Return the number of tokens of a prompt, template and tools included; nothing has 0.

        Raises:
            ConfigurationError: The server has no endpoint for it.
        """
        if not prompt:
            return 0
        if isinstance(prompt, str):
            asked: dict[str, Any] = {"prompt": prompt, "add_special_tokens": True}
            return int(self._tokenized("count", int, asked))
        asked = {"messages": write_messages(prompt)}
        if tools is not None and tools.visible:
            asked["tools"] = [dict(tool) for tool in tools.visible]
        if self._template_kwargs:
            asked["chat_template_kwargs"] = self._template_kwargs
        return int(self._tokenized("count", int, asked))

    def _tokenized(self, name: str, kind: type, asked: Mapping[str, Any]) -> Any:
        served = self._served()
        if served.kind == "other":
            msg = (
                f"{self._address} has no endpoint that counts tokens; `rasd serve` and vLLM have one. Count with a "
                f"tokenizer of your own."
            )
            raise ConfigurationError(msg)
        client, url = self._connection.for_threads(), f"{self._connection.options.root}/tokenize"
        with self._connection.errors():
            found: Any = client.post(url, body={"model": served.name, **asked}, cast_to=object)
        if isinstance(found, Mapping) and isinstance(found.get(name), kind):
            return found[name]
        msg = f"{url} answered {repr(found)[:80]}, but must answer with {name!r}, as vLLM does."
        raise ServerError(msg)

    # --- what is done in the server's own process ---

    @property
    def tokenizer(self) -> NoReturn:
        """Refuse: it is loaded there."""
        self._refuse("tokenizer")

    @property
    def explain(self) -> NoReturn:
        """Refuse, before a request is made: the records of steps do not travel."""
        self._refuse("explain")

    def attach(self, store: object) -> NoReturn:
        """Refuse: a store is searched where the model runs."""
        self._refuse("attach")

    def warm(self, documents: Sequence[Prompt], progress: object = None) -> NoReturn:
        """Refuse: what is warmed is kept there."""
        self._refuse("warm")

    def forget(self, text: str | None = None) -> NoReturn:
        """Refuse: others are answered from the same memory."""
        self._refuse("forget")

    def clear_cache(self) -> NoReturn:
        """Refuse: others are answered from the same cache."""
        self._refuse("clear_cache")

    def _refuse(self, call: str) -> NoReturn:
        msg = f"{call} is not possible for a model at {self._address}: {_NOT_HERE[call]}."
        raise ConfigurationError(msg)

    def close(self) -> None:
        """Close the connections; requests that are open end, and later calls raise."""
        self._connection.close()
