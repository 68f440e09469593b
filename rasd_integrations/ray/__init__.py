"""Our server as replicas of Ray Serve, and batches over Ray's machines.

``serve run rasd_integrations.ray:app model=MODEL num_replicas=2``: see :func:`app`; :func:`batch` answers a file.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a Ray that is started here

from rasd_integrations.ray.batches import batch
from rasd_integrations.ray.replicas import app

__all__ = ["app", "batch"]
