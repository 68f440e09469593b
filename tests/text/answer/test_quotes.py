"""Quotes: spans of an answer that are word for word in a chunk, against a search that tries every span."""

from __future__ import annotations

import random
import sys
import unicodedata
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rasd_integrations import Chunk, DecodingStats, TextDelta
from rasd_integrations.stats import Quote
from rasd_integrations.text.answer.quotes import find_quotes, quoted

WITHOUT_SPACES = ("THAI", "LAO", "MYANMAR", "KHMER", "CJK", "HIRAGANA", "KATAKANA")


def is_unspaced(char):
    return char.isalnum() and unicodedata.name(char, "").startswith(WITHOUT_SPACES)


def is_letter(char):
    return (char.isalnum() or char == "_") and not is_unspaced(char)


def is_mark(char):
    return unicodedata.category(char).startswith("M") or char in "\u200c\u200d\u00ad"


def words_of(text):
    """Return start and end of each word, read character by character."""
    found, at, text = [], 0, text + "\0\0"
    while at < len(text) - 2:
        start = at
        if is_unspaced(text[at]):
            at += 1
            while is_mark(text[at]):
                at += 1
            found.append((start, at))
        elif is_letter(text[at]):
            while True:
                at += 1
                if is_letter(text[at]) or is_mark(text[at]):
                    continue
                apostrophe = text[at] in "'\u2019" and is_letter(text[at + 1])
                point = text[at] in ".," and text[at - 1].isdecimal() and text[at + 1].isdecimal()
                if not (apostrophe or point):
                    break
            found.append((start, at))
        else:
            at += 1
    return found


@cache
def size(text):
    """Return the number of words as a reader counts them."""
    kinds = "".join(
        "C" if is_unspaced(c) else "w" if is_letter(c) else " "[: c.isspace()] for c in text
    )
    return kinds.count("C") / 2 + len(kinds.replace("C", " ").split())


def places_of(chunks):
    """Return the first place of every run of whole words in the chunks."""
    places = {}
    for number, chunk in enumerate(chunks):
        words = words_of(chunk.original)
        for i, (start, _) in enumerate(words):
            for _, end in words[i:]:
                places.setdefault(chunk.original[start:end], (number, start))
    return places


def every_quote(answer, chunks, places=None):
    """Try all spans, the longest first."""
    places = places_of(chunks) if places is None else places
    words = words_of(answer)
    spans = [
        (words[i][0] - words[j][1], words[i][0], words[j][1])
        for i in range(len(words))
        for j in range(i, len(words))
        if answer[words[i][0] : words[j][1]] in places
        and size(answer[words[i][0] : words[j][1]]) >= 5
    ]
    chosen = []
    for _, start, end in sorted(spans):
        number, at = places[answer[start:end]]
        if all(end <= quote.start or quote.end <= start for quote in chosen):
            chunk = chunks[number]
            chosen.append(Quote(start, end, answer[start:end], chunk.id, at, chunk.metadata))
    return tuple(sorted(chosen, key=lambda quote: quote.start))


