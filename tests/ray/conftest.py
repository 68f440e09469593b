"""A cluster of Ray, a Chroma server, and the page's own file of Ray Serve over a tiny model."""

from __future__ import annotations

import copy
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_cluster import BIN, Cluster, ask, free_ports, page_config, waits_for
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.serving.reading import read_chat
from rasd_integrations.serving.server.engines import Engines, engines_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model on disk, with a window that takes a while to fill."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(max_position_embeddings=8192).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start Ray; nothing of it is left behind."""
    home = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets need a short path
    found = Cluster(home)
    try:
        waits_for(lambda: found.board.get("/api/version").status_code == 200)
        yield found
    finally:
        found.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a Chroma server, and return its address."""
    (port,) = free_ports(1)
    command = [
        BIN / "chroma",
        "run",
        "--path",
        tmp_path_factory.mktemp("chroma"),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://localhost:{port}"
        waits_for(lambda: httpx.get(f"{url}/api/v2/heartbeat").status_code == 200)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def config(
    cluster: Cluster, folder: Path, chroma: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return the page's file with a tiny model, and a second application with keys and hardly any places."""
    found = page_config()
    found["http_options"]["port"] = cluster.port
    (first,) = found["applications"]
    _, _, collection = first["args"]["store"].partition("#")
    first["args"] |= {
        "model": str(folder),
        "name": "tiny",
        "executor": "eager",
        "store": f"{chroma}#{collection}",
    }
    first["deployments"][0]["ray_actor_options"] = {"num_cpus": 0.5}
    first["deployments"][0]["health_check_period_s"] = 1
    file = tmp_path_factory.mktemp("team") / "serve.toml"
    file.write_text(
        f'model = "{folder}"\nexecutor = "eager"\nstreams = 1\nqueue = 1\n[keys]\n"sk-a" = "a"\n"sk-b" = "b"\n'
    )
    team = copy.deepcopy(first) | {
        "name": "team",
        "route_prefix": "/team",
        "args": {"config": str(file), "num_replicas": 1},
    }
    team["deployments"] = []
    found["applications"].append(team)
    return found


@pytest.fixture(scope="session")
def engines(folder: Path) -> Engines:
    """Return the same model in this process."""
    return engines_of(str(folder), {"executor": "eager"}, None)


@pytest.fixture(scope="session")
def quoted(
    engines: Engines, chroma: str, config: dict[str, Any]
) -> list[tuple[dict[str, Any], str]]:
    """Put answers of the model into the store that the page's file names; return them with their requests."""
    import chromadb

    letters = {
        "grammar": {"kind": "regex", "source": "[a-z ]{60}"}
    }  # others may be halves of a character
    bodies = [ask(f"Say {number}.", 60, rasd=letters) for number in range(12)]
    engine = engines.get("", {})
    answers = [engine.generate(read_chat(body).requests[0]).text for body in bodies]
    _, _, name = config["applications"][0]["args"]["store"].partition("#")
    client = chromadb.HttpClient(port=int(chroma.rpartition(":")[2]))
    client.create_collection(name).add(  # its own model would embed questions; nothing here asks one
        ids=[str(n) for n in range(12)], documents=answers, embeddings=[[1.0, 0.0]] * 12
    )  # fmt: skip
    return list(zip(bodies, answers, strict=True))


@pytest.fixture(scope="module")
def deployed(cluster: Cluster, config: dict[str, Any], quoted: object) -> Cluster:
    """Deploy the page's file."""
    cluster.deploy(config)
    return cluster
