"""The LlamaIndex contract on local LLM classes, with one scripted model behind each: a table, and no verdict.

Runs the suite of ``tests/llama_index_contract`` on ``RASDLLM`` and, for comparison, on ``HuggingFaceLLM`` of
llama-index-llms-huggingface. The model does all that the suite asks of a model, so what fails is the class's.
``smollm`` is ``RASDLLM`` with SmolLM2 instead: there the model fails, too. A test that takes longer than two
minutes counts as failed, for a stream may wait for a thread that died.

Example::

    pip install --no-deps llama-index-llms-huggingface
    python examples/benchmarks/llama_index_llms.py
    python examples/benchmarks/llama_index_llms.py smollm --reasons
"""

from __future__ import annotations

import argparse
import io
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 120  # for one test
OUTCOMES = ("passed", "failed", "skipped")


SUITES = {
    "rasd": "llama_index/test_contract.py::TestRASDLLM",
    "huggingface": "llama_index_contract/contract_huggingface.py",
    "smollm": "llama_index_contract/contract_smollm.py",
}


class Tally:
    """A pytest plugin: counts outcomes by group, notes why tests failed, and lets none run for ever."""

    def __init__(self) -> None:
        """Start at zero."""
        self.groups: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, str] = {}
        self._group: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Note which group each test is of."""
        for item in items:
            self._group[item.nodeid] = item.function.__qualname__.partition(".")[0]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """Stop a test that takes too long."""

        def stop(*_: object) -> NoReturn:
            msg = f"no end after {SECONDS} s"
            raise TimeoutError(msg)

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)
        try:
            return (yield)
        finally:
            signal.alarm(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test when it has run, or could not be set up."""
        if report.when != "call" and report.passed:
            return
        group = self._group[report.nodeid]
        self.groups[group][report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
            self.reasons[report.nodeid.partition("::")[2]] = reason.partition("\n")[0][:160]

    def total(self) -> Counter[str]:
        """Return the counts of all groups."""
        return sum(self.groups.values(), Counter())


def run(suite: str) -> Tally:
    """Run the contract on one class."""
    tally = Tally()
    # Other people's warnings are no failures here.
    options = ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(ROOT)]
    with redirect_stdout(io.StringIO()):
        pytest.main([*options, str(ROOT / "tests" / SUITES[suite])], [tally])
    return tally


def table(tallies: dict[str, Tally]) -> str:
    """Return the counts as Markdown, a row for each group."""
    head = ["group", *(f"{name}: {' / '.join(OUTCOMES)}" for name in tallies)]
    ran = dict.fromkeys(group for tally in tallies.values() for group in tally.groups)
    groups = [*ran][::-1]  # pytest runs the last group first
    rows = [head, ["---"] * len(head)]
    rows += [[group, *(_counts(t.groups[group]) for t in tallies.values())] for group in groups]
    rows.append(["all", *(_counts(t.total()) for t in tallies.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _counts(counter: Counter[str]) -> str:
    return " / ".join(str(counter[outcome]) for outcome in OUTCOMES)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the suites and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "suites", nargs="*", help=f"of {', '.join(SUITES)}; the first two by default"
    )
    parser.add_argument(
        "--reasons", action="store_true", help="say why each test failed that failed"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.suites) - set(SUITES):
        parser.error(f"unknown suites: {', '.join(unknown)}")
    tallies = {name: run(name) for name in args.suites or ("rasd", "huggingface")}
    print(table(tallies))
    if args.reasons:
        for name, tally in tallies.items():
            for test, reason in tally.reasons.items():
                print(f"{name}: {test}: {reason}")


if __name__ == "__main__":
    main()
