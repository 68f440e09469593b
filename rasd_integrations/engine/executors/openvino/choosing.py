"""Chooses the attention of a compiled graph: what the model needs decides, then which is quicker here."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino.op import Parameter

from rasd_integrations.engine.executors.openvino.attention import Attention, Place, Span
from rasd_integrations.engine.executors.openvino.compiling import DTYPES
from rasd_integrations.engine.executors.openvino.own import OwnAttention
from rasd_integrations.engine.executors.openvino.paged import PagedAttention
from rasd_integrations.engine.executors.openvino.tracing import Layer, TraceLayout
from rasd_integrations.engine.native.library import library, variants
from rasd_integrations.errors import StorageError
from rasd_integrations.loading.progress import stage
from rasd_integrations.storage.cache_folder import cache_folder, is_whole
from rasd_integrations.storage.marked import made_folder

logger = logging.getLogger(__name__)

# What is timed: committed tokens, rows of the memory, step widths, steps of each.
_PREFIX, _CAPACITY, _ROWS, _TIMES = 2000, 2048, (1, 5, 9, 17), 9
_CLEARLY = 0.9  # OpenVINO's must take less than this share of ours: the kernel's gain grows with the prefix
_FILE, _NBYTES = "times.json", 1000


def attention_of(
    trace: TraceLayout, dtype: torch.dtype, options: Mapping[str, Any], cache_dir: Path | None,
    *, in_8_bits: bool,
) -> tuple[Attention | None, str]:  # fmt: skip
    """Return the attention for a model's graph, or ``None`` and why not, as a sentence without its subject.

    Args:
        trace: Of the model.
        dtype: Of the model.
        options: That the graph is compiled with.
        cache_dir: Where the kernel and its times are kept; default the user's cache folder.
        in_8_bits: Keep keys and values in bytes.
    """
    kind = getattr(ov.Type, DTYPES[dtype])
    paged = PagedAttention(trace, kind, in_8_bits=in_8_bits)
    theirs = paged.lacking()
    make = partial(OwnAttention, trace, kind, in_8_bits=in_8_bits)
    if ours := make(Path(), "").lacking():  # before anything is built
        why = f"{theirs}, which OpenVINO's attention cannot do, and {ours}, which ours cannot"
        return (None, why) if theirs else (paged, "")
    built = library(Path(ov.__file__).parent, ov.__version__, cache_dir, stage)
    if built is None:
        why = f"{theirs}, which OpenVINO's attention cannot do, and there is no other: it needs a C++ compiler"
        return (None, why) if theirs else (paged, "")
    own = [make(built, variant) for variant in variants(built)]
    times = _times([paged, *own], dtype, built, options, cache_dir)
    best = min(own, key=lambda attention: times[attention.name])
    is_slower = times[paged.name] < _CLEARLY * times[best.name]
    return (paged if is_slower and not theirs else best), ""


def _times(
    attentions: Sequence[Attention], dtype: torch.dtype, built: Path, options: Mapping[str, Any],
    cache_dir: Path | None,
) -> dict[str, float]:  # fmt: skip
    """Return the seconds that each takes on a layer of the model, by its name; timed once on a machine."""
    layer = min(attentions[0].trace.layers, key=lambda layer: layer.scoring.window is not None)
    shape = layer.kv_heads, layer.group, layer.key_dim, layer.value_dim
    machine = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    names = [attention.name for attention in attentions]
    said = (built.parent.name, names, machine, shape, sorted(options.items()), _PREFIX, _ROWS)
    name = hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()
    path = cache_folder("native", cache_dir) / name
    if is_whole(path):
        return dict(json.loads((path / _FILE).read_text()))
    steps = {attention.name: _Step(attention, layer, dtype, options) for attention in attentions}
    taken: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(_TIMES):  # by turns, and the least of each: another process may run meanwhile
        for name, step in steps.items():
            taken[name].append([step.seconds(n) for n in _ROWS])
    times = {name: sum(map(min, zip(*each, strict=True))) for name, each in taken.items()}
    try:
        with made_folder(path, "native", f"times on {machine}", _NBYTES) as new:
            (new / _FILE).write_text(json.dumps(times))
    except StorageError as error:
        logger.warning("cannot keep the times of attention: %s", error)
    return times


class _Step:
    """Steps through a graph of one layer."""

    def __init__(
        self, whole: Attention, layer: Layer, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> None:
        attention = whole.of(TraceLayout((), (layer,)))
        sizes = layer.group * layer.key_dim, layer.key_dim, layer.value_dim
        reads = [Parameter(ov.Type.f32, ov.PartialShape([-1, size])) for size in sizes]
        own = attention.parameters()
        out = attention.output(0, [read.output(0) for read in reads], own)
        model = ov.Model([out], [*reads, *own], "attention")
        self._request = ov.Core().compile_model(model, "CPU", dict(options)).create_infer_request()
        key, value = (
            torch.zeros(layer.kv_heads, _CAPACITY, size, dtype=dtype)
            for size in (layer.key_dim, layer.value_dim)
        )
        self._memory = key, value
        attention.bind(self._request, [self._memory])
        self._tensors: dict[int, list[ov.Tensor]] = {}
        for n in _ROWS:
            where = attention.arrays([Place(n, 0, _CAPACITY, is_tree=False)], _CAPACITY)
            depths = np.arange(n, dtype=np.int32)
            attention.refresh([Span(_PREFIX, n, 0, _CAPACITY, depths)], where)
            rows = [np.zeros((layer.kv_heads * n, size), np.float32) for size in sizes]
            self._tensors[n] = [ov.Tensor(a, shared_memory=True) for a in (*rows, *where)]

    def seconds(self, n: int) -> float:
        """Run a step of ``n`` rows and return its time."""
        for index, tensor in enumerate(self._tensors[n]):
            self._request.set_input_tensor(index, tensor)
        self._request.infer()  # fits the graph to the width
        start = time.perf_counter()
        self._request.infer()
        return time.perf_counter() - start
