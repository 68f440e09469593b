"""The suffix automaton against brute force, and the drafts made from it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rasd_integrations.drafters.suffix import SuffixAutomaton, SuffixDrafter
from rasd_integrations.types import DraftContext, TokenBlock

TEXTS = st.lists(st.integers(0, 3), max_size=40)
DATA = Path(os.environ.get("RASD_DATA", Path(__file__).parents[3] / "shared" / "data"))


def occurrences(text, needle):
    """Return the ends of the occurrences of `needle`, as indices of their last token."""
    return [
        i for i in range(len(needle) - 1, len(text)) if text[i - len(needle) + 1 : i + 1] == needle
    ]


def longest_earlier(text):
    """Return the length of the longest suffix that occurred before."""
    return max(
        (m for m in range(len(text)) if len(occurrences(text, text[len(text) - m :])) > 1),
        default=0,
    )


def session(prompt, chunks=(), **options):
    """Return a session of a drafter with these options."""
    return SuffixDrafter(**options).start(DraftContext(prompt_ids=prompt, chunk_ids=chunks))


@given(TEXTS)
@example([1] * 30)
@example([0, 1, 0, 0, 1, 0, 1])
def test_match_is_the_longest_earlier_suffix(text):
    """The automaton finds as long an earlier occurrence as brute force does."""
    _, length = SuffixAutomaton(text).match()
    assert length == longest_earlier(text)


@given(TEXTS, st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_match_after_hypothetical_tokens_is_the_longest(text, extra):
    """With extra tokens the longest suffix that stands anywhere in the text is found."""
    _, length = SuffixAutomaton(text).match(extra)
    whole = text + extra
    expected = max(
        m for m in range(len(whole)) if occurrences(text, whole[len(whole) - m :]) or not m
    )
    assert length == expected


@given(TEXTS)
def test_followers_are_the_tokens_that_followed(text):
    """After a match exactly the tokens come that followed one of its occurrences."""
    automaton = SuffixAutomaton(text)
    state, length = automaton.match()
    if length:
        ends = occurrences(text, text[len(text) - length :])
        expected = {text[e + 1] for e in ends if e + 1 < len(text)}
        assert {t for _, t, _ in automaton.followers(state, 99)} == expected


@given(st.lists(st.integers(0, 2), max_size=24))
def test_the_automaton_holds_every_substring_and_nothing_else(text):
    """Walking any substring finds exactly the tokens that followed it, to the text's end."""
    automaton = SuffixAutomaton(text)
    for start in range(len(text)):
        state = 0
        for end in range(start, len(text)):
            state = automaton._target(state, text[end])
            needle = text[start : end + 1]
            followed = {text[e + 1] for e in occurrences(text, needle) if e + 1 < len(text)}
            assert state
            assert {t for _, t, _ in automaton.followers(state, 99)} == followed


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6).map(lambda t: [*t, 7]))
def test_followers_are_ordered_by_count_then_recency(text):
    """Shares are the counts of brute force, most frequent first, ties to the latest."""
    text = text * 2 + text[:1]
    automaton = SuffixAutomaton(text)
    state, length = automaton._step(0, 0, text[-1])
    ends = [e for e in occurrences(text, text[len(text) - length :]) if e + 1 < len(text)]
    counts = Counter(text[e + 1] for e in ends)
    latest = {text[e + 1]: e for e in ends}
    order = sorted(counts, key=lambda t: (counts[t], latest[t]), reverse=True)
    followers = automaton.followers(state, 99)
    assert [t for _, t, _ in followers] == order
    assert [s for s, _, _ in followers] == pytest.approx([counts[t] / len(ends) for t in order])


@given(TEXTS, TEXTS)
def test_indexing_in_parts_equals_indexing_at_once(first, second):
    """The automaton is online: how the text arrives does not matter."""
    parts = SuffixAutomaton(first)
    parts.extend(second)
    whole = SuffixAutomaton(first + second)
    assert parts.match() == whole.match()
    assert parts._links == whole._links


@given(TEXTS, TEXTS)
def test_no_match_crosses_a_separator(first, second):
    """A match lies within one of the separated texts."""
    automaton = SuffixAutomaton(first)
    automaton.separate()
    automaton.extend(second)
    _, length = automaton.match()
    suffixes = (second[len(second) - m :] for m in range(len(second) + 1))
    expected = max(
        len(s) for s in suffixes if occurrences(first, s) or len(occurrences(second, s)) > 1
    )
    assert length == expected


def test_separators_do_not_match_each_other():
    """Texts that begin alike match from their first token on, not from the separator before it."""
    automaton = SuffixAutomaton([9])
    for text in ([1, 2, 3], [1, 2]):
        automaton.separate()
        automaton.extend(text)
    assert automaton.match()[1] == 2


@given(TEXTS)
@settings(max_examples=50)
def test_states_and_transitions_stay_linear(text):
    """At most 2n states: the index is linear in the text."""
    automaton = SuffixAutomaton(text)
    assert len(automaton._links) <= max(2 * len(text), 2)


def test_draft_is_the_continuation_of_the_longest_match():
    """Three tokens that stood before are followed by what followed them then."""
    assert session([1, 2, 3, 4, 5, 6, 9, 3, 8, 1, 2, 3]).propose(8).token_ids == (4, 5, 6, 9)


def test_draft_grows_with_the_match_and_keeps_to_the_budget():
    """A match of one token drafts two, a match of four drafts five, never over the budget."""
    text = list(range(10, 30))
    assert session([*text, 99, 10]).propose(16).token_ids == (11, 12)
    assert session([*text, 99, 10, 11, 12, 13]).propose(16).token_ids == (14, 15, 16, 17, 18)
    assert session([*text, 99, 10, 11, 12, 13]).propose(3).token_ids == (14, 15, 16)


