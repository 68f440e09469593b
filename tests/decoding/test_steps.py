"""deterministic=True: the same call gives the same bits, whatever was cached, drafted or asked beside it (fault 11)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from fakes_grammar import TableGrammar, banded
from tiny import FAMILIES, VOCAB, WINDOW, tiny_llama, tiny_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from rasd_integrations import RASD, SamplingParams, SpeculationConfig, llama_index
from rasd_integrations.config import CacheDir
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.steps import PIECE, WIDTH, FixedSteps
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.attention import StepContext
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.executors.factory import has_openvino, make_executor
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, DeviceMemoryError
from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.runtime.models import wrapped_model
from rasd_integrations.types import Draft

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPENVINO = pytest.mark.skipif(not has_openvino(), reason="an extra")
EXECUTORS = ["eager", pytest.param("openvino", marks=OPENVINO)]
LONG = 1 << 40


def random_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def rows_of(buffer: KVBuffer, n: int) -> list[bytes]:
    pairs = (buffer.rows(layer, 0, n) for layer in range(buffer.num_layers))
    return [bits(part) for pair in pairs for part in pair]


@pytest.fixture(scope="module")
def fixed():
    """Return fixed steps of a family, dtype and executor, each made once."""
    made = {}

    def of(family="llama", dtype="bfloat16", executor="eager"):
        key = family, dtype, executor
        if key not in made:
            model = FAMILIES[family]().to(DTYPES[dtype])
            made[key] = FixedSteps(TargetModel(model, executor=make_executor(executor, model)))
        return made[key]

    return of


def prefilled(steps: FixedSteps, ids: list[int], capacity: int) -> KVBuffer:
    buffer = KVBuffer(capacity)
    for _ in steps.prefill(ids, buffer):
        pass
    return buffer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "executor"),
    [
        *((family, dtype, "eager") for family in sorted(FAMILIES) for dtype in DTYPES),
        # A graph takes long to compile, and not every random model's is near enough in bfloat16.
        pytest.param("llama", "bfloat16", "openvino", marks=OPENVINO),
        pytest.param("gemma3", "float32", "openvino", marks=OPENVINO),
    ],
)
def test_drafts_and_cached_rows_change_no_bit(fixed, family, dtype, executor):
    """Fault 11: logits, keys and values of a token are the same bits, plain or drafted, cold or cached."""
    steps = fixed(family, dtype, executor)
    ids, start, end = random_ids(PIECE + 80), PIECE + 21, PIECE + 70
    plain = prefilled(steps, ids[:start], 300)
    logits = []
    for n in range(start, end):
        logits.append(bits(steps.step(ids[:n], Draft(), plain)))
        plain.commit([0])
    # The same document before, then other tokens: its whole piece is reused, in memory of another size.
    drafted = prefilled(steps, [*ids[:PIECE], *random_ids(90, seed=5)], 1100)
    drafted.truncate(PIECE)
    for _ in steps.prefill(ids[:start], drafted):
        pass
    seen, n = [], start
    for turn in range(100):
        room = min(steps.room(n), end - n - 1)
        right = ids[n : n + room * (turn % 3) // 2]
        wrong = random_ids(room - len(right), seed=turn)
        got = steps.step(ids[:n], Draft((*right, *wrong)), drafted)
        drafted.commit(range(1 + len(right)))
        seen += [bits(row) for row in got[: 1 + len(right)]]
        n += 1 + len(right)
        if n >= end:
            break
    assert seen == logits[: len(seen)]
    assert len(seen) == end - start
    assert rows_of(drafted, end - 1) == rows_of(plain, end - 1)


def test_steps_that_are_not_fixed_do_change_bits():
    """Without it the same token gets other bits behind another prefix: the test above can fail."""
    target = TargetModel(tiny_llama().bfloat16())
    ids = random_ids(150)
    whole, parts = KVBuffer(300), KVBuffer(300)
    for _ in target.prefill(ids, whole):
        pass
    for n in range(0, 150, 10):
        for _ in target.prefill(ids[n : n + 10], parts):
            pass
    assert rows_of(whole, 150) != rows_of(parts, 150)


def decoder_of(steps: FixedSteps, drafter=None, config=None, cache=True) -> SpeculativeDecoder:
    kept = PrefixCache(LONG if cache else 0)
    return SpeculativeDecoder(steps._target, drafter, config=config, prefix_cache=kept, steps=steps)


def said(decoder: SpeculativeDecoder, ids: list[int], **params) -> list[int]:
    asked = SamplingParams(max_tokens=20, ignore_eos=True, **params)
    return [t for block in decoder.generate(ids, asked) for t in block.token_ids]


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}])
def test_five_ways_of_calling(fixed, executor, sampling):
    """Fault 11: cold, cached, warmed, drafting and beside others, greedy and sampled with a seed, in bfloat16."""
    steps = fixed("llama", "bfloat16", executor)
    document = random_ids(2 * PIECE + 9)
    prompts = [[*document, *random_ids(n, seed=n)] for n in (1, 30)]
    prompts += [document[:n] for n in (1, WIDTH, PIECE + 1)]
    wanted = [said(decoder_of(steps, cache=False), ids, **sampling) for ids in prompts]
    assert len({tuple(answer) for answer in wanted}) == len(wanted)

    warmed = decoder_of(steps)
    for _ in warmed.prefill(document):
        pass
    auto = SpeculationConfig(num_draft_tokens=6)
    for name, decoder in {
        "cached": decoder_of(steps),
        "warmed": warmed,
        "suffix tree": decoder_of(steps, SuffixDrafter(tree=True), auto),
        "model": decoder_of(steps, ModelDrafter(TargetModel(tiny_llama(1))), auto),
    }.items():
        for _ in range(2):  # the second time from what the first has kept
            assert [said(decoder, ids, **sampling) for ids in prompts] == wanted, name
    beside = decoder_of(steps, SuffixDrafter(tree=True))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(said, beside, ids, **sampling) for ids in prompts]
        assert [job.result() for job in jobs] == wanted


@pytest.fixture(scope="module")
def undrafted(fixed):
    """Return greedy and sampled answers to one prompt, with their sampling."""
    samplings = ({}, {"temperature": 1.0, "seed": 3})
    return [(how, tuple(said(decoder_of(fixed()), random_ids(21), **how))) for how in samplings]


@pytest.mark.parametrize("script", ["oracle", "wrong", "random", "partly_right", "too_long"])
@pytest.mark.parametrize("tree", [False, True])
def test_scripted_drafts(fixed, undrafted, script, tree):
    """Drafts of any quality and form, at any place of a window, leave the text as it is; some are accepted."""
    steps = fixed()
    ids = random_ids(21)
    for sampling, answer in undrafted:
        wanted = list(answer)
        propose = fakes.scripts(VOCAB)[script](wanted)
        drafter = ScriptedDrafter(fakes.as_tree(propose, VOCAB) if tree else propose)
        for n in (1, 5, 40):
            config = SpeculationConfig(num_draft_tokens=n, max_draft_tokens=40)
            assert said(decoder_of(steps, drafter, config), ids, **sampling) == wanted


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_float32_equals_plain_decoding(fixed, family):
    """The text is that of plain decoding without the option."""
    steps = fixed(family, "float32")
    for n in (3, 40, PIECE + 5):
        ids = random_ids(n, seed=n)
        plain = said(SpeculativeDecoder(steps._target), ids)
        assert said(decoder_of(steps, SuffixDrafter(tree=True)), ids) == plain


def test_windows_and_answers_end_together(fixed):
    """Padding stands within the model's window, also where that is full and no multiple of ours."""
    model = tiny_llama(max_position_embeddings=PIECE + WIDTH + 5).bfloat16()
    steps = FixedSteps(TargetModel(model))
    ids = random_ids(PIECE + 1)
    params = SamplingParams(max_tokens=WIDTH + 4, ignore_eos=True)
    decoder = decoder_of(steps, SuffixDrafter(tree=True))
    runs = [[b.token_ids for b in decoder.generate(ids, params)] for _ in range(2)]
    answers = [[t for block in run for t in block] for run in runs]
    assert answers[0] == answers[1]
    assert len(answers[0]) == params.max_tokens


