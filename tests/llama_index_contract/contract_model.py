"""The scripted assistant as the contract's model: what it reads and how often it steps can be seen."""

from __future__ import annotations

import re
import time
from typing import Any

from assistant import standard_recover, standard_script
from scripted import WINDOW, scripted_model
from tokenizers.processors import TemplateProcessing

BOS = "<|endoftext|>"
_SCHEMA = re.compile(
    r"Here's a JSON schema to follow:\n\{\{.*?\}\}\n\nOutput a valid JSON[^\n]*", re.DOTALL
)


class WatchedModel:
    """A new scripted model and its tokenizer, whose texts begin with a token of their own.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer; template and encoding both write the first token, as Llama's do.
        prompts: What the model was asked, each prompt once.
        steps: Forward passes so far.
        delay: Seconds that each forward pass takes longer.
    """

    window = WINDOW

    def __init__(self, template: str = "hermes") -> None:
        self.prompts: list[str] = []
        self.steps = 0
        self.delay = 0.0
        self.model, self.tokenizer = scripted_model(
            self._answer, recover=standard_recover, template=template
        )
        self.model.model.register_forward_pre_hook(self._count)
        self.tokenizer.bos_token = BOS
        self.tokenizer.chat_template = "{{ bos_token }}" + self.tokenizer.chat_template
        self.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, self.tokenizer.bos_token_id)]
        )

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, no token added."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _answer(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return standard_script(_with_schema_last(prompt))

    def _count(self, *_: Any) -> None:
        self.steps += 1
        if self.delay:
            time.sleep(self.delay)


def _with_schema_last(prompt: str) -> str:
    """Return the prompt with a schema of LlamaIndex's where the assistant looks for it, in the last turn.

    LlamaIndex doubles the braces of a schema that it puts into messages, wherever it puts it.
    """
    found = _SCHEMA.search(prompt)
    if found is None:
        return prompt
    schema = found[0].replace("{{", "{").replace("}}", "}")
    talk, end, rest = (prompt[: found.start()] + prompt[found.end() :]).rpartition("<|im_end|>")
    return f"{talk}\n{schema}{end}{rest}"
