"""The HTTP routes of a server: OpenAI's API, health, readiness and metrics."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from rasd_integrations.errors import ServerError
from rasd_integrations.runtime.telemetry import below_caller
from rasd_integrations.serving.reading import read_chat
from rasd_integrations.serving.server.answers import ClientLeftError
from rasd_integrations.serving.server.exchange import CLIENT_LEFT, Exchange, failed
from rasd_integrations.serving.server.formats import Json, encoded
from rasd_integrations.serving.server.service import Server
from rasd_integrations.serving.server.settings import is_local

_RETRY_S = "1"
_NO_EMBEDDINGS = (
    "This server decodes text and has no embeddings. Ask the model that your vector store was filled with."
)  # fmt: skip


def build_app(server: Server) -> FastAPI:
    """Return the application of a server, which :meth:`Server.load` makes ready."""
    app = FastAPI(title="rasd", docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(server)
    for path, method, handler in (
        ("/v1/chat/completions", "POST", routes.chat),
        ("/v1/completions", "POST", routes.completions),
        ("/v1/embeddings", "POST", routes.embeddings),
        ("/v1/models", "GET", routes.models),
        ("/v1/models/{name:path}", "GET", routes.model),
        ("/tokenize", "POST", routes.tokenize),
        ("/health", "GET", routes.health),
        ("/ready", "GET", routes.ready),
        ("/metrics", "GET", routes.metrics),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(404, routes.unknown)
    app.add_exception_handler(405, routes.unknown)
    return app


class _Routes:
    """The handlers of one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answered(request, chat=False)

    async def embeddings(self) -> Response:
        return _refused(ServerError(_NO_EMBEDDINGS, 501))

    async def models(self, request: Request) -> Response:
        return await self._guarded(request, lambda _: {"object": "list", "data": [self._card()]})

    async def model(self, request: Request, name: str) -> Response:
        def found(_: str) -> Json:
            self.server.check_model(name)
            return self._card()

        return await self._guarded(request, found)

    async def tokenize(self, request: Request) -> Response:
        async def found(namespace: str) -> Json:
            self.server.check_ready()
            body = await self.server.body(request)
            self.server.check_model(body.get("model") or "")
            return await asyncio.to_thread(_tokenized, self.server, namespace, body)

        return await self._guarded(request, found)

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        try:
            self.server.check_ready()
        except ServerError as err:
            return _refused(err)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        asks = request.client.host if request.client else ""
        if self.server.settings.keys and not is_local(asks):
            msg = "With keys, metrics are read on the server's own machine only."
            return _refused(ServerError(msg, 403))
        return Response(self.server.metrics.text(), media_type="text/plain; version=0.0.4")

    async def unknown(self, request: Request, _: Exception) -> Response:
        told = f"There is no {request.method} {request.url.path} here."
        error = {
            "message": told,
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
        return JSONResponse({"error": error}, 404)

    async def _answered(self, request: Request, *, chat: bool) -> Response:
        exchange = Exchange(self.server, request, chat=chat)
        response: Response
        try:
            with below_caller(request.headers):
                response = await exchange.respond()
        except ClientLeftError:
            response = Response(status_code=CLIENT_LEFT)
        except Exception as err:  # noqa: BLE001  (each becomes OpenAI's object)
            response = _refused(err)
        if not isinstance(response, StreamingResponse):
            exchange.log(response.status_code)
        return response

    async def _guarded(
        self, request: Request, make: Callable[[str], Json | Awaitable[Json]]
    ) -> Response:
        """Return what ``make`` does of the namespace of the request's key, or the error."""
        try:
            found = make(self.server.namespace(request))
            return JSONResponse(await found if inspect.isawaitable(found) else found)
        except Exception as err:  # noqa: BLE001  (each becomes OpenAI's object)
            return _refused(err)

    def _card(self) -> Json:
        own = self.server
        card = {"id": own.name, "object": "model", "created": own.created, "owned_by": "rasd"}
        return card | (own.card if own.ready else {})


def _refused(err: Exception) -> Response:
    status, told = failed(err)
    retry = {"Retry-After": _RETRY_S} if status in (429, 503) else {}
    return Response(encoded(told), status, headers=retry, media_type="application/json")


def _tokenized(server: Server, namespace: str, body: Mapping[str, Any]) -> Json:
    """Return the number of tokens of a text or of messages, and the ids of a text, as vLLM does."""
    engine = server.engines.get(namespace, body.get("chat_template_kwargs") or {})
    found: Json = {"max_model_len": engine.window}
    text = body.get("prompt")
    if not isinstance(text, str):
        asked = read_chat({name: body.get(name) for name in ("messages", "tools")}).requests[0]
        return found | {"count": engine.count_tokens(asked.prompt, asked.tools)}
    special = body.get("add_special_tokens", True)
    ids = engine.tokenizer.encode(text) if special else engine.encode(text)
    return found | {"count": len(ids), "tokens": ids}