def test_grammars_and_their_forced_tokens(fixed):
    """Forced tokens end with the window, too, and change nothing."""
    steps = fixed()
    answers = []
    for drafter in (None, SuffixDrafter(tree=True)):
        for sampling in ({}, {"temperature": 1.0, "seed": 5}):
            grammar = TableGrammar(banded, VOCAB)
            params = SamplingParams(max_tokens=40, drafting=drafter is not None, **sampling)
            run = decoder_of(steps, drafter).generate(random_ids(30), params, grammar=grammar)
            answers.append([t for block in run for t in block.token_ids])
    assert answers[:2] == answers[2:]


def test_without_a_seed_the_draws_are_the_same_ones(fixed):
    """A call that gives no seed is still the same call."""
    decoder = decoder_of(fixed())
    first, again = (said(decoder, random_ids(9), temperature=1.5) for _ in range(2))
    assert first == again
    assert said(decoder, random_ids(9), temperature=1.5, seed=1) != first


def test_a_failed_step_leaves_a_true_buffer(fixed, monkeypatch):
    """Where memory runs out in a step, the buffer holds rows of its tokens only, and the next answer is right."""
    steps = fixed("llama", "float32")
    decoder, ids = decoder_of(steps), random_ids(PIECE + 30)
    wanted = said(decoder, ids)
    run = EagerExecutor.step
    left = PIECE // WIDTH + 3

    def short(self, ids, context: StepContext, *, num_logits: int):
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return run(self, ids, context, num_logits=num_logits)

    with monkeypatch.context() as patch:
        patch.setattr(EagerExecutor, "step", short)
        with pytest.raises(DeviceMemoryError):
            said(decoder, ids)
    assert said(decoder, ids) == wanted


