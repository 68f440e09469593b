"""Copies a model's modules over the same weights.

A step needs another attention function in the config, a hook on the body and dropout off. The model may be the
user's, who calls it in other threads, so a copy is changed instead.
"""

from __future__ import annotations

import copy
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PretrainedConfig

_M = TypeVar("_M", bound=nn.Module)
_SWITCHES = ("_active_adapter", "_disable_adapters")  # of peft's layers: which adapters are on
_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


def shared_copy(model: _M) -> _M:
    """Copy ``model``'s modules and configs, and none of its weights.

    Parameters and persistent buffers are the same tensors. Other buffers are copied: some forwards rewrite them (rotary
    frequencies that depend on the length).

    Returns:
        A model in eval mode; attributes, hooks and configs set on it do not change ``model``.
    """
    copies: dict[int, nn.Module] = {}
    for module in model.modules():
        new = copies[id(module)] = object.__new__(type(module))
        vars(new).update(vars(module))
    configs: dict[int, Any] = {}
    for new in copies.values():
        own = vars(new)
        for name, value in list(own.items()):
            own[name] = _carried(value, copies, configs, is_table=name in _TABLES)
        for name in new._non_persistent_buffers_set:
            buffer = new._buffers[name]
            new._buffers[name] = buffer if buffer is None or buffer.is_meta else buffer.clone()
        own["training"] = False
        own.pop("_compiled_call_impl", None)  # torch.compile's, bound to the module that was copied
    return cast("_M", copies[id(model)])


class Switches:
    """Keeps the adapters of copies switched as the user's model has them."""

    def __init__(self, model: nn.Module, *copies: nn.Module) -> None:
        """Find the layers with switches; without any, :meth:`follow` costs nothing."""
        self._pairs = [
            (vars(theirs), vars(mine))
            for new in copies
            for theirs, mine in zip(model.modules(), new.modules(), strict=True)
            if any(name in vars(theirs) for name in _SWITCHES)
        ]

    def follow(self) -> None:
        """Copy the model's current switches."""
        for theirs, mine in self._pairs:
            mine.update((name, theirs[name]) for name in _SWITCHES if name in theirs)


def _carried(
    value: Any, copies: dict[int, nn.Module], configs: dict[int, Any], *, is_table: bool = False
) -> Any:
    """Return ``value`` with the modules and configs in it replaced by their copies."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, PretrainedConfig):
        return copy.deepcopy(value, configs)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, partial):  # how accelerate puts its hooks around a forward
        args = [_carried(arg, copies, configs) for arg in value.args]
        new = partial(_carried(value.func, copies, configs), *args, **value.keywords)
        return update_wrapper(new, value) if vars(value) else new
    if is_table:  # of weights, modules or hooks: an ordered dictionary where the order counts
        return type(value)((key, _carried(item, copies, configs)) for key, item in value.items())
    return value
