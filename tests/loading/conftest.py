"""What all tests of loading have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Keep conversions out of the user's cache."""
    monkeypatch.setenv("RASD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
