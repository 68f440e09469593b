"""Other integrations' names of the options, for the advice in errors."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_SAME = {
    "model": ("model_name", "model_id", "model_path", "repo_id", "name_or_path", "checkpoint"),
    "max_tokens": (
        "max_new_tokens", "max_completion_tokens", "max_output_tokens", "num_output", "num_predict",
        "n_predict", "max_length",
    ),
    "stop": ("stop_sequences", "stop_strings", "stop_words", "stopping_ids"),
    "seed": ("random_seed", "generator"),
    "drafter": ("assistant_model", "draft_model", "drafter_model", "speculative_config", "speculative_model"),
    "num_draft_tokens": ("num_assistant_tokens", "num_speculative_tokens", "prompt_lookup_num_tokens"),
    "store": ("vectorstore", "vector_store", "retriever", "index", "documents"),
}  # fmt: skip
_ELSEWHERE = {
    "model_kwargs={{'device_map': ...}}": ("device", "device_map", "n_gpu_layers"),
    "model_kwargs={{'dtype': ...}}": ("dtype", "torch_dtype", "precision"),
    "model_kwargs={{'quantization_config': ...}}": ("quantization_config", "load_in_4bit", "load_in_8bit"),
    "model_kwargs={{'token': ...}}": ("hf_token", "token", "huggingfacehub_api_token", "use_auth_token"),
    "model_kwargs={{{0!r}: ...}}": (
        "revision", "trust_remote_code", "local_files_only", "attn_implementation", "subfolder",
    ),
    "chat_template_kwargs={{{0!r}: ...}}": ("chat_template", "enable_thinking"),
    "retrieval={{'k': ...}}": ("similarity_top_k", "search_kwargs"),
    "temperature=, top_p=, top_k=, max_tokens=, stop= or seed= themselves": (
        "generate_kwargs", "generation_kwargs", "pipeline_kwargs", "generation_config", "llm_kwargs",
    ),
    "temperature: 0 is greedy, above it answers are sampled": ("do_sample",),
    "from_model(model, tokenizer), or leave it out: the model's own is loaded with it": (
        "tokenizer", "tokenizer_name", "tokenizer_kwargs", "pipeline",
    ),
}  # fmt: skip
_NOTHING = {
    "the window is the model's own, and a prompt over it is refused": (
        "context_window", "n_ctx", "num_ctx", "max_model_len", "max_seq_len", "max_input_tokens",
    ),
    "the model runs in this process, which has no key, address, network timeout or retries": (
        "api_key", "api_base", "base_url", "timeout", "max_retries", "organization",
    ),
    "torch.set_num_threads() sets the threads of a CPU": ("n_threads", "num_threads", "n_batch"),
}  # fmt: skip

_NAMES = {other: name for name, others in _SAME.items() for other in others}
_ADVICE = {
    **{o: f"Use {text.format(o)}." for text, others in _ELSEWHERE.items() for o in others},
    **{o: f"Leave it out: {text}." for text, others in _NOTHING.items() for o in others},
}


def advice(name: str, known: Collection[str]) -> str:
    """Return a sentence on what to use instead of the unknown option ``name``.

    ``known`` are the valid names.
    """
    if _NAMES.get(name) in known:
        return f"Did you mean {_NAMES[name]!r}?"
    # Only for options of a model or a call; other groups of options have names of their own.
    if name in _ADVICE and not {"temperature", "drafter", "dtype"}.isdisjoint(known):
        return _ADVICE[name]
    near = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Valid ones: {', '.join(sorted(known))}."
