"""In Ray Serve itself (``make test-ray``): the whole server in each replica, and a document in one of them."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter

import httpx
import pytest
from ray_cluster import HEADER, ask, waits_for
from served import served

from rasd_integrations.config import SamplingParams
from rasd_integrations.prompting.hints import PromptHints
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.types import Chunk

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
DOCUMENTS = {
    f"document-{n}": f"Document {n}. " + f"It tells of number {n}. " * 30 for n in range(12)
}


def content(got):
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]["message"]["content"]


def test_answers_are_those_of_the_server(deployed, engines, folder):
    """Whole and streamed, greedy and sampled, refused and malformed: as `rasd serve` would answer."""
    bodies = [
        ask("Name a colour."),
        ask("Name another.", 40, seed=5, temperature=1.0),
        ask("Twice.", 8, n=2),
        ask("Never.", temperature=-1),
        ask("Never.", model="gpt-9"),
        {"messages": "none"},
    ]
    with served(engines, name="tiny") as plain:
        for body in bodies:
            expected = httpx.post(f"{plain.base_url}/chat/completions", json=body, timeout=60)
            got = deployed.post(body)
            assert got.status_code == expected.status_code
            one, other = got.json(), expected.json()
            if got.status_code == 200:
                assert [c["message"] for c in one["choices"]] == [c["message"] for c in other["choices"]]  # fmt: skip
                assert one["usage"]["completion_tokens"] == other["usage"]["completion_tokens"]
            else:
                assert one == other
        for path in ("/v1/models", "/ready", "/nowhere"):
            one, other = httpx.get(deployed.root + path), httpx.get(plain.root + path)
            assert one.status_code == other.status_code
    stream = deployed.client().chat.completions.create(
        model="", stream=True, extra_body={"ignore_eos": True}, max_tokens=16,
        messages=bodies[0]["messages"],
    )  # fmt: skip
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said == content(deployed.post(bodies[0]))


def test_a_stream_is_read_while_it_is_made(deployed):
    """The first words arrive while the replica decodes; the answer of a client that hangs up ends soon."""
    (session, *_) = deployed.sessions().values()
    with deployed.client(default_headers={"X-Session-ID": session}) as client:
        stream = client.chat.completions.create(
            model="", stream=True, extra_body={"ignore_eos": True}, max_tokens=8000,
            messages=[{"role": "user", "content": "Go on."}],
        )  # fmt: skip
        next(stream)
        assert deployed.gauge("rasd_running", session) == 1
        stream.close()
    waits_for(lambda: deployed.gauge("rasd_running", session) == 0, 5)


def test_a_document_is_read_by_one_replica(deployed):
    """All questions on it go there, where it is found in the cache; other documents are on the other replica."""
    places = {name: set() for name in DOCUMENTS}
    for turn in range(3):
        for name, text in DOCUMENTS.items():
            got = deployed.post(ask(f"{text}\n\nQuestion {turn}?", 4), name)
            cached = got.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 300) == (turn > 0)
            places[name].add(got.headers[HEADER])
    assert {len(by) for by in places.values()} == {1}
    assert {*deployed.sessions()} == {*deployed.replicas()}
    assert len(deployed.replicas()) == 2


def test_our_client_says_which_document(deployed):
    """Its requests with one document's chunks go to one replica, whatever the question."""
    from rasd_integrations.serving.client.connection import ServerOptions
    from rasd_integrations.serving.client.remote import RemoteRASD

    seen = Counter()

    def see(response):
        seen[response.headers[HEADER]] += response.request.url.path.endswith("completions")

    http = httpx.Client(event_hooks={"response": [see]}, timeout=60)
    options = ServerOptions(
        base_url=f"{deployed.root}/v1", timeout=60.0, client_kwargs={"http_client": http}
    )
    remote, params = RemoteRASD(options, "tiny"), SamplingParams(max_tokens=4)
    chunk = Chunk(DOCUMENTS["document-3"], "3", 0, {"source": "three.txt"})
    with http:
        for number in range(16):
            messages = [{"role": "user", "content": f"{number}: {chunk.text} Is it so?"}]
            remote.generate(Request(messages, params, hints=PromptHints(chunks=(chunk,))))
    assert max(seen.values()) == seen.total() == 16


def test_the_store_behind_chroma_is_drafted_from(deployed, quoted):
    """Each replica reads the texts of the server that the settings name, and drafts an answer that is one of them."""
    asked = iter(quoted)  # each once: an answer that was given before is drafted from, too
    for session in deployed.sessions().values():

        def drafted(session=session):
            body, answer = next(asked)
            got = deployed.post(body, session)
            assert content(got) == answer
            time.sleep(1)  # for the thread that reads the store
            drafters = got.json()["choices"][0]["rasd"]["drafters"]
            return drafters.get("collection", {"accepted": 0})["accepted"] > 10

        waits_for(drafted)


def test_a_full_replica_refuses_at_once(deployed):
    """With one place and one that waits, the third is told so by the server: 429, when to come again, OpenAI's object."""
    running, waiting = "rasd_running", "rasd_waiting"

    def number(name):
        return deployed.gauge(name, app="/team", key="sk-a")

    long = ask("Go on.", 3000)
    threads = [threading.Thread(target=deployed.post, args=(long, "", "/team", "sk-a")) for _ in range(2)]  # fmt: skip
    for thread in threads:
        thread.start()
    waits_for(lambda: number(running) == 1 and number(waiting) == 1, 20)
    got = deployed.post(ask("More."), app="/team", key="sk-a")
    assert got.status_code == 429
    assert got.headers["retry-after"] == "1"
    assert "1 answers run and 1 wait" in got.json()["error"]["message"]
    for thread in threads:
        thread.join()
    assert deployed.post(ask("More."), app="/team", key="sk-a").status_code == 200


def test_keys_keep_tenants_apart(deployed):
    """A request without a key is refused; what one tenant has asked is in no other's cache."""
    body = ask(DOCUMENTS["document-1"] + " For the team.", 4)
    for key in ("", "sk-none"):
        got = deployed.post(body, app="/team", key=key)
        assert got.status_code == 401
        assert "The API key is missing" in got.json()["error"]["message"]
    cached = [
        deployed.post(body, app="/team", key=key).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for key in ("sk-a", "sk-a", "sk-b", "sk-b")
    ]  # fmt: skip
    assert [tokens > 300 for tokens in cached] == [False, True, False, True]


def test_ray_tells_of_all_replicas(deployed):
    """What Prometheus scrapes of a machine's agent has each replica's counters, by its name."""
    for session in deployed.sessions().values():
        deployed.post(ask("Count me.", 4), session)

    def told():
        text = httpx.get(f"http://127.0.0.1:{deployed.metrics_port}/metrics").text
        lines = re.findall(
            r"^ray_rasd_time_to_first_token_seconds_count\{(.*)\} (\S+)$", text, re.MULTILINE
        )
        found = {re.findall(r'replica="([^"]+)"', labels)[0]: float(v) for labels, v in lines}
        return all(found.get(name, 0) > 0 for name in deployed.replicas())

    waits_for(told, 60)
