"""Compiles schemas, patterns and tool calls with llguidance into grammar states."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rasd_integrations.errors import ConfigurationError, MissingDependencyError
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.text.grammar.closing import CompletionSearch
from rasd_integrations.text.grammar.examples import examples
from rasd_integrations.text.grammar.rules import ANSWER, answer_rules, arguments_rule
from rasd_integrations.text.grammar.size import max_growth
from rasd_integrations.text.grammar.state import Closing, LLGuidanceState
from rasd_integrations.text.tool_formats import ToolFormat, added_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_KEPT = 64  # compiled grammars per tokenizer; one takes some tens of kilobytes
_MAX_CHARACTERS = 1 << 18  # of a grammar's source
# llguidance's own limits are reached by 500 optional properties; these allow 2,000, at milliseconds a mask.
_LIMITS = {"max_items_in_row": 20_000, "step_max_items": 400_000, "step_lexer_fuel": 2_000_000}


class GrammarCompiler:
    """Compiles and caches the grammars of one tokenizer. Thread-safe."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Collection[int]
    ) -> None:
        """Read the tokenizer, without keeping it, for ids below ``vocab_size``.

        Takes a third of a second for 49K tokens, five seconds for 262K.

        Raises:
            ConfigurationError: It is not a fast tokenizer.
            MissingDependencyError: llguidance is not installed.
        """
        llguidance, hf = _llguidance()
        if not getattr(tokenizer, "is_fast", False):
            msg = (
                f"{type(tokenizer).__name__} is a slow tokenizer, but grammars need a fast one. Load the "
                f"model from a folder that has a tokenizer.json."
            )
            raise ConfigurationError(msg)
        self._make_matcher = partial(
            llguidance.LLMatcher, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS)
        )
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._eos_ids = sorted(eos_ids)
        self._vocabulary: LLTokenizer = hf.from_tokenizer(
            tokenizer, n_vocab=vocab_size, eos_token=self._eos_ids or None
        )
        self._search = CompletionSearch(tokenizer, self._vocabulary, self._words, self._eos_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._completions: OrderedDict[str, list[int] | None] = OrderedDict()
        # Not those that the tokenizer calls special: llguidance takes <tool_call> of Qwen for one too, and no text
        # matches such a token.
        self._control = {
            str(token): i
            for i, token in added_tokens(tokenizer).items()
            if i < vocab_size and self._vocabulary.is_special_token(i)
        }

    def fits(self, vocab_size: int, eos_ids: Collection[int]) -> bool:
        """Return True if this compiler serves a model of these sizes."""
        return (self._vocab_size, self._eos_ids) == (vocab_size, sorted(eos_ids))

    def state(
        self,
        grammar: Grammar | None,
        tools: ToolUse | None = None,
        tool_format: ToolFormat | None = None,
        *,
        thought_end: str | None = None,
        room: int | None = None,
    ) -> LLGuidanceState | None:
        """Return the initial state of an answer's grammar; ``None`` if the answer is free.

        Args:
            grammar: Of the answer's text.
            tools: Calls that must or may be made; the answer is then either calls or text.
            tool_format: How this model writes calls.
            thought_end: Text that ends a thought the prompt has opened; the thought itself is free.
            room: Most tokens of the answer; JSON is closed within them.

        Raises:
            ConfigurationError: The grammar, or a tool's parameters, cannot be followed.
        """
        if grammar is None and (tools is None or not (tools.forced or tools.strict)):
            return None
        rules, own = answer_rules(grammar, tools, tool_format, thought_end, self._control)
        source = "\n".join(rules)
        if own is not None:
            named = {"main": source, ANSWER: own}
            parts = [{"name": name, "lark_grammar": text} for name, text in named.items()]
            source = json.dumps({"grammars": parts})
        is_json = bool(tools and tools.forced) or (
            grammar is not None and grammar.kind == "json_schema"
        )
        try:
            matcher = self._matcher(source)
            if not is_json or room is None:
                return LLGuidanceState(matcher, self._words)
            opening = tuple(self._vocabulary.tokenize_str(thought_end)) if thought_end else ()
            schemas = _schemas(grammar, tools)
            texts = tuple(examples(*schemas))
            closing = Closing(self._search, max_growth(*schemas), opening, texts)
            completion = self._shortest(source, matcher, closing, room)
            return LLGuidanceState(matcher, self._words, closing, room, completion)
        except ConfigurationError:
            for function in tools.functions if tools is not None else ():
                self._check(function)
            raise

    def _shortest(self, source: str, matcher: LLMatcher, closing: Closing, room: int) -> list[int]:
        """Return the shortest answer; the search runs once per grammar.

        Raises:
            ConfigurationError: There is none, or it has more than ``room`` tokens.
        """
        with self._lock:
            if source not in self._completions:
                self._completions[source] = self._search.shortest_completion(
                    matcher, closing.opening, closing.texts
                )
                if len(self._completions) > _KEPT:
                    self._completions.popitem(last=False)
            completion = self._completions[source]
        if completion is None:
            msg = (
                "This schema cannot be followed: no whole answer was found for it. Check that each object ends "
                "somewhere (a $ref to itself needs a null or a list beside it), and that no part must be longer "
                "than a model can write."
            )
            raise ConfigurationError(msg)
        if len(completion) > room:
            msg = (
                f"max_tokens is {room}, but the shortest answer that the schema allows needs {len(completion)} tokens. "
                f"Raise max_tokens to several times that, or ask for fewer or shorter parts."
            )
            raise ConfigurationError(msg)
        return completion

    def _check(self, function: Mapping[str, Any]) -> None:
        """Raise an error that names the function if its parameters cannot be followed."""
        try:
            self._matcher(f"start: {arguments_rule(function)}")
        except ConfigurationError as err:
            msg = f"Tool {function['name']!r}: {err}"
            raise ConfigurationError(msg) from err

    def _matcher(self, source: str) -> LLMatcher:
        if len(source) > _MAX_CHARACTERS:
            msg = (
                f"This grammar cannot be followed: it has {len(source)} characters, but may have "
                f"{_MAX_CHARACTERS}. Shorten its patterns and lists of values, or ask for it in parts."
            )
            raise ConfigurationError(msg)
        with self._lock:
            found = self._compiled.get(source)
            if found is None:
                found = self._make_matcher(self._vocabulary, source)
                self._check_begins(found)
                self._compiled[source] = found
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(source)
            return found.deep_copy()

    def _check_begins(self, matcher: LLMatcher) -> None:
        """Raise unless the grammar compiled and allows a first token."""
        bits = np.zeros(self._words, dtype=np.int32)
        probe = matcher.deep_copy()
        if not probe.is_error():
            probe.compute_ff_tokens()
            probe.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if probe.is_error():
            raise _refused(probe.get_error())


_compilers: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, GrammarCompiler] = (
    weakref.WeakKeyDictionary()
)
_compilers_guard = threading.Lock()


