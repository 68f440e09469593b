"""Makes the executor that the option ``executor`` names."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from transformers import PreTrainedModel

from rasd_integrations.config import ExecutorName
from rasd_integrations.engine.executors.base import Executor
from rasd_integrations.engine.executors.cuda_graphs.executor import GraphExecutor, is_available
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.executors.packing import pack_linears
from rasd_integrations.engine.kv.state import empty_states
from rasd_integrations.errors import ConfigurationError, MissingDependencyError

logger = logging.getLogger(__name__)


def make_executor(
    name: ExecutorName,
    model: PreTrainedModel,
    *,
    owned: bool = False,
    cache_dir: Path | None = None,
    identity: str | None = None,
) -> Executor:
    """Make the executor that ``name`` names.

    ``"auto"`` compiles an ``owned`` model on a CPU if OpenVINO is installed and agrees with eager torch; all else
    runs eagerly.

    Args:
        name: ``"auto"``, ``"eager"``, ``"openvino"``, ``"openvino-kv8"`` (keys and values in 8 bits) or
            ``"cuda-graphs"``.
        model: With unpacked weights.
        owned: Loaded by this package, which may repack its weights or hold a second copy of them.
        cache_dir: Where compiled graphs are kept; default the user's cache folder.
        identity: Digest of the weights; ``None`` keeps no graph.

    Raises:
        MissingDependencyError: ``"openvino"`` or ``"openvino-kv8"`` without the extra.
        ConfigurationError: The architecture cannot run speculative steps, or not as asked.
    """
    if name == "cuda-graphs":
        if not is_available(model.device):
            msg = (
                f"executor 'cuda-graphs' needs a CUDA device, but {type(model).__name__} is on {model.device}. "
                f"Use executor='auto'."
            )
            raise ConfigurationError(msg)
        _check_stateless(name, model)
        return GraphExecutor(model)
    if name in ("openvino", "openvino-kv8"):
        return _compiled(model, cache_dir, identity, in_8_bits=name == "openvino-kv8")
    if name == "auto" and owned and model.device.type == "cpu" and has_openvino():
        try:
            return _compiled(model, cache_dir, identity)
        except ConfigurationError as err:
            logger.warning("%s It runs so now.", err)
    if owned:
        pack_linears(model)
    return EagerExecutor(model)


def _check_stateless(name: str, model: PreTrainedModel) -> None:
    if empty_states(model.config):
        msg = (
            f"executor {name!r} does not run {type(model).__name__}, some of whose layers keep a recurrent state. "
            f"Use executor='auto' or 'eager'."
        )
        raise ConfigurationError(msg)


def has_openvino() -> bool:
    """Return True if the extra ``openvino`` is installed."""
    return importlib.util.find_spec("openvino") is not None


def _compiled(
    model: PreTrainedModel, cache_dir: Path | None, identity: str | None, *, in_8_bits: bool = False
) -> Executor:
    _check_stateless("openvino-kv8" if in_8_bits else "openvino", model)
    if not has_openvino():
        package = "openvino"
        raise MissingDependencyError(package, package)
    from rasd_integrations.engine.executors.openvino.executor import CompiledExecutor  # an extra

    return CompiledExecutor(model, cache_dir=cache_dir, identity=identity, in_8_bits=in_8_bits)
