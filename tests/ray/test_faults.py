"""Replicas that are killed, added and taken away under load (``make test-ray``)."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections import defaultdict
from contextlib import contextmanager

import openai
import pytest
from ray_cluster import HEADER, ask, waits_for

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
SESSIONS = [f"document-{n}" for n in range(24)]


def changed(config, **options):
    """Return the page's file with other options of Ray Serve."""
    found = copy.deepcopy(config)
    own = found["applications"][0]["deployments"][0]
    own.pop("num_replicas")
    own.update(options)
    return found


@contextmanager
def load(cluster, clients=4):
    """Ask about each document in turn until the block ends; yield what was answered: document and replica.

    Whatever a client of OpenAI's raises after its own retries ends the test.
    """
    stop, done, failed = threading.Event(), [], []

    def ask_on(first):
        turn = first
        with cluster.client(max_retries=2) as client:  # as many as it has by default
            while not stop.is_set():
                session = SESSIONS[turn % len(SESSIONS)]
                turn += clients + 1
                try:
                    got = client.chat.completions.with_raw_response.create(
                        model="", messages=[{"role": "user", "content": session}], max_tokens=4,
                        extra_headers={"X-Session-ID": session},
                    )  # fmt: skip
                except openai.OpenAIError as err:
                    failed.append(err)
                else:
                    done.append((session, got.headers[HEADER]))

    threads = [threading.Thread(target=ask_on, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_a_killed_replica_loses_no_request_and_moves_its_documents_only(deployed, config):
    """Its documents go to the others, theirs stay; the one that Ray starts in its place takes a share of all."""
    deployed.deploy(changed(config, num_replicas=3))
    waits_for(lambda: len(deployed.sessions()) == 3)
    before = deployed.replicas()
    with load(deployed) as done:
        waits_for(lambda: {session for session, _ in done} == {*SESSIONS})
        home = dict(done)
        assert len(set(done)) == len(SESSIONS)  # each document on one replica
        victim = home[SESSIONS[0]]
        killed = len(done)
        os.kill(before[victim], signal.SIGKILL)
        new = waits_for(lambda: deployed.replicas().keys() - before.keys())
        waits_for(lambda: new & {replica for _, replica in done})
        started = len(done)
        waits_for(lambda: {session for session, _ in done[started:]} == {*SESSIONS})
    (new,) = new
    first = next(n for n, (_, replica) in enumerate(done) if replica == new)
    places = defaultdict(set)
    for session, replica in done[killed + 8 : first]:  # what was on its way may be from before
        places[session].add(replica)
    assert places.keys() == {*SESSIONS}
    assert {len(found) for found in places.values()} == {1}
    moved = {session for session, (replica,) in places.items() if replica != home[session]}
    assert moved == {session for session, replica in home.items() if replica == victim}
    for session, replica in done[first + 8 :]:
        assert {replica} <= places[session] | {new}


def test_replicas_come_with_the_load(deployed, config):
    """With Ray's autoscaling there is a second replica once more answers run than one should have."""
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1,
        "upscale_delay_s": 1, "downscale_delay_s": 600,
    }  # fmt: skip
    deployed.deploy(changed(config, num_replicas=1))
    deployed.deploy(changed(config, autoscaling_config=scaling))
    waits_for(lambda: len(deployed.replicas()) == 1 and len(deployed.sessions()) == 1)
    with load(deployed):
        waits_for(lambda: len(deployed.replicas()) == 2)


def test_a_replica_that_is_taken_away_ends_its_answers(deployed, config):
    """An answer that runs in it comes whole, while new requests go to the other."""
    config = copy.deepcopy(config)
    config["applications"][0]["args"]["drain_seconds"] = 120
    deployed.deploy(changed(config, num_replicas=2))
    waits_for(lambda: len(deployed.replicas()) == len(deployed.sessions()) == 2)
    begun, ended = set(), {}

    def read(replica, session):
        with deployed.client() as client:
            stream = client.chat.completions.create(
                model="", stream=True, stream_options={"include_usage": True}, max_tokens=8000,
                messages=[{"role": "user", "content": "Go on."}], timeout=150,
                extra_headers={"X-Session-ID": session},
                extra_body={"ignore_eos": True, "rasd": {"drafting": False}},  # so that it takes a while
            )  # fmt: skip
            next(stream)
            begun.add(replica)
            *_, last = stream
            ended[replica] = time.monotonic(), last.usage.completion_tokens

    threads = [threading.Thread(target=read, args=pair) for pair in deployed.sessions().items()]
    for thread in threads:
        thread.start()
    waits_for(lambda: len(begun) == 2)
    deployed.give(changed(config, num_replicas=1))
    (left,) = waits_for(lambda: deployed.replicas(state="STOPPING"))
    told = time.monotonic()
    (kept,) = begun - {left}
    for session in SESSIONS[:6]:
        assert deployed.post(ask("More.", 1), session).headers[HEADER] == kept
    for thread in threads:
        thread.join()
    assert {tokens for _, tokens in ended.values()} == {8000}
    assert ended[left][0] > told
    waits_for(lambda: not deployed.replicas(state="STOPPING"))
    assert deployed.replicas().keys() == {kept}
