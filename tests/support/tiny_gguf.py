"""A tiny random Llama as a GGUF file, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tiny import WINDOW, tiny_tokenizer

LAYERS, WIDTH, HEADS = 1, 32, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path: Path, kind: str = "F32") -> Path:
    """Write the model to ``path``, its matrices of a type that gguf names, and return it."""
    tokens = [*tiny_tokenizer().get_vocab(), "ab", "cd"]
    tokens.sort(key=lambda t: (len(t) > 2, t))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(WINDOW)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(12345.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if len(t) > 2 else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges(["a b", "c d"])  # transformers 5.17 reads a list of one as its item
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.{n}": (WIDTH, WIDTH) for n in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        shapes |= {f"blk.{i}.{n}": (WIDTH, WIDTH) for n in ("ffn_gate", "ffn_up", "ffn_down")}
        shapes |= {f"blk.{i}.{n}": (WIDTH,) for n in ("attn_norm", "ffn_norm")}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = random.normal(size=shape).astype(np.float32)
        if kind == "F32" or len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            dtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(
                f"{name}.weight", gguf.quants.quantize(weight, dtype), raw_dtype=dtype
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
