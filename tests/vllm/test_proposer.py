"""What is drafted for each row of vLLM's batch, from what, and what is not."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from fakes_vllm import VOCABULARY, WINDOW, Letters, Worker, config, ids

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft
from rasd_integrations.vllm import Proposer
from rasd_integrations.vllm.drafting import MEMORY, REQUEST, RequestDrafts, Source
from rasd_integrations.vllm.memory import Namespaces

TEXT = "the quick brown fox jumps over a lazy dog, "
ALL = {"least_probability": 0}  # drafts whatever matches


def test_a_draft_continues_the_prompt() -> None:
    """What followed the last tokens in the prompt is drafted: one more than matched, and never more than K."""
    worker = Worker(ALL)
    worker.add("r", TEXT + "I saw: ", TEXT)
    worker.step()
    assert worker.drafts["r"] == ids("he")
    worker.step()
    assert worker.drafts["r"] == ids("quic")


def test_a_draft_continues_a_chunk_that_is_not_in_the_prompt() -> None:
    """Chunks sent with the request are drafted from; no draft runs from one into the next."""
    worker = Worker(ALL)
    worker.add("r", "Q: ", "abcdefXYZ", rasd_chunks=[*ids("abcdef"), -1, *ids("uvwxyz")])
    worker.step()
    assert worker.drafts["r"] == ids("bc")
    worker.step()
    assert worker.drafts["r"] == ids("ef")


def test_an_answer_is_remembered_for_its_namespace_only() -> None:
    """The same question is answered in fewer steps the second time, and another tenant's is not."""
    worker = Worker()
    alone = worker.run("1", "Q? A: ", TEXT, rasd_namespace="one")
    assert worker.run("2", "Q? A: ", TEXT, rasd_namespace="two") == alone
    assert worker.run("3", "Q? A: ", TEXT, rasd_namespace="one") < alone / 2
    assert worker.rasd_stats()["sources"]["memory"]["accepted"] > 0


def test_fed_texts_are_drafted_from_until_they_are_forgotten() -> None:
    """A fed text is drafted from in its namespace; forgetting it takes the answers that hold it too."""
    worker = Worker()
    alone = worker.run("1", "Q? A: ", TEXT, rasd_namespace="fresh")
    assert worker.rasd_feed([TEXT, TEXT]) == 1
    assert worker.run("2", "Q? A: ", TEXT) < alone / 2
    worker.step()
    assert worker.rasd_forget("quick brown") == 2  # both answers hold it, no fed text is it
    assert worker.rasd_forget(TEXT) == 1
    assert worker.run("3", "Q? A: ", TEXT) == alone


@pytest.mark.parametrize("text", [None, "quick"])
def test_forgetting_reaches_answers_that_still_run(text: str | None) -> None:
    """They draft from what was forgotten no more, and are not remembered at their end."""
    worker = Worker(ALL)
    alone = worker.run("1", "Q? A: ", TEXT, rasd_namespace="fresh")
    worker.run("2", "Q? A: ", TEXT)
    worker.add("3", "Q? A: ", TEXT)
    worker.step()
    assert worker.drafts["3"] == ids("he q")
    assert worker.rasd_forget(text) == 2  # of the first two answers
    worker.step()
    assert worker.drafts["3"] == []
    while len(worker.model_runner.requests["3"].output_token_ids) < len(TEXT):
        worker.step()
    worker.finish("3")
    worker.step()
    assert worker.rasd_stats()["memory"]["answers"] == 0
    assert worker.run("4", "Q? A: ", TEXT) >= alone


def test_the_last_answer_is_forgotten_before_vllm_tells_of_its_end() -> None:
    """No step has come since; the answer is not remembered at the next one."""
    worker = Worker()
    worker.run("1", "Q? A: ", TEXT)
    assert worker.rasd_forget("quick") == 0
    worker.step()
    assert worker.rasd_stats()["memory"]["answers"] == 0


def test_memory_is_bounded() -> None:
    """Old answers go beyond memory_tokens, and namespaces beyond their number."""
    worker = Worker({"memory_tokens": 100, "namespaces": 2})
    for n in range(12):
        worker.run(f"a{n}", "Q: ", "".join(chr(97 + (7 * n + i * i) % 26) for i in range(30)))
    worker.step()
    kept = worker.rasd_stats()["memory"]
    assert 0 < kept["answer_tokens"] <= 100
    for n in range(5):
        worker.run(f"b{n}", "Q: ", TEXT, rasd_namespace=str(n))
    worker.rasd_feed([TEXT * 2, TEXT * 3], namespace="4")
    worker.step()
    kept = worker.rasd_stats()["memory"]
    assert kept["namespaces"] == 2
    assert kept["text_tokens"] <= 100


