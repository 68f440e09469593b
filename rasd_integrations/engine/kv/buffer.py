"""Keys and values of one stream's committed tokens: preallocated, append-only.

Final hidden states are kept beside them if a drafter reads them. A step writes its tokens to the spare room behind
``length``; the decoder then commits the accepted path. Until then the buffer is unchanged.

Recurrent states (:mod:`.state`) are right at the end of a step only: such a step is committed whole or not at all, and
what was accepted of it runs again with the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rasd_integrations.engine.device import to_device
from rasd_integrations.engine.kv.order import Order, allocate, read, whole, write
from rasd_integrations.engine.kv.state import Snapshots

GRANULE = 256


class LayerRow(NamedTuple):
    """The key and value of one token in one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How an executor keeps keys and values, and step widths.

    Attributes:
        layers: Of one token.
        hidden_size: Width of a final hidden state.
        row_multiple: Step widths are ``1 + k * row_multiple``; above 1 if changing the width costs time.
        order: Of the rows that its steps read.
        in_8_bits: Keys and values are bytes that only this executor's own steps can read.
        state_nbytes: Bytes of the recurrent states of one text; 0 without such layers.
        one_by_one: Only single tokens go on from a state; a prompt is read in one piece, from its first token on.
    """

    layers: tuple[LayerRow, ...] = ()
    hidden_size: int = 0
    row_multiple: int = 1
    order: Order = Order.COLUMNS
    in_8_bits: bool = False
    state_nbytes: int = 0
    one_by_one: bool = False

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's keys and values."""
        return sum(r.kv_heads * (r.key_dim + r.value_dim) * r.dtype.itemsize for r in self.layers)


