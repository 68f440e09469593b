"""The server's settings: where they come from, and what is refused before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.server.settings import ServerSettings, add_flags, is_local

ROOT = Path(__file__).parents[2]
FILE = """
model = "from the file"
streams = 3
queue = 4
[keys]
"sk-1" = "team"
"""


@pytest.fixture
def file(tmp_path):
    """A file of settings."""
    path = tmp_path / "serve.toml"
    path.write_text(FILE)
    return path


def test_flags_come_before_the_environment_and_that_before_the_file(file, monkeypatch):
    """Each source gives what those before it leave open."""
    monkeypatch.setenv("RASD_SERVE_STREAMS", "5")
    monkeypatch.setenv("RASD_SERVE_QUEUE", "6")
    read = ServerSettings.read({"queue": "7", "host": "0.0.0.0"}, file)
    assert (read.model, read.streams, read.queue) == ("from the file", 5, 7)
    assert read.namespaces == {"sk-1": "team"}
    assert "sk-1" not in repr(read)
    monkeypatch.setenv("RASD_SERVE_KEYS", '{"sk-2": "other"}')
    assert ServerSettings.read({"model": "m"}).namespaces == {"sk-2": "other"}


REFUSED = [
    ({}, "model: Field required"),
    ({"model": ""}, "model: "),
    ({"model": "m", "port": "many"}, "port: "),
    ({"model": "m", "executor": "fast"}, "executor: "),
    ({"model": "m", "streams": 0}, "streams: "),
    ({"model": "m", "stream": 1}, "Did you mean 'streams'"),
    ({"model": "m", "host": "0.0.0.0"}, "there are no keys"),
    ({"model": "m", "host": "box.example"}, "there are no keys"),
]


@pytest.mark.parametrize(("flags", "says"), REFUSED)
def test_settings_that_cannot_work_are_refused(flags, says):
    """The error names the setting; a door to others without keys is one."""
    with pytest.raises(ConfigurationError, match=says):
        ServerSettings.read(flags)


@pytest.mark.parametrize(
    ("text", "says"),
    [("modle = 'm'", "modle: Extra"), ("model = ", "cannot be read"), ("model = 'm'\nkeys = {'sk-secret' = 3}", "keys")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused(tmp_path, text, says):
    """So are a missing file and a wrong name in it; an error never shows a key."""
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=says) as caught:
        ServerSettings.read({"model": "m"}, path)
    assert "sk-secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="does not exist"):
        ServerSettings.read({"model": "m"}, tmp_path / "none.toml")


def test_every_setting_but_keys_is_a_flag():
    """The flags are the settings' names; what is not given stays open for the other sources."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = vars(parser.parse_args(["--streams", "2", "--no-deterministic"]))
    assert {*given} == {*ServerSettings.model_fields} - {"model", "keys"}
    assert {n: v for n, v in given.items() if v is not None} == {
        "streams": "2",
        "deterministic": False,
    }
    parser.format_help()


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_a_local_address_is_told_from_others(host, local):
    """Only a loopback address is this machine's alone."""
    assert is_local(host) is local


def test_the_engine_gets_its_options():
    """Each engine setting arrives under the engine's own name."""
    from rasd_integrations import RASD

    read = ServerSettings.read({
        "model": "m", "drafter": "none", "dtype": "float32", "knowledge_transfer": "cautious", "context": "documents",
        "executor": "eager", "weights": "dense", "deterministic": "true", "prefix_cache_bytes": "5", "memory": "/m",
    })  # fmt: skip
    options = read.engine_options()
    assert options == {
        "drafter": None, "model_kwargs": {"dtype": "float32"}, "knowledge_transfer": "cautious", "context": "documents",
        "executor": "eager", "weights": "dense", "deterministic": True, "prefix_cache_bytes": 5, "memory": "/m",
        "cache_dir": None,
    }  # fmt: skip
    RASD("m", **options | {"knowledge_transfer": None})


def test_every_setting_is_in_the_reference():
    """The page of the server names each of them."""
    page = (ROOT / "docs" / "reference" / "server.md").read_text(encoding="utf-8")
    assert [name for name in ServerSettings.model_fields if f"`{name}`" not in page] == []
