"""Blocks to text chunks: cut, closed, and ended as promised."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import SimpleNamespace

import pytest
from tiny import EOS, tiny_tokenizer

from rasd_integrations.stats import DecodingStats
from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.answer.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.answer.parser import AnswerParser, ReasoningFormat
from rasd_integrations.text.answer.stream import stream_text
from rasd_integrations.types import TextDelta, TokenBlock


class Source:
    """Blocks of a text, and whether they were closed."""

    def __init__(self, texts: list[str], finish: str = "length") -> None:
        tokenizer = tiny_tokenizer()
        self.ids = [tuple(tokenizer.encode(t, add_special_tokens=False)) for t in texts]
        self.finish = finish
        self.taken = 0
        self.closed = False

    def blocks(self) -> Generator[TokenBlock, None, None]:
        try:
            for ids in self.ids:
                self.taken += 1
                last = self.taken == len(self.ids)
                tail = (EOS,) if last and self.finish == "stop" else ()
                yield TokenBlock(ids + tail, finish_reason=self.finish if last else None)
        finally:
            self.closed = True


def chunks_of(source: Source, stop: tuple[str, ...] = ()) -> Iterator[TextDelta]:
    stats = DecodingStats(target_steps=7)
    return stream_text(
        source.blocks(), IncrementalDetokenizer(tiny_tokenizer()), stop, lambda: stats
    )


def test_one_chunk_a_block_with_its_ids():
    """Chunks carry the text and the ids of their blocks, in order."""
    source = Source(["Hello", " wor", "ld"])
    chunks = list(chunks_of(source))
    assert ["Hello", " wor", "ld"] == [c.text for c in chunks]
    assert source.ids == [c.token_ids for c in chunks]


def test_only_the_last_chunk_has_reason_and_statistics():
    """The end is marked once, on the last piece."""
    chunks = list(chunks_of(Source(["a", "b"], finish="stop")))
    assert [None, "stop"] == [c.finish_reason for c in chunks]
    assert [None, 7] == [c.stats and c.stats.target_steps for c in chunks]


def test_end_token_is_not_text():
    """A special end token is among the ids and not in the text."""
    (chunk,) = chunks_of(Source(["a"], finish="stop"))
    assert ("a", EOS) == (chunk.text, chunk.token_ids[-1])


def test_stop_string_across_blocks_cuts_and_closes():
    """A stop string over three blocks ends the text before it, and no further block is asked for."""
    source = Source(["one ", "<E", "N", "D> two", " three"])
    chunks = list(chunks_of(source, ("<END>",)))
    assert "one " == "".join(c.text for c in chunks)
    assert ("stop", 4, True) == (chunks[-1].finish_reason, source.taken, source.closed)


def test_stop_string_in_the_last_block_is_the_reason():
    """Text that ends by length and by a stop string ended by the stop string."""
    assert "stop" == list(chunks_of(Source(["ab", "c."]), (".",)))[-1].finish_reason


def test_held_back_text_comes_with_the_last_chunk():
    """What might have become a stop string is shown when the answer ends."""
    chunks = list(chunks_of(Source(["a<", "E"]), ("<END>",)))
    assert ["a", "<E"] == [c.text for c in chunks]


def test_half_a_character_at_the_end_is_shown_as_replacement():
    """An answer cut inside a character ends in one replacement character."""
    source = Source(["é"])
    source.ids = [source.ids[0][:1]]
    assert "\ufffd" == "".join(c.text for c in chunks_of(source))


TWO_CALLS = (
    "Fine.\n",
    '<tool_call>\n{"name": "f", "arguments": {"a": "END"}}\n</tool_call>\n',
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    "",
)


def answer_of(texts, stop=(), max_calls=None, thinking=False):
    """Return the chunks of an answer with tools, and its source."""
    source = Source(list(texts), finish="stop")
    parser = AnswerParser(tf.HERMES, ("f", "g"), reasoning=ReasoningFormat(), thinking=thinking)
    chunks = stream_text(
        source.blocks(), IncrementalDetokenizer(tiny_tokenizer()), stop, DecodingStats,
        parser=parser, max_calls=max_calls, count_tokens=len,
    )  # fmt: skip
    return list(chunks), source


def calls_of(chunks):
    """Return names and arguments, joined."""
    deltas = [d for c in chunks for d in c.tool_calls]
    return [d.name for d in deltas if d.name], "".join(d.arguments for d in deltas)


def test_calls_are_no_text_and_tell_the_reason():
    """What is left of the text has no markup."""
    chunks, _ = answer_of(TWO_CALLS)
    assert "".join(c.text for c in chunks) == "Fine."
    assert calls_of(chunks) == (["f", "g"], '{"a": "END"}{}')
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("stop", ["END", "\n", '"'])
def test_stop_strings_end_the_text_only(stop):
    """Reasoning and calls may contain a stop string: they are not the answer's text."""
    thought = f"a{stop}b</think>\n\n"
    chunks, _ = answer_of([thought, *TWO_CALLS], (stop,), thinking=True)
    assert "".join(c.reasoning for c in chunks) == f"a{stop}b"
    assert calls_of(chunks)[0] == ["f", "g"]
    assert chunks[-1].finish_reason == "tool_calls"
    assert chunks[-1].stats.reasoning_tokens == len("".join(c.reasoning for c in chunks)) > 0


def test_a_stop_string_before_the_calls_ends_all():
    """Nothing after the end of the text is emitted."""
    chunks, source = answer_of(TWO_CALLS, ("ine",))
    assert "".join(c.text for c in chunks) == "F"
    assert calls_of(chunks) == ([], "")
    assert (chunks[-1].finish_reason, source.taken, source.closed) == ("stop", 1, True)


def test_a_call_in_the_token_of_a_stop_string_is_behind_it():
    """Where one token holds the stop string and a call after it, the call is not handed out."""
    text = 'a END<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    whole = SimpleNamespace(push=lambda ids: text, flush=str)
    parser = AnswerParser(tf.HERMES, ("f",), reasoning=None, thinking=False)
    blocks = (TokenBlock((1,), finish_reason="stop") for _ in range(1))
    chunks = list(stream_text(blocks, whole, ("END",), DecodingStats, parser=parser))
    assert ("a ", ([], "")) == ("".join(c.text for c in chunks), calls_of(chunks))
    assert chunks[-1].finish_reason == "stop"


def test_an_answer_of_one_call_ends_before_the_second():
    """Where one call is wanted, decoding stops when another begins."""
    chunks, source = answer_of(TWO_CALLS, max_calls=1)
    assert calls_of(chunks) == (["f"], '{"a": "END"}')
    assert (chunks[-1].finish_reason, source.closed) == ("tool_calls", True)


def test_closing_the_text_closes_the_blocks():
    """A consumer that stops early stops the decoding."""
    source = Source(["a", "b", "c"])
    chunks = chunks_of(source)
    next(chunks)
    chunks.close()
    assert (True, 1) == (source.closed, source.taken)


def test_an_error_of_the_engine_reaches_the_consumer_and_closes():
    """What decoding raises is not swallowed."""
    closed = []

    def failing() -> Generator[TokenBlock, None, None]:
        try:
            yield TokenBlock((65,))
            message = "no"
            raise MemoryError(message)
        finally:
            closed.append(True)

    chunks = stream_text(failing(), IncrementalDetokenizer(tiny_tokenizer()), (), DecodingStats)
    with pytest.raises(MemoryError):
        list(chunks)
    assert [True] == closed
