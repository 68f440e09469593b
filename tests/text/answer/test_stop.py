"""Stop strings cut streamed text as they cut the whole."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rasd_integrations.text.answer.stop import StopMatcher, ended_at
from rasd_integrations.types import TokenBlock, TokenLogprob

# Few letters make overlaps, repeats and stop strings inside stop strings likely.
TEXTS = st.text("ab.\n", max_size=24)
STOPS = st.lists(st.text("ab.\n", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=len(text))]


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(TEXTS, STOPS, st.lists(st.integers(0, 24), max_size=8))
def test_cut_is_at_the_first_stop_string_of_the_whole_text(text, stops, cuts):
    """The shown text ends before the first stop string, for any pieces."""
    matcher = StopMatcher(stops)
    shown = "".join([matcher.push(piece) for piece in pieces(text, cuts)] + [matcher.flush()])
    assert cut(text, stops) == shown
    assert any(stop in text for stop in stops) == matcher.stopped


@given(TEXTS, STOPS)
def test_only_what_may_be_a_stop_string_is_held_back(text, stops):
    """After each character, the hidden part is the longest that can still begin a stop string."""
    matcher, shown = StopMatcher(stops), ""
    for end, character in enumerate(text, start=1):
        shown += matcher.push(character)
        if matcher.stopped:
            break
        so_far = text[:end]
        whole = min((so_far.find(s) for s in stops if s in so_far), default=end)
        begins = (i for i in range(end) if any(s.startswith(so_far[i:]) for s in stops))
        assert so_far[: min(whole, next(begins, end))] == shown


def test_text_after_a_stop_string_is_swallowed():
    """Once stopped, nothing more is shown."""
    matcher = StopMatcher(["END"])
    assert "one " == matcher.push("one END two")
    assert "" == matcher.push("three")
    assert "" == matcher.flush()


def test_longer_stop_string_that_begins_earlier_wins():
    """A stop string inside another does not cut before the outer one is decided."""
    matcher = StopMatcher(["abc", "b"])
    assert "x" == matcher.push("xab")
    assert not matcher.stopped
    assert "" == matcher.push("c")
    assert matcher.stopped


def test_an_end_token_is_the_last_of_the_answer():
    """It is among the ids, with what is reported of it; what was decoded behind it is not. No other block is taken."""
    taken = []

    def blocks():
        for ids in ((1, 2), (3, 9, 4), (5,)):
            taken.append(ids)
            yield TokenBlock(ids, logprobs=tuple(TokenLogprob(token, -1.0) for token in ids))

    ended = list(ended_at(blocks(), {9}))
    assert [block.token_ids for block in ended] == [(1, 2), (3, 9)]
    assert [[one.token_id for one in block.logprobs] for block in ended] == [[1, 2], [3, 9]]
    assert [block.finish_reason for block in ended] == [None, "stop"]
    assert len(taken) == 2


def test_held_beginning_is_shown_when_the_text_ends():
    """The beginning of a stop string that never came is part of the answer."""
    matcher = StopMatcher(["\nUser:"])
    assert "hello" == matcher.push("hello\nUse")
    assert "\nUse" == matcher.flush()
    assert not matcher.stopped
