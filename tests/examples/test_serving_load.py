"""The load on a server: honest and rude clients at once, for a few seconds."""

from __future__ import annotations

import pytest
import serving_load
from tiny import tiny_llama, tiny_tokenizer


@pytest.mark.slow
def test_every_finished_answer_is_its_sequential_one(tmp_path):
    """Under hang-ups, bad bodies, slow readers and floods nothing is wrong, nothing hangs, and the process ends."""
    tiny_llama(max_position_embeddings=8192).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = serving_load.main(
        ["--model", str(tmp_path), "--clients", "40", "--seconds", "15", "--questions", "8", "--queue", "16",
         "--serve=--deterministic --executor eager", "--out", str(tmp_path / "out.json")]
    )  # fmt: skip
    assert (found["wrong"], found["foreign"], found["exit status"]) == ([], [], 0)
    assert {*found["counts"]} == {"equal", "left", "refused (429)", "bad body refused (400)"}
    assert found["counts"]["equal"] > 20
    last, before = found["states"][-1], found["states"][0]
    assert last["files"] <= before["files"] - 10  # the clients' connections are gone
    assert last["threads"] <= before["threads"]
