"""``rasd batch``: answers a file of requests in OpenAI's batch format, and goes on where it was stopped."""

from __future__ import annotations

import json
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm  # type: ignore[import-untyped]

from rasd_integrations.errors import ConfigurationError, RASDError, ServerError
from rasd_integrations.process import locked
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.runtime.together import as_they_end, has_left, until_left
from rasd_integrations.serving.reading import Asked, read_chat, read_completion
from rasd_integrations.serving.server.engines import Engines, engines_for
from rasd_integrations.serving.server.formats import Head, Json, encoded, failure
from rasd_integrations.serving.server.settings import ServerSettings
from rasd_integrations.storage.atomic import replaced_file
from rasd_integrations.text.answer.logprobs import openai_logprobs

logger = logging.getLogger(__name__)

_DONE = 200
_READ = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}
_FAILED = 500  # what failed so is asked again; what was refused stays refused


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input."""

    custom_id: str
    url: str
    body: Mapping[str, Any]

    @property
    def prefix(self) -> str:
        """What lines are put in order by: those with a common beginning are answered one after the other."""
        said = self.body.get("messages", self.body.get("prompt"))
        tools = self.body.get("tools") or ""  # templates write them before the conversation
        return json.dumps([tools, said], sort_keys=True, default=str)


def read_lines(path: Path) -> list[Line]:
    """Return the requests of a file.

    Raises:
        ConfigurationError: It cannot be read, or a line is no request of a batch; names the line.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        msg = f"The batch {str(path)!r} cannot be read: {err}."
        raise ConfigurationError(msg) from err
    lines = [_line(path, n, text) for n, text in enumerate(texts, 1) if text.strip()]
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line.custom_id in seen:
            both = f"Requests {seen[line.custom_id]} and {number} of {str(path)!r}"
            msg = f"{both} share the custom_id {line.custom_id!r}. Give each its own."
            raise ConfigurationError(msg)
        seen[line.custom_id] = number
    return lines


def _line(path: Path, number: int, text: str) -> Line:
    wants = 'must be {"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as err:
        msg = f"Line {number} of {str(path)!r} is no JSON: {err}. It {wants}."
        raise ConfigurationError(msg) from err
    entry = given if isinstance(given, dict) else {}
    name, url, body = entry.get("custom_id"), entry.get("url"), entry.get("body")
    posted = entry.get("method", "POST") == "POST" and url in _READ
    if posted and isinstance(name, str) and name and isinstance(body, dict):
        return Line(name, str(url), body)
    msg = f"Line {number} of {str(path)!r} {wants}; url is one of {', '.join(_READ)}."
    raise ConfigurationError(msg)


class _Output:
    """The file of answers; a line is written whole, or not at all once the file is read again."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        found = path.read_bytes() if path.exists() else b""
        lines = [(name, line) for line in found.split(b"\n") if (name := _answered_in(line))]
        self.done = {name for name, _ in lines}
        with replaced_file(path, len(found)) as file:  # without a line that was cut
            file.writelines(line + b"\n" for _, line in lines)
        self._file: BinaryIO = path.open("ab")

    @locked
    def write(self, entry: Json) -> None:
        self._file.write(encoded(entry) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _answered_in(line: bytes) -> str | None:
    """Return the custom_id of a line that need not be asked again."""
    try:
        entry = json.loads(line)
        name, status = entry["custom_id"], entry["response"]["status_code"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and isinstance(status, int) and status < _FAILED else None


def run_batch(
    source: Path, target: Path, engines: Engines, *, name: str, streams: int, bar: bool = True
) -> tuple[int, int]:
    """Answer the requests of ``source`` into ``target``; return how many were answered and how many failed.

    Requests with a common prefix follow one another on one of the ``streams``, which decode side by side.

    Args:
        source: Requests, one a line.
        target: Answers, in the order in which they are made.
        engines: What answers.
        name: Of the model, as answers show it.
        streams: Answers that are decoded at a time.
        bar: Show the progress on stderr.

    Raises:
        ConfigurationError: ``source`` cannot be read.
    """
    answer = partial(answer_lines, engines=engines, name=name, streams=streams)
    return fill(source, target, answer, bar=bar)


Write = Callable[[Json], None]
"""Takes OpenAI's entry of an answered request; may be called from any thread."""


