"""A causal language model that says what a script says, run by the real engine from end to end.

Its one attention layer is a plain uniform average of the values that the attention function lets a row
see. A value is 64 signs that stand for (token, position), so that average times the row's length
is a fingerprint of every token before it. The model keeps a tree of all sequences it was ever fed and
finds each row in it by the fingerprint: a wrong mask, a key or value committed in the wrong place, or
positions that are off give a fingerprint that nothing fits, and a :class:`LostError` instead of a wrong answer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tiny import EOS, VOCAB, tiny_tokenizer
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rasd_integrations.engine.executors.agreement import comparison_text

Script = Callable[[str], str]
"""From the prompt as the model reads it, special tokens included, to the answer. Asked once a prompt."""
Recover = Callable[[str, str], str]
"""From the prompt and an answer that left the script (a grammar forced it) to the whole answer, which
counts only where it begins with what stands already."""

WINDOW = 8192
ANSWER = (
    "<|im_start|>assistant\n"  # the answer follows the last of these; without one, the prompt's end
)
_DIM = 64
CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
_PRIME = 1009
_GAP = 20.0  # between one rank and the next: sampling follows the ranks too

# Where script and grammar part, what ends a JSON value soonest comes first.
_CLOSERS = '}]",:1234567890xntf{[-.eE+'
_SPACE = " \n\t\r"

_TEMPLATE = """\
{%- macro system_and_tools(text) -%}
{{- '<|im_start|>system\\n' + text }}
{%- if text %}{{- '\\n\\n' }}{% endif %}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": ' }}
{{- '<args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endmacro -%}
{%- if tools %}
{{- system_and_tools(messages[0].content if messages[0].role == 'system' else '') }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- elif not (m.role == 'system' and loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_PLAIN = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_STRICT = (
    """\
{%- for m in messages %}
{%- if m.role not in ('user', 'assistant') %}{{- raise_exception('Role ' + m.role + ' not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- endfor %}
"""
    + _PLAIN
)

TEMPLATES = {
    "hermes": _TEMPLATE,  # tools, tool calls and results, as Qwen2.5 writes them
    "plain": _PLAIN,  # any role, but no word of tools
    "strict": _STRICT,  # user and assistant only, in turns
}


def scripted_tokenizer(template: str = "hermes") -> PreTrainedTokenizerFast:
    """Return the byte tokenizer with one of ``TEMPLATES``."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.model_max_length = WINDOW
    return tokenizer


def scripted_model(
    script: Script, *, recover: Recover | None = None, template: str = "hermes"
) -> tuple[ScriptedForCausalLM, PreTrainedTokenizerFast]:
    """Return a model that answers as ``script`` says, and its tokenizer."""
    tokenizer = scripted_tokenizer(template)
    return ScriptedForCausalLM(ScriptedConfig(), tokenizer, script, recover), tokenizer


class LostError(Exception):
    """The attention showed a row tokens that never stood before it."""


class ScriptedConfig(PretrainedConfig):
    """The shape of the scripted model."""

    model_type = "scripted"

    def __init__(self, **kwargs: Any) -> None:
        self.vocab_size, self.max_position_embeddings = VOCAB, WINDOW
        self.hidden_size = self.head_dim = _DIM
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = 1
        super().__init__(**{"eos_token_id": EOS, "bos_token_id": None, **kwargs})


class Node:
    """The last token of a sequence that was fed."""

    __slots__ = ("answer", "parent", "plan", "prompt", "token")

    def __init__(self, token: int, parent: Node | None) -> None:
        self.token, self.parent = token, parent
        self.answer: Node | None = None  # last token of the prompt that this one answers
        self.plan: list[int] | None = None  # of a prompt's last token: the answer
        self.prompt: str | None = None  # and the prompt

    def ids(self, after: Node | None = None) -> list[int]:
        """Return the sequence, or what of it follows ``after``."""
        found, node = [], self
        while node is not None and node is not after:
            found.append(node.token)
            node = node.parent
        return found[::-1]


@cache
def _numbers(*rows: int) -> list[Tensor]:
    """Return random numbers below the prime, as many rows of them as asked."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, _PRIME, (n, _DIM), generator=generator).float() for n in rows]


@cache
def _marker() -> list[int]:
    return scripted_tokenizer().encode(ANSWER)


class SignAttention(nn.Module):
    """Uniform attention over signs of (token, position)."""

    is_causal = True

    def __init__(self, config: ScriptedConfig) -> None:
        super().__init__()
        self.config, self.layer_idx = config, 0

    def forward(
        self, signs: Tensor, mask: Tensor | None, cache: Any, positions: Tensor, **kwargs: Any
    ) -> Tensor:
        value = signs[:, None]  # [batch, 1 head, n, dim]
        query, key = torch.zeros_like(value), torch.zeros_like(value)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, _ = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=0.0,
            scaling=1.0,
            position_ids=positions,
            **kwargs,
        )
        return out.reshape(signs.shape) * (positions[..., None] + 1)


class ScriptedPreTrainedModel(PreTrainedModel):
    """What body and head share."""

    config_class = ScriptedConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        pass


class ScriptedModel(ScriptedPreTrainedModel):
    """The body: finds every row in the tree of sequences; its hidden state is the node's number."""

    def __init__(self, config: ScriptedConfig) -> None:
        super().__init__(config)
        self.tokens, self.places = (
            nn.Parameter(numbers.clone(), requires_grad=False)
            for numbers in _numbers(config.vocab_size, config.max_position_embeddings)
        )
        self.attention = SignAttention(config)
        self.nodes: list[Node] = []
        self._numbers: dict[bytes, int] = {}
        self._marker = _marker()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,  # before transformers 5.24
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + seen)[None]
        product = self.tokens[input_ids] * self.places[position_ids]
        signs = (product.remainder(_PRIME) >= _PRIME // 2).to(product.dtype) * 2 - 1
        mask = create_causal_mask(
            config=self.config, inputs_embeds=signs, attention_mask=attention_mask,
            position_ids=position_ids, **{CACHE: cache},
        )  # fmt: skip
        total = self.attention(signs, mask, cache, position_ids, **kwargs)
        numbers = self._find(input_ids, total.round(), signs)
        return BaseModelOutputWithPast(
            last_hidden_state=numbers[..., None].to(signs), **{CACHE: cache}
        )

    def _find(self, ids: Tensor, total: Tensor, signs: Tensor) -> Tensor:
        """Return ``[batch, n]`` numbers of the rows' nodes; parents stand before their children."""
        whole, before = (t.to("cpu", torch.int16).numpy() for t in (total, total - signs))
        return torch.tensor(
            [
                [self._number(token, a.tobytes(), b.tobytes()) for token, a, b in zip(*row, strict=True)]
                for row in zip(ids.tolist(), whole, before, strict=True)
            ],
            device=ids.device,
        )  # fmt: skip

    def _number(self, token: int, whole: bytes, before: bytes) -> int:
        known = self._numbers.get(whole)
        if known is not None:
            return known
        parent = None
        if any(before):
            at = self._numbers.get(before)
            if at is None:
                msg = f"token {token} follows a sequence that was never fed: keys, values, mask or positions are wrong"
                raise LostError(msg)
            parent = self.nodes[at]
        node = Node(token, parent)
        if parent is not None:
            node.answer = parent.answer
        if token == self._marker[-1] and self.ends_with_marker(node):
            node.answer = node
        self._numbers[whole] = len(self.nodes)
        self.nodes.append(node)
        return len(self.nodes) - 1

    def ends_with_marker(self, node: Node | None) -> bool:
        for token in reversed(self._marker):
            if node is None or node.token != token:
                return False
            node = node.parent
        return True


class ScriptedForCausalLM(ScriptedPreTrainedModel, GenerationMixin):
    """Body and head: the script's next token first, then what ends a JSON value soonest."""

    def __init__(
        self,
        config: ScriptedConfig,
        tokenizer: PreTrainedTokenizerFast,
        script: Script,
        recover: Recover | None = None,
    ) -> None:
        super().__init__(config)
        self.model = ScriptedModel(config)
        self._tokenizer, self._script, self._recover = tokenizer, script, recover
        self._spaces = frozenset(tokenizer.encode(_SPACE))
        first = [EOS, *tokenizer.encode(_CLOSERS)]
        last = [*tokenizer.encode(_SPACE + "\\"), EOS + 1, EOS + 2]
        middle = [i for i in range(VOCAB) if i not in {*first, *last}]
        self._ranks = torch.zeros(VOCAB)
        self._ranks[[*first, *middle, *last]] = torch.arange(VOCAB, 0, -1).float() * _GAP
        self.post_init()

    def forward(
        self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, **kwargs)
        numbers = out.last_hidden_state[:, -logits_to_keep:, 0].long().tolist()
        logits = torch.stack(
            [torch.stack([self._row(self.model.nodes[i]) for i in row]) for row in numbers]
        )
        return CausalLMOutputWithPast(
            logits=logits.to(input_ids.device), **{CACHE: out[CACHE]} if CACHE in out else {}
        )

    def _row(self, node: Node) -> Tensor:
        row = self._ranks.clone()
        for place, token in enumerate(self._wanted(node)):
            row[token] = (VOCAB + 3 - place) * _GAP
        return row

    def _wanted(self, node: Node) -> list[int]:
        """Return the ids to prefer, best first: the script's next, and its next that is no space."""
        start = _prompt_end(node)
        if start.plan is None:
            ids = start.ids()
            is_check = (
                ids == comparison_text(len(ids), VOCAB).tolist()
            )  # of a load: nobody's prompt
            start.plan = [] if is_check else self._encode(self._script(self._text(start)))
        said = node.ids(after=start)
        at = self._aligned(said, start.plan)
        if at is None and not self.model.ends_with_marker(
            start
        ):  # another prompt without a template
            node.answer = node
            return self._wanted(node)
        if at is not None:
            rest = [*start.plan[at:], EOS]
            return list(dict.fromkeys([rest[0], next(i for i in rest if i not in self._spaces)]))
        if self._recover is not None:
            text = self._recover(self._text(start), self._tokenizer.decode(said))
            plan = self._encode(text)
            if plan[: len(said)] == said:
                return [[*plan, EOS][len(said)]]
        if (text := _open_string(self._tokenizer.decode(said))) is not None:
            return self._encode('"' if text else 'x"')
        return []

    def _aligned(self, said: list[int], plan: list[int]) -> int | None:
        """Return where in the plan the answer stands, white space apart; ``None`` where it left it."""
        at = 0
        for token in said:
            while at < len(plan) and plan[at] != token and plan[at] in self._spaces:
                at += 1
            if at < len(plan) and plan[at] == token:
                at += 1
            elif token not in self._spaces:
                return None
        return at

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _text(self, node: Node) -> str:
        if node.prompt is None:
            node.prompt = self._tokenizer.decode(node.ids(), skip_special_tokens=False)
        return node.prompt


def _open_string(text: str) -> str | None:
    """Return what stands behind an opening quote; ``None`` outside of JSON strings."""
    *_, last = re.split(r'"((?:[^"\\]|\\.)*)"', text)
    return last.partition('"')[2] if '"' in last else None


def _prompt_end(node: Node) -> Node:
    """Return the last token of the prompt; where no template marks it, the first that was asked about."""
    path, at = [node], node
    while at.answer is None and at.parent is not None:
        at = at.parent
        path.append(at)
    if at.answer is None:
        node.answer = node
        return node
    for passed in path:
        passed.answer = at.answer
    return at.answer
