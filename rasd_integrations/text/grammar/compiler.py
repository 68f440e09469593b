"""Grammars of answers: schemas, patterns and tool calls compiled by llguidance into states of the engine."""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rasd_integrations.errors import ConfigurationError, DecodingError, MissingDependencyError
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.text.grammar.closing import Closer, growth
from rasd_integrations.text.grammar.schema import prepared, without_unique_items
from rasd_integrations.text.tool_formats import ToolFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_KEPT = 64  # compiled grammars a tokenizer; one takes some tens of kilobytes
_ANSWER = "answer"  # name of a grammar of the user's own, beside the rules made here


class GrammarCompiler:
    """Compiles the grammars of one tokenizer, each once. Safe to use from many threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Collection[int]
    ) -> None:
        """Read the tokenizer, which is not held on to, for ids below ``vocab_size``.

        Takes a third of a second for 49K tokens, five for 262K.

        Raises:
            ConfigurationError: It is no fast tokenizer.
            MissingDependencyError: llguidance is not installed.
        """
        llguidance, hf = _llguidance()
        if not getattr(tokenizer, "is_fast", False):
            msg = (
                f"{type(tokenizer).__name__} is a slow tokenizer, but grammars need a fast one. Load the "
                f"model from a folder that has a tokenizer.json."
            )
            raise ConfigurationError(msg)
        self._make_matcher = llguidance.LLMatcher
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._eos_ids = sorted(eos_ids)
        self._vocabulary: LLTokenizer = hf.from_tokenizer(
            tokenizer, n_vocab=vocab_size, eos_token=self._eos_ids or None
        )
        self._closer = Closer(tokenizer, self._vocabulary, self._words, self._eos_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        known = getattr(tokenizer, "added_tokens_decoder", {})
        self._control = {str(t): int(i) for i, t in known.items() if t.special}

    def fits(self, vocab_size: int, eos_ids: Collection[int]) -> bool:
        """Whether this is a compiler for such a model."""
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
        """Return the start of what an answer must match; ``None`` where it is free.

        Args:
            grammar: Of the answer's text.
            tools: Calls that must or may be made; the answer is then either calls or a text.
            tool_format: How this model writes calls.
            thought_end: Where the prompt has opened a thought, the text that ends it; the thought is free.
            room: Tokens that the answer may hold; JSON is then closed in time, if it fits at all.

        Raises:
            ConfigurationError: The grammar, or a tool's parameters, cannot be followed.
        """
        if grammar is None and (tools is None or not (tools.forced or tools.strict)):
            return None
        rules, own = answer_rules(grammar, tools, tool_format, thought_end, self._control)
        source = "\n".join(rules)
        if own is not None:
            parts = [
                {"name": "main", "lark_grammar": source},
                {"name": _ANSWER, "lark_grammar": own},
            ]
            source = json.dumps({"grammars": parts})
        is_json = bool(tools and tools.forced) or (
            grammar is not None and grammar.kind == "json_schema"
        )
        try:
            matcher = self._matcher(source)
            closing = self._closing(matcher) if is_json and room is not None else None
            return LLGuidanceState(matcher, self._words, closing, room or 0)
        except ConfigurationError:
            for function in tools.functions if tools is not None else ():
                self._check(function)
            raise

    def _closing(self, matcher: LLMatcher) -> _Closing | None:
        """Return what keeps an answer's way out open; ``None`` where none is found at its start."""
        with self._lock:
            way = self._closer.way_out(matcher)
        return None if way is None else _Closing(self._closer, growth(len(way)))

    def _check(self, function: Mapping[str, Any]) -> None:
        """Raise what is wrong with the parameters of one function, by its name."""
        try:
            self._matcher(f"start: {_arguments(function)}")
        except ConfigurationError as err:
            msg = f"Tool {function['name']!r}: {err}"
            raise ConfigurationError(msg) from err

    def _matcher(self, source: str) -> LLMatcher:
        with self._lock:
            found = self._compiled.get(source)
            if found is None:
                found = self._make_matcher(self._vocabulary, source, log_level=0)
                if found.is_error():
                    raise _refused(found.get_error())
                self._compiled[source] = found
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(source)
            return found.deep_copy()


