"""Runs a cluster of Ray on this machine for tests, and asks what Ray Serve runs on it."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-ray.md"
BIN = Path(sys.executable).parent
HEADER = "x-rasd-replica"
STARTS_S = 180.0
# Ray makes a token for its cluster and keeps it in the user's home, unless it is given one.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


def ask(text: str, tokens: int = 16, **more: Any) -> dict[str, Any]:
    """Return a request whose answer has so many tokens."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, **more}


def headers(session: str, key: str = "") -> dict[str, str]:
    """Return the headers that say what is read, and who asks."""
    found = {"X-Session-ID": session, "Authorization": f"Bearer {key}" if key else ""}
    return {name: value for name, value in found.items() if value}


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def waits_for(what: Callable[[], Any], seconds: float = STARTS_S) -> Any:
    """Return what ``what`` returns once that is true; an error of the network is not."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if found := what():
                return found
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    msg = f"waited {seconds} s"
    raise AssertionError(msg)


class Cluster:
    """Ray with Ray Serve, and what its dashboard says of the replicas."""

    def __init__(self, home: Path) -> None:
        port, board, agent, metrics, client, self.port = free_ports(6)
        self.home, self.address, self.metrics_port = home, f"127.0.0.1:{port}", metrics
        self.dashboard = f"http://127.0.0.1:{board}"
        self.root = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=8",
                f"--port={port}", f"--dashboard-port={board}", f"--dashboard-agent-listen-port={agent}",
                f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={home}",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        own = headers("", os.environ["RAY_AUTH_TOKEN"])
        self.board = httpx.Client(base_url=self.dashboard, headers=own, timeout=30)

    def details(self, app: str = "default") -> dict[str, Any]:
        return self.board.get("/api/serve/applications/").json()["applications"].get(app, {})

    def replicas(self, app: str = "default", state: str = "RUNNING") -> dict[str, int]:
        """Return the process of each replica in a state, by its name."""
        deployments = self.details(app).get("deployments", {}).values()
        return {
            replica["replica_id"]: replica["pid"]
            for deployment in deployments
            for replica in deployment["replicas"]
            if replica["state"] == state
        }

    def give(self, config: dict[str, Any]) -> None:
        """Give Ray Serve a file, as a person would."""
        file = self.home / "serve.yaml"
        file.write_text(json.dumps(config))
        command = [BIN / "serve", "deploy", "-a", self.dashboard, file]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self, config: dict[str, Any]) -> None:
        """Give Ray Serve a file, and wait until all of it runs."""
        self.give(config)
        for app in config["applications"]:
            found = waits_for(lambda name=app["name"]: self._ended(name))
            assert found["status"] == "RUNNING", json.dumps(found, indent=1)

    def _ended(self, app: str) -> dict[str, Any] | None:
        found = self.details(app)
        return found if found.get("status") in {"RUNNING", "DEPLOY_FAILED"} else None

    def client(self, app: str = "", **options: Any) -> openai.OpenAI:
        given = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.root}{app}/v1", **given)

    def post(
        self, body: dict[str, Any], session: str = "", app: str = "", key: str = ""
    ) -> httpx.Response:
        url = f"{self.root}{app}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers(session, key), timeout=60)

    def sessions(self) -> dict[str, str]:
        """Return a session of each replica that runs, by the replica's name."""
        found: dict[str, str] = {}
        for number in range(1000):
            got = httpx.get(f"{self.root}/health", headers={"X-Session-ID": f"s{number}"})
            found.setdefault(got.headers[HEADER], f"s{number}")
            if found.keys() >= self.replicas().keys():
                return found
        raise AssertionError(found)

    def gauge(self, name: str, session: str = "", app: str = "", key: str = "") -> float:
        """Return a number of the replica that answers a session."""
        told = httpx.get(f"{self.root}{app}/metrics", headers=headers(session, key)).text
        return float(re.findall(rf"^{name} (\S+)$", told, re.MULTILINE)[0])

    def close(self) -> None:
        self.board.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def page_config() -> dict[str, Any]:
    """Return the file that the page shows."""
    import yaml

    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return yaml.safe_load(text)
