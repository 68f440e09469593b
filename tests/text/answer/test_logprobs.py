"""Tokens' log-probabilities in OpenAI's form: their bytes join to the text, whatever the tokenizer."""

from __future__ import annotations

import json

import pytest
from fakes_vocabulary import KINDS
from tiny import EOS, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rasd_integrations.text.answer.logprobs import openai_logprobs
from rasd_integrations.types import TokenLogprob

TEXT = "the café\n 漢字 😀!"


def entries(tokenizer, ids):
    return openai_logprobs(tokenizer, [TokenLogprob(i, -0.5) for i in ids])


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_text_join_to_it(kind):
    """Characters that several tokens share included; a token that is part of one is shown as U+FFFD."""
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    found = entries(tokenizer, ids)
    assert len(found) == len(ids)
    joined = bytes(byte for one in found for byte in one["bytes"]).decode()
    assert joined == {"llama": f" {TEXT}"}.get(kind, TEXT)
    parts = [one for one in found if one["token"] == "\ufffd"]
    assert [byte for one in parts for byte in one["bytes"]] == list("é漢字😀".encode())
    assert [one["token"] for one in found if one not in parts] == [
        bytes(one["bytes"]).decode() for one in found if one not in parts
    ]


def test_an_entry_is_openais():
    """Its alternatives too, in the order of their probabilities; all of it is JSON."""
    tokenizer = tiny_tokenizer()
    a, b = tokenizer.encode("ab")
    found = openai_logprobs(tokenizer, [TokenLogprob(a, -1.5, ((b, -0.5), (a, -1.5)))])
    first = {"token": "a", "logprob": -1.5, "bytes": [97]}
    other = {"token": "b", "logprob": -0.5, "bytes": [98]}
    assert json.loads(json.dumps(found)) == [first | {"top_logprobs": [other, first]}]


def test_control_tokens_are_named_and_unknown_ids_are_empty():
    """Models have more rows than their tokenizers have tokens."""
    named, unknown = entries(tiny_tokenizer(), [EOS, 100_000])
    assert (named["token"], bytes(named["bytes"]).decode()) == ("<|endoftext|>",) * 2
    assert (unknown["token"], unknown["bytes"]) == ("", [])


def test_other_tokenizers_decode_each_token():
    """Whole words, say, are neither byte-level nor sentencepiece."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "café": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    (found,) = entries(tokenizer, [1])
    assert (found["token"], bytes(found["bytes"]).decode()) == ("café", "café")
