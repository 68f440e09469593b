"""Tiny random models of every supported family, and a byte tokenizer, made in code."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 259  # 256 bytes, end of text, im_start, im_end
EOS = 256
WINDOW = 2048

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}


def seed_draws(seed: int) -> None:
    """Seed torch. Its own ``manual_seed`` also notes the whole stack for every device that is not there."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _random(model_class: type[PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    seed_draws(seed)
    model = model_class(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            weight.mul_(6)  # at the stock scale every random model says the same token for ever
    return model


def tiny_llama(seed: int = 0, head_dim: int = 8, **changes: object) -> PreTrainedModel:
    """Return a random Llama in float32."""
    shape = {**_SHAPE, "head_dim": head_dim, **changes}
    return _random(LlamaForCausalLM, LlamaConfig(**shape), seed)


def tiny_qwen2(seed: int = 0, head_dim: int = 8) -> PreTrainedModel:
    """Return a random Qwen2."""
    return _random(Qwen2ForCausalLM, Qwen2Config(**_SHAPE, head_dim=head_dim), seed)


def tiny_qwen3(seed: int = 0, head_dim: int = 8) -> PreTrainedModel:
    """Return a random Qwen3."""
    return _random(Qwen3ForCausalLM, Qwen3Config(**_SHAPE, head_dim=head_dim), seed)


def tiny_mistral(seed: int = 0, head_dim: int = 8) -> PreTrainedModel:
    """Return a random Mistral whose layers look back on 24 tokens."""
    config = MistralConfig(**_SHAPE, head_dim=head_dim, sliding_window=24)
    return _random(MistralForCausalLM, config, seed)


def tiny_gemma3(seed: int = 0, head_dim: int = 8, **changes: object) -> PreTrainedModel:
    """Return a random Gemma-3: three sliding layers of 16 tokens for each full one."""
    shape = {**_SHAPE, "num_hidden_layers": 4, **changes}
    layers = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**shape, head_dim=head_dim, sliding_window=16, layer_types=layers)
    return _random(Gemma3ForCausalLM, config, seed)


def tiny_gemma2(seed: int = 0) -> PreTrainedModel:
    """Return a random Gemma-2, which caps its scores; windows as wide as the model's."""
    config = Gemma2Config(**_SHAPE, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=5.0)
    return _random(Gemma2ForCausalLM, config, seed)


def tiny_gpt2(seed: int = 0, head_dim: int = 8) -> PreTrainedModel:
    """Return a random GPT-2."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=WINDOW, n_embd=4 * head_dim, n_layer=2, n_head=4,
        bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    return _random(GPT2LMHeadModel, config, seed)


FAMILIES = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gemma3": tiny_gemma3,
    "gpt2": tiny_gpt2,
}

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one id a byte, and three special tokens with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
