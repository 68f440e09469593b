"""The GPU benchmark, whole, in its toy size on a CPU: what it reports, and what it refuses to time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.engine.executors.base import StepOutput
from rasd_integrations.engine.executors.cuda_graphs.executor import GraphExecutor


def test_the_script_prints_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors, the floor and steps of each engine; what only a device can tell is null."""
    out = tmp_path / "new" / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(out)])
    gpu.main()
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert len(document["correctness"]) == 12
    size = gpu.setting(tiny=True)
    widths = [str(n) for n in size.widths]
    assert list(document["prefixes"]) == [str(n) for n in size.prefixes]
    for figures in document["prefixes"].values():
        for engine in ("ours_ms", "graphs_ms", "transformers_ms"):
            assert list(figures[engine]) == widths
            assert all(ms > 0 for ms in figures[engine].values())
        for measured in (figures["host_ms"], figures["waits"]):
            assert measured == {name: dict.fromkeys(widths) for name in ("ours", "graphs")}
    drafting = document["drafting"]
    assert min(drafting["eager_ms"], drafting["graphs_ms"]) > 0
    assert drafting["eager_waits"] is drafting["graphs_waits"] is None


def test_a_wrong_graph_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is timed that is not right."""
    stock = GraphExecutor._replayed

    def wrong(self, run, ids, segment):
        out = stock(self, run, ids, segment)
        return StepOutput(
            out.logits * 1.0005, out.hidden
        )  # too little for the executor's own check

    monkeypatch.setattr(GraphExecutor, "_replayed", wrong)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    with pytest.raises(SystemExit, match=r"float32, 16 cached, tree: graphs errs by"):
        gpu.main()
    assert not capsys.readouterr().out


PATHS = {"transformers", "eager", "graphs", "graphs, drafted", "graphs, model"}


def test_a_model_says_the_same_on_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model's part, with a tiny one: eager, graphs, trees and a drafter model on graphs, transformers."""
    loaded = SimpleNamespace(model=tiny_llama(), tokenizer=tiny_tokenizer())
    monkeypatch.setattr(gpu, "TEXT", gpu.TEXT[:600])
    monkeypatch.setattr(gpu, "packaged_model", lambda name: name)
    monkeypatch.setattr(gpu, "load_model", lambda *args: loaded)
    found = gpu.real("cpu", torch.float32, tokens=12)
    assert found is not None
    assert set(found["identical"]) == set(found["ms_per_token"]) == PATHS


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_says_the_same_on_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same over a short text and a real model."""
    monkeypatch.setattr(gpu, "TEXT", gpu.TEXT[:300])
    found = gpu.real("cpu", torch.float32, tokens=24)
    assert found is not None
    assert set(found["identical"]) == PATHS


def test_a_missing_model_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the package of its weights there is no real model, and a line that says so."""
    monkeypatch.setattr(gpu, "REAL", "no_such_package")
    assert gpu.real("cpu", torch.float32) is None
    assert "no real model" in capsys.readouterr().err