def test_no_memory_is_kept_of_a_limit_of_0() -> None:
    """Requests draft from their own text, and feeding says why it cannot."""
    worker = Worker({"memory_tokens": 0})
    assert worker.run("1", "Q: ", TEXT) == worker.run("2", "Q: ", TEXT)
    with pytest.raises(ConfigurationError, match="memory_tokens is 0"):
        worker.rasd_feed([TEXT])


def test_a_request_that_is_off_gets_no_drafts_and_is_not_remembered() -> None:
    """Each step gives one token, and nothing is left of it."""
    worker = Worker()
    assert worker.run("1", TEXT, TEXT, rasd_off=1) == len(TEXT)
    worker.step()
    assert worker.rasd_stats()["memory"].get("answers", 0) == 0
    assert worker.run("2", TEXT, TEXT) < len(TEXT) / 2


def test_a_malformed_request_is_answered_without_drafts(caplog: pytest.LogCaptureFixture) -> None:
    """Others in the batch are drafted for; the log says what was refused, once."""
    worker = Worker()
    for name in ("bad", "worse"):
        worker.add(name, TEXT, TEXT, rasd_chunks=[VOCABULARY])
    worker.add("good", TEXT, TEXT)
    with caplog.at_level(logging.WARNING, "rasd_integrations"):
        for _ in range(4):
            worker.step()
    assert worker.drafts["bad"] == worker.drafts["worse"] == []
    assert worker.drafts["good"]
    assert worker.rasd_stats()["refused_requests"] == 2
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("A request gets no drafts: An item of rasd_chunks is 1000")


def test_rows_may_change_places_and_ids_may_come_again() -> None:
    """A request keeps its drafts in another row; another one of the same id starts afresh."""
    worker = Worker(ALL)
    worker.add("a", TEXT, TEXT)
    worker.add("b", "0123456789 ", "0123456789")
    worker.step()
    assert worker.drafts["b"] == ids("12")
    worker.model_runner.input_batch.req_ids.reverse()
    worker.step()
    assert worker.drafts == {"a": ids("quic"), "b": ids("4567")}
    worker.finish("a")
    worker.add("a", "zyxwvut ", "zyxwvut")
    worker.step()
    assert worker.drafts["a"] == ids("yx")


def test_a_preempted_request_goes_on() -> None:
    """It leaves the batch, not vLLM's requests: its answer is remembered once, whole."""
    worker = Worker()
    worker.add("a", "Q: ", TEXT)
    worker.step()
    batch = worker.model_runner.input_batch
    batch.req_ids.remove("a")
    worker.drafts.clear()
    worker.step()
    assert worker.rasd_stats()["running"] == 1
    batch.req_ids.append("a")
    while len(worker.model_runner.requests["a"].output_token_ids) < len(TEXT):
        worker.step()
    worker.finish("a")
    worker.step()
    kept = worker.rasd_stats()["memory"]
    assert (kept["answers"], kept["answer_tokens"]) == (1, len("Q: ") + len(TEXT))


def test_no_draft_reaches_past_the_answers_room() -> None:
    """A step adds one token itself, so a draft ends one before max_tokens and before the window."""
    worker = Worker(ALL, draft=64)
    worker.run("1", "Q: ", TEXT)
    worker.add("2", "Q: ", TEXT[:12])
    worker.step()
    assert worker.drafts["2"] == ids(TEXT)[1:11]
    state = SimpleNamespace(num_prompt_tokens=3, sampling_params=SimpleNamespace(max_tokens=None))
    lengths = (WINDOW - 5, WINDOW - 1, WINDOW)
    assert [worker.proposer._room(state, length) for length in lengths] == [4, 0, 0]


def test_an_id_that_the_model_lacks_is_not_drafted() -> None:
    """A fed text may have such ids; the draft ends before."""
    worker = Worker()
    worker.rasd_feed(["abcdef\u4e00ghi"])
    worker.add("r", "say: ", "abcdefgh")
    for _ in range(4):
        worker.step()
        assert all(token < VOCABULARY for token in worker.drafts["r"])
    assert worker.rasd_stats()["sources"]["memory"]["accepted"] > 0


