"""A script that plays a competent assistant: it reads the rendered prompt and nothing else.

Tools are read from the prompt, chosen by the words that they share with the question, and their arguments
filled from the question by their JSON schemas. Tool results become text. ReAct prompts are answered in
their own form, prompts with context by the line that fits the question best.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from scripted import ScriptedForCausalLM, scripted_model
from transformers import PreTrainedTokenizerFast

GREETING = "Hello! How can I help you today?"
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_PREAMBLE = re.compile(
    r"# Tools\n.*(?:</tool_call>|answer in plain text\.)"
    r"|You are designed to help.*human and assistant messages\.",
    re.DOTALL,
)  # fmt: skip
_REACT_TOOL = re.compile(r"> Tool Name: (.+)\nTool Description: ((?:.|\n)*?)\nTool Args: (\{.*\})")
_CALLED = re.compile(r'<tool_call>\s*\{"name": "(.+?)"')
_QUOTED = re.compile(r"(?<!\w)[\"'“](.+?)[\"'”](?!\w)")
_NAMED = re.compile(r"(?<=[a-z(,:'] )[A-Z]\w*(?:,? [A-Z]\w*)*|(?<=\()[A-Z]\w*(?: [A-Z]\w*)*")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")
_DULL = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by can do does for from function get give have how i in is it me my of on or please "
        "tell that the this to tool tools use using value was what when where which who will with you your",
    )
)


def standard_model(template: str = "hermes") -> tuple[ScriptedForCausalLM, PreTrainedTokenizerFast]:
    """Return a model that follows :func:`standard_script`, and its tokenizer."""
    return scripted_model(standard_script, recover=standard_recover, template=template)


def standard_script(prompt: str) -> str:
    """Return what the assistant answers of its own accord."""
    talk = Talk.read(prompt)
    if "\nAction Input: " in talk.text:
        return _react(talk)
    if talk.results:
        return f"The result is: {'; '.join(talk.results)}"
    if (tool := talk.tool()) is not None:
        return "\n".join(_call(tool, arguments) for arguments in talk.all_arguments(tool))
    if (value := talk.json_value()) is not None:
        return json.dumps(value, ensure_ascii=False)
    return talk.best_line() or GREETING


def standard_recover(prompt: str, said: str) -> str:
    """Return what the assistant answers where ``said`` was forced: a call, or the arguments of one."""
    talk = Talk.read(prompt)
    # A tool that was not called yet: who is forced to call after a result is to finish, not to begin again.
    tools = sorted(talk.tools, key=lambda t: (t["name"] in talk.called, -talk.score(t)))
    for tool in tools:
        arguments = talk.all_arguments(tool)[0]
        for text in (_call(tool, arguments), json.dumps(arguments, ensure_ascii=False)):
            if text.startswith(said):
                return text
    return ""


def _call(tool: Mapping[str, Any], arguments: Any) -> str:
    written = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{tool["name"]}", "arguments": {written}}}\n</tool_call>'


def _react(talk: Talk) -> str:
    tool = talk.tool()
    if talk.results or tool is None:
        answer = f"The result is: {talk.results[-1]}" if talk.results else GREETING
        return (
            f"Thought: I can answer without using any more tools. I'll use the user's language to answer\n"
            f"Answer: {answer}"
        )
    arguments = json.dumps(talk.all_arguments(tool)[0], ensure_ascii=False)
    return (
        f"Thought: The current language of the user is: English. I need to use a tool to help me answer the question.\n"
        f"Action: {tool['name']}\nAction Input: {arguments}"
    )


@dataclass
class Talk:
    """A prompt, taken apart.

    Attributes:
        text: The text of all turns.
        question: The last thing the user said, tool results apart.
        results: Tool results since then.
        tools: ``name``, ``description`` and ``parameters`` of each.
        called: Names of the tools that were called.
    """

    text: str
    question: str = ""
    results: list[str] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    called: list[str] = field(default_factory=list)

    # It is asked for at each token where a grammar holds the answer; nobody changes one.
    @classmethod
    @lru_cache(maxsize=32)
    def read(cls, prompt: str) -> Talk:
        turns = _TURN.findall(prompt) or [("user", prompt)]
        talk = cls("\n".join(text for _, text in turns))
        talk.tools = list(_tools(prompt))
        for role, text in turns:
            if role == "assistant":
                talk.called += _CALLED.findall(text)
                continue
            text = _PREAMBLE.sub("", text).strip()
            results = _RESULT.findall(text) or ([text] if role == "tool" else [])
            if text.startswith("Observation: "):
                results = [text.removeprefix("Observation: ")]
            if results:
                talk.results += [result.strip() for result in results]
            elif role == "user":
                talk.question, talk.results = text, []
        return talk

    def tool(self) -> Mapping[str, Any] | None:
        """Return the tool that the question asks for."""
        best = max(self.tools, key=self.score, default=None)
        if best is None or not (self.score(best) or re.search(r"\btool\b", self.question)):
            return None
        return best

    def score(self, tool: Mapping[str, Any]) -> int:
        """Return how well a tool fits the question; its own name weighs most."""
        about = _words(tool["name"]) | _words(tool.get("description") or "")
        named = 100 * bool(re.search(rf"\b{re.escape(tool['name'])}\b", self.question))
        return named + len(about & _words(self.question))

    def all_arguments(self, tool: Mapping[str, Any]) -> list[Any]:
        """Return the arguments of each call that the question asks for: "in Paris and in Rome" are two."""
        schema = tool.get("parameters") or {}
        required = schema.get("required") or []
        names = _NAMED.findall(self.question)
        if len(required) == 1 and len(names) > 1 and " and " in self.question and not _NUMBER.search(self.question):  # fmt: skip
            kind = schema["properties"][required[0]].get("type")
            if kind == "string":
                return [{required[0]: name} for name in names]
        return [Filler(self.question, schema).value(schema)]

    def json_value(self) -> Any:
        """Return the JSON that the question itself asks for, by a schema or by the names of its keys."""
        for schema in _objects(self.question):
            if "properties" in schema and "parameters" not in schema:
                return Filler(self.question[: self.question.find("{")], schema).value(schema)
        if "JSON" in self.question and (keys := _QUOTED.findall(self.question)):
            return {key: f"A {key} of my own." for key in keys}
        return None

    def best_line(self) -> str:
        """Return the line of the prompt that shares most words with its last line, if any shares two."""
        *lines, last = [line for line in self.text.splitlines() if line.strip()]
        asked = next((x for x in [last, *reversed(lines)] if "?" in x), last)
        wanted = _words(asked)
        best = max(lines, key=lambda x: (x != asked) * len(_words(x) & wanted), default="")
        return best.strip() if best != asked and len(_words(best) & wanted) >= 2 else ""


class Filler:
    """Values for JSON schemas out of a question: each quoted text, name and number is used once."""

    def __init__(self, question: str, root: Mapping[str, Any]) -> None:
        self.question, self.root = question, root
        self.quoted = _QUOTED.findall(question)
        self.named = _NAMED.findall(question)
        self.numbers = _NUMBER.findall(question)

    def value(self, schema: Mapping[str, Any], name: str = "") -> Any:
        """Return a value that fits ``schema``."""
        if "$ref" in schema:
            key = schema["$ref"].split("/")[-1]
            return self.value({**self.root.get("$defs", {}), **self.root.get("definitions", {})}[key], name)  # fmt: skip
        for union in ("anyOf", "oneOf", "allOf"):
            if options := [o for o in schema.get(union, []) if o.get("type") != "null"]:
                return self.value(options[0], name)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            said = (o for o in schema["enum"] if str(o).lower() in self.question.lower())
            return next(said, schema["enum"][0])
        kind = schema.get("type", "object" if "properties" in schema else "string")
        return self._plain(kind[0] if isinstance(kind, list) else kind, schema, name)

    def _plain(self, kind: str, schema: Mapping[str, Any], name: str) -> Any:
        if kind == "object":
            wanted, known = schema.get("required", []), schema.get("properties", {})
            return {key: self.value(known[key], key) for key in known if key in wanted}
        if kind == "array":
            item = schema.get("items", {})
            numeric = item.get("type") in ("integer", "number")
            count = max(1, schema.get("minItems", 1), len(self.numbers) if numeric else 1)
            return [self.value(item, name) for _ in range(count)]
        if kind in ("integer", "number"):
            said = float(self.numbers.pop(0) if self.numbers else schema.get("minimum", 1))
            return int(said) if kind == "integer" else said
        return {"boolean": True, "null": None}[kind] if kind != "string" else self._text(name)

    def _text(self, name: str) -> str:
        if name in {"query", "question", "input", "text", "prompt"}:
            return self.question
        for found in (self.quoted, self.named):
            if found:
                return str(found.pop(0))
        return self.question or name


def _tools(prompt: str) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for name, description, args in (m.groups() for m in _REACT_TOOL.finditer(prompt)):
        yield {"name": name, "description": description, "parameters": next(_objects(args), {})}
    for found in _objects(prompt):
        function = found.get("function", found)
        known = isinstance(function, dict) and isinstance(function.get("name"), str)
        if (
            known
            and (found is not function or "parameters" in function)
            and function["name"] not in seen
        ):
            seen.add(function["name"])
            if "arguments" not in function:
                yield function


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text, outermost only."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            end = at + 1
        else:
            yield value
        at = text.find("{", end)


def _words(text: str) -> set[str]:
    return {w.rstrip("s") for w in re.findall(r"[^\W_]+", text.lower())} - _DULL
