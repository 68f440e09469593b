"""Loaded objects on their way from `from_model()` to the engine, out of sight of everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self


class LoadedName(str):
    """The name of a model with the objects that are loaded already.

    LangChain copies models field by field (`configurable_fields`, `with_config`), so what must not be lost
    travels in a field. Printed, dumped or pickled it is the name alone.
    """

    __slots__ = ("drafter_model", "model", "tokenizer")
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafter_model: PreTrainedModel | None

    def __new__(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter_model: PreTrainedModel | None,
    ) -> Self:
        """Take the name from ``model``, or its class."""
        self = super().__new__(cls, getattr(model, "name_or_path", "") or type(model).__name__)
        self.model, self.tokenizer, self.drafter_model = model, tokenizer, drafter_model
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Leave the weights out of a pickle."""
        return str, (str(self),)