class KVBuffer:
    """The keys and values of one token sequence, one pair of tensors a layer.

    Attributes:
        length: Committed tokens.
        keeps_hidden: Steps also write their final hidden states.
        is_gathered: Rows skip positions; only in subclasses (:mod:`rasd_integrations.drafters.papers.gathered_kv`).
        long_rope: Keys have the long factors of longrope (:mod:`..long_rope`).
        snapshots: Of recurrent states; empty for models without.
        origin: First row of this buffer in :meth:`stores`; 0 unless it is in a :class:`KVArena`.
    """

    is_gathered = False

    def __init__(self, capacity: int, *, keeps_hidden: bool = False) -> None:
        """Plan for ``capacity`` tokens; memory is taken at the first write of each layer."""
        self.length = 0
        self.keeps_hidden = keeps_hidden
        self.long_rope = False
        self.origin = 0
        self.snapshots = Snapshots()
        self._arena: KVArena | None = None
        self._order = Order.COLUMNS
        self._is_torn = False  # a move was interrupted: layers have different capacities
        self._capacity = _rounded(capacity)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._hidden: dict[int, Tensor] = {}  # at most one, {0: [1, capacity, hidden]}
        self._hidden_from = 0  # hidden states are kept from this row on

    @property
    def nbytes(self) -> int:
        """Bytes of the committed tokens (on a CPU spare room takes no memory before it is written)."""
        return self.row_nbytes * self.length + self.snapshots.nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token, in the layers that have written."""
        return sum(t.element_size() * t.shape[0] * t.shape[2] for t in self._stores())

    @property
    def layers(self) -> tuple[LayerRow, ...]:
        """Size of one token in each layer that has written."""
        return tuple(
            LayerRow(key.shape[0], key.shape[2], self._values[layer].shape[2], key.dtype)
            for layer, key in sorted(self._keys.items())
        )

    @property
    def next_position(self) -> int:
        """Position of the next token."""
        return self.length

    @property
    def attending(self) -> frozenset[int]:
        """Places of the layers that have written keys and values."""
        return frozenset(self._keys)

    @property
    def num_layers(self) -> int:
        """Layers that have written."""
        return len(self._keys)

    @property
    def capacity(self) -> int:
        """Rows of the memory."""
        return self._capacity

    def stores(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's whole memory (or its arena's), keys and values ``[kv_heads, rows, head_dim]``."""
        if self._arena is not None:
            return self._arena.stores[layer]
        return self._keys[layer], self._values[layer]

    @property
    def memory(self) -> Tensor | None:
        """The first layer's keys: another tensor once the buffer moved, ``None`` before the first write."""
        return self.stores(0)[0] if self._keys else None

    def pinned(self, rows: int) -> KVBuffer:
        """Return a view of the first ``rows`` rows that keeps the memory alive."""
        new = KVBuffer(0)
        new._capacity, new.long_rope, new._order = rows, self.long_rope, self._order
        for mine, theirs in ((self._keys, new._keys), (self._values, new._values)):
            for layer, store in mine.items():
                theirs[layer] = store[:, : whole(rows)]
        return new

    @torch.inference_mode()
    def lay(self, order: Order) -> None:
        """Keep rows in this order from now on."""
        if order is not self._order:
            self._move(self._capacity, order)

    @torch.inference_mode()
    def reserve(self, num_rows: int) -> None:
        """Make room for ``num_rows`` tokens behind the committed ones."""
        needed = self.length + num_rows
        if self._is_torn:
            self._move(max(self._capacity, _rounded(needed)))
        elif needed > self._capacity:
            self._move(_rounded(max(needed, self._capacity * 3 // 2)))

    @torch.inference_mode()
    def leave_arena(self) -> None:
        """Leave the arena if no other buffer is in it."""
        if self._arena is not None and len(self._arena) == 1:
            self._move(self._capacity)

    def _move(self, capacity: int, order: Order | None = None) -> None:
        """Move to new memory layer by layer, so that only one layer is held twice at a time."""
        order = order or self._order
        self._is_torn = True
        stores = self._keys, self._values, self._hidden
        # An arena's memory is not freed, so moving layer by layer saves nothing; and a layer does not say its order.
        if self._arena is not None or order is not self._order:
            stores = dict(self._keys), dict(self._values), dict(self._hidden)
        for store in stores:
            is_key = store is stores[0]
            for layer, old in store.items():
                new = self._place(old, capacity, order, is_key=is_key)
                if order is self._order or store is stores[2]:
                    new[:, : whole(self.length)] = old[:, : whole(self.length)]
                else:
                    rows = read(old, self._order, 0, self.length, is_key=is_key)
                    write(new, order, 0, rows, is_key=is_key)
                store[layer] = new
        # Last: after an interrupt or a lack of memory on the way, the next step moves it again.
        self._keys, self._values, self._hidden = stores
        self._capacity, self._arena, self.origin, self._is_torn = capacity, None, 0, False
        self._order = order

    def _lie_in(self, arena: KVArena, origin: int) -> None:
        """Move keys and values into an arena's rows from ``origin`` on."""
        end = origin + self._capacity
        self._is_torn = True
        for layer, wholes in enumerate(arena.stores):
            for store, memory in zip((self._keys, self._values), wholes, strict=True):
                new = memory[:, origin:end]
                new[:, : whole(self.length)] = store[layer][:, : whole(self.length)]
                store[layer] = new
        self._arena, self.origin, self._is_torn = arena, origin, False

    def _place(
        self, like: Tensor, capacity: int, order: Order | None = None, *, is_key: bool = False
    ) -> Tensor:
        """Return memory for ``capacity`` rows such as those of ``like``."""
        return allocate(like, capacity, order or self._order, is_key=is_key)

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's keys and values ``[kv_heads, n, head_dim]`` of a step behind the committed ones."""
        if layer not in self._keys:
            self._keys[layer] = self._place(key, self._capacity, is_key=True)
            self._values[layer] = self._place(value, self._capacity)
        write(self._keys[layer], self._order, self.length, key, is_key=True)
        write(self._values[layer], self._order, self.length, value, is_key=False)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and return keys and values ``[kv_heads, length + n, head_dim]`` (:meth:`rows`)."""
        self.append(layer, key, value)
        return self.rows(layer, 0, self.length + key.shape[1])

    def write_hidden(self, hidden: Tensor) -> None:
        """Write a step's final hidden states ``[n, hidden]`` behind the committed ones."""
        if not self._hidden:
            self._hidden[0] = self._place(hidden[None], self._capacity)
            self._hidden_from = self.length
        self._hidden[0][0, self.length : self.length + len(hidden)] = hidden

    def hidden(self, start: int = 0) -> tuple[int, Tensor]:
        """Return the first kept row from ``start`` on, and a view ``[rows, hidden]`` of it and all later ones.

        Row ``i``, the input of the output layer, predicts token ``i + 1``.
        """
        first = min(max(start, self._hidden_from), self.length)
        if not self._hidden:
            return self.length, torch.empty(0, 0)
        return first, self._hidden[0][0, first : self.length]

    def reusable(self, length: int) -> int:
        """Return what :meth:`truncate` to ``length`` leaves: all of it, or up to the last snapshot."""
        return self.snapshots.last(min(length, self.length)) if self.snapshots else length

    @torch.inference_mode()
    def commit(self, rows: Sequence[int]) -> None:
        """Append these rows of the last step, ascending, and drop the others.

        Where states are kept, nothing is appended before all rows are: by one call, or by several, one behind another.
        """
        n, start = len(rows), self.length
        if self.snapshots:
            self.length = self.snapshots.accept(start, n)
            return
        if list(rows) != list(range(n)):
            places = torch.tensor(rows)
            index = {
                device: to_device(places, device) for device in {s.device for s in self._stores()}
            }
            end = start + max(rows) + 1
            for stores, order in (
                (self._keys, self._order), (self._values, self._order), (self._hidden, Order.ROWS),
            ):  # fmt: skip
                is_key = stores is self._keys
                for store in stores.values():
                    step = read(store, order, start, end, is_key=is_key)
                    kept = step.index_select(1, index[store.device])
                    write(store, order, start, kept, is_key=is_key)
        self.length = start + n

    def rows(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return rows ``start:end`` of a layer's keys and values: copies if they lie in blocks, else views."""
        return (
            read(self._keys[layer], self._order, start, end, is_key=True),
            read(self._values[layer], self._order, start, end, is_key=False),
        )

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on: between answers, and where a drafter's own guess failed.

        Where states are kept, also those before it, back to the last snapshot.
        """
        self.length = min(self.length, self.reusable(length))
        if self.length < self._hidden_from:
            self._hidden = {}

    def positions(self, start: int, end: int, device: torch.device) -> Tensor:
        """Return the positions ``[end - start]`` of rows ``start:end``."""
        return torch.arange(start, end, device=device)

    def first_from(self, position: int) -> int:
        """Return the first row at ``position`` or later."""
        return position

    @torch.inference_mode()
    def copy(self, length: int, capacity: int) -> KVBuffer:
        """Return a new buffer with the first ``length`` tokens."""
        new = KVBuffer(max(capacity, length), keeps_hidden=self.keeps_hidden)
        new._order, new.long_rope = self._order, self.long_rope
        new.length, new.snapshots = self.length, self.snapshots.copy()
        new.truncate(length)
        if self._hidden and length > self._hidden_from:
            new._hidden_from = self._hidden_from
            new._hidden[0] = new._place(self._hidden[0], new._capacity)
            new._hidden[0][:, :length] = self._hidden[0][:, :length]
        for layer, key in self._keys.items():
            new._keys[layer] = new._place(key, new._capacity, is_key=True)
            new._values[layer] = new._place(self._values[layer], new._capacity)
            new._keys[layer][:, : whole(length)] = key[:, : whole(length)]
            new._values[layer][:, : whole(length)] = self._values[layer][:, : whole(length)]
        return new

    def _stores(self) -> tuple[Tensor, ...]:
        return (*self._keys.values(), *self._values.values(), *self._hidden.values())


class KVArena:
    """Memory shared by several buffers, so that one graph reads them in one step.

    It lives as long as one of them is in it; the room of a buffer that is gone is reused.

    Attributes:
        rows: Of each layer; the first :data:`GRANULE` are reserved.
        stores: Keys and values ``[kv_heads, rows, head_dim]`` of each layer.
    """

    def __init__(self, like: KVBuffer, rows: int) -> None:
        """Reserve ``rows`` for layers such as those of ``like``."""
        self.rows = GRANULE + _rounded(rows)
        self.stores: list[tuple[Tensor, Tensor]] = []
        for layer in range(like.num_layers):
            keys, values = (
                allocate(store, self.rows, Order.ROWS, is_key=False) for store in like.stores(layer)
            )
            self.stores.append((keys, values))
        # A buffer that moved out keeps its room while it lives: another thread may be copying from it.
        self._places: list[tuple[int, int, weakref.ref[KVBuffer]]] = []

    def __len__(self) -> int:
        """Return the number of buffers with room here."""
        return sum(buffer() is not None for *_, buffer in self._places)

    def holds(self, buffer: KVBuffer) -> bool:
        """Return True if ``buffer`` is here."""
        return buffer.memory is self.stores[0][0]

    @torch.inference_mode()
    def admit(self, buffer: KVBuffer) -> bool:
        """Move ``buffer`` here; ``False`` if there is no room for its capacity."""
        self._places = sorted(
            (place for place in self._places if place[2]() is not None), key=lambda place: place[0]
        )
        origin = GRANULE
        for first, end, _ in self._places:
            if first - origin >= buffer.capacity:
                break
            origin = end
        end = origin + buffer.capacity
        if end > self.rows:
            return False
        self._places.append((origin, end, weakref.ref(buffer)))
        buffer._lie_in(self, origin)
        return True


def _rounded(capacity: int) -> int:
    return -(-max(capacity, 1) // GRANULE) * GRANULE
