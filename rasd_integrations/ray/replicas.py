"""``rasd serve`` as replicas of Ray Serve: one deployment, whose replicas run the whole server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.metrics import Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.server.app import build_app
from rasd_integrations.serving.server.engines import engines_for
from rasd_integrations.serving.server.run import log_to_stderr
from rasd_integrations.serving.server.service import Server
from rasd_integrations.serving.server.settings import ServerSettings

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_SPARE = (
    16  # requests beyond a replica's places: it refuses them itself, and answers for its health
)
_PROXIES = ("host", "port")
REPLICA = "x-rasd-replica"
"""Header of each answer: the replica's name, as Ray's dashboard and logs have it."""


def app(args: Mapping[str, Any]) -> Any:
    """Return the application of Ray Serve that serves a model.

    Args:
        args: Settings of ``rasd serve`` by name, ``config`` (a file of them, read here), and options of a Ray Serve
            deployment: ``num_replicas``, ``autoscaling_config``, ``ray_actor_options``, ... Text that is JSON is read
            so in the latter, since a command line has nothing else.

    Raises:
        ConfigurationError: A setting that cannot work, or a name that neither the server nor Ray Serve knows.
    """
    known = ServerSettings.model_fields
    flags = {name: value for name, value in args.items() if name in known}
    given = {n: _value(v) for n, v in args.items() if n not in known and n != "config"}
    settings = ServerSettings.read(flags, args.get("config"))
    if taken := [name for name in _PROXIES if name in settings.model_fields_set]:
        msg = f"{' and '.join(taken)}: Ray's proxies listen, not the server. Leave it out, and set Ray's http_options."
        raise ConfigurationError(msg)
    own = {
        "name": "rasd",
        "max_ongoing_requests": settings.streams + settings.queue + _SPARE,
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "max_constructor_retry_count": 3,  # what cannot be loaded now cannot be loaded the twentieth time
        "request_router_config": {"request_router_class": _ROUTER},
    }
    try:
        deployment = serve.deployment(serve.ingress()(_Replica)).options(**{**own, **given})
    except (TypeError, ValueError) as err:
        names = ", ".join(sorted(given))
        msg = f"Ray Serve refuses {names}: {err}. Give settings of rasd serve, or options of a deployment."
        raise ConfigurationError(msg) from err
    return deployment.bind(settings.model_dump())


def _value(given: Any) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


class _Replica:
    """One copy of the model, and the server over it; requests come once it is loaded."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        # Ray's proxies listen for all replicas, so the door that needs keys is theirs.
        host = _get_global_client().http_config.host or "127.0.0.1"
        read = ServerSettings.read({**settings, "host": host})
        log_to_stderr(read.log_format)
        self.server = Server(read, engines_for(read))
        self.server.load()
        self._gauges: dict[str, Any] = {}

    def __serve_build_asgi_app__(self) -> Any:
        """Return the server's application, whose answers name the replica."""
        own = build_app(self.server)
        own.add_middleware(_Named, name=serve.get_replica_context().replica_id.unique_id)
        return own

    def check_health(self) -> None:
        """Raise while the server is not ready, for Ray to replace the replica; else hand its counters to Ray.

        A scrape of /metrics reads the one replica that the request came to. Ray's agent on each machine tells of all.
        """
        self.server.check_ready()
        for family in self.server.metrics.registry.collect():
            for name, labels, value, *_ in family.samples:
                if name.endswith("_created"):
                    continue
                if name not in self._gauges:
                    # Ray adds up what a counter is given; these are sums already.
                    self._gauges[name] = Gauge(
                        name, description=family.documentation, tag_keys=tuple(labels)
                    )
                self._gauges[name].set(value, labels)

    def __del__(self) -> None:
        """Close what is open; Ray calls it after the last answer."""
        if hasattr(self, "server"):  # else it was not loaded
            self.server.engines.close()


class _Named:
    """Middleware that writes the replica's name into each answer."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.header = app, (REPLICA.encode(), name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], self.header]
            await send(message)

        await self.app(scope, receive, sent)
