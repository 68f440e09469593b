"""Compiles a model's graph with OpenVINO, and keeps its trace, without its weights, in a folder."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from transformers import PreTrainedModel

from rasd_integrations.engine.executors.openvino import graph as graphs
from rasd_integrations.engine.executors.openvino.attention import Attention
from rasd_integrations.engine.executors.openvino.weights import LARGE, weights_of
from rasd_integrations.storage.cache_folder import cache_folder, is_whole, title_of
from rasd_integrations.storage.marked import made_folder

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FORMAT = 5  # of kept graphs: raise it when a step's inputs, outputs or operations change
_FILE = "graph.xml"


def options_of(dtype: torch.dtype, *, in_8_bits: bool) -> dict[str, Any]:
    """Return what a graph of this type is compiled with."""
    kind = DTYPES[dtype]
    return {
        "INFERENCE_PRECISION_HINT": kind,
        "KV_CACHE_PRECISION": "u8" if in_8_bits else kind,
        # By channel, keys of 32 rows would share a scale, and none of them could be moved or dropped.
        "KEY_CACHE_QUANT_MODE": "BY_TOKEN",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # else products with codes round what they are multiplied with
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }


def compiled(
    model: PreTrainedModel, attention: Attention, path: Path | None, options: dict[str, Any]
) -> ov.CompiledModel:
    """Return the compiled graph of ``model``; its trace is kept at ``path``."""
    weights = weights_of(model)
    graph = _kept(path)
    if graph is None:
        graph = graphs.traced(model, attention.trace, weights)
        if path is not None:
            _keep(graph, path, model)
    kind = getattr(ov.Type, DTYPES[model.dtype])
    return ov.Core().compile_model(graphs.whole(graph, weights, attention, kind), "CPU", options)


def graph_path(model: PreTrainedModel, identity: str | None, cache_dir: Path | None) -> Path | None:
    """Return where a graph is kept, by a digest of weights and versions; ``None`` without an ``identity``."""
    if identity is None:
        return None
    said = (_FORMAT, identity, str(model.dtype), ov.__version__, torch.__version__)
    name = hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()
    return cache_folder("graphs", cache_dir) / name


def _kept(path: Path | None) -> ov.Model | None:
    """Return the graph kept at ``path``, if it can be read."""
    if path is None or not is_whole(path):
        return None
    try:
        return ov.Core().read_model(path / _FILE)
    except RuntimeError:
        logger.warning("%s is of another OpenVINO and is made again", path)
        return None


def _keep(graph: ov.Model, path: Path, model: PreTrainedModel) -> None:
    """Write a graph atomically; keep none if the disk is full."""
    title = title_of(model.name_or_path or type(model).__name__)
    nbytes = 4 * sum(w.numel() for w in model.parameters() if w.numel() < LARGE)
    try:
        with made_folder(path, "graphs", title, nbytes) as new:
            ov.save_model(graph, new / _FILE, compress_to_fp16=False)
            ov.Core().read_model(new / _FILE)  # on a full disk it is cut without an error
    except (OSError, RuntimeError) as err:
        logger.warning("cannot keep the compiled graph (%s); it is made again each time", err)
