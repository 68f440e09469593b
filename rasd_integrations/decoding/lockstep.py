"""Refuses options under which the processes of one model would take other steps."""

from __future__ import annotations

from rasd_integrations.config import Sampling, SpeculationConfig
from rasd_integrations.drafters.base import Drafter
from rasd_integrations.errors import ConfigurationError


def check_lockstep(drafter: Drafter | None, config: SpeculationConfig, params: Sampling) -> None:
    """Raise unless every process of a sharded model would take the same steps.

    Raises:
        ConfigurationError: Draft lengths or draws could differ, so that all processes would wait for one another.
    """
    faults = []
    if drafter is not None and config.num_draft_tokens is None:
        faults.append("num_draft_tokens is None, so that the clock chooses it; set it")
    if drafter is not None and drafter.needs.timing:
        faults.append("the drafter chooses its parts by the clock; give a model or None")
    if params.temperature > 0 and params.seed is None:
        faults.append("seed is None, so that each process would draw its own; set it")
    if faults:
        msg = f"A model split by tp_plan needs the same steps in every process, but {'; '.join(faults)}."
        raise ConfigurationError(msg)