def test_a_tree_is_cut_to_its_most_likely_path(fixed):
    """A token beside the path would stand at another row than its position says."""
    draft = Draft(
        (1, 2, 3, 4, 5),
        (-1, -1, 1, 1, 3),
        node_probs=(0.2, 0.7, 0.3, 0.4, 0.1),
        sources=tuple("abcde"),
    )
    path = fixed().fitted(draft)
    assert (path.token_ids, path.sources, path.node_probs) == (
        (2, 4, 5),
        ("b", "d", "e"),
        (0.7, 0.4, 0.1),
    )
    assert path.is_chain
    assert fixed().fitted(Draft((1, 2, 3), (-1, -1, 0))).token_ids == (1, 3)


def test_what_cannot_be_kept_is_refused(monkeypatch):
    """An executor and a family whose bits depend on what else is in a step."""
    for make in (RASD, ChatRASD, RASDLLM, llama_index.RASDLLM):
        with pytest.raises(ConfigurationError, match="contradicts executor"):
            make(model="a", deterministic=True, executor="cuda-graphs")
    with pytest.raises(ConfigurationError, match="deterministic is 'yes'"):
        RASD("a", deterministic="yes")
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=WINDOW,
        )
    ).eval()  # fmt: skip
    with pytest.raises(ConfigurationError, match="experts"):
        RASD.from_model(experts, tiny_tokenizer(), deterministic=True).ensure_loaded()
    run = EagerExecutor.step

    def leaks(self, ids, context: StepContext, *, num_logits: int):
        out = run(self, ids, context, num_logits=num_logits)
        out.logits.add_(float(ids.sum()))
        return out

    target = TargetModel(tiny_llama())
    monkeypatch.setattr(EagerExecutor, "step", leaks)
    with pytest.raises(ConfigurationError, match="other tokens follow it"):
        FixedSteps(target)


def test_rows_of_both_kinds_are_kept_apart(tmp_path):
    """Rows of a normal answer have other bits: neither memory nor files share them; identities differ."""
    model, tokenizer = tiny_llama().bfloat16(), tiny_tokenizer()
    document = "".join(map(chr, torch.randint(97, 122, (3 * PIECE,)).tolist()))
    options = {"drafter": None, "cache_dir": tmp_path}
    normal = RASD.from_model(model, tokenizer, **options)
    same = RASD.from_model(model, tokenizer, deterministic=True, **options)
    assert normal.identity != same.identity
    normal.warm([document])
    prompt, params = [{"role": "user", "content": document + "?"}], SamplingParams(max_tokens=5)
    cold = same.generate(prompt, params)
    assert cold.stats.cached_prompt_tokens == 0
    same.warm([document])
    folder = CacheDir.of(tmp_path, LONG)
    shared = wrapped_model(model, tokenizer, "a", "auto")
    for deterministic, reused in ((True, 3 * PIECE), (False, 3 * PIECE)):
        files = shared._prefix_files(folder, deterministic=deterministic)
        ids = normal._pipeline("prompt").template.encode_messages(prompt)
        found = PrefixCache(0, files).lease(ids, 600)
        assert reused <= found.reused < reused + PIECE, deterministic
        assert found.reused % PIECE == 0 or not deterministic
    again = same.generate(prompt, params)
    assert again.token_ids == cold.token_ids
    assert again.stats.cached_prompt_tokens == 3 * PIECE


def test_all_classes_take_the_option():
    """ChatRASD, both RASDLLMs and RASD hand it on, and tell their engines apart by it."""
    loaded = tiny_llama().bfloat16(), tiny_tokenizer()
    answers = []
    for make in (ChatRASD, RASDLLM, llama_index.RASDLLM):
        llm = make.from_model(*loaded, deterministic=True, max_tokens=8)
        assert llm._rasd.identity["deterministic"] is True
        assert make.from_model(*loaded)._rasd.identity["deterministic"] is False
        call = llm.complete if make is llama_index.RASDLLM else llm.invoke
        answers.append([str(call("What is it?")) for _ in range(2)])
    for first, again in answers[1:]:
        assert first == again
