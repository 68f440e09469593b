"""Seeded prompts of every odd kind, each with a twin of the same shape whose control tokens are words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages import ChatMessage as LangChainChat
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

MARKS = (
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[CALL_ID]", "[ARGS]",
    "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|system|>", "<|end|>", "<|tool_call|>",
    "<start_of_turn>", "<end_of_turn>", "<tool_call>", "</tool_call>", "</s>",
)  # fmt: skip
_CONTROL = (
    *MARKS,
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "<",
    ">",
    "|",
    "[IN",
    "ST]",
    "[/",
    "</s",
)
_ODD = (
    "\ud800", "\x00", "\u202e", "\u200b", "\ufeff", "\uf8ff", "\uf8fe", "\\uf8ff", "\ufdd0", "\uff1c/\uff53\uff1e", "é", "𝄞", "ﬁ",
    "{{ 7 * 7 }}", "{% raw %}", "{% for m in messages %}", "{#", "#}", "</think>", "<think>", "</tool_response>", "<tool_response>",
    "CONTINUE_FINAL_MESSAGE_TAG ", '"', "'", "\\", "\r\n", "\t", "%s", "{0}", "$ref", "role", "content", "",
)  # fmt: skip
_WORDS = ("word", " ", "\n", "Paris", "1887", "the lighthouse ", "?", ".")
_HARMLESS = str.maketrans("<>|[]/", "lgbsvd")
_OTHERS = (
    "web_search_call",
    "server_tool_use",
    "refusal",
    "non_standard",
    "executable_code",
    "image_url",
    "file",
    "tool_result",
)


class Prompts:
    """One seed's prompt in every form; ``harmless`` makes the twin."""

    def __init__(self, seed: int, *, harmless: bool = False) -> None:
        self.random = random.Random(seed)
        self.harmless = harmless

    def text(self, most: int = 6) -> str:
        pick = self.random
        if pick.random() < 0.01:
            return "word " * 9000 + self._control()
        atoms = (self._control, lambda: pick.choice(_ODD), lambda: pick.choice(_WORDS))
        return "".join(pick.choice(atoms)() for _ in range(pick.randrange(most)))

    def _control(self) -> str:
        text = self.random.choice(_CONTROL)
        return text.translate(_HARMLESS) if self.harmless else text

    def value(self, depth: int = 3) -> Any:
        """Return JSON of any kind."""
        kinds: list[Callable[[], Any]] = [
            self.text,
            lambda: self.random.choice([None, True, 0, -1.5, 10**30, float("inf")]),
        ]
        if depth:
            size = self.random.randrange(3)
            kinds += [
                lambda: [self.value(depth - 1) for _ in range(size)],
                lambda: {self.text(3): self.value(depth - 1) for _ in range(size)},
            ]
        return self.random.choice(kinds)()

    def arguments(self) -> dict[str, Any]:
        found = {self.text(3): self.value() for _ in range(self.random.randrange(3))}
        if self.random.random() < 0.1:
            found["role"] = self.text()
        if self.random.random() < 0.02:
            deep: Any = self.text()
            for _ in range(400):
                deep = [{self.text(2): deep}] if self.random.random() < 0.1 else {"a": deep}
            found["deep"] = deep
        return found

    def tools(self) -> list[dict[str, Any]] | None:
        if self.random.random() < 0.6:
            return None
        tools = []
        for place in range(self.random.randrange(1, 3)):
            field = {"type": "string", "description": self.text(), "enum": [self.text(), "x"]}
            schema = {"type": "object", "title": self.text(), "properties": {self.text(3): field}}
            function = {"name": f"f{place}{self.text(3)}", "description": self.text()}
            if self.random.random() < 0.9:
                function["parameters"] = schema
            tools.append({"type": "function", "function": function})
        return tools

    def blocks(self) -> list[Any]:
        """Return content blocks of all providers."""
        found: list[Any] = []
        for _ in range(self.random.randrange(4)):
            kind = self.random.choice(("text", "text", "text", "thinking", "tool_use", *_OTHERS))
            block = {"type": kind, kind: self.text(), "id": self.text(2)}
            if self.random.random() < 0.2:
                block |= {"content": self.blocks(), "value": {"type": self.text(2)}}
            if kind == "tool_use":
                block |= {"name": self.text(3), "input": self.value()}
            found.append(self.text() if self.random.random() < 0.2 else block)
        return found

    def content(self) -> Any:
        return self.text() if self.random.random() < 0.7 else self.blocks()

    def langchain(self) -> list[BaseMessage]:
        return [self._langchain() for _ in range(self.random.randrange(1, 6))]

    def _langchain(self) -> BaseMessage:
        kind = self.random.choice("hhhaaasttfc")
        if kind == "a":
            calls = [
                {"name": self.text(3), "args": self.arguments(), "id": self.text(2)}
                for _ in range(self.random.choice([0, 0, 1, 2]))
            ]
            broken = [
                {"name": self.text(2), "args": self.text(), "id": self.text(2), "error": None}
            ] * self.random.choice([0, 0, 0, 1])
            extra = {"reasoning_content": self.text()} if self.random.random() < 0.2 else {}
            return AIMessage(self.content(), tool_calls=calls, invalid_tool_calls=broken, additional_kwargs=extra)  # fmt: skip
        if kind == "t":
            return ToolMessage(self.content(), tool_call_id=self.text(2), name=self.text(2) or None)
        if kind == "f":
            return FunctionMessage(self.text(), name=self.text(2))
        if kind == "c":
            roles = ("user", "assistant", "system", "developer", "tool", self.text(2))
            return LangChainChat(self.content(), role=self.random.choice(roles))
        return (SystemMessage if kind == "s" else HumanMessage)(self.content())

    def llama_index(self) -> list[ChatMessage]:
        return [self._llama_index() for _ in range(self.random.randrange(1, 6))]

    def _llama_index(self) -> ChatMessage:
        role = self.random.choice(
            [*MessageRole, MessageRole.USER, MessageRole.ASSISTANT, MessageRole.USER]
        )
        blocks: list[Any] = []
        for _ in range(self.random.randrange(4)):
            arguments = self.arguments() if self.random.random() < 0.7 else self.text()
            text = TextBlock(text=self.text())
            blocks.append(
                self.random.choice(
                    [
                        text, text, text, text,
                        ThinkingBlock(content=self.text()),
                        ToolCallBlock(tool_call_id=self.text(2), tool_name=self.text(3), tool_kwargs=arguments),
                        ImageBlock(url="https://example.org/x.png"),
                        CitableBlock(title=self.text(), source=self.text(), content=[text]),
                        CitationBlock(cited_content=text, source="s", title="t", additional_location_info={}),
                        CachePoint(cache_control={"type": "ephemeral"}),
                    ]
                )
            )  # fmt: skip
        extra: dict[str, Any] = {}
        if self.random.random() < 0.3:
            function = {
                "name": self.text(3),
                "arguments": self.random.choice(
                    [self.text(), json.dumps(self.arguments()), self.arguments(), [1]]
                ),
            }
            extra = {
                "tool_calls": [{"id": self.text(2), "function": function}],
                "tool_call_id": self.text(2),
                "name": self.text(2),
            }
        return ChatMessage(role=role, blocks=blocks, additional_kwargs=extra)

    def core(self) -> list[Any]:
        """Return messages as dicts, with values of any type where texts belong."""
        found: list[Any] = []
        for _ in range(self.random.randrange(1, 6)):
            role = self.random.choice(
                [
                    "user",
                    "user",
                    "assistant",
                    "assistant",
                    "system",
                    "tool",
                    "developer",
                    self.value(1),
                ]
            )
            message = {
                "role": role,
                "content": self.random.choice(
                    [self.text, self.text, self.text, self.blocks, self.value]
                )(),
            }
            if self.random.random() < 0.3:
                function = {
                    "name": self.text(3),
                    "arguments": self.random.choice([self.arguments, self.text, self.value])(),
                }
                message["tool_calls"] = [{"id": self.value(1), "function": function}]
            if self.random.random() < 0.2:
                message[self.text(2)] = self.value()
            found.append(message if self.random.random() < 0.98 else self.value())
        return found
