"""Steps of a compiled graph say what eager steps say, leave the buffer as those do, and come back from disk."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from steps import (
    ATTENTIONS,
    TREE,
    close,
    close_rows,
    decoded,
    joint,
    prefilled,
    random_ids,
    shared_target,
)
from tiny import FAMILIES, VOCAB, tiny_gemma2, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.engine.executors import factory as executors
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.executors.factory import make_executor
from rasd_integrations.engine.executors.openvino import executor as compiled
from rasd_integrations.engine.executors.openvino import graph as graphs
from rasd_integrations.engine.executors.openvino.executor import CompiledExecutor
from rasd_integrations.engine.executors.packing import PackedLinear
from rasd_integrations.engine.kv import buffer as kv
from rasd_integrations.engine.kv.buffer import GRANULE
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import (
    ConfigurationError,
    DeviceMemoryError,
    MissingDependencyError,
)
from rasd_integrations.stats import DecodingStats
from rasd_integrations.storage.marked import marked

pytest.importorskip("openvino")

close = partial(close, off=1e-4)
prefilled = partial(prefilled, keeps_hidden=True)


@pytest.fixture(params=["own", "paged"])
def targets(request):
    """Return a function that returns the compiled and the eager target of a family, with either attention."""

    def made(family):
        head_dim = 16 if request.param == "own" else 8
        ours = shared_target(family, "openvino", request.param, head_dim)
        if request.param == "own" and "own" not in ours.executor_name:
            pytest.skip("no C++ compiler")
        return ours, shared_target(family, head_dim=head_dim)

    return made


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("prefix", [1, 15, 16, 40, GRANULE - 3])
def test_logits_hidden_states_and_rows_equal_eager(family, prefix, targets):
    """Chains and a tree, below, at and above a window, and where the buffer has to grow."""
    ours, eager = targets(family)
    ids = random_ids(prefix)
    mine, theirs = prefilled(ours, ids), prefilled(eager, ids)
    for n in (1, 2, 9):
        draft = random_ids(n, seed=n)
        close(ours.step(draft, mine), eager.step(draft, theirs))
    draft = random_ids(1 + len(TREE), seed=7)
    close(ours.step(draft, mine, TREE), eager.step(draft, theirs, TREE))
    mine.commit([0, 1, 3])
    theirs.commit([0, 1, 3])
    close_rows(mine, theirs, prefix + 3)
    close(mine.hidden()[1], theirs.hidden()[1])


SCRIPTS = fakes.scripts(VOCAB)
TOGETHER = "several answers decode together"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("script", sorted(SCRIPTS))
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_greedy_ids_equal_eager_plain_decoding(family, script, shape, targets):
    """Whatever is drafted, the ids are those of eager torch without drafts."""
    ours, eager = targets(family)
    truth = decoded(eager)
    propose = SCRIPTS[script](truth)
    if shape == "tree":
        propose = fakes.as_tree(propose, VOCAB)
    assert truth == decoded(ours, ScriptedDrafter(propose))


@pytest.mark.slow
def test_a_gathered_buffer_keeps_its_places(targets):
    """Rows picked out of a longer text, with windows, are seen where they stood."""
    ours, eager = targets("gemma3")
    ids = random_ids(50)
    rows = [0, 1, 2, 20, 21, 33, 45, 46, 47, 48, 49]
    mine, theirs = (GatheredKV(prefilled(t, ids), rows, 64) for t in (ours, eager))
    close(ours.step([5, 6, 7], mine), eager.step([5, 6, 7], theirs))


@pytest.mark.slow
def test_two_buffers_take_turns(targets):
    """The graph reads the memory of the answer whose turn it is, also after it grew."""
    ours, eager = targets("llama")
    mine = [prefilled(ours, random_ids(30, seed)) for seed in (1, 2)]
    theirs = [prefilled(eager, random_ids(30, seed)) for seed in (1, 2)]
    for turn in range(6):
        which = turn % 2
        draft = random_ids(80, seed=turn)
        close(ours.step(draft, mine[which]), eager.step(draft, theirs[which]))
        for buffer in (mine[which], theirs[which]):
            buffer.commit(range(80))


def test_memory_that_is_no_number_stays_out(monkeypatch, targets):
    """Fresh memory may hold anything: at first, after growth, in a copy and in gathered rows."""
    ours, eager = targets("llama")
    allocate = kv.allocate
    monkeypatch.setattr(
        kv, "allocate", lambda *args, **how: allocate(*args, **how).fill_(float("nan"))
    )
    ids = random_ids(GRANULE + 10)
    mine, theirs = prefilled(ours, ids, 8), prefilled(eager, ids, 8)
    for rows in (
        lambda b: b,
        lambda b: b.copy(20, 40),
        lambda b: GatheredKV(b, [0, 3, 9, 100], 40),
    ):
        got, wanted = ours.step([1, 2], rows(mine)), eager.step([1, 2], rows(theirs))
        assert bool(got.isfinite().all())
        close(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_steps_of_several_answers_run_together(family, monkeypatch, targets):
    """Chains and trees, as more rows than there are, over memory of any content; answers come, grow and leave."""
    ours, eager = targets(family)
    allocate = kv.allocate
    monkeypatch.setattr(
        kv, "allocate", lambda *args, **how: allocate(*args, **how).fill_(float("nan"))
    )
    compiled_steps = []
    run = ours._executor._bind
    monkeypatch.setattr(
        ours._executor,
        "_bind",
        lambda buffers, rows: (compiled_steps.append(len(buffers)), run(buffers, rows))[1],
    )
    prompts = [random_ids(n, seed=n) for n in (12, GRANULE - 5, 40, 3)]
    mine = [prefilled(ours, ids) for ids in prompts]
    theirs = [prefilled(eager, ids) for ids in prompts]
    compiled_steps.clear()
    shapes = [None, [-1, 0, 0], [], None]  # a chain, a tree, no draft
    for turn, answers in enumerate([(0, 1), (0, 1, 2), (0, 1, 2, 3), (2, 1), (3,), (1, 3, 0)]):
        drafts = []
        for answer in answers:
            parents = shapes[(answer + turn) % len(shapes)]
            n = 4 if parents is None else len(parents)
            drafts.append((random_ids(1 + n, seed=10 * turn + answer), parents))
        got, wanted = (
            joint(target, drafts, [buffers[answer] for answer in answers])
            for target, buffers in ((ours, mine), (eager, theirs))
        )
        for answer, (ids, _), one, other in zip(answers, drafts, got, wanted, strict=True):
            close(one, other)
            kept = [0] if len(ids) < 3 else [0, 1]
            for buffer in (mine[answer], theirs[answer]):
                buffer.commit(kept)
    assert mine[1].capacity > GRANULE  # it grew among the others
    for one, other in zip(mine, theirs, strict=True):
        assert one.length == other.length
        close_rows(one, other, one.length)
    assert compiled_steps
    if family in ("llama", "gpt2"):  # no windows, beyond which trees run eagerly
        assert compiled_steps == [2, 3, 4, 2, 1, 3]


def test_answers_that_ran_together_are_let_go(targets):
    """A place that is free is given away; the last one in an arena takes memory of its own."""
    ours, eager = targets("llama")
    stays, goes, comes = (prefilled(ours, random_ids(20, seed)) for seed in (1, 2, 3))
    joint(ours, [([1], None), ([2], None)], [stays, goes])
    arena, place = weakref.ref(stays._arena), goes.origin
    assert place > stays.origin > 0
    ours.step([5], stays)
    assert stays.origin > 0  # it is not the last one
    del goes
    joint(ours, [([1], None), ([2], None)], [stays, comes])
    assert comes.origin == place
    del comes
    close(ours.step([5], stays), eager.step([5], prefilled(eager, random_ids(20, 1))))
    assert stays.origin == 0
    assert stays.stores(0)[0].shape[1] == stays.capacity
    assert arena() is None


def test_answers_that_decode_together_stand_aside(targets):
    """Each has the ids of plain decoding; nobody drafts while others pay for it, but who is alone and who asks."""
    ours, eager = targets("llama")
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = [random_ids(30, seed=i) for i in range(3)]
    truths = [
        [t for block in SpeculativeDecoder(eager).generate(ids, params) for t in block.token_ids]
        for ids in prompts
    ]
    drafters = [ScriptedDrafter(SCRIPTS["oracle"](truth)) for truth in truths]
    gate = threading.Barrier(len(prompts))

    def answer(i, config):
        decoder = SpeculativeDecoder(ours, drafters[i], config=config)
        stats = DecodingStats()
        ids, reasons = [], set()
        for n, block in enumerate(decoder.generate(prompts[i], params, stats=stats)):
            ids += block.token_ids
            reasons.add(stats.off_reason)
            if n in (1, 2):  # nobody is done before all have taken a step beside the others
                gate.wait(30)
        return ids, stats, reasons

    for config, asides in (
        (SpeculationConfig(), True),
        (SpeculationConfig(num_draft_tokens=2), False),
    ):
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = [*pool.map(answer, range(len(prompts)), [config] * len(prompts))]
        assert [ids for ids, *_ in together] == truths
        assert all((TOGETHER in reasons) == asides for *_, reasons in together)
    gate = threading.Barrier(1)
    ids, stats, reasons = answer(0, SpeculationConfig())
    assert ids == truths[0]
    assert stats.drafted > 0
    assert TOGETHER not in reasons


def test_who_moved_out_of_an_arena_keeps_its_place_there(targets):
    """Somebody may be copying the rows that lie there."""
    ours, _ = targets("llama")
    first, second = (prefilled(ours, random_ids(20, seed)) for seed in (1, 2))
    joint(ours, [([1], None), ([2], None)], [first, second])
    arena, copied = first._arena, first.rows(0, 0, 20)
    before = [rows.clone() for rows in copied]
    first.reserve(first.capacity + 1)
    assert first.origin == 0
    third = prefilled(ours, random_ids(20, 3))
    joint(ours, [([1], None), ([2], None)], [second, third])
    assert third._arena is arena
    for rows, old in zip(copied, before, strict=True):
        assert torch.equal(rows, old)


@pytest.mark.slow
def test_a_kept_graph_is_loaded_and_a_damaged_one_made_anew(tmp_path, monkeypatch, caplog):
    """Fault 17: the second time nothing is traced; a damaged file is replaced, and said once; a user's file stays."""
    model = tiny_llama()
    CompiledExecutor(model, cache_dir=tmp_path, identity="a")
    (kept,) = (tmp_path / "graphs").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "traced", None)
        loaded = TargetModel(
            model, executor=CompiledExecutor(model, cache_dir=tmp_path, identity="a")
        )
    ids = random_ids(20)
    eager = shared_target()
    close(loaded.step([1], prefilled(loaded, ids)), eager.step([1], prefilled(eager, ids)))

    file = kept / "graph.xml"
    (kept / "mine.bin").write_bytes(b"mine")
    assert marked(kept).kind == "graphs"
    file.write_bytes(file.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            CompiledExecutor(model, cache_dir=tmp_path, identity="a")
    assert caplog.text.count("made again") == 1
    assert file.stat().st_size > 1000
    assert (kept / "mine.bin").read_bytes() == b"mine"
    CompiledExecutor(tiny_llama(1), cache_dir=tmp_path, identity="b")
    assert len(list((tmp_path / "graphs").iterdir())) == 2


def test_a_kept_graph_has_bfloat16_weights_once(tmp_path):
    """Two bytes a weight, tied ones stored once; read back it says the same to the bit."""
    sizes = {"hidden_size": 192, "vocab_size": 2048, "intermediate_size": 512}
    model = tiny_llama(**sizes, tie_word_embeddings=True).bfloat16()
    first, again = (
        TargetModel(model, executor=CompiledExecutor(model, cache_dir=tmp_path, identity="a"))
        for _ in range(2)
    )
    (kept,) = (tmp_path / "graphs").iterdir()
    weights = sum(weight.numel() for weight in model.parameters())
    assert (kept / "graph.bin").stat().st_size < 2.3 * weights
    ids = random_ids(20)
    logits = [target.step([1], prefilled(target, ids)) for target in (first, again)]
    assert torch.equal(*logits)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to_costs_time_only(tmp_path, caplog):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        CompiledExecutor(tiny_llama(), cache_dir=tmp_path / "file" / "x", identity="a")
    assert "cannot keep" in caplog.text


@pytest.mark.slow
def test_a_graph_that_says_something_else_is_refused(monkeypatch, caplog):
    """By name it is an error; "auto" runs eagerly and says why."""
    spans = compiled._spans
    monkeypatch.setattr(  # half of the prefix is lost
        compiled, "_spans", lambda *args: [s._replace(prefix=s.prefix // 2) for s in spans(*args)]
    )
    with pytest.raises(ConfigurationError, match="off eager ones"):
        CompiledExecutor(tiny_llama())
    with caplog.at_level(logging.WARNING):
        executor = make_executor("auto", tiny_llama(), owned=True)
    assert isinstance(executor, EagerExecutor)
    assert "off eager ones" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "owned", "kind", "packed"),
    [
        ("auto", True, CompiledExecutor, False),
        ("auto", False, EagerExecutor, False),
        ("eager", True, EagerExecutor, True),
        ("openvino", False, CompiledExecutor, False),
    ],
)
def test_names_make_executors(name, owned, kind, packed):
    """Weights of others are neither laid out again nor doubled unless asked."""
    model = tiny_llama()
    executor = make_executor(name, model, owned=owned)
    assert type(executor) is kind
    assert packed == any(isinstance(m, PackedLinear) for m in model.modules())


def test_without_the_extra(monkeypatch):
    """By name it is asked for; "auto" does without."""
    monkeypatch.setattr(executors, "has_openvino", lambda: False)
    with pytest.raises(MissingDependencyError, match="openvino"):
        make_executor("openvino", tiny_llama())
    assert isinstance(make_executor("auto", tiny_llama(), owned=True), EagerExecutor)


@pytest.mark.slow
def test_without_the_extra_everything_else_works(tmp_path):
    """Nothing but a compiled model imports OpenVINO: who has not installed it runs eagerly."""
    tiny_llama().save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "import rasd_integrations.runtime.models, rasd_integrations.runtime.rasd\n"
        "from rasd_integrations.engine.executors.factory import make_executor\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\n"
        "print(type(make_executor('auto', model, owned=True)).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "EagerExecutor", done.stderr


@pytest.mark.slow
def test_openvino_reports_nothing():
    """Neither its import nor a conversion is reported over the network; who wants the reports can have them."""
    code = (
        "import sys\n"
        "import rasd_integrations.engine.executors.openvino\n"
        "import openvino.tools.ovc.convert_impl, openvino.tools.ovc.telemetry_utils\n"
        "print('openvino_telemetry' in sys.modules)\n"
        "print({openvino.tools.ovc.convert_impl.tm.__name__, openvino.tools.ovc.telemetry_utils.tm.__name__})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "{'openvino.tools.ovc.telemetry_stub'}"], done.stderr


def test_graphs_of_a_gpu_need_one():
    """On a CPU they are refused by name."""
    with pytest.raises(ConfigurationError, match="CUDA"):
        make_executor("cuda-graphs", tiny_llama())


@pytest.mark.slow
def test_what_openvino_cannot_do_is_refused(monkeypatch):
    """Another OpenVINO, whose attention takes other inputs, is an error of the configuration, by its name."""

    def other(*_, **__):
        msg = "PagedAttention expects 99 inputs"
        raise RuntimeError(msg)

    monkeypatch.setattr(graphs, "whole", other)
    with pytest.raises(ConfigurationError, match=r"OpenVINO 20.*99 inputs.*eager"):
        CompiledExecutor(tiny_llama())
    assert isinstance(make_executor("auto", tiny_llama(), owned=True), EagerExecutor)


@pytest.mark.parametrize(
    ("term", "said"),
    [({"softcap": 50.0}, "caps its scores"), ({"sinks": torch.zeros(6)}, "attention sinks")],
)
def test_terms_that_pages_lack_are_refused_without_a_compiler(monkeypatch, term, said):
    """OpenVINO's attention has no cap, and no sink of each head."""
    trace_layout = compiled.trace_layout

    def planned(*args):
        trace = trace_layout(*args)
        layers = [replace(x, scoring=replace(x.scoring, **term)) for x in trace.layers]
        return replace(trace, layers=tuple(layers))

    monkeypatch.setattr(compiled, "trace_layout", planned)
    with ATTENTIONS["paged"](), pytest.raises(ConfigurationError, match=f"{said}.*C.. compiler"):
        CompiledExecutor(tiny_llama(head_dim=16))
    with pytest.raises(ConfigurationError, match=f"{said}.*heads of .8. numbers"):
        CompiledExecutor(tiny_llama())


def test_capped_scores_are_compiled():
    """Chains and a tree, behind a prefix of several blocks."""
    model = tiny_gemma2()
    if "own" not in (executor := CompiledExecutor(model)).name:
        pytest.skip("no C++ compiler")
    ours, eager = TargetModel(model, executor=executor), TargetModel(model)
    mine, theirs = (prefilled(target, random_ids(70)) for target in (ours, eager))
    for parents in (None, [-1, 0, 0, 1]):
        ids = random_ids(5, seed=1)
        close(ours.step(ids, mine, parents), eager.step(ids, theirs, parents))
        for buffer in (mine, theirs):
            buffer.commit([0, 1])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("rows", [5, 9, 33])
@pytest.mark.parametrize("parents", [None, [-1, 0, 0]])
def test_a_step_may_be_run_as_more_rows(family, rows, parents, targets):
    """The rows too many change nothing, also where memory grows, and where they are more than a window."""
    ours, eager = targets(family)
    ids = random_ids(GRANULE - 4)
    mine, theirs = prefilled(ours, ids), prefilled(eager, ids)
    for turn in range(3):
        draft = random_ids(4, seed=turn)
        got = ours.step(draft, mine, parents, rows=rows)
        close(got, eager.step(draft, theirs, parents))
        for buffer in (mine, theirs):
            buffer.commit([0, 1])
    assert mine.length == theirs.length == GRANULE + 2


def test_other_dtypes_are_refused():
    """float16 has no graph here."""
    with pytest.raises(ConfigurationError, match="float16"):
        CompiledExecutor(tiny_llama().half())


@pytest.mark.slow
def test_a_model_is_let_go_with_its_executor():
    """No hook, patch or graph keeps the weights alive."""
    model = tiny_llama()
    executor = CompiledExecutor(model)
    gone = weakref.ref(model)
    del model, executor
    gc.collect()
    assert gone() is None


class _Idle:
    """An infer request that does nothing on some runs, or raises; else it is the one it stands for."""

    def __init__(self, request, error=None):
        self.request, self.error, self.idle = request, error, False

    def __getattr__(self, name):
        return getattr(self.request, name)

    def infer(self):
        if not self.idle:
            self.request.infer()
        elif self.error is not None:
            raise self.error


@pytest.mark.slow
@pytest.mark.parametrize(("before", "rows"), [(1, 1), (1, 4), (4, 4), (4, 40)])
@pytest.mark.parametrize(
    "error", [None, RuntimeError("Exception from src/inference: Transpose node can't alloc")]
)
def test_a_step_that_did_not_run_is_no_step(monkeypatch, before, rows, error):
    """Fault 19: OpenVINO returns, or raises, and wrote nothing: DeviceMemoryError, and the buffer stays true."""
    model = tiny_llama()
    target = TargetModel(model, executor=CompiledExecutor(model))
    buffer, other, wanted = (prefilled(target, random_ids(30)) for _ in range(3))
    expected = target.step(random_ids(rows, 2), wanted)
    target.step(random_ids(before, 1), buffer)  # whose outputs lie there still
    request = _Idle(target._executor._request, error)
    monkeypatch.setattr(target._executor, "_request", request)
    request.idle = True
    with pytest.raises(DeviceMemoryError, match="does not fit in the memory"):
        target.step(random_ids(rows, 2), buffer)
    # The graph is compiled again by now, since what failed may have left it half resized.
    monkeypatch.setattr(target._executor, "_request", request)
    with pytest.raises(DeviceMemoryError):
        next(target.prefill(random_ids(rows, 2), other))
    assert target._executor._request is None
    assert buffer.length == other.length == 30
    close(target.step(random_ids(rows, 2), buffer), expected)
    close(target.step(random_ids(rows, 2), other), expected)


@pytest.mark.slow
def test_a_joint_step_that_did_not_run_is_taken_again_one_by_one(monkeypatch):
    """Fault 19: of answers in one step each goes on, or fails, by itself."""
    model = tiny_llama()
    target = TargetModel(model, executor=CompiledExecutor(model))
    buffers = [prefilled(target, random_ids(30, seed)) for seed in (1, 2)]
    drafts = [(random_ids(4, seed), None) for seed in (3, 4)]
    expected = joint(target, drafts, buffers)
    request = _Idle(target._executor._request)
    monkeypatch.setattr(target._executor, "_request", request)
    request.idle = True
    with pytest.raises(MemoryError):
        joint(target, drafts, buffers)
    for buffer, (ids, _), wanted in zip(buffers, drafts, expected, strict=True):
        close(target.step(ids, buffer), wanted)
