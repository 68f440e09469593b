"""One HTTP request for answers, from its body to its last byte."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from rasd_integrations.errors import RASDError
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.serving.reading import read_chat, read_completion
from rasd_integrations.serving.server.answers import ClientLeftError, deltas_of
from rasd_integrations.serving.server.formats import Head, Json, encoded, event, failure
from rasd_integrations.serving.server.service import Server
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.logprobs import openai_logprobs
from rasd_integrations.types import TextDelta, TokenLogprob, WrittenLogprob

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Status in the log and the metrics; nobody reads it."""


class Exchange:
    """Answers one request; ``chat``: to messages."""

    def __init__(self, server: Server, request: Request, *, chat: bool) -> None:
        """Read nothing yet."""
        self.server, self.request, self.chat = server, request, chat
        self.started = time.perf_counter()
        self.first: dict[int, float] = {}  # seconds to each answer's first token
        self.ended: dict[int, DecodingStats] = {}

    async def respond(self) -> Response:
        """Return the response, whose stream writes its own line in the log.

        Raises:
            RASDError: What is wrong with the request, or was with its answers.
        """
        server = self.server
        server.check_ready()
        namespace = server.namespace(self.request)
        body = await server.body(self.request)
        self.asked = asked = (read_chat if self.chat else read_completion)(body)
        server.check_model(asked.model)
        engine = await asyncio.to_thread(server.engines.get, namespace, asked.template_kwargs)
        if server.settings.prompt_tokens or server.settings.answer_tokens:
            asked = self.asked = await asyncio.to_thread(server.limited, engine, asked)
        self.head = Head(server.name, self.chat, partial(_entries, engine))
        deltas = deltas_of(
            engine, asked.each(), server.places, seconds=server.settings.seconds, left=self._left
        )
        if not asked.stream:
            return Response(encoded(await self._whole(deltas)), media_type="application/json")
        # What is wrong with the request is known before the first delta, and is no stream.
        first = await anext(deltas)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        stream = self._events(first, deltas)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def _left(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def _whole(self, deltas: AsyncGenerator[tuple[int, TextDelta], None]) -> Json:
        answers: list[list[TextDelta]] = [[] for _ in range(self.asked.answers)]
        async with aclosing(deltas):
            async for number, delta in deltas:
                self._count(number, delta)
                answers[number].append(delta)
        return self.head.whole(answers, len(self.asked.requests))

    async def _events(
        self, first: tuple[int, TextDelta], deltas: AsyncGenerator[tuple[int, TextDelta], None]
    ) -> AsyncGenerator[bytes, None]:
        status = 200
        try:
            async with aclosing(deltas):
                for number in range(self.asked.answers):
                    for found in self.head.first(number):
                        yield event(found)
                number, delta = first
                while True:
                    self._count(number, delta)
                    for found in self.head.chunks(number, delta):
                        yield event(found)
                    try:
                        number, delta = await anext(deltas)
                    except StopAsyncIteration:
                        break
            if self.asked.include_usage:
                stats = [self.ended[n] for n in sorted(self.ended)]
                yield event(self.head.last(stats, len(self.asked.requests)))
            yield b"data: [DONE]\n\n"
        except ClientLeftError:
            status = CLIENT_LEFT
        except Exception as err:  # noqa: BLE001  (the head is sent; the error is the stream's last event)
            status, told = failed(err)
            yield event(told)
        except BaseException:
            status = CLIENT_LEFT
            raise
        finally:
            self.log(status)

    def _count(self, number: int, delta: TextDelta) -> None:
        now = time.perf_counter() - self.started
        if delta.token_ids:
            self.first.setdefault(number, now)
        if delta.stats is not None:
            self.ended[number] = delta.stats
            first = self.first.get(number, now)
            self.server.metrics.answer(delta.stats, first, now - first)

    def log(self, status: int) -> None:
        """Count the request and write its line."""
        made = [*self.ended.values()]
        seconds = time.perf_counter() - self.started
        path = self.request.url.path
        self.server.metrics.request(path, status, seconds)
        _log(path, status, seconds, made)


def _entries(engine: RASD, logprobs: Sequence[TokenLogprob | WrittenLogprob]) -> list[Json]:
    return openai_logprobs(engine.tokenizer, logprobs)


def _log(path: str, status: int, seconds: float, made: list[DecodingStats]) -> None:
    told: Json = {"path": path, "status": status, "seconds": round(seconds, 3)}
    if made:
        told |= {
            "prompt_tokens": sum(s.prompt_tokens for s in made),
            "cached_tokens": sum(s.cached_prompt_tokens for s in made),
            "answer_tokens": sum(s.generated_tokens for s in made),
            "target_steps": sum(s.target_steps for s in made),
            "drafted": sum(s.drafted for s in made),
            "accepted": sum(s.accepted for s in made),
        }
    logger.info(
        " ".join(f"{name}={value}" for name, value in told.items()), extra={"request": told}
    )


def failed(err: Exception) -> tuple[int, Json]:
    """Return the status and the object of an error; log what is not the client's to know."""
    if not isinstance(err, RASDError):
        logger.error("A request failed.", exc_info=err)
    return failure(err)
