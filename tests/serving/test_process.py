"""``rasd serve`` as a process: what it prints, how it drains, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from tiny import tiny_llama, tiny_tokenizer

ASK = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, with a window that takes a while to fill."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(max_position_embeddings=8192).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


class Process:
    """A server in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "rasd_integrations", "serve", *map(str, arguments)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def waits_for(self, says: str, seconds: float = 60) -> re.Match[str]:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for line in self.lines:
                if found := re.search(says, line):
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError("\n".join(self.lines))

    def ends(self) -> int:
        code = self.process.wait(60)
        self.reader.join(5)
        return code


@pytest.fixture
def process():
    """Start servers; none is left behind."""
    made: list[Process] = []

    def start(*arguments: object) -> Process:
        made.append(Process(*arguments))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.ends()
        one.process.stderr.close()


def test_it_drains_when_it_is_told_to_end(folder, process):
    """SIGTERM lets a running answer end, refuses others, and the process ends by itself with 0."""
    server = process(folder, "--port", 0, "--executor", "eager", "--log-format", "json")
    url = server.waits_for(r"serving .* at (http://127\.0\.0\.1:\d+/v1)")[1]
    server.waits_for("ready after")
    body = {**ASK, "max_tokens": 1500, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"{url}/chat/completions", json=ASK)
        rest = [line for line in lines if line]
    assert '"completion_tokens":1500' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert server.ends() == 0
    told = "\n".join(server.lines)
    assert '"answer_tokens": 1500' in told
    assert "Traceback" not in told
    assert "Hi" not in re.sub(r'"time".*', "", told)  # no prompt


def test_it_cuts_what_runs_too_long_after_that(folder, process):
    """An answer that outlives the time to drain is ended, and so is the process."""
    server = process(folder, "--port", 0, "--executor", "eager", "--drain-seconds", 1)
    url = server.waits_for(r"at (http://127\.0\.0\.1:\d+/v1)")[1]
    server.waits_for("ready after")
    body = {**ASK, "max_tokens": 8000, "stream": True}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as stream:
        next(stream.iter_lines())
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.ends() == 0
    assert time.monotonic() - started < 15


def test_what_cannot_be_served_is_one_line(folder, process, tmp_path):
    """A wrong path, a taken port and a wrong flag end the process with a line that says why."""
    server = process(tmp_path / "none", "--port", 0)
    assert server.ends() == 1
    assert [line for line in server.lines if line.startswith("error: ")]
    assert "Traceback" not in "\n".join(server.lines)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = process(folder, "--port", taken.getsockname()[1])
        assert server.ends() == 1
        assert "error: " in "\n".join(server.lines)
        assert "in use" in "\n".join(server.lines)
    server = process(folder, "--host", "0.0.0.0")
    assert server.ends() == 1
    assert "there are no keys" in "\n".join(server.lines)


def test_it_serves_from_a_file_with_a_store(folder, process, tmp_path):
    """Settings, keys and a FAISS folder from a file; the key's owner is answered."""
    texts = tmp_path / "docstore.json"
    texts.write_text(
        '{"docstore/data": {"a": {"__data__": {"text": "The harbour freezes.", "metadata": {}}}}}'
    )
    file = tmp_path / "serve.toml"
    file.write_text(
        f'model = "{folder}"\nname = "mine"\nport = 0\nstore = "{tmp_path}"\n[keys]\n"sk-1" = "team"\n'
    )
    server = process("--config", file)
    url = server.waits_for(r"serving mine at (http://127\.0\.0\.1:\d+/v1)")[1]
    server.waits_for("ready after")
    headers = {"authorization": "Bearer sk-1"}
    got = httpx.post(
        f"{url}/chat/completions", json={**ASK, "max_tokens": 5}, headers=headers, timeout=60
    )
    assert got.json()["usage"]["completion_tokens"] == 5
    assert "sk-1" not in "\n".join(server.lines)
