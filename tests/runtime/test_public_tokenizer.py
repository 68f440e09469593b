"""The model's own tokenizer is public, and loads no weights."""

from __future__ import annotations

import pytest
from llama_index.core.node_parser import SentenceSplitter
from scripted import scripted_model
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, langchain, llama_index


@pytest.mark.parametrize(
    "kind",
    [RASD, langchain.ChatRASD, langchain.RASDLLM, llama_index.RASDLLM],
    ids=lambda kind: kind.__module__,
)
def test_every_class_has_it(kind):
    """It is the very one that was given."""
    model, tokenizer = scripted_model(lambda _: "Paris.")

    assert kind.from_model(model, tokenizer).tokenizer is tokenizer


def test_it_loads_no_weights(tmp_path):
    """A folder without weights is enough for a splitter."""
    tiny_llama().config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    llm = llama_index.RASDLLM(tmp_path)
    splitter = SentenceSplitter(chunk_size=40, chunk_overlap=0, tokenizer=llm.encode)
    pieces = splitter.split_text("Ein Satz über Gärten. " * 8)

    assert len(llm.tokenizer) > 0
    assert 0 < max(len(llm.encode(piece)) for piece in pieces) <= 40