_compilers: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, GrammarCompiler] = (
    weakref.WeakKeyDictionary()
)
_compilers_guard = threading.Lock()


def grammar_compiler(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Collection[int]
) -> GrammarCompiler:
    """Return the compiler of a tokenizer, the same for all that use it for such a model."""
    with _compilers_guard:
        known = _compilers.get(tokenizer)
        if known is None or not known.fits(vocab_size, eos_ids):
            known = _compilers[tokenizer] = GrammarCompiler(tokenizer, vocab_size, eos_ids)
        return known


@dataclass(frozen=True, slots=True)
class _Closing:
    """How an answer is closed in time, and what one token may add to the way out."""

    closer: Closer
    most: int


class LLGuidanceState:
    """One answer's place in a grammar."""

    def __init__(
        self, matcher: LLMatcher, words: int, closing: _Closing | None = None, room: int = 0
    ) -> None:
        """Stand where ``matcher`` stands, which is this state's own; masks have ``words`` words.

        With ``closing`` the answer is closed before it has grown by ``room`` tokens.
        """
        self._matcher = matcher
        self._words = words
        self._closing = closing
        self._room = room
        self._squeezed_from: int | None = None  # the room at which only the way out was left

    def mask(self) -> NDArray[np.int32]:
        """Return the bits of the tokens that may follow, ``[ceil(vocab / 32)]``.

        Raises:
            DecodingError: The grammar became too large to follow.
        """
        bits = np.zeros(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            msg = (
                f"The answer's grammar cannot be followed any further: {self._matcher.get_error()}"
            )
            raise DecodingError(msg)
        way = None if _is_single(bits) else self._way_out()
        if self._closing is None or way is None:
            return bits
        bits, only = self._closing.closer.squeezed(bits, way, self._room, self._closing.most)
        if only and self._squeezed_from is None:
            self._squeezed_from = self._room
        return bits

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if not tokens and self._squeezed_from is not None:
            return self._way_out() or ()
        return tokens

    def push(self, token_id: int) -> bool:
        """Step over a token; ``False``, and no step, where it may not follow."""
        if self._is_short:
            self.mask()  # notes whether the answer is being closed, also in a block of many tokens
        taken = bool(self._matcher.try_consume_tokens([token_id]) == 1)
        self._room -= taken
        return taken

    def pop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        if count:
            self._matcher.rollback(count)
            self._room += count
            if self._squeezed_from is not None and self._room > self._squeezed_from:
                self._squeezed_from = None

    def fork(self) -> LLGuidanceState:
        """Return a state of its own at the same place."""
        return LLGuidanceState(self._matcher.deep_copy(), self._words, self._closing, self._room)

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def squeezed(self) -> bool:
        """Whether the answer had to be closed because its room ended."""
        return self._squeezed_from is not None

    def _way_out(self) -> list[int] | None:
        """Return the way out where the room may be running short, else ``None``."""
        if self._closing is None or not self._is_short or self._matcher.is_stopped():
            return None
        return self._closing.closer.way_out(self._matcher)

    @property
    def _is_short(self) -> bool:
        return self._closing is not None and self._room <= 2 * self._closing.most


def answer_rules(
    grammar: Grammar | None,
    tools: ToolUse | None,
    tool_format: ToolFormat | None,
    thought_end: str | None,
    control: Mapping[str, int],
) -> tuple[list[str], str | None]:
    """Return the Lark rules of an answer, and a grammar of the user's own that they name.

    Raises:
        ConfigurationError: A grammar is given beside calls that must be made.
    """
    rules: list[str] = []
    own: str | None = None
    answers: list[str] = []
    if tools is not None and tool_format is not None and (tools.forced or tools.visible):
        if tools.forced and grammar is not None:
            msg = (
                f"A grammar is given, but tool_choice {tools.choice!r} demands a call. Leave out one "
                f"of them, or use tool_choice='auto'."
            )
            raise ConfigurationError(msg)
        rules += _call_rules(tools, tool_format, control)
        answers.append("calls")
        if not tools.forced and grammar is None:
            answers = ["free"]
            rules += _free_rules(tools, tool_format, control)
    if grammar is not None:
        rules.append(f"text: {_text_rule(grammar)}")
        own = grammar.source if grammar.kind == "lark" else None
        answers.append("text")
    start = f"({' | '.join(answers)})"
    if thought_end is not None:
        rules += [f"thought[lazy]: /(?s:.*){_escaped(thought_end)}/", "SPACE: /\\s+/"]
        start = f"thought SPACE? {start}"
    return [f"start: {start}", *rules], own


def _text_rule(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return f"%json {json.dumps(prepared(json.loads(grammar.source)))}"
    if grammar.kind == "regex":
        pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", grammar.source)
        return f"/{pattern}/"
    return f"@{_ANSWER}"


def _call_rules(tools: ToolUse, form: ToolFormat, control: Mapping[str, int]) -> list[str]:
    """Return the rules of one call or more: ``calls``."""
    functions = tools.forced or tools.functions
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
    more = f"({_terms(form.separator, control)} call)*" if tools.parallel else ""
    rules.append(
        _rule("calls", _terms(form.opening, control), "call", more, _terms(form.closing, control))
    )
    for place, function in enumerate(functions):
        parts = (
            _terms(_before(form, function), control),
            _arguments(function),
            _terms(form.tail, control),
        )
        rules.append(_rule(f"call_{place}", *parts))
    return rules


def _free_rules(tools: ToolUse, form: ToolFormat, control: Mapping[str, int]) -> list[str]:
    """Return the rules of an answer that may call: ``free``, text in which what opens a call begins one."""
    mark = form.mark
    if mark in control:  # no text holds it
        return ["free: TEXT | TEXT? calls", "TEXT: /(?s:.+)/"]
    if not mark:  # bare JSON is a call only where the answer begins with it
        return ["free: TEXT | calls", "TEXT: /[^{](?s:.*)/"]
    functions = tools.functions
    several = f"({_terms(form.separator, control)} call)*" if tools.parallel else ""
    hops = "hop*" if tools.parallel else "hop?"
    firsts = " | ".join(f"first_{i}" for i in range(len(functions)))
    rules = [
        f"free: {hops} TEXT?",
        "TEXT: /(?s:.+)/",
        _rule("hop", "trigger", f"({firsts})", several, _terms(form.closing, control)),
        f"trigger[lazy]: /(?s:.*){_escaped(mark)}/",
    ]
    for place, function in enumerate(functions):
        before = (form.opening + _before(form, function)).removeprefix(mark)
        parts = (_terms(before, control), _arguments(function), _terms(form.tail, control))
        rules.append(_rule(f"first_{place}", *parts))
    return rules


def _is_single(bits: NDArray[np.int32]) -> bool:
    words = np.flatnonzero(bits)
    return len(words) == 1 and int(bits[words[0]]).bit_count() == 1


def _rule(name: str, *parts: str) -> str:
    return f"{name}: {' '.join(part for part in parts if part)}"


def _before(form: ToolFormat, function: Mapping[str, Any]) -> str:
    name = json.dumps(function["name"], ensure_ascii=False)[1:-1]
    return form.begin + form.head.replace("{name}", name)


def _arguments(function: Mapping[str, Any]) -> str:
    given = function.get("parameters")
    schema = {"type": "object", "properties": {}, **(given if isinstance(given, Mapping) else {})}
    # Frameworks read arguments into typed values, in which a set drops its duplicates.
    return f"%json {json.dumps(prepared(without_unique_items(schema)))}"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


def _terms(text: str, control: Mapping[str, int]) -> str:
    """Return ``text`` as Lark terms: control tokens by their ids, the rest as strings."""
    if not text:
        return ""
    names = sorted((re.escape(name) for name in control), key=len, reverse=True)
    parts = re.split(f"({'|'.join(names)})", text) if names else [text]
    return " ".join(
        f"<[{control[part]}]>" if part in control else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )


def _refused(reason: str) -> ConfigurationError:
    """Return the error of a grammar; of the library's many lines the first tells what, "error:" why."""
    first, *rest = reason.splitlines() or [""]
    why = next((line for line in rest if line.startswith("error:")), "")
    return ConfigurationError(
        f"This grammar cannot be followed: {f'{first} {why}'.strip()}. Leave the keyword out of the "
        f"schema, and check it on the finished answer."
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