def test_drafts_that_do_not_pay_are_not_sent() -> None:
    """Short matches that are wrong each time fall silent; longer ones, not known to be wrong, do not."""
    sources = {REQUEST: Source(), MEMORY: Source()}
    pairs = [(n, 100 + n) for n in range(40)]
    drafts = RequestDrafts([token for pair in pairs for token in pair], (), None, sources, 0.15)
    sent = []
    for first, _ in pairs:
        drafts.observe([first])
        sent.append(drafts.propose(4))
        drafts.observe([200 + first])
        assert drafts.propose(4) == []
    assert sent[0] == [100, 1]
    assert sent[20:] == [[]] * 20
    assert sources[REQUEST].accepted == 0
    drafts.observe([100])
    assert drafts.propose(4) == []
    drafts.observe([1])
    assert drafts.propose(4) == [101, 2, 102]


def test_the_source_that_was_right_before_is_drafted_from() -> None:
    """Prompt and memory go on differently after the same match; the one that was right is believed."""
    space = Namespaces(Letters(), most=1, max_tokens=1000).of("")
    space.texts.add(["cd", "xy"])
    sources = {REQUEST: Source(), MEMORY: Source()}
    drafts = RequestDrafts(ids("cq xp "), (), space, sources, 0)
    drafts.observe(ids("c"))
    assert drafts.propose(4) == ids("q ")
    drafts.observe(ids("d"))
    for _ in range(20):
        sources[MEMORY].calibration.count(Draft(ids("d"), node_probs=(0.25,)), ids("d"))
    drafts.observe(ids("x"))
    assert drafts.propose(4) == ids("y")


def test_a_fault_costs_one_requests_drafts(caplog: pytest.LogCaptureFixture) -> None:
    """A row that cannot be read gets no drafts from then on; others do, and nothing is raised."""
    worker = Worker()
    worker.add("bad", TEXT, TEXT)
    worker.add("good", TEXT, TEXT)
    del worker.model_runner.requests["bad"].num_prompt_tokens
    with caplog.at_level(logging.WARNING, "rasd_integrations"):
        for _ in range(4):
            worker.step()
    assert worker.drafts["bad"] == []
    assert worker.drafts["good"]
    assert worker.rasd_stats()["faults"] == 1
    assert "AttributeError" in caplog.text


def test_a_contract_that_changed_under_the_proposer_raises_nothing() -> None:
    """Whatever vLLM hands over, it gets an empty draft for each row."""
    worker = Worker()
    del worker.model_runner.input_batch
    assert worker.proposer.propose([[1], [2]], np.zeros(2), np.zeros((2, 9))) == [[], []]
    assert worker.rasd_stats()["faults"] == 1


def test_nothing_is_drafted_before_it_is_bound(caplog: pytest.LogCaptureFixture) -> None:
    """The log says what to call."""
    proposer = Proposer(config())
    with caplog.at_level(logging.WARNING, "rasd_integrations"):
        assert proposer.propose([[1]], np.ones(1, int), np.ones((1, 9), int)) == [[]]
    assert "collective_rpc('rasd_bind')" in caplog.text
    assert proposer.stats()["bound"] is False
    proposer.load_model(object())
    proposer.bind(SimpleNamespace(requests={}), Letters())
    assert proposer.stats()["bound"] is True


def test_a_prompt_without_ids_gets_no_drafts() -> None:
    """A prompt may be embeddings; its row holds no tokens."""
    worker = Worker()
    worker.add("r", TEXT, TEXT)
    worker.model_runner.requests["r"].prompt_token_ids = None
    state = worker.model_runner.requests["r"]
    tokens = np.array([[*ids(TEXT), ord("t")]])
    assert worker.proposer.propose([[ord("t")]], np.array([tokens.shape[1]]), tokens) == [[]]
    assert state.num_prompt_tokens == len(TEXT)


def test_a_prompt_that_is_still_read_gets_no_draft() -> None:
    """Its row has no new token; it is not indexed before its last part."""
    worker = Worker()
    worker.add("r", TEXT, TEXT)
    assert worker.proposer.propose([[]], np.array([9]), np.zeros((1, 50), int)) == [[]]
    assert worker.rasd_stats()["running"] == 0


def test_an_unknown_option_ends_the_start() -> None:
    """Making the proposer raises, so vLLM shows the message and ends."""
    with pytest.raises(ConfigurationError, match="Unknown option 'memory'"):
        Proposer(config({"memory": 3}))
