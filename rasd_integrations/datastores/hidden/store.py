"""A store of the target's hidden states over some texts, searched by the current hidden state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Self

from rasd_integrations.datastores.hidden import build
from rasd_integrations.datastores.hidden.build import Reader
from rasd_integrations.datastores.hidden.transform import Transform
from rasd_integrations.datastores.mapped_file import MappedFile
from rasd_integrations.datastores.tokens.encoding import SEPARATOR
from rasd_integrations.errors import RetrievalError

# Keys compared for one draft (of more, that many, evenly spaced), and at once.
_MOST_ROWS, _BLOCK = 1 << 18, 1 << 11


class Neighbour(NamedTuple):
    """A position with a similar hidden state: cosine similarity of the keys, 0 to 1, and the tokens that followed."""

    agreement: float
    following: tuple[int, ...]


class DenseStore:
    """Keys of hidden states, grouped by next token, and the texts they came from.

    DReSD (arXiv 2502.15572) asks an approximate index for 50 neighbours among all keys and drops those with another
    next token than the last one. Here all keys of that token's group are compared, which is exact and needs no
    index: about a millisecond for the most frequent word of 1M tokens. In 34K tokens of documents 8 % of the
    look-ups find nothing, against 38 % of DReSD's, and drafts give 1.71 tokens a step against 1.53
    (docs/explanation/experiments.md). A token takes 136 bytes: 64 float16 and two ids.

    Immutable and thread-safe. ``width`` is the size of the hidden states, ``num_tokens`` that of the texts.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Use :meth:`open` or :meth:`build`."""
        self.path = path
        with build.KIND.errors(path):
            self._file = file = MappedFile(path, build.KIND, verify=verify)
            self._ids, self._positions = file.array("ids", "U32"), file.array("positions", "U32")
            self._tokens, self._starts = file.array("tokens", "U32"), file.array("starts", "I64")
            self._keys = torch.from_numpy(file.array("keys", "F16"))
            self._transform = Transform(file.array("mean", "F32"), file.array("basis", "F32"))
        self.width = self._transform.width
        self.num_tokens = int((self._ids != SEPARATOR).sum())

    @classmethod
    def build(
        cls,
        texts: Any,
        model: Reader,
        folder: str | Path,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """Run the target over ``texts`` and keep the store in ``folder``.

        A killed build continues where it stopped and gives the same store bit for bit; a finished one is opened.

        Args:
            texts: Texts, chunks, documents or nodes; or token ids, a sequence for each prompt with its answer.
                The target's own answers draft best.
            model: The target: :func:`rasd_integrations.runtime.models.shared_model`.
            folder: Also of the parts.
            progress: Called with the tokens done and the tokens in all.

        Raises:
            ConfigurationError: ``texts`` is not iterable, an item has no text, or there is nothing to learn.
            StorageError: The folder cannot be written to, or the disk is full.
        """
        build.build(texts, model, Path(folder), progress)
        return cls.open(folder, model)

    @classmethod
    def open(cls, folder: str | Path, model: Reader, *, verify: bool = True) -> Self:
        """Map a store into memory; ``verify`` reads the whole file once and compares its checksums.

        Raises:
            RetrievalError: There is no store, it is damaged, or of another model.
        """
        store = cls(Path(folder) / build.FILE, verify=verify)
        marks = store._file.marks
        if marks.get("model") != model.fingerprint:
            msg = (
                f"The dense store {store.path} was built with {marks.get('name')} ({marks.get('model')}), but the "
                f"target is {model.name} ({model.fingerprint}). Build one: DenseStore.build(texts, model, folder)."
            )
            raise RetrievalError(msg)
        return store

    def find(
        self, hidden: NDArray[np.floating], token_id: int, k: int, depth: int
    ) -> list[Neighbour]:
        """Return the ``k`` positions with the most similar hidden states, best first, equal ones in text order.

        Args:
            hidden: ``[width]``, the final hidden state that gave ``token_id``.
            token_id: The last committed token; only positions where it came next are compared.
            k: At least 1.
            depth: Most following tokens.

        Raises:
            RetrievalError: The file was changed in place, or ``hidden`` has another width.
        """
        self._file.check()
        if hidden.shape != (self.width,):
            msg = f"The dense store {self.path} is of width {self.width}, but was asked with {hidden.shape}."
            raise RetrievalError(msg)
        group = int(np.searchsorted(self._tokens, token_id))
        if group == len(self._tokens) or self._tokens[group] != token_id:
            return []
        start, end = int(self._starts[group]), int(self._starts[group + 1])
        stride = -(-(end - start) // _MOST_ROWS)
        query = torch.from_numpy(self._transform(hidden))
        # Block by block, so that the float32 copies stay in the cache.
        blocks = self._keys[start:end:stride].split(_BLOCK)
        cosines = torch.cat([block.float() @ query for block in blocks]).clamp(0, 1).numpy()
        return [
            Neighbour(
                float(cosines[i]),
                self._following(int(self._positions[start + i * stride]), depth),
            )
            for i in nearest(cosines, k)
        ]

    def _following(self, position: int, depth: int) -> tuple[int, ...]:
        ids = self._ids[position : position + depth]
        ends = np.flatnonzero(ids == SEPARATOR)
        return tuple((ids[: ends[0]] if len(ends) else ids).tolist())


def nearest(similarities: NDArray[np.floating], k: int) -> list[int]:
    """Return the indices of the ``k`` greatest values, greatest first, equal ones in order."""
    if len(similarities) > k:
        best = np.flatnonzero(similarities >= np.partition(similarities, -k)[-k])
    else:
        best = np.arange(len(similarities))
    order = np.argsort(-similarities[best], kind="stable")[:k]
    found: list[int] = best[order].tolist()
    return found
