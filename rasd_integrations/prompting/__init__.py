"""From the prompt that a framework sends to the two prompts of an answer: the target's and the drafter's."""

from __future__ import annotations

from rasd_integrations.prompting.hints import Prompt, PromptHints, PromptPlan
from rasd_integrations.prompting.planner import PromptPlanner

__all__ = ["Prompt", "PromptHints", "PromptPlan", "PromptPlanner"]
