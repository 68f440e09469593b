"""Drafts for vLLM: a proposer over prompt, chunks, fed texts and earlier answers, and its worker methods.

``speculative_config={"method": "custom_class", "model": "rasd_integrations.vllm.Proposer", ...}`` and
``worker_extension_cls="rasd_integrations.vllm.WorkerExtension"``. vLLM checks every draft: answers stay its own.
"""

from __future__ import annotations

from rasd_integrations.vllm.proposer import Proposer
from rasd_integrations.vllm.worker import WorkerExtension

__all__ = ["Proposer", "WorkerExtension"]