def test_nothing_known_or_no_budget_gives_an_empty_draft():
    """No earlier occurrence, an empty prompt or no budget: an empty draft, no error."""
    assert len(session([1, 2, 3]).propose(8)) == 0
    assert len(session([]).propose(8)) == 0
    assert len(session([1, 2, 1]).propose(0)) == 0


def test_min_match_holds_back_short_matches():
    """A match shorter than asked for drafts nothing."""
    prompt = [1, 2, 3, 4, 9, 2]
    assert session(prompt, min_match=2).propose(8).token_ids == ()
    assert session([*prompt, 3], min_match=2).propose(8).token_ids == (4, 9, 2)


def test_the_most_frequent_continuation_wins_and_ties_go_to_the_latest():
    """Two against one wins; one against one takes the recent one."""
    assert session([1, 5, 1, 5, 1, 6, 8, 1]).propose(1).token_ids == (5,)
    assert session([1, 5, 8, 1, 6, 8, 1], min_match=1).propose_after((), 1) == (6,)


def test_an_unlikely_continuation_is_not_drafted():
    """A token that was followed by something else every time predicts nothing."""
    prompt = [t for i in range(10, 20) for t in (1, i)] + [1]
    assert session(prompt).propose(4).token_ids == ()
    assert session(prompt, min_probability=0.05).propose(1).token_ids == (19,)


def test_a_loop_is_drafted_past_the_end_of_the_text():
    """Where the text ends the draft goes on from a shorter match."""
    assert session([9, 1, 2, 1, 2, 1, 2]).propose(5).token_ids == (1, 2, 1, 2, 1)


def test_the_answer_is_indexed_as_it_grows():
    """What was committed can be copied."""
    running = session([1, 2, 3])
    running.observe(TokenBlock((7, 8, 9, 7)))
    assert running.propose(4).token_ids == (8, 9)


def test_chunks_are_copied_from_but_never_run_together():
    """A draft ends where its chunk ends."""
    running = session([1, 2, 3, 5, 6], chunks=[[4, 5, 6, 7, 8], [30, 31]])
    assert running.propose(9).token_ids == (7, 8)


def test_propose_after_looks_ahead_without_a_trace():
    """Hypothetical tokens steer the draft and leave the session as it was."""
    running = session([1, 2, 3, 4, 5, 6, 9, 1])
    before = running.propose(8)
    assert running.propose_after((2, 3), 8) == (4, 5, 6, 9)
    assert running.propose_after((77,), 8) == ()
    assert running.propose(8) == before


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30), st.lists(st.integers(0, 2), max_size=5)
)
def test_propose_after_leaves_the_next_proposal_as_it_was(text, extra):
    """Looking ahead by nothing is the proposal itself; looking further changes nothing."""
    running = session(text)
    assert running.propose_after((), 6) == running.propose(6).token_ids
    running.propose_after(extra, 6)
    assert running.propose(6) == session(text).propose(6)


def test_tree_holds_the_other_continuations():
    """With tree=True siblings are what else followed, the chain first."""
    prompt = [1, 2, 5, 5, 1, 2, 6, 6, 1, 2, 5, 5, 9, 1, 2]
    draft = session(prompt, tree=True).propose(8)
    assert draft.token_ids[0] == 5
    children = {t for t, p in zip(draft.token_ids, draft.parents, strict=True) if p == -1}
    assert children == {5, 6}
    assert all(p < i for i, p in enumerate(draft.parents))


@given(TEXTS, st.integers(0, 9))
def test_tree_is_well_formed_and_within_the_budget(text, budget):
    """Parents stand before children, siblings differ, ids are real tokens."""
    draft = session(text, chunks=[text[:5], text[5:9]], tree=True, min_probability=0.01).propose(
        budget
    )
    assert len(draft) <= budget
    assert all(-1 <= p < i for i, p in enumerate(draft.parents))
    pairs = list(zip(draft.parents, draft.token_ids, strict=True))
    assert len(set(pairs)) == len(pairs)
    assert set(draft.token_ids) <= set(text)


def test_drafts_depend_on_the_context_only():
    """Two sessions of one drafter agree and do not see each other's text."""
    drafter = SuffixDrafter()
    one = drafter.start(DraftContext(prompt_ids=[1, 2, 3, 1]))
    two = drafter.start(DraftContext(prompt_ids=[1, 2, 3, 1]))
    one.observe(TokenBlock((9, 9, 1)))
    assert two.propose(4) == drafter.start(DraftContext(prompt_ids=[1, 2, 3, 1])).propose(4)


def test_source_names_the_drafter_and_close_frees_the_index():
    """The statistics know who drafted; a closed session holds no text."""
    running = session([1, 2, 1], name="lookup")
    assert running.propose(2).source == "lookup"
    running.close()
    assert len(running.propose(2)) == 0


def test_a_long_prompt_is_indexed_fast():
    """7 000 tokens of real text in under 60 ms of processor time (10 ms when measured alone)."""
    path = DATA / "leval" / "gov_report_summ.jsonl"
    if not path.exists():
        pytest.skip(f"no benchmark data: set RASD_DATA (looked in {DATA})")
    words = json.loads(path.read_text(encoding="utf-8").splitlines()[1])["input"].split()
    ids: dict[str, int] = {}
    tokens = [ids.setdefault(word, len(ids)) for word in words * 3][:7000]
    took = []
    for _ in range(3):
        start = time.process_time()
        SuffixAutomaton(tokens)
        took.append(time.process_time() - start)
    assert min(took) < 0.06
