"""The LlamaIndex contract, kept by ``RASDLLM`` over a scripted model in the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest

pytest.importorskip("llama_index.core")
pytest.importorskip("llguidance")

import llama_index_llms
from contract_model import BOS, WatchedModel
from contract_setup import ContractSetup
from contract_tools import ToolCalling
from llama_index_contract import LLMContract
from served import engines_over, served

from rasd_integrations.llama_index import RASDLLM, configure_settings


class Watched(ContractSetup):
    """``RASDLLM`` over a new scripted model in each test."""

    template = "hermes"
    context_window = WatchedModel.window
    bos = BOS
    secret_options = MappingProxyType({"store": ["a secret text"]})

    @pytest.fixture(autouse=True)
    def _watched(self) -> None:
        self.watched = WatchedModel(self.template)

    def make_llm(self, **options: Any) -> RASDLLM:
        return RASDLLM.from_model(
            self.watched.model, self.watched.tokenizer, max_tokens=512, **options
        )

    def configure(self, llm: RASDLLM) -> None:
        configure_settings(llm)

    def prompts_read(self) -> list[str]:
        return self.watched.prompts

    def steps(self) -> int:
        return self.watched.steps

    def slow_down(self, seconds: float) -> None:
        self.watched.delay = seconds

    def count_tokens(self, text: str) -> int:
        return self.watched.count_tokens(text)


class TestRASDLLM(Watched, LLMContract):
    """The whole contract, speculative path and all."""


@pytest.mark.slow
class TestOverHTTP(Watched, LLMContract):
    """The same from a server, on a real socket."""

    # LlamaIndex counts tokens on the event loop, here by requests: the loop may wait, for less than a model's step.
    query_step = 0.15

    secret_options = MappingProxyType(
        {"api_key": "a secret", "client_kwargs": {"default_headers": {"x": "secret"}}}
    )

    @pytest.fixture(autouse=True)
    def _served(self, _watched: None) -> Iterator[None]:
        with served(engines_over(self.watched.model, self.watched.tokenizer)) as server:
            self.url = server.base_url
            yield

    @pytest.fixture(autouse=True)
    def _no_network(self) -> None:
        """The one connection is the subject."""

    def make_llm(self, **options: Any) -> RASDLLM:
        return RASDLLM(base_url=self.url, max_tokens=512, **options)


class TestTemplateWithoutTools(Watched, ToolCalling):
    """A chat template that knows any role, but no word of tools."""

    template = "plain"


class TestTemplateOfTwoRoles(Watched, ToolCalling):
    """A chat template that takes user and assistant only, in turns."""

    template = "strict"


def test_no_group_may_hide_anothers_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tests of one name would leave one of them unasked."""
    monkeypatch.setattr(ToolCalling, "test_chat", None, raising=False)
    with pytest.raises(TypeError, match="test_chat"):
        type("Host", (LLMContract,), {})


def test_the_comparison_counts_by_group() -> None:
    """The benchmark's table has a row for each group and one for all."""
    tally = llama_index_llms.Tally()
    tally.groups["Running"].update(failed=1, skipped=4)
    tally.groups["Endpoints"].update(passed=2, failed=3)

    assert llama_index_llms.table({"mine": tally}).splitlines() == [
        "| group | mine: passed / failed / skipped |",
        "| --- | --- |",
        "| Endpoints | 2 / 3 / 0 |",
        "| Running | 0 / 1 / 4 |",
        "| all | 2 / 4 / 4 |",
    ]
