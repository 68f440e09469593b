"""What requests draft from besides their own text: earlier answers and fed texts, by namespace."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from rasd_integrations.datastores.tokens.answers import Answers
from rasd_integrations.datastores.tokens.encoding import Encoder, Ids
from rasd_integrations.datastores.tokens.shard import Shard
from rasd_integrations.datastores.tokens.store import TokenStore


class Namespace:
    """The texts that one namespace may draft from.

    Attributes:
        answers: Answers finished earlier.
        texts: What was fed.
    """

    def __init__(self, encode: Any, max_tokens: int) -> None:
        """Hold nothing yet; ``encode`` is a function from a text to its ids."""
        self.answers = Answers(encode, max_tokens)
        self.texts = TokenStore(encode, max_tokens=max_tokens)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What a drafter searches."""
        return (*self.answers.store.shards, *self.texts.shards)


class Namespaces:
    """The memory of each namespace, the last used ones; nothing is kept of a limit of 0 tokens."""

    def __init__(self, tokenizer: Any, *, most: int, max_tokens: int) -> None:
        """Keep at most ``most`` namespaces of at most ``max_tokens`` answer tokens, and as many of fed texts."""
        encoder = Encoder(tokenizer)  # one for all: it makes a copy of the tokenizer
        self._encode = lambda text: encoder([text])[0]
        self._tokenizer, self._most, self._max_tokens = tokenizer, most, max_tokens
        self._held: OrderedDict[str, Namespace] = OrderedDict()

    def of(self, name: str) -> Namespace | None:
        """Return a namespace, which has been used now; ``None`` if nothing is kept."""
        if not self._max_tokens:
            return None
        if name not in self._held:
            self._held[name] = Namespace(self._encode, self._max_tokens)
        self._held.move_to_end(name)
        while len(self._held) > self._most:
            self._held.popitem(last=False)
        return self._held[name]

    def forget(self, text: str | None, name: str | None) -> int:
        """Forget a text and every answer that holds it, or all; return how many texts and answers.

        Args:
            text: ``None`` forgets all.
            name: The namespace; ``None`` is every one.
        """
        names = [n for n in self._held if name is None or n == name]
        count = sum(self._forget(self._held[n], text) for n in names)
        for n in names if text is None else ():
            del self._held[n]
        return count

    def sizes(self) -> dict[str, int]:
        """Return how much is kept, of all namespaces together."""
        held = self._held.values()
        return {
            "namespaces": len(held),
            "answers": sum(len(space.answers.store) for space in held),
            "answer_tokens": sum(space.answers.store.num_tokens for space in held),
            "texts": sum(len(space.texts) for space in held),
            "text_tokens": sum(space.texts.num_tokens for space in held),
        }

    def _forget(self, space: Namespace, text: str | None) -> int:
        """Empty the stores themselves: requests that run draft from them."""
        rows = space.answers.store.rows()
        keys = [key for key, ids in rows if text is None or text in self._decoded(ids)]
        space.answers.remove(keys)
        texts = [key for key, _ in space.texts.rows()] if text is None else text
        return len(keys) + space.texts.remove(texts)

    def _decoded(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))
