"""The builder of the application: settings of ``rasd serve``, options of Ray Serve, and names that are neither's."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from ray_cluster import PAGE

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.server.settings import ServerSettings

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def build():
    """Return what the builder makes: the deployment, and the settings of its replicas."""
    from rasd_integrations.ray import app

    def built(**args):
        deployment = app(args)._bound_deployment
        (settings,) = deployment.init_args
        return deployment, settings

    return built


def test_it_takes_both_kinds_of_options(build, tmp_path, monkeypatch):
    """As text, as a command line has them, from a file and from the environment; the first of them wins."""
    file = tmp_path / "serve.toml"
    file.write_text('model = "m"\nstreams = 3\nqueue = 5\nseconds = 7\n[keys]\n"sk-1" = "team"\n')
    monkeypatch.setenv("RASD_SERVE_QUEUE", "6")
    deployment, settings = build(
        config=str(file), streams="4", drain_seconds="9", num_replicas="2", max_queued_requests=50,
        ray_actor_options='{"num_cpus": 3}',
    )  # fmt: skip
    read = ServerSettings.read(settings)
    assert (read.model, read.streams, read.queue, read.seconds) == ("m", 4, 6, 7.0)
    assert read.namespaces == {"sk-1": "team"}
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options == {"num_cpus": 3}
    own = deployment._deployment_config
    assert (own.max_queued_requests, own.graceful_shutdown_timeout_s) == (50, 9)
    assert (
        own.max_ongoing_requests > 4 + 6
    )  # else requests would wait at the proxy, and none be refused
    assert own.request_router_config.request_router_class.endswith(".ConsistentHashRouter")
    assert build(model="m", num_replicas="auto")[0]._deployment_config.autoscaling_config


def test_the_command_of_the_page_is_taken(build):
    """Its names and values, as the command line gives them: text."""
    (line,) = re.findall(r"^serve run rasd_integrations\.ray:app (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)  # fmt: skip
    deployment, settings = build(**dict(part.split("=", 1) for part in line.split()))
    assert (deployment.num_replicas, settings["model"]) == (2, "Qwen/Qwen2.5-Coder-0.5B-Instruct")


REFUSED = [
    ({"model": "m", "modell": "x"}, "Ray Serve refuses modell: .*unexpected"),
    ({"model": "m", "num_replicas": "many"}, "Ray Serve refuses num_replicas"),
    ({"model": "m", "port": "8000"}, "^port: Ray's proxies listen"),
    ({"num_replicas": 2}, "model: Field required"),
    ({"model": "m", "streams": "0"}, "streams: Input should be greater"),
    ({"model": "m", "config": "none.toml"}, "'none.toml' does not exist"),
]


@pytest.mark.parametrize(("args", "says"), REFUSED)
def test_what_cannot_work_is_refused_by_name(build, args, says):
    """Before anything is started."""
    with pytest.raises(ConfigurationError, match=says):
        build(**args)


def test_proxies_that_others_reach_need_keys(monkeypatch):
    """A replica behind an open door does not start, as no server does."""
    from rasd_integrations.ray import replicas

    door = SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0"))
    monkeypatch.setattr(replicas, "_get_global_client", lambda: door)
    settings = ServerSettings.read({"model": "none"}).model_dump()
    with pytest.raises(ConfigurationError, match=r"host is '0\.0\.0\.0'.*there are no keys"):
        replicas._Replica(settings)
