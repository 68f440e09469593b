"""Makes the target's and the drafter's prompt from the one that a framework sends."""

from __future__ import annotations

from rasd_integrations.prompting.hints import Prompt, PromptHints, PromptPlan
from rasd_integrations.prompting.planner import PromptPlanner

__all__ = ["Prompt", "PromptHints", "PromptPlan", "PromptPlanner"]
