"""Maps hidden states to keys: z-score, principal components, unit length (DReSD, arXiv 2502.15572)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 64  # as in DReSD
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """``unit((h - mean) @ basis)``.

    Attributes:
        mean: ``[hidden]`` float32.
        basis: ``[hidden, dimensions]`` float32: components, each row divided by its dimension's deviation.
    """

    mean: Floats
    basis: Floats

    @classmethod
    def fit(cls, samples: Iterable[NDArray[np.float16]]) -> Transform:
        """Fit the leading components of z-scored hidden states ``[rows, hidden]``, read part by part.

        The mean of z-scores is zero, so one mean serves both steps.
        """
        count, total, squares = 0, np.zeros(1), np.zeros((1, 1))
        for part in samples:
            rows = part.astype(np.float32)
            count += len(rows)
            total = total + rows.sum(0, dtype=np.float64)
            squares = squares + rows.T @ rows
        mean = total / max(count, 1)
        covariance = squares / max(count, 1) - np.outer(mean, mean)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
        _, vectors = np.linalg.eigh(covariance / np.outer(deviation, deviation))
        components = vectors[:, ::-1][:, :DIMENSIONS]  # eigh is ascending
        basis = components / deviation[:, None]
        return cls(mean.astype(np.float32), np.ascontiguousarray(basis, np.float32))

    @property
    def width(self) -> int:
        """The hidden states' width."""
        return len(self.mean)

    def __call__(self, hidden: NDArray[np.floating]) -> Floats:
        """Return the keys ``[..., dimensions]`` float32 of hidden states ``[..., hidden]``."""
        keys = (hidden.astype(np.float32) - self.mean) @ self.basis
        lengths = np.linalg.norm(keys, axis=-1, keepdims=True)
        unit: Floats = (keys / np.maximum(lengths, 1e-9)).astype(np.float32, copy=False)
        return unit
