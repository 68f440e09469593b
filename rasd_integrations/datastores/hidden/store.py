"""A store of what the target thought at each place of some texts, looked up by what it thinks now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Self

from rasd_integrations.datastores.hidden import build
from rasd_integrations.datastores.hidden.build import SEPARATOR, Reader
from rasd_integrations.datastores.hidden.file import ArrayFile
from rasd_integrations.datastores.hidden.transform import Transform
from rasd_integrations.errors import RetrievalError

# Keys compared for one draft, of more that many evenly spread; and of them at once.
_MOST_ROWS, _BLOCK = 1 << 18, 1 << 11


class Neighbour(NamedTuple):
    """A place that is like the present one.

    Attributes:
        agreement: 0 to 1: about how likely its next token is the present one's.
        following: The tokens that followed there.
    """

    agreement: float
    following: tuple[int, ...]


class DenseStore:
    """Keys of hidden states by the token that the target said there, and the texts they came from.

    DReSD (arXiv 2502.15572) asks an approximate index for 50 neighbours among all keys and drops those
    whose next token is not the one just said. Here keys lie grouped by that token and all of its group are
    compared, which is exact and needs no index: about a millisecond for the most frequent word of 1M tokens.
    In 34K tokens of documents 8 % of the look-ups find nothing, against 38 % of DReSD's, and drafts give
    1.71 tokens a step against 1.53 (docs/explanation/experiments.md). A token takes 136 bytes: 64 float16
    and two ids.

    Immutable and safe under threads.

    Attributes:
        path: The store's file.
        width: Width of the hidden states that it can be asked with.
        num_tokens: Tokens of its texts.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Made by :meth:`open` and :meth:`build`."""
        self._file = file = ArrayFile(path, verify=verify)
        self.path = path
        self._ids, self._places = file["ids"], file["places"]
        self._tokens, self._starts = file["tokens"], file["starts"]
        self._keys = torch.from_numpy(file["keys"])
        self._transform = Transform(file["mean"], file["basis"])
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

        A build that was killed goes on where it stopped, and gives the same store bit for bit. One that is
        done already is opened.

        Args:
            texts: Texts, chunks, documents or nodes; or token ids, one
                sequence for each prompt with its answer. The target's own answers draft best.
            model: The target: :func:`rasd_integrations.runtime.models.shared_model`.
            folder: Where the store and its parts are kept.
            progress: Called with the tokens done and the tokens in all.

        Raises:
            ConfigurationError: A source that cannot list its chunks, an item without a text, or nothing to
                learn from.
            StorageError: The folder cannot be written to, or the disk is full.
        """
        build.build(texts, model, Path(folder), progress)
        return cls.open(folder, model)

    @classmethod
    def open(cls, folder: str | Path, model: Reader, *, verify: bool = True) -> Self:
        """Map a store into memory.

        Args:
            folder: Where it was built.
            model: The target: its weights must be those that the store was built with.
            verify: Compare the file's checksum, which reads all of it once.

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
        """Return the ``k`` places most like the present one, best first, equal ones in the texts' order.

        Args:
            hidden: ``[width]``, the final hidden state that gave ``token_id``.
            token_id: The last committed token; only places where it came next are compared.
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
                self._following(int(self._places[start + i * stride]), depth),
            )
            for i in nearest(cosines, k)
        ]

    def _following(self, place: int, depth: int) -> tuple[int, ...]:
        ids = self._ids[place : place + depth]
        ends = np.flatnonzero(ids == SEPARATOR)
        return tuple((ids[: ends[0]] if len(ends) else ids).tolist())


def nearest(similarities: NDArray[np.floating], k: int) -> list[int]:
    """Return the places of the ``k`` greatest values, greatest first, equal ones in order."""
    if len(similarities) > k:
        places = np.flatnonzero(similarities >= np.partition(similarities, -k)[-k])
    else:
        places = np.arange(len(similarities))
    order = np.argsort(-similarities[places], kind="stable")[:k]
    found: list[int] = places[order].tolist()
    return found
