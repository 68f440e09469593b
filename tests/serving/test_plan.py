"""The simulation of a load: by hand where it can be, by theory where there is one."""

from __future__ import annotations

import json
import statistics

import pytest
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD
from rasd_integrations.cli import main
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.costs import measure
from rasd_integrations.serving.plan import Arrival, Costs, Fleet, Load, at, plan, simulate, summary

COSTS = Costs(
    prefill_s=((0, 0.0), (1000, 1.0)), step_s=((1, 0.1), (2, 0.12), (4, 0.2)), overhead_s=0.05
)
ONE = Fleet(replicas=1)


def test_costs_between_measurements_are_interpolated():
    """Between two points a line, beyond them the last one's."""
    points = ((1.0, 2.0), (3.0, 4.0), (5.0, 10.0))
    assert [at(points, x) for x in (1, 2, 3, 4, 7, 0)] == [2, 3, 4, 7, 16, 1]
    assert at(((4.0, 2.0),), 9) == 2


def test_a_request_alone_takes_its_own_work():
    """Overhead and prefill, then a step a token; a document that is known costs its question only."""
    first, second = simulate(
        [Arrival(0, 7, 900, 100, 11), Arrival(50, 7, 900, 100, 11)], COSTS, ONE
    )
    assert (first.first_s, first.per_token_s) == pytest.approx((1.05, 0.1))
    assert (second.first_s, second.per_token_s) == pytest.approx((0.15, 0.1))
    assert (first.known, second.known) == (False, True)


def test_a_short_question_takes_a_step_at_least():
    """Behind a known document a few tokens read all weights and the context, as a step does."""
    costs = Costs(prefill_s=COSTS.prefill_s, step_s=COSTS.step_s, step_s_per_token=0.0001)
    _, known = simulate([Arrival(0, 7, 1000, 10, 2), Arrival(50, 7, 1000, 10, 2)], costs, ONE)
    assert known.first_s == pytest.approx(0.1 + 0.1)


def test_drafts_make_an_answer_alone_shorter():
    """Two tokens a step, each of them longer: only while nothing else decodes."""
    costs = Costs(prefill_s=COSTS.prefill_s, step_s=COSTS.step_s, alone_tokens=2.0, alone_s=0.12)
    (one,) = simulate([Arrival(0, 0, 0, 10, 21)], costs, ONE)
    assert one.per_token_s == pytest.approx(0.06)
    two = simulate([Arrival(0, 0, 0, 0, 21), Arrival(0, 1, 0, 0, 21)], costs, ONE)
    assert two[0].per_token_s == pytest.approx(0.12, rel=0.1)


def test_a_prefill_is_shared_with_those_who_decode():
    """A long prompt holds up the others for a piece at a time, not to its end."""
    costs = Costs(prefill_s=((0, 0.0), (1000, 1.0)), step_s=((1, 0.01), (2, 0.01)), piece=100)
    short, long = simulate([Arrival(0, 0, 0, 10, 41), Arrival(0.02, 1, 4000, 0, 2)], costs, ONE)
    assert short.per_token_s == pytest.approx(0.11, rel=0.1)
    assert long.first_s == pytest.approx(4.4, rel=0.1)


def test_a_queue_is_what_theory_says():
    """One place, one fixed service time: the mean wait of an M/D/1 queue."""
    service, rate = 0.1, 7.0
    costs = Costs(prefill_s=((0, 0.0), (1, service)), step_s=((1, 0.0),))
    load = Load(
        rate=rate, documents=1, document_tokens=0, question_tokens=1, answer_tokens=1, seconds=4000
    )
    found = simulate(load.arrivals(3), costs, Fleet(replicas=1, streams=1, queue=10**6))
    wait = statistics.fmean(one.first_s for one in found) - service
    busy = rate * service
    assert wait == pytest.approx(busy * service / (2 * (1 - busy)), rel=0.06)


def test_every_request_ends_or_is_refused():
    """More than places and queue is refused; the rest is served, each first token after its own prefill."""
    load = Load(rate=30, seconds=20, documents=5, document_tokens=800)
    found = simulate(load.arrivals(0), COSTS, Fleet(replicas=2, streams=2, queue=3))
    refused = [one for one in found if one.refused]
    served = [one for one in found if not one.refused]
    assert refused
    assert min(one.first_s for one in served) >= at(COSTS.prefill_s, load.question_tokens)
    assert all(one.per_token_s >= 0.1 for one in served)


def test_affinity_reads_a_document_once():
    """With it each document is read by one server; without, by each; a small cache forgets."""
    load = Load(rate=1, seconds=600, documents=4, skew=0, document_tokens=500)
    arrivals = load.arrivals(1)
    unknown = {
        affinity: sum(
            not one.known for one in simulate(arrivals, COSTS, Fleet(replicas=4, affinity=affinity))
        )
        for affinity in (True, False)
    }
    assert unknown == {True: 4, False: 16}
    small = simulate(arrivals, COSTS, Fleet(replicas=1, cache_tokens=600))
    assert summary(small)["known"] < 0.5


def test_a_plan_ends_at_the_first_number_that_keeps_the_limits():
    """Rows up to it, with what affinity and drafts are worth; more servers are never slower here."""
    load = Load(rate=0.5, seconds=200, documents=20, document_tokens=1000, answer_tokens=20)
    costs = Costs(prefill_s=COSTS.prefill_s, step_s=COSTS.step_s, alone_tokens=1.5, alone_s=0.1)
    rows = plan(load, costs, ONE, most=8, first_s=4.0, token_s=1.0)
    assert [row["keeps"] for row in rows] == [False] * (len(rows) - 1) + [True]
    firsts = [row["affinity"]["first p50"] for row in rows]
    assert firsts == sorted(firsts, reverse=True)
    assert rows[-1]["no drafts"]["token p50"] >= rows[-1]["affinity"]["token p50"]


REFUSED = [
    (["plan", "{file}"], "There is nothing to do"),
    (["plan", "{file}", "--rate", "1"], "cannot be read"),
    (["plan", "{file}", "--rate", "0"], "cannot be read"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_a_plan_without_costs_says_what_to_do(arguments, says, tmp_path, capsys):
    """One line, with the next step."""
    arguments = [a.format(file=tmp_path / "costs.json") for a in arguments]
    assert main(arguments) == 1
    assert says in capsys.readouterr().err


def test_the_command_prints_the_table(tmp_path, capsys):
    """From a file of costs; its exit status says if the limits can be kept, a bad value is named."""
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"costs": COSTS.as_dict()}))
    few = ["plan", str(path), "--rate", "0.2", "--document-tokens", "500", "--seconds", "300"]
    assert main([*few, "--tokens-a-step", "1.5"]) == 0
    told = capsys.readouterr().out
    assert "servers keep the limits" in told
    assert "no affinity" in told
    assert "no drafts" in told
    assert main([*few, "--first-token", "0.01", "--most", "2"]) == 1
    assert "No number of these servers" in capsys.readouterr().out
    assert main(["plan", str(path), "--rate", "-1"]) == 1
    assert "rate is -1.0" in capsys.readouterr().err


def test_costs_are_measured_on_a_model(tmp_path):
    """Longer prompts and more answers take longer, and what is written can be read again."""
    engine = RASD.from_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer())
    costs = measure(engine)
    seconds = [y for _, y in costs.prefill_s]
    assert seconds[-1] > seconds[0]
    assert all(y > 0 for _, y in costs.step_s)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"costs": costs.as_dict()}))
    assert Costs.read(path) == costs
    with pytest.raises(ConfigurationError, match="answer_tokens is 0"):
        Load(rate=1, answer_tokens=0)
