"""``rasd batch``: a file of requests is answered, and goes on where it was stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from openai.types.chat import ChatCompletion
from served import engines_over
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.cli import main
from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.batch import read_lines, run_batch

URL = "/v1/chat/completions"


def line(name, text, url=URL, **more):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **more}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def written(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def answers(path):
    return {entry["custom_id"]: entry for entry in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def engines():
    """Engines over a tiny model."""
    return engines_over(tiny_llama(max_position_embeddings=4096), tiny_tokenizer())


def test_each_request_has_its_answer(engines, tmp_path):
    """Answers are what the engine says; a request that is wrong has OpenAI's error, and the others go on."""
    source = written(
        tmp_path / "in.jsonl",
        line("a", "Say something."),
        line("bad", "Say something.", temperature=-1),
        line("b", "Say more.", seed=3, temperature=1.0),
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 4}},
        line("other", "Say something.", model="gpt-9"),
    )  # fmt: skip
    target = tmp_path / "out.jsonl"
    assert run_batch(source, target, engines, name="tiny", streams=2, bar=False) == (5, 2)
    got = answers(target)
    engine = engines.get("", {})
    for name, text, params in (
        ("a", "Say something.", SamplingParams(max_tokens=6)),
        ("b", "Say more.", SamplingParams(max_tokens=6, seed=3, temperature=1.0)),
    ):
        body = got[name]["response"]["body"]
        ChatCompletion.model_validate(body, strict=True)
        expected = engine.generate([{"role": "user", "content": text}], params).text
        assert body["choices"][0]["message"]["content"] == expected
    assert got["c"]["response"]["body"]["object"] == "text_completion"
    statuses = {name: entry["response"]["status_code"] for name, entry in got.items()}
    assert statuses == {"a": 200, "b": 200, "c": 200, "bad": 400, "other": 404}
    assert got["bad"]["response"]["body"]["error"]["code"] == "invalid_option"


def test_what_is_answered_is_not_asked_again(engines, tmp_path):
    """A second run answers what is new, was cut in writing, or failed for no fault of its own."""
    source = written(tmp_path / "in.jsonl", *(line(str(n), f"Question {n}") for n in range(4)))
    target = tmp_path / "out.jsonl"
    kept = {"custom_id": "0", "response": {"status_code": 200, "body": "kept"}}
    failed = {"custom_id": "1", "response": {"status_code": 500, "body": "failed"}}
    target.write_text(
        json.dumps(kept) + "\n" + json.dumps(failed) + "\n" + '{"custom_id": "2", "resp'
    )
    assert run_batch(source, target, engines, name="tiny", streams=8, bar=False) == (3, 0)
    got = answers(target)
    assert got["0"]["response"]["body"] == "kept"
    assert {name: entry["response"]["status_code"] for name, entry in got.items()} == dict.fromkeys("0123", 200)  # fmt: skip
    assert run_batch(source, target, engines, name="tiny", streams=8, bar=False) == (0, 0)


def test_requests_with_one_document_follow_one_another(engines, tmp_path):
    """In whatever order they come, a document is read once and found in the cache after that."""
    documents = [f"Document {letter}. " + f"It tells of {letter}. " * 30 for letter in "abcd"]
    entries = [line(f"{d}-{q}", f"{text}\n\nQuestion {q}?") for q in range(3) for d, text in enumerate(documents)]  # fmt: skip
    target = tmp_path / "out.jsonl"
    run_batch(written(tmp_path / "in.jsonl", *entries), target, engines, name="tiny", streams=1, bar=False)  # fmt: skip
    cached = [
        entry["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for entry in answers(target).values()
    ]
    assert sum(tokens > 300 for tokens in cached) == 8


REFUSED = [
    ("{", "Line 1 of .* is no JSON"),
    ("[]", "Line 1 of .* must be"),
    ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "url is one of"),
    ('{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "must be"),
    ('{"custom_id": "", "url": "/v1/completions", "body": {}}', "must be"),
    ('\n{"custom_id": "a", "url": "/v1/completions", "body": 3}', "Line 2 of"),
    ('{"custom_id": "a", "url": "/v1/completions", "body": {}}\n' * 2, "Requests 1 and 2 .* share"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_a_file_that_is_no_batch_is_refused(tmp_path, text, says):
    """The line is named, before anything is answered."""
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ConfigurationError, match=says):
        read_lines(tmp_path / "in.jsonl")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_lines(tmp_path / "none.jsonl")


def test_what_a_kill_or_an_odd_text_left_is_read(engines, tmp_path):
    """A line cut within a character, and half of a surrogate pair in a request, end no batch; kept lines stay as they are."""
    odd = line(
        "odd", "Say it.", rasd={"chunks": [{"text": "Say it.", "metadata": {"by": "\ud800"}}]}
    )
    source = written(
        tmp_path / "in.jsonl", line("cut", "Say something."), odd, line("kept", "Say.")
    )
    target = tmp_path / "out.jsonl"
    kept = '{"custom_id": "kept",  "response": {"status_code": 200, "body": "é"}}\n'.encode()
    target.write_bytes(kept + '{"custom_id": "cut", "response": {"text": "é'.encode()[:-1])
    assert run_batch(source, target, engines, name="tiny", streams=1, bar=False) == (2, 0)
    assert target.read_bytes().startswith(kept)
    assert {*answers(target)} == {"cut", "odd", "kept"}


# A script's background jobs ignore Ctrl-C, and so would the command that they start.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from rasd_integrations.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_batch_goes_on(tmp_path, capsys):
    """After SIGKILL and Ctrl-C in its middle, the same command ends with one answer for each request."""
    model = tmp_path / "model"
    tiny_llama(max_position_embeddings=4096).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    entries = [line(str(n), f"Question {n}", max_tokens=300, ignore_eos=True) for n in range(12)]
    source, target = written(tmp_path / "in.jsonl", *entries), tmp_path / "out.jsonl"
    arguments = ["batch", str(source), str(target), "--model", str(model), "--executor", "eager", "--streams", "2"]  # fmt: skip
    for sig, codes in ((signal.SIGKILL, {-9}), (signal.SIGINT, {130})):
        command = [sys.executable, "-c", COMMAND, *arguments]
        before = target.stat().st_size if target.exists() else 0
        told = tmp_path / "told.txt"
        with told.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors)
        while not target.exists() or target.stat().st_size <= before:
            assert process.poll() is None, told.read_text()
            time.sleep(0.01)
        process.send_signal(sig)
        assert process.wait(60) in codes, told.read_text()
    assert 0 < len(target.read_text().splitlines()) < 12
    assert main(arguments) == 0
    assert "with an error; the answers are in" in capsys.readouterr().err
    got = [json.loads(text) for text in target.read_text().splitlines()]
    assert sorted(entry["custom_id"] for entry in got) == sorted(map(str, range(12)))
    assert {entry["response"]["status_code"] for entry in got} == {200}
