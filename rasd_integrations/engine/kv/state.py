"""Recurrent states: what layers of linear attention, convolution or state space keep in the place of keys and values.

They are transformers' own cache layers, and each is of one length of text: nothing can be cut off. A step runs on
copies of the last ones, so that a snapshot never changes, and buffers of one text share it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

MOST_KEPT = 8  # snapshots of a text that a later prompt may go on from

StateLayers = Mapping[int, LinearAttentionCacheLayerMixin]
"""The layers with a state, by their place in the model."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The states behind a text's first tokens.

    Attributes:
        length: Of these tokens.
        layers: Never changed.
        is_kept: A later text may go on from here; else only the next step does.
    """

    length: int
    layers: StateLayers
    is_kept: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for layer in self.layers.values() for t in _tensors(layer))


class Snapshots:
    """The snapshots of a text: those kept, the one behind its committed tokens, and the last step's."""

    def __init__(self, known: tuple[Snapshot, ...] = ()) -> None:
        """Begin with those ``known``, ascending by length."""
        self._known = known
        self._accepted = 0  # rows of the last step

    def __bool__(self) -> bool:
        """Return True once a step has left states."""
        return bool(self._known)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(snapshot.nbytes for snapshot in self._known)

    @property
    def nbytes_each(self) -> int:
        """Bytes of one; 0 without."""
        return self._known[-1].nbytes if self._known else 0

    def copy(self) -> Snapshots:
        """Return others that begin with these."""
        return Snapshots(self._known)

    def at(self, length: int) -> StateLayers:
        """Return the states behind ``length`` tokens, not to be changed."""
        return next(s.layers for s in self._known if s.length == length)

    def last(self, most: int) -> int:
        """Return the length of the last one of at most ``most`` tokens; 0 without."""
        return max((s.length for s in self._known if s.length <= most), default=0)

    def write(self, length: int, rows: int, layers: StateLayers) -> None:
        """Hold the states behind a step of ``rows`` tokens after ``length`` committed ones."""
        self._known, self._accepted = (*self._held(length), Snapshot(length + rows, layers)), 0

    def accept(self, length: int, rows: int) -> int:
        """Return how many tokens are committed once so many more rows of the last step are: all or none of them."""
        self._accepted += rows
        whole = self._known[-1].length
        return whole if length + self._accepted == whole else length

    def keep(self, length: int) -> None:
        """Let later texts go on from here, and from a few of the places before."""
        held = tuple(replace(snapshot, is_kept=True) for snapshot in self._held(length))
        while len(held) > MOST_KEPT:  # every second of the older ones goes
            held = (*held[:-1:2], held[-1])
        self._known = held

    def _held(self, length: int) -> Iterator[Snapshot]:
        for snapshot in self._known:
            if snapshot.length == length or (snapshot.is_kept and snapshot.length < length):
                yield snapshot


def empty_states(config: PretrainedConfig) -> StateLayers:
    """Return a model's layers with a state, before the first token."""
    return {
        place: layer
        for place, layer in enumerate(_layers(config))
        if isinstance(layer, LinearAttentionCacheLayerMixin)
    }


def attending(config: PretrainedConfig) -> set[int]:
    """Return the places of the layers that transformers keeps keys and values for."""
    layers = enumerate(_layers(config))
    return {place for place, layer in layers if isinstance(layer, CacheLayerMixin)}


def _layers(config: PretrainedConfig) -> Sequence[object]:
    try:
        return DynamicCache(config=config).layers
    except Exception:  # noqa: BLE001 - a config may name layers that no cache of transformers is made for
        return ()


def copied(layers: StateLayers) -> StateLayers:
    """Return copies that a step may change."""
    return {place: _copied(layer) for place, layer in layers.items()}


def _copied(layer: LinearAttentionCacheLayerMixin) -> LinearAttentionCacheLayerMixin:
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            parts = {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
            setattr(new, name, parts)
    return new


def _tensors(layer: LinearAttentionCacheLayerMixin) -> list[Tensor]:
    tables = [value for value in vars(layer).values() if isinstance(value, dict)]
    return [part for table in tables for part in table.values() if isinstance(part, Tensor)]
