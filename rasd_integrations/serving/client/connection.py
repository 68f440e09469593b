"""The openai package's clients of one server, one for threads and one for each event loop; their errors as ours."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rasd_integrations.errors import (
    ConfigurationError,
    DecodingError,
    MissingDependencyError,
    RASDError,
)
from rasd_integrations.process import locked
from rasd_integrations.serving.client.faults import our_error

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI
    from pydantic import SecretStr

_NO_KEY = "none"  # the openai clients refuse to be without one; servers that ask for none ignore it
_OWN_OPTIONS = ("base_url", "api_key", "timeout", "max_retries")
_CLIENTS = ("http_client", "http_async_client")
_ADDRESS = re.compile(r"https?://[^/@\s]+(/[^@\s]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server is, and how it is asked.

    Attributes:
        base_url: Its address, ``/v1`` included.
        api_key: ``None``: the variable ``OPENAI_API_KEY``, else none.
        timeout: Seconds without a byte of the answer; ``None``: the openai package's default.
        max_retries: Of a request that was not answered yet; ``None``: the openai package's default.
        client_kwargs: Passed to the openai package's clients.
    """

    base_url: str
    api_key: SecretStr | None = field(default=None, repr=False)
    timeout: float | None = None
    max_retries: int | None = None
    client_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the address, the numbers, and that nothing is said twice."""
        if not _ADDRESS.fullmatch(self.base_url):  # not shown: there may be a key in it
            msg = (
                "base_url must be an address like 'http://host:8000/v1', without user and password. "
                "Give a key as api_key=, other credentials as client_kwargs={'default_headers': {...}}."
            )
            raise ConfigurationError(msg)
        if self.timeout is not None and not self.timeout > 0:
            msg = f"timeout is {self.timeout!r}, but must be a number of seconds above 0, or None."
            raise ConfigurationError(msg)
        if self.max_retries is not None and self.max_retries < 0:
            msg = f"max_retries is {self.max_retries!r}, but must be at least 0, or None."
            raise ConfigurationError(msg)
        for name in _OWN_OPTIONS:
            if name in self.client_kwargs:
                msg = f"client_kwargs has {name!r}, which is an option of its own. Give {name}= itself."
                raise ConfigurationError(msg)
        if find_spec("openai") is None:
            needed = "openai"
            raise MissingDependencyError(needed, "remote")

    @property
    def root(self) -> str:
        """The address without ``/v1``: where servers have what OpenAI's API has not."""
        return self.base_url.rstrip("/").removesuffix("/v1")


class Connection:
    """The clients of one server. They are made when they are needed, and again after a fork."""

    def __init__(self, options: ServerOptions) -> None:
        """Open nothing yet."""
        self.options = options
        self._lock = threading.RLock()
        self._closed = False
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._client: OpenAI | None = None
        # By event loop: a connection belongs to the loop that opened it.
        self._keepers: dict[
            asyncio.AbstractEventLoop, tuple[AsyncGenerator[AsyncOpenAI, None], AsyncOpenAI]
        ] = {}

    def check_open(self) -> None:
        """Raise if it was closed.

        Raises:
            DecodingError: It was.
        """
        if self._closed:
            msg = "This model was closed. Make a new instance."
            raise DecodingError(msg)
        if self._process != os.getpid():  # sockets of before a fork are the parent's
            self._forget()

    @locked
    def for_threads(self) -> OpenAI:
        """Return the client for synchronous calls."""
        self.check_open()
        if self._client is None:
            from openai import OpenAI

            self._client = self._made(OpenAI, "http_client")
        return self._client

    async def for_this_loop(self) -> AsyncOpenAI:
        """Return the client of the running event loop; it is closed when the loop ends."""
        self.check_open()
        loop = asyncio.get_running_loop()
        with self._lock:
            known = self._keepers.get(loop)
        if known is not None:
            return known[1]
        from openai import AsyncOpenAI

        keeper = self._kept(self._made(AsyncOpenAI, "http_async_client"))
        client = await anext(keeper)
        with self._lock:
            for ended in [other for other in self._keepers if other.is_closed()]:
                del self._keepers[ended]
            self._keepers[loop] = keeper, client
        return client

    async def _kept(self, client: AsyncOpenAI) -> AsyncGenerator[AsyncOpenAI, None]:
        """Yield ``client`` and close it afterwards: a loop that ends closes the generators that it has run."""
        try:
            yield client
        finally:
            if "http_async_client" not in self.options.client_kwargs:
                await client.close()

    def _made(self, kind: Any, http: str) -> Any:
        own = self.options
        given = {"timeout": own.timeout, "max_retries": own.max_retries, **own.client_kwargs}
        clients = {name: given.pop(name) for name in _CLIENTS if name in given}
        if clients and http not in clients:
            msg = (
                f"client_kwargs has {next(iter(clients))} only, but this call needs {http}, or it would not go the "
                f"same way. Give both."
            )
            raise ConfigurationError(msg)
        options = {name: value for name, value in given.items() if value is not None}
        if clients:
            options["http_client"] = clients[http]
        try:
            return kind(base_url=own.base_url, api_key=self._key(), **options)
        except TypeError as err:
            msg = (
                f"client_kwargs has {', '.join(sorted(own.client_kwargs))}, which openai.{kind.__name__} does not take "
                f"so: {err}."
            )
            raise ConfigurationError(msg) from err

    def _key(self) -> str:
        given = self.options.api_key
        if given is not None:
            return given.get_secret_value()
        return os.environ.get("OPENAI_API_KEY") or _NO_KEY

    def close(self) -> None:
        """End open requests; later ones raise."""
        with self._lock:
            self._closed = True
            client, keepers = self._client, dict(self._keepers)
            self._forget()
        if client is not None and "http_client" not in self.options.client_kwargs:
            client.close()
        for loop, (keeper, _) in keepers.items():
            if loop.is_running():  # another's client is closed when its loop ends
                asyncio.run_coroutine_threadsafe(_ended(keeper), loop)

    @contextmanager
    def errors(self, body: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Raise what the openai package raises, and what reading a broken answer does, as our errors.

        ``body`` is what was asked.
        """
        try:
            yield
        except RASDError:
            raise
        except Exception as err:
            found = our_error(err, self.options.base_url, body or {})
            if (key := self._key()) != _NO_KEY:  # a server may repeat it
                found.args = tuple(
                    a.replace(key, "***") if isinstance(a, str) else a for a in found.args
                )
            raise found from err


async def _ended(keeper: AsyncGenerator[AsyncOpenAI, None]) -> None:
    await keeper.aclose()
