"""The grammar libraries that ``masks.py`` compares, behind one face."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from schemas import Schema
from transformers import PreTrainedTokenizerBase

from rasd_integrations.text.grammar.schema import prepared


class Matcher(Protocol):
    """One answer's place in a grammar."""

    def mask(self) -> None:
        """Write the mask of the next token."""

    def push(self, token: int) -> bool:
        """Step over a token; ``False`` where it may not follow."""

    def pop(self, count: int) -> None:
        """Take back the last tokens."""

    def forced(self) -> str:
        """Return the text that must follow."""

    def fork(self) -> object:
        """Return a copy at the same place."""

    def accepts(self) -> bool:
        """Whether the answer may end here."""


class Library(Protocol):
    """A grammar library that has read a tokenizer."""

    def compile(self, schema: Schema) -> Any:
        """Compile a schema.

        Raises:
            ValueError: It cannot be followed; says why.
        """

    def start(self, compiled: Any) -> Matcher:
        """Return a matcher at the start."""


class LLGuidance:
    """llguidance with schemas as this package rewrites them, or as they are."""

    package = "llguidance"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, raw: bool = False) -> None:
        """Read the tokenizer."""
        import llguidance
        import llguidance.hf

        self._new, self._raw = llguidance.LLMatcher, raw
        self._vocabulary = llguidance.hf.from_tokenizer(tokenizer)

    def compile(self, schema: Schema) -> Any:
        """Compile a schema to a matcher that is copied for each answer."""
        writing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        source = self._new.grammar_from_json_schema(
            dict(schema) if self._raw else prepared(schema), overrides=writing
        )
        matcher = self._new(self._vocabulary, source, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def start(self, compiled: Any) -> Matcher:
        """Return a matcher at the start."""
        return _LLMatcher(compiled.deep_copy(), self._vocabulary.vocab_size)


class _LLMatcher:
    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self.pop: Callable[[int], object] = matcher.rollback
        self.fork: Callable[[], object] = matcher.deep_copy
        self.accepts: Callable[[], bool] = matcher.is_accepting

    def mask(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)

    def push(self, token: int) -> bool:
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    def forced(self) -> str:
        return str(self._matcher.compute_ff_bytes(), "utf-8", "replace")


class XGrammar:
    """xgrammar, strict as it comes."""

    package = "xgrammar"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the tokenizer."""
        import xgrammar

        self._xgrammar = xgrammar
        self._vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
        self._compiler = xgrammar.GrammarCompiler(
            self._vocabulary, max_threads=1, cache_enabled=False
        )

    def compile(self, schema: Schema) -> Any:
        """Compile a schema."""
        try:
            return self._compiler.compile_json_schema(
                json.dumps(schema), any_whitespace=False, separators=(", ", ": ")
            )
        except RuntimeError as err:
            raise ValueError(str(err)) from err

    def start(self, compiled: Any) -> Matcher:
        """Return a matcher at the start."""
        matcher = self._xgrammar.GrammarMatcher(compiled)
        bits = self._xgrammar.allocate_token_bitmask(1, self._vocabulary.vocab_size)
        return _XMatcher(matcher, bits)


class _XMatcher:
    def __init__(self, matcher: Any, bits: Any) -> None:
        self._matcher, self._bits = matcher, bits
        self.push: Callable[[int], bool] = matcher.accept_token
        self.pop: Callable[[int], object] = matcher.rollback
        self.forced: Callable[[], str] = matcher.find_jump_forward_string
        self.fork: Callable[[], object] = matcher.fork
        self.accepts: Callable[[], bool] = matcher.is_completed

    def mask(self) -> None:
        self._matcher.fill_next_token_bitmask(self._bits)


LIBRARIES: dict[str, type[LLGuidance | XGrammar]] = {"llguidance": LLGuidance, "xgrammar": XGrammar}
