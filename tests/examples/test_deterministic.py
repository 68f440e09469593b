"""The benchmark of deterministic=True: it asks in every way, counts and times."""

from __future__ import annotations

import json

import deterministic
import pytest
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, SamplingParams


def test_every_way_is_asked_and_counted(monkeypatch):
    """Fault 11: with the option all ways agree; engines of one number share a cache, and others do not."""
    loaded = tiny_llama().bfloat16(), tiny_tokenizer()
    texts = ["Who? " * n for n in (3, 40, 55)]

    def make(nbytes: int) -> RASD:
        return RASD.from_model(*loaded, prefix_cache_bytes=nbytes, deterministic=True)

    found = list(deterministic.asked(make, texts, SamplingParams(max_tokens=12, ignore_eos=True)))
    said = deterministic.agreement(found)
    assert said["questions"] == said["same in all ways"] == 3
    assert set(said["parted from cold"].values()) == {0}
    found[0]["cached"] += "."
    said = deterministic.agreement(found)
    assert (said["same in all ways"], said["parted from cold"]["cached"]) == (2, 1)
    engines = {"normal": RASD.from_model(*loaded), "deterministic": make(0)}
    costs = deterministic.costs(engines, texts[2], 4, 2)
    assert len(costs) == 4
    assert all(value > 0 for pair in costs.values() for value in pair.values())


@pytest.mark.real
@pytest.mark.soak
def test_real_questions(data_folder, tmp_path):
    """Fault 11: SmolLM2 in bfloat16 says the same in all ways, eager and compiled, greedy and sampled."""
    pytest.importorskip("openvino")
    out = tmp_path / "out.json"
    options = ["--questions", "4", "--without", "0", "--characters", "900", "--max-tokens", "8"]
    deterministic.main([*options, "--turns", "0", "--data", str(data_folder), "--out", str(out)])
    same = json.loads(out.read_text(encoding="utf-8"))["same"]
    assert len(same) == 4
    assert all(part["same in all ways"] == part["questions"] == 4 for part in same.values())