CASES = {
    "whole words only": ("cat sat on a mat", ["cat sat on a matter of"], []),
    "five of six": ("so the cat sat on a mat", ["See the cat sat on a matter of"], ["the cat sat on a"]),
    "four words": ("the cat sat down", ["the cat sat down"], []),
    "no punctuation at the ends": ('"One, two, three, four, five."', ["One, two, three, four, five."], ["One, two, three, four, five"]),
    "case as written": ("The cat sat on a mat", ["the cat sat on a mat"], ["cat sat on a mat"]),
    "white space as written": ("a b c d e\nf g h i j", ["a b c d e f g h i j"], ["a b c d e", "f g h i j"]),
    "numbers are whole": ("it costs exactly about 3.", ["it costs exactly about 3.50 now"], []),
    "a number's points": ("it costs exactly about 3.50 now", ["it costs exactly about 3.50 now"], ["it costs exactly about 3.50 now"]),
    "an apostrophe joins": ("I don't know who's", ["I don't know who's"], []),
    "joined words are one": ("a state-of-the-art model, docs/how-to/index.md", ["a state-of-the-art model, docs/how-to/index.md"], []),
    "joined words in a quote": ("the-art models are very good", ["of-the-art models are very good"], ["the-art models are very good"]),
    "half of joined words": ("the art models are very good", ["of-the-art models are very good"], ["art models are very good"]),
    "marks belong to letters": ("le cafe\u0301 est tres bon ici", ["le cafe est tres bon ici"], []),
    "nine characters of Han": ("机器学习模型在训练", ["机器学习模型在训练"], []),
    "ten characters of Han": ("机器学习模型在训练中", ["那机器学习模型在训练中的"], ["机器学习模型在训练中"]),
    "Han beside words": ("GPT 4 机器学习模型", ["GPT 4 机器学习模型"], ["GPT 4 机器学习模型"]),
    "Hindi": ("यह हिन्दी में एक छोटा वाक्य है", ["देखो यह हिन्दी में एक छोटा वाक्य हैं"], ["यह हिन्दी में एक छोटा वाक्य"]),
    "the longest first": ("a b c d e f g h i j k l", ["a b c d e f", "f g h i j k l m"], ["a b c d e", "f g h i j k l"]),
    "what remains may be too short": ("a b c d e f g h i j k l", ["a b c d e f g h i", "e f g h i j k l"], ["a b c d e f g h i"]),
    "not over a gap in the chunk": ("a b c d e f", ["a b c d e x b c d e f"], ["a b c d e"]),
    "not over two chunks": ("a b c d e f", ["a b c d e", "b c d e f"], ["a b c d e"]),
    "of equals the first": ("a b c d e f", ["b c d e f", "a b c d e"], ["a b c d e"]),
    "a pair of surrogates cut": ("a b c d e \ud800", ["a b c d e \ud800"], ["a b c d e"]),
    "nothing": ("", ["a b c d e"], []),
    "no chunks": ("a b c d e", [], []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_a_quote(case):
    """Whole words, five or more, as written; the longest first."""
    answer, texts, expected = CASES[case]
    chunks = [Chunk(text, id=str(i)) for i, text in enumerate(texts)]
    assert [quote.text for quote in find_quotes(answer, chunks)] == expected
    assert find_quotes(answer, chunks) == every_quote(answer, chunks)


def test_of_several_chunks_the_best_is_named_and_its_first_place():
    """The order of the chunks decides, then the place in the chunk."""
    chunks = [Chunk("nothing of it"), Chunk("- a b c d e, a b c d e", id="1"), Chunk("a b c d e f", id="2")]  # fmt: skip
    (quote,) = find_quotes("So a b c d e.", chunks)
    assert (quote.chunk_id, quote.chunk_start) == ("1", 2)
    (quote,) = find_quotes("So a b c d e f.", chunks)
    assert (quote.chunk_id, quote.chunk_start) == ("2", 0)


def test_positions_are_those_of_the_text_as_stored():
    """What a framework shows before a chunk's text is not quoted and does not move it."""
    chunk = Chunk("title: a b c d e f\n\nOne two three four five", stored="One two three four five")
    (quote,) = find_quotes("a b c d e f: One two three four five", [chunk])
    assert (quote.text, quote.chunk_start) == ("One two three four five", 0)


def test_only_what_json_can_say_of_the_metadata_is_told():
    """A value that is no JSON is left out; the rest are plain values."""
    loop: list[object] = []
    loop.append(loop)
    metadata = {
        "source": "a.md",
        "page": 3,
        5: (1, 2),
        "when": object(),
        "loop": loop,
        "nan": float("nan"),
    }
    told = DecodingStats(quotes=(Quote(0, 9, "x", "id", 2, metadata),)).as_dict()["quotes"]
    assert told == [
        {"start": 0, "end": 9, "text": "x", "chunk_id": "id", "chunk_start": 2,
         "metadata": {"source": "a.md", "page": 3, "5": [1, 2]}}
    ]  # fmt: skip


def test_the_last_piece_of_an_answer_carries_its_quotes():
    """They are searched once, over the text of all pieces without the reasoning."""
    stats = DecodingStats()
    pieces = (
        p
        for p in [
            TextDelta("", reasoning="six seven eight nine ten"),
            TextDelta("one two th"),
            TextDelta("ree four five", finish_reason="stop", stats=stats),
        ]
    )
    chunks = [Chunk("one two three four five"), Chunk("six seven eight nine ten")]
    before = [stats.quotes for _ in quoted(pieces, chunks)]
    assert before == [(), (), stats.quotes]
    assert [quote.text for quote in stats.quotes] == ["one two three four five"]


PIECES = ["a", "b", "ab", "1", "1.5", "1,", "don't", "d'", "\u2019s", "cafe\u0301", "\u0301", "机", "器", "ก็", "x_y", "हि", "A", "", "\u200d", "😀", "e"]  # fmt: skip
GAPS = [" ", " ", " ", "", "\n", ", ", ".", "-", "  ", "'"]
ODD_TEXT = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(GAPS)), max_size=40).map(
    lambda pairs: "".join(word + gap for word, gap in pairs)
)
TEXT = st.one_of(ODD_TEXT, st.lists(st.sampled_from("ab"), max_size=40).map(" ".join))


