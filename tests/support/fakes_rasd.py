"""A stand-in for the engine behind both frameworks' models: it records what it is asked, and says what it is told."""

from __future__ import annotations

from typing import Any

from rasd_integrations.stats import DecodingStats

ENGINE = "rasd_integrations.edges.engine.RASD"
"""Where both edges take their engine from."""


class FakeEngine:
    """RASD's face but for its answers.

    Attributes:
        options: What it was made with.
        calls: What it was asked, in order.
        loaded_objects: What `from_model` was given.
    """

    window = 2048
    max_tokens = 512
    has_reasoning = True
    has_chat_template = True

    def __init__(self, model: str, **options: Any) -> None:
        self.model_name = str(model)
        self.options = options
        self.stats = DecodingStats()
        self.calls: list[Any] = []
        self.loaded_objects: tuple[Any, ...] = ()
        self.loads = 0
        self.closed = False
        self.attached: list[Any] = []
        self.warmed: list[str] = []

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, drafter_model: Any = None, **options: Any):
        fake = cls(f"loaded {model}", **options)
        fake.loaded_objects = (model, tokenizer, drafter_model)
        return fake

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": self.model_name, "context": self.options["context"]}

    def ensure_loaded(self) -> None:
        self.loads += 1

    def attach(self, store: Any) -> None:
        self.attached.append(store)

    def warm(self, documents: list[str], progress: Any = None) -> None:
        self.warmed += documents
        if progress is not None:
            progress(len(documents), len(documents))

    def close(self) -> None:
        self.closed = True
