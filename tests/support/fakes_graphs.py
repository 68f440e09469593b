"""Recorders that stand in for CUDA's, and what tests of graphs share.

The package's own recorder on a CPU runs the step again; ``Tape`` is a graph proper: it writes down the operators of
one run with the tensors they touched, and a replay runs these and no Python, so whatever the step asked of the host
is frozen in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rasd_integrations.engine.executors.base import StepOutput
from rasd_integrations.engine.executors.cuda_graphs import executor as graphs
from rasd_integrations.engine.executors.cuda_graphs.executor import GraphExecutor, run_again
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel

OUR_FAMILIES = ["gemma3", "gpt2", "llama"]


class Tape(TorchDispatchMode):
    """A recorder whose replays run the recorded operators on the recorded tensors, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            msg = "operation not permitted when stream is capturing"  # CUDA's own words
            raise RuntimeError(msg)
        out = func(*args, **(kwargs or {}))
        self.lines.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.lines:
            new = func(*args, **kwargs)
            read = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, fresh in zip(tensors(out), tensors(new), strict=True):
                if old.untyped_storage().data_ptr() not in read:  # else a view, or written in place
                    old.copy_(fresh)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def taped(run: graphs.Run) -> graphs.Run:
    """Record ``run`` on a tape."""
    tape = Tape()
    with tape:
        out = run()

    def replay() -> StepOutput:
        tape.play()
        return out

    return replay


RECORDERS: dict[str, graphs.Recorder] = {"again": run_again, "tape": taped}


class Counted:
    """A recorder that counts its recordings, and their replays."""

    def __init__(self, recorder: graphs.Recorder = run_again) -> None:
        self.recorder, self.recordings, self.replays = recorder, 0, 0

    def __call__(self, run: graphs.Run) -> graphs.Run:
        self.recordings += 1
        replay = self.recorder(run)

        def counted() -> StepOutput:
            self.replays += 1
            return replay()

        return counted


def graph_target(make: Callable[[], Any], recorder: Any = run_again) -> TargetModel:
    model = make()
    return TargetModel(model, executor=GraphExecutor(model, recorder=recorder))


@torch.inference_mode()
def fill_behind(buffer: KVBuffer, value: float) -> None:
    """Fill the spare room."""
    for store in buffer._stores():
        store[:, buffer.length :] = value


def executor(target: TargetModel) -> GraphExecutor:
    found = target._executor
    assert isinstance(found, GraphExecutor)
    return found