@st.composite
def answers(draw):
    """Return texts, and an answer with parts of them."""
    texts = draw(st.lists(TEXT, min_size=1, max_size=4))
    joined = "".join(texts)
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(joined)))
        parts += [joined[start : start + draw(st.integers(0, 60))], draw(TEXT)]
    return "".join(parts), [Chunk(text, id=str(i)) for i, text in enumerate(texts)]


@settings(max_examples=200, deadline=None)
@example((" ".join("a" * 12), [Chunk("a a a a a a", id="0")]))
@given(answers())
def test_nothing_is_missed_and_nothing_claimed(case):
    """The quotes are those of a search that tries every span, in texts of few and odd words."""
    answer, chunks = case
    found = find_quotes(answer, chunks)
    assert found == every_quote(answer, chunks)
    by_id = {chunk.id: chunk.text for chunk in chunks}
    for quote in found:
        held = by_id[quote.chunk_id][quote.chunk_start :]
        assert held.startswith(quote.text)
        assert answer[quote.start : quote.end] == quote.text


def generated(rng, chunks, words):
    """Return an answer of copied, changed and invented parts."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        text = rng.choice(chunks).text
        start = rng.randrange(len(text))
        part = text[start : start + rng.randint(10, 200)]
        if rng.random() < 0.3:
            part = part.replace(rng.choice(words), rng.choice(words)).replace("  ", " ")
        parts += [part, " ".join(rng.choices(words, k=rng.randint(0, 8)))]
    return " ".join(parts)


def test_on_500_answers_precision_and_recall_are_1():
    """Every quote is in its chunk, and no other span that is would have been chosen before."""
    rng = random.Random(7)
    words = [f"w{n}" for n in range(30)] + ["don't", "3.5", "机", "器", "é"]
    claimed = right = wanted = 0
    for _ in range(10):
        texts = [
            "".join(
                rng.choice(words) + rng.choice([" ", " ", " ", ", ", "\n", "-"]) for _ in range(28)
            )
            for _ in range(4)
        ]
        chunks = [Chunk(text, id=str(i)) for i, text in enumerate(texts)]
        places = places_of(chunks)
        for _ in range(50):
            answer = generated(rng, chunks, words)
            found, expected = find_quotes(answer, chunks), every_quote(answer, chunks, places)
            claimed += len(found)
            right += sum(
                texts[int(q.chunk_id)][q.chunk_start :].startswith(answer[q.start : q.end])
                for q in found
            )
            wanted += len(expected)
            assert found == expected
    assert right == claimed == wanted > 500


def lines_run(answer, chunks):
    """Return the lines of the module that a search runs, and its quotes."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if not frame.f_code.co_filename.endswith("quotes.py"):
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = find_quotes(answer, chunks)
    finally:
        sys.settrace(before)
    return lines, found


def fibonacci(length):
    one, two = "a", "ab"
    while len(two) < length:
        one, two = two, two + one
    return two[:length]


ODD = {
    "one word": lambda n: ("a " * n, ["a " * n]),
    "one word and another end": lambda n: ("a " * n + "b", ["a " * n + "c"] * 2),
    "one character of Han": lambda n: ("机" * n, ["机" * n]),
    "many short quotes": lambda n: ("a b c d e f " * (n // 6), ["a b c d e f - " * (n // 6)]),
    "two words in turn": lambda n: ("a b " * (n // 2), ["b a " * (n // 2)] * 2),
    "Fibonacci's words": lambda n: (" ".join(fibonacci(n)), [" ".join(fibonacci(n)[::-1])]),
    "steps": lambda n: (" ".join("a " * k + "b" for k in range(int(n**0.5))), ["a " * n]),
    "nothing shared": lambda n: ("a " * n, [" ".join(map(str, range(n)))]),
}


@pytest.mark.parametrize("case", ODD)
def test_no_text_costs_more_than_its_length(case):
    """Four times the text is at most some five times the lines run, whatever it repeats."""
    sizes = (300, 1200)
    counts = []
    for size in sizes:
        answer, texts = ODD[case](size)
        counts.append(lines_run(answer, [Chunk(text) for text in texts])[0])
    assert counts[1] <= 5.5 * counts[0]


def test_a_chunk_of_100_000_characters_is_searched_once():
    """Chunks that share no five known words in a row are not even taken apart."""
    rng = random.Random(3)
    text = " ".join(f"w{rng.randrange(5000)}" for _ in range(18_000))
    lines, found = lines_run("x " * 40 + text[50_000:50_200], [Chunk(text)])
    assert len(found) == 1
    none, _ = lines_run("x " * 40 + "y " * 40, [Chunk(text)])
    assert none < 2000 < lines < 200_000
