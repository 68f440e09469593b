"""However rows lie in memory, a buffer says the same of them."""

from __future__ import annotations

import random

import pytest
import torch

from rasd_integrations.engine.kv import buffer as kv
from rasd_integrations.engine.kv.buffer import GRANULE, KVArena, KVBuffer
from rasd_integrations.engine.kv.order import Order


def poisoned(monkeypatch) -> None:
    """Have memory hold NaN before it is written."""
    allocate = kv.allocate
    monkeypatch.setattr(
        kv, "allocate", lambda *args, **how: allocate(*args, **how).fill_(float("nan"))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_steps_commits_moves_and_copies_are_those_of_plain_tensors(dtype, monkeypatch):
    """Forty random operations on each of fifty buffers of all orders, beside lists of rows."""
    poisoned(monkeypatch)
    for seed in range(50):
        chance, draw = random.Random(seed), torch.Generator().manual_seed(seed)
        heads, key_dim, value_dim = chance.choice(((1, 16, 16), (2, 32, 16), (3, 16, 48)))
        order = chance.choice([*Order])
        buffer = KVBuffer(chance.choice((1, 100, 300)))
        buffer.lay(order)
        arenas: list[KVArena] = []
        sizes = key_dim, value_dim
        wanted = [torch.empty(heads, 0, size, dtype=dtype) for size in sizes]
        for _ in range(40):
            match chance.choice(("step", "step", "step", "cut", "copy", "lay", "arena")):
                case "step":
                    n = chance.choice((1, 2, 5, 15, 16, 17, 60))
                    rows = [torch.randn(heads, n, size, generator=draw).to(dtype) for size in sizes]
                    buffer.reserve(n)
                    got = buffer.write(0, *rows)
                    for have, old, new in zip(got, wanted, rows, strict=True):
                        assert torch.equal(have, torch.cat([old, new], 1))
                    path = sorted(chance.sample(range(n), chance.randint(0, n)))
                    buffer.commit(path)
                    wanted = [
                        torch.cat([w, r[:, path]], 1) for w, r in zip(wanted, rows, strict=True)
                    ]
                case "cut" if wanted[0].shape[1]:
                    length = chance.randint(0, wanted[0].shape[1])
                    buffer.truncate(length)
                    wanted = [w[:, :length] for w in wanted]
                case "copy":
                    length = wanted[0].shape[1]
                    buffer = buffer.copy(length, chance.choice((length, length + GRANULE)))
                case "lay" if not buffer.origin:
                    order = chance.choice([*Order])
                    buffer.lay(order)
                case "arena" if buffer.num_layers and order is not Order.COLUMNS:
                    arenas.append(KVArena(buffer, 2 * buffer.capacity))
                    assert arenas[-1].admit(buffer)
            if buffer.num_layers:
                end = wanted[0].shape[1]
                start = chance.randint(0, end)
                for have, want in zip(buffer.rows(0, start, end), wanted, strict=True):
                    assert torch.equal(have, want[:, start:])
                pinned = buffer.pinned(end)
                for have, want in zip(pinned.rows(0, 0, end), wanted, strict=True):
                    assert torch.equal(have, want)


def test_blocks_are_those_of_the_kernel():
    """Sixteen keys beside each other and pairs along the head; values in pairs of rows."""
    buffer = KVBuffer(1)
    buffer.lay(Order.BLOCKS)
    rows = torch.arange(20 * 32, dtype=torch.float32).view(1, 20, 32)
    buffer.append(0, (rows % 256).bfloat16(), (rows % 256).bfloat16())
    keys, values = (store[0].flatten() for store in buffer.stores(0))
    for row, d in ((0, 0), (0, 1), (3, 17), (15, 31), (16, 0), (19, 30)):
        number = float(rows[0, row, d] % 256)
        block = keys[row // 16 * 16 * 32 :]
        assert float(block[d // 2 * 32 + row % 16 * 2 + d % 2]) == number
        assert float(values[row // 2 * 2 * 32 + d * 2 + row % 2]) == number
