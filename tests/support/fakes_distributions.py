"""Exact enumeration of what a randomised function returns, and random little language models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

Path = tuple[int, ...]


class Oracle:
    """Stands in for `draw` and `flip`: takes every branch in turn and keeps its probability."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.widths: list[int] = []
        self.weight = 1.0

    def _branch(self, chances: Sequence[float]) -> int:
        place = len(self.widths)
        self.widths.append(len(chances))
        if place == len(self.script):
            self.script.append(0)
        taken = self.script[place]
        self.weight *= chances[taken] if self.weight else 0.0  # impossible branches may lead to NaN
        return taken

    def draw(self, probs: Tensor, generator: object) -> Tensor:
        chances = (probs.double() / probs.double().sum()).tolist()
        return torch.tensor(self._branch(chances))

    def bernoulli(self, chances: Sequence[float], generator: object) -> list[bool]:
        return [self._branch([1 - min(c, 1), min(c, 1)]) == 1 for c in chances]

    def runs(self) -> Iterator[None]:
        """Yield once for each path through the branches; `weight` is then the path's probability."""
        while True:
            self.widths, self.weight = [], 1.0
            yield
            while self.script and self.script[-1] + 1 == self.widths[len(self.script) - 1]:
                self.script.pop()
            if not self.script:
                return
            self.script[-1] += 1


def outcomes(oracle: Oracle, function: Callable[[], Hashable]) -> dict[Hashable, float]:
    """Return the exact distribution of `function`, whose randomness comes from the oracle."""
    distribution: dict[Hashable, float] = defaultdict(float)
    for _ in oracle.runs():
        result = function()
        distribution[result] += oracle.weight
    return distribution


class Model:
    """A random distribution of the next token for every prefix, with zeros here and there."""

    def __init__(self, seed: int, vocab: int, sharpness: float = 2.0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        self.sharpness = sharpness
        self.table: dict[Path, Tensor] = {}

    def logits(self, prefix: Path) -> Tensor:
        if prefix not in self.table:
            row = torch.randn(self.vocab, generator=self.generator) * self.sharpness
            row[torch.rand(self.vocab, generator=self.generator) < 0.15] = float("-inf")
            row[int(torch.randint(self.vocab, (), generator=self.generator))] = 0.5
            self.table[prefix] = row
        return self.table[prefix]

    def distribution(self, prefix: Path) -> list[float]:
        return self.logits(prefix).double().softmax(-1).tolist()

    def extend(self, distribution: dict[Path, float], length: int) -> dict[Path, float]:
        """Return the distribution of the first `length` tokens, given a distribution of shorter and longer ones."""
        full: dict[Path, float] = defaultdict(float)
        todo = dict(distribution)
        while todo:
            prefix, weight = todo.popitem()
            if len(prefix) >= length:
                full[prefix[:length]] += weight
                continue
            for token, p in enumerate(self.distribution(prefix)):
                if p * weight > 0:
                    longer = (*prefix, token)
                    todo[longer] = todo.get(longer, 0.0) + p * weight
        return full


def softmax(logits: Tensor) -> Tensor:
    """Return the plain distribution at temperature 1."""
    return logits.float().softmax(-1)


def distance(a: dict[Path, float], b: dict[Path, float]) -> float:
    """Return the largest difference between two distributions."""
    return max(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in a.keys() | b.keys())