def grammar_compiler(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Collection[int]
) -> GrammarCompiler:
    """Return the shared compiler of a tokenizer and model."""
    with _compilers_guard:
        known = _compilers.get(tokenizer)
        if known is None or not known.fits(vocab_size, eos_ids):
            known = _compilers[tokenizer] = GrammarCompiler(tokenizer, vocab_size, eos_ids)
        return known


def _schemas(grammar: Grammar | None, tools: ToolUse | None) -> list[Any]:
    schemas: list[Any] = [f.get("parameters") for f in (tools.functions if tools else ())]
    if grammar is not None and grammar.kind == "json_schema":
        schemas.append(json.loads(grammar.source))
    return schemas


def _refused(reason: str) -> ConfigurationError:
    """Return the error for llguidance's message: its first line, and the one that begins "error:"."""
    first, *rest = reason.splitlines() or [""]
    why = next((line for line in rest if line.startswith("error:")), "")
    reason = f"{first} {why}".strip()
    if "NoExtension" in reason:
        reason = "it allows no answer at all"
    step = next(remedy for mark, remedy in _REMEDIES if mark in reason)
    return ConfigurationError(f"This grammar cannot be followed: {reason[:500]}. {step}")


_REMEDIES = (
    ("no answer at all", "Check for a $ref to itself, or parts that contradict one another."),
    ("nsatisfiable", "Check for parts that contradict one another."),
    ("items; max is", "Ask for fewer optional properties at a time, or make them required."),
    ("fuel", "Shorten its patterns, or the lengths in them."),
    ("recursion limit", "Nest its objects and lists less deeply: 100 levels are followed."),
    ("", "Leave the keyword out of the schema, and check it on the finished answer."),
)


def _llguidance() -> tuple[Any, Any]:
    try:
        import llguidance
        import llguidance.hf
    except ModuleNotFoundError as err:
        if err.name != "llguidance":
            raise
        raise MissingDependencyError(err.name, extra="structured") from err
    return llguidance, llguidance.hf
