"""The files to run a server elsewhere name what there is: routes, settings, metrics, flags."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from served import engines_over, served
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.cli import build_parser
from rasd_integrations.serving.server.app import build_app
from rasd_integrations.serving.server.settings import ServerSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


@pytest.fixture(scope="module")
def server():
    """A server over a tiny model that has answered once."""
    with served(engines_over(tiny_llama(), tiny_tokenizer())) as found:
        found.server.base.generate("Once")
        yield found.server


def test_kubernetes_probes_ask_routes_that_exist(server):
    """Each probe has a route, each port a container, and the settings are read as they are written."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    by_name = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    pod = by_name["StatefulSet", "rasd"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    routes = {route.path for route in build_app(server).routes}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in routes
    settings = by_name["Secret", "rasd"]["stringData"]["serve.toml"]
    read = ServerSettings.read(tomllib.loads(settings))
    assert read.port == container["ports"][0]["containerPort"]
    assert pod["terminationGracePeriodSeconds"] > read.drain_seconds
    parsed = build_parser(flags=True).parse_args(["serve", *container["args"]])
    assert parsed.config == container["volumeMounts"][0]["mountPath"] + "/serve.toml"
    workers = by_name["Deployment", "rasd-router"]["spec"]["template"]["spec"]["containers"][0][
        "args"
    ][0]
    replicas = by_name["StatefulSet", "rasd"]["spec"]["replicas"]
    assert re.findall(r"http://(\S+):8000", workers) == [f"rasd-{n}.rasd" for n in range(replicas)]


def test_the_dashboard_asks_for_metrics_that_exist(server):
    """Every name in its queries is one that the server reports, and every label too."""
    from rasd_integrations.stats import DecodingStats

    server.metrics.answer(DecodingStats(generated_tokens=2), 0.1, 0.1)
    server.metrics.request("/v1/completions", 200, 0.1)
    stats = DecodingStats()
    stats.count("suffix", 1, 1)
    server.metrics.answer(stats, 0.1, 0.1)
    told = server.metrics.text().decode()
    names = set(re.findall(r"^(rasd_\w+)", told, re.MULTILINE))
    board = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"rasd_\w+", query)}
    assert len(queries) >= 8
    assert asked - names == set()
    assert {label for q in queries for label in re.findall(r"by \((\w+)\)", q)} <= {
        "le",
        "status",
        "drafter",
    }


def test_the_image_installs_extras_that_exist():
    """The image is built of files of the repository, with extras that pyproject names."""
    text = (DEPLOY / "Dockerfile").read_text()
    root = DEPLOY.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", text)
    assert {*extras.split(",")} <= {*project["optional-dependencies"]}
    copied = [
        name
        for line in re.findall(r"^COPY (?!--)(.*) \./?\S*$", text, re.MULTILINE)
        for name in line.split()
    ]
    assert copied
    assert [name for name in copied if not (root / name).exists()] == []
    torch = re.findall(r"torch==[\d.]+", text)
    assert torch == re.findall(r"torch==[\d.]+", (root / "Makefile").read_text())[:1]