def fill(
    source: Path, target: Path, answer: Callable[[Sequence[Line], Write], None], *, bar: bool = True
) -> tuple[int, int]:
    """Have ``answer`` write the entries of ``source`` into ``target``; return how many, and how many failed.

    It is given the lines in the order of their prefixes, but for those that ``target`` holds already. What failed with
    a status of 500 or above is asked again.

    Raises:
        ConfigurationError: ``source`` cannot be read.
    """
    lines = sorted(read_lines(source), key=lambda line: line.prefix)
    output = _Output(target)
    left = [line for line in lines if line.custom_id not in output.done]
    statuses: list[int] = []
    with tqdm(
        total=len(lines), initial=len(lines) - len(left), unit=" requests", disable=not bar
    ) as shown:

        def write(entry: Json) -> None:
            output.write(entry)
            statuses.append(entry["response"]["status_code"])
            shown.update()

        try:
            answer(left, write)
        finally:
            output.close()
    return len(statuses), sum(status != _DONE for status in statuses)


def answer_lines(
    lines: Sequence[Line], write: Write, *, engines: Engines, name: str, streams: int
) -> None:
    """Answer lines on ``streams`` threads, each with neighbours of its own, and write the entries as they are made."""
    share = max(-(-len(lines) // streams), 1)

    def answer_part(at: int) -> None:
        for line in lines[at : at + share]:
            write(_answered(line, engines, name))

    jobs = [partial(answer_part, at) for at in range(0, len(lines), share)]
    with closing(as_they_end(jobs, streams)) as ended:
        for _ in ended:
            pass


def _answered(line: Line, engines: Engines, name: str) -> Json:
    """Return OpenAI's entry of one answered request; an error of its own is one, too."""
    status = _DONE
    try:
        asked = _READ[line.url](line.body)
        if asked.model not in ("", name):
            msg = f"The model {asked.model!r} is not loaded. There is {name!r}."
            raise ServerError(msg, 404)  # noqa: TRY301  (it becomes the entry)
        body = _answers(asked, engines.get("", asked.template_kwargs), name, line.url)
    except Exception as err:
        if has_left():  # the batch was stopped, not this request
            raise
        if not isinstance(err, RASDError):
            logger.exception("The request %r failed.", line.custom_id)
        status, body = failure(err)
    response = {"status_code": status, "request_id": secrets.token_hex(12), "body": body}
    entry = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id}
    return {**entry, "response": response, "error": None}


def _answers(asked: Asked, engine: RASD, name: str, url: str) -> Json:
    head = Head(name, url.endswith("chat/completions"), partial(openai_logprobs, engine.tokenizer))
    answers = [list(until_left(engine.stream_to_end(request))) for request in asked.each()]
    return head.whole(answers, len(asked.requests))


def batch(
    source: str, target: str, flags: Mapping[str, Any], file: str | Path | None = None
) -> int:
    """Answer the requests of ``source`` into ``target``; return 1 if some failed, else 0.

    Raises:
        ConfigurationError: Settings that cannot work, or requests that cannot be read.
        RASDError: The store or the model cannot be opened.
    """
    settings = ServerSettings.read(flags, file)
    engines = engines_for(settings)
    try:
        engines.get("", {}).ensure_loaded()
        done, failed = run_batch(
            Path(source), Path(target), engines,
            name=settings.name or settings.model, streams=settings.streams,
        )  # fmt: skip
    finally:
        engines.close()
    told = f"{done} answered, {failed} of them with an error; the answers are in {target}"
    print(told, file=sys.stderr)  # noqa: T201  (a command says what it did)
    return 1 if failed else 0
