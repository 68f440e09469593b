"""The kernels compute attention, whatever the shape, in every variant that this processor runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_attention import KINDS, Asked, Case, Shape, cases, keys_of, loaded, values_of

pytest.importorskip("openvino")

import openvino
from openvino.op import Parameter

from rasd_integrations.engine.attention import Scoring
from rasd_integrations.engine.executors.openvino.attention import Span
from rasd_integrations.engine.executors.openvino.own import OwnAttention
from rasd_integrations.engine.executors.openvino.tracing import Layer, TraceLayout
from rasd_integrations.engine.native import library

BUILT = Path(openvino.__file__).parent, openvino.__version__, None

# Largest error against float64 over the largest output: bfloat16 rounds queries and weights to 2^-8.
BOUNDS = {True: 2e-2, False: 1e-5}
ROUNDING = ("avx512_bf16", "amx_bf16")


@pytest.fixture(scope="module")
def kernels():
    path = library.library(*BUILT)
    if path is None:
        pytest.skip("no C++ compiler")
    return loaded(path), library.variants(path)


def check(kernels, cases: Iterator[Case]) -> None:
    code, names = kernels
    assert names[0] == "base"
    for case in cases:
        before = case.keys.clone(), case.values.clone()
        for name in names:
            out = case.run(code, name)
            expected = case.expected()
            error = float((out - expected).abs().max() / expected.abs().max())
            bound = BOUNDS[name in ROUNDING and case.shape.kind == "bf16"]
            assert error <= bound, (name, error, case.shape, [a[:2] for a in case.asked])
        written = torch.zeros(case.capacity, dtype=torch.bool)
        for first, a in zip(case.firsts, case.asked, strict=True):
            end = first + a.prefix + a.rows
            written[first + a.prefix : end + end % 2] = True  # the other row of a pair
        for old, new, rows in zip(
            before, (case.keys, case.values), (keys_of, values_of), strict=True
        ):
            assert torch.equal(rows(old)[:, ~written], rows(new)[:, ~written])


def test_it_is_attention_in_float64(kernels):
    """Chains and trees, windows, caps, sinks, several answers; no row but the step's is written."""
    check(kernels, cases(60, 1))


@pytest.mark.slow
def test_it_is_attention_in_two_thousand_shapes(kernels):
    """And over 40,000 keys."""
    check(kernels, cases(2000, 2))
    check(kernels, iter([Case(Shape(1, 3, 64, 64), [Asked(40_000, 9)])]))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_operation_of_a_graph_is_the_kernel(kind, kernels):
    """Sinks and a cap, chains and trees of two answers, on OpenVINO's threads, by every variant."""
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    _, names = kernels
    for name in names:
        for seed, asked in enumerate(
            (
                [Asked(2100, 3, tree, torch.tensor([0, 1, 1]))],
                [Asked(40, 5), Asked(1000, 3, tree, torch.tensor([0, 1, 1]))],
                [Asked(0, 300)],
            )
        ):
            case = Case(Shape(2, 3, 64, 32, kind, 0, 10.0, has_sinks=True), asked, seed)
            out = run_in_graph(case, library.library(*BUILT), name)
            expected = case.expected()
            error = float((out - expected).abs().max() / expected.abs().max())
            assert error <= BOUNDS[name in ROUNDING and kind == "bf16"], (name, error)


def run_in_graph(case: Case, built: Path, variant: str) -> torch.Tensor:
    """Return the output of a graph of one operation."""
    s = case.shape
    scoring = Scoring(s.key_dim**-0.5, None, s.softcap, case.sinks)
    trace = TraceLayout((), (Layer(s.kv_heads, s.group, s.key_dim, s.value_dim, scoring),))
    kind = {"f32": openvino.Type.f32, "bf16": openvino.Type.bf16}[s.kind]
    attention = OwnAttention(trace, kind, built, variant, in_8_bits=False)
    sizes = s.group * s.key_dim, s.key_dim, s.value_dim
    reads = [Parameter(openvino.Type.f32, openvino.PartialShape([-1, n])) for n in sizes]
    parameters = attention.parameters()
    out = attention.output(0, [read.output(0) for read in reads], parameters)
    graph = openvino.Model([out], [*reads, *parameters], "one")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    spans = [
        Span(
            a.prefix,
            a.rows,
            first,
            0,
            a.depth.int().numpy(),
            None if a.sees is None else a.sees.numpy(),
        )
        for first, a in zip(case.firsts, case.asked, strict=True)
    ]
    where = attention.arrays([span.place for span in spans], case.capacity)
    attention.refresh(spans, where)
    attention.bind(request, [(case.keys, case.values)])
    given = [
        t.reshape(-1, n).numpy()
        for t, n in zip((case.query, case.key, case.value), sizes, strict=True)
    ]
    (result,) = request.infer([*given, *where]).values()
    return torch.from_numpy(result.copy()).view(s.kv_heads, case.rows, s.group, s.value_dim)


@pytest.mark.slow
def test_nothing_is_read_or_written_outside(kernels, tmp_path):
    """Built with the address and undefined-behaviour sanitizers, over shapes at the edges of blocks."""
    found = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("no address sanitizer")
    checks = "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"
    built = tmp_path / "checked.so"
    library.build("c++", BUILT[0], built, checks)
    env = os.environ | {
        "LD_PRELOAD": found,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(built), *kernels[1]],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "300 cases"


@pytest.mark.parametrize("found", ["no compiler", "a broken compiler", "no folder"])
def test_without_a_kernel_attention_is_openvinos(found, monkeypatch, tmp_path, caplog):
    """Nothing else changes; only what is broken is worth a warning."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\ntest $1 = --version && exit 0\necho error: broken >&2\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "file").touch()
    folder = tmp_path / ("file" if found == "no folder" else "cache")
    monkeypatch.setattr(library, "_COMPILERS", () if found == "no compiler" else ("c++",))
    monkeypatch.delenv("CXX", raising=False)
    if found == "a broken compiler":
        monkeypatch.setenv("CXX", str(broken))
    library.library.cache_clear()
    with caplog.at_level("WARNING"):
        assert library.library(*BUILT[:2], folder) is None
    library.library.cache_clear()
    said = {"no compiler": "", "a broken compiler": "error: broken", "no folder": "cannot"}[found]
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
    assert not list(tmp_path.glob("cache/native/*/*.so"))
