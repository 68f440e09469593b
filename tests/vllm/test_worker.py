"""The worker's methods: binding checks what is read of vLLM, and says what to do where it changed."""

from __future__ import annotations

import pytest
from fakes_vllm import Worker

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.vllm.worker import HOOKS, WorkerExtension


def test_binding_refuses_another_proposer() -> None:
    """The message says what to start with."""
    worker = Worker()
    worker.model_runner.drafter = object()
    for call in (worker.rasd_bind, worker.init_worker_extension, worker.rasd_stats):
        with pytest.raises(
            ConfigurationError, match=r"is object, but must be Proposer.*custom_cla"
        ):
            call()
    del worker.model_runner
    with pytest.raises(ConfigurationError, match="is NoneType"):
        worker.rasd_bind()


@pytest.mark.parametrize("path", HOOKS)
def test_binding_refuses_a_contract_that_changed(path: str) -> None:
    """Each attribute that is read of vLLM is looked for, and named if it is gone."""
    worker = Worker()
    *owners, last = path.split(".")
    owner = worker
    for name in owners:
        owner = getattr(owner, name)
    delattr(owner, last)
    with pytest.raises(ConfigurationError, match=f"no {path}, .*Use a tested version: vLLM 0.32"):
        worker.rasd_bind()


@pytest.mark.parametrize("texts", ["one text", [1], None])
def test_feeding_refuses_what_is_no_list_of_texts(texts: object) -> None:
    """A single text would be taken letter by letter."""
    with pytest.raises(ConfigurationError, match=r"texts is .*, but must be a list of texts"):
        Worker().rasd_feed(texts)


def test_feeding_before_binding_says_so() -> None:
    """There is no tokenizer yet."""
    worker = Worker()
    worker.proposer._namespaces = None
    with pytest.raises(ConfigurationError, match="rasd_bind"):
        worker.rasd_feed(["a text"])
    assert worker.rasd_stats()["memory"] == {}


def test_methods_do_not_hide_vllms_own() -> None:
    """An extension is refused if its names are the worker's; ours begin with rasd_, but for its own hook."""
    ours = {name for name in vars(WorkerExtension) if not name.startswith("__")}
    assert ours - {"init_worker_extension"} == {n for n in ours if n.startswith("rasd_")}
