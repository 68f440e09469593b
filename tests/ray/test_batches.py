"""A file of requests over Ray's workers (``make test-ray``): the answers of ``rasd batch``."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from ray_cluster import PAGE, waits_for

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.batch import run_batch

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
DOCUMENTS = [f"Document {letter}. " + f"It tells of {letter}. " * 30 for letter in "abcd"]


def line(name, text, **more):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **more}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def written(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def answers(path):
    return {entry["custom_id"]: entry for entry in map(json.loads, path.read_text().splitlines())}


def said(entries):
    """Return status, texts and error of each answer: what does not depend on when it was made."""
    return {
        name: (
            entry["response"]["status_code"],
            [c["message"]["content"] for c in entry["response"]["body"].get("choices", [])],
            entry["response"]["body"].get("error"),
        )
        for name, entry in entries.items()
    }


@pytest.fixture(scope="module")
def batch(cluster, folder):
    """Answer a file with workers of the cluster."""
    import ray

    from rasd_integrations.ray import batch

    ray.init(address=cluster.address, log_to_driver=False)

    def answered(source, target, **options):
        own = {"model": str(folder), "name": "tiny", "executor": "eager", "streams": 2}
        return batch(source, target, bar=False, resources={"num_cpus": 0.5}, **{**own, **options})

    yield answered
    ray.shutdown()


def workers():
    """Return the processes of Ray Data's workers on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"_Worker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def test_answers_are_those_of_rasd_batch(batch, engines, tmp_path):
    """Texts, errors, and odd characters, in the same format; what is answered already is not asked again."""
    entries = [line(f"{d}-{q}", f"{text}\n\nQuestion {q}?") for q in range(6) for d, text in enumerate(DOCUMENTS)]  # fmt: skip
    entries += [
        line("bad", "Say.", temperature=-1), line("other", "Say.", model="gpt-9"),
        line("odd \ud800", "Say it.", rasd={"chunks": [{"text": "Say.", "metadata": {"by": "\ud800"}}]}),
        line("seeded", "Say more.", seed=3, temperature=1.0, n=2),
    ]  # fmt: skip
    source, plain, spread = (
        written(tmp_path / "in.jsonl", entries), tmp_path / "plain.jsonl", tmp_path / "out.jsonl"
    )  # fmt: skip
    kept = {"custom_id": "0-0", "response": {"status_code": 200, "body": {"error": "kept"}}}
    again = {"custom_id": "0-1", "response": {"status_code": 500, "body": {}}}
    written(spread, [kept, again])
    assert run_batch(source, plain, engines, name="tiny", streams=2, bar=False) == (28, 2)
    assert batch(source, spread, workers=2) == (27, 2)
    got, expected = said(answers(spread)), said(answers(plain))
    assert got.pop("0-0") == (200, [], "kept")
    assert got == {name: value for name, value in expected.items() if name != "0-0"}
    assert batch(source, spread, workers=2) == (0, 0)


def test_requests_with_one_document_follow_one_another(batch, tmp_path):
    """In whatever order they come, a part of the work has neighbours, and a worker reads a document once."""
    entries = [line(f"{d}-{q}", f"{text}\n\nQuestion {q}?") for q in range(6) for d, text in enumerate(DOCUMENTS)]  # fmt: skip
    source, target = written(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl"
    assert batch(source, target, streams=1) == (24, 0)
    got = answers(target)
    order = sorted(got)
    parts = [[*got][at : at + 8] for at in range(0, 24, 8)]
    assert sorted(parts) == [order[at : at + 8] for at in range(0, 24, 8)]
    cached = [
        entry["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"] > 300
        for entry in got.values()
    ]
    assert cached.count(False) == len(DOCUMENTS)


def test_the_code_of_the_page_answers_a_file(batch, folder, tmp_path, monkeypatch):
    """As it stands there, with a smaller model and fewer workers."""
    (code,) = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for written_there, here in (
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", str(folder)), ("workers=4", "workers=1"), ('"num_cpus": 4', '"num_cpus": 0.5'),
    ):  # fmt: skip
        assert written_there in code
        code = code.replace(written_there, here)
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in.jsonl", [line("a", "Say something.")])
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert (names["answered"], names["failed"]) == (1, 0)
    assert [*answers(tmp_path / "out.jsonl")] == ["a"]


def test_a_killed_worker_is_replaced(batch, tmp_path):
    """Its part is answered by another, and each request once."""
    entries = [line(str(n), f"Question {n}", max_tokens=400, ignore_eos=True) for n in range(48)]
    source, target = written(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl"
    result = []
    thread = threading.Thread(target=lambda: result.append(batch(source, target, workers=2)))
    thread.start()
    waits_for(lambda: target.exists() and target.read_text().count("\n") > 2)
    os.kill(workers()[0], signal.SIGKILL)
    thread.join(180)
    assert result == [(48, 0)]
    assert [*answers(target)] == [json.loads(text)["custom_id"] for text in target.read_text().splitlines()]  # fmt: skip
    assert len(answers(target)) == 48


def test_what_cannot_work_is_refused_before_a_worker_starts(batch, tmp_path):
    """A malformed file, an unknown setting, no worker."""
    (tmp_path / "in.jsonl").write_text("{")
    with pytest.raises(ConfigurationError, match="is no JSON"):
        batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ConfigurationError, match="workers"):
        batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", workers=0)
    with pytest.raises(ConfigurationError, match="strems"):
        batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", strems=2)
