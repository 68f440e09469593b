"""Finds the tokens that end a turn of a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# End-of-turn tokens of the common families.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|end_of_turn|>")


def turn_end_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> frozenset[int]:
    """Return the ids of the end-of-turn tokens in the text of ``template``."""
    vocabulary = tokenizer.get_vocab()
    ends = (end for end in _TURN_ENDS if end in template and end in vocabulary)
    return frozenset(vocabulary[end] for end in ends)
