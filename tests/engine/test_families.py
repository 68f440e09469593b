"""All causal families of the installed transformers: equal to ``generate``, or refused with our reason."""

from __future__ import annotations

import pytest
import transformers
from families import MODEL_TYPES, documented, outcome, variants

LENGTHS = {"quick": ((7, 60), 12), "long": ((150, 220), 32)}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_is_right_or_refused(model_type):
    """Faults 20 and 21: every kind of layer; plain, with drafted trees, and again from the prefix cache."""
    found = {name: outcome(config, *LENGTHS["quick"]) for name, config in variants(model_type)}
    rows, version = documented()
    if version == transformers.__version__:  # the page is of the locked one
        assert rows[model_type] == found


@pytest.mark.soak
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_is_right_in_long_texts(model_type):
    """Prompts of several pieces, over windows many times."""
    for _, config in variants(model_type):
        outcome(config, *LENGTHS["long"])


def test_the_page_lists_each_family_once():
    """Nothing is missing from docs/reference/families.md, and nothing stale is left."""
    rows, version = documented()
    if version == transformers.__version__:
        assert sorted(rows) == MODEL_TYPES
