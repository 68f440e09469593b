"""Models in several places: drafters elsewhere, layers that are offloaded, layers split over processes.

There is no second device here. What can be run is run: accelerate's hooks with layers on disk, two processes of
one sharded model. ``Elsewhere`` is a tensor that says it is on another device, and refuses to meet those that are not.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_llama, tiny_tokenizer
from torch.utils._pytree import tree_map

from rasd_integrations import RASD, SamplingParams
from rasd_integrations.config import SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.lockstep import check_lockstep
from rasd_integrations.drafters.base import Needs
from rasd_integrations.drafters.candidates import Shortlist
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.executors.eager import input_device
from rasd_integrations.engine.executors.packing import pack_linears
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.loading import check_device, load_model

PROMPT = "hello world hello world hello"
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
FLOAT32 = {"dtype": "float32"}
FOREIGN = torch.device("cuda:1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, and a smaller one beside it."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("target", tiny_llama()), ("drafter", tiny_llama(1, num_hidden_layers=1))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def truth(saved: Path) -> tuple[int, ...]:
    """What the target says in one place, without a draft."""
    with RASD.load(saved / "target", drafter=None, model_kwargs=FLOAT32) as rasd:
        return rasd.generate(PROMPT, PARAMS).token_ids


# --- drafter_device ---


@pytest.mark.parametrize("drafter", ["auto", "self", None, SuffixDrafter()])
def test_a_device_without_a_drafter_model_is_refused(drafter):
    """There is nothing that could be put there."""
    with pytest.raises(
        ConfigurationError, match=r"drafter_device is 'cpu', but drafter .* loads no model"
    ):
        RASD("m", drafter=drafter, drafter_device="cpu")


def test_a_drafter_that_is_loaded_already_is_not_moved():
    """Objects are used as they stand."""
    with pytest.raises(ConfigurationError, match="stays where it is"):
        RASD.from_model(tiny_llama(), tiny_tokenizer(), tiny_llama(1), drafter_device="cpu")


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "", "cpu:x", "cpu:1"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(device):
    """The target, which does not exist, is not even looked for."""
    rasd = RASD("./no/such/folder", drafter="./nor/this", drafter_device=device)
    with pytest.raises(ConfigurationError, match=r"torch has here: cpu"):
        rasd.ensure_loaded()


def test_devices_are_those_that_torch_has(monkeypatch):
    """The processor always, an accelerator up to its last one."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in (None, "cpu", "cpu:0", "cuda", "cuda:0", "cuda:1"):
        check_device(device)
    with pytest.raises(ConfigurationError, match="cpu, cuda:0, cuda:1"):
        check_device("cuda:2")
    with pytest.raises(ConfigurationError, match="drafter_device is 'mps'"):
        check_device("mps")


def test_the_drafter_is_loaded_onto_its_device(saved, truth, monkeypatch):
    """It goes where it was told to, the target where it always goes; the answer is the target's."""
    moved = []
    stock = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        "to",
        lambda self, *args: (moved.append((len(self.model.layers), args)), stock(self, *args))[1],
    )
    options = {"drafter": saved / "drafter", "drafter_device": "cpu", "model_kwargs": FLOAT32}
    fixed = SpeculationConfig(num_draft_tokens=2)  # the clock might find that it does not pay
    with RASD.load(saved / "target", speculation=fixed, **options) as rasd:
        assert moved == [(1, ("cpu",))]
        answer = rasd.generate(PROMPT, PARAMS)
    assert answer.token_ids == truth
    assert "model" in answer.stats.as_dict()["drafters"]


def test_a_drafter_device_takes_the_place_of_the_targets_map(saved, monkeypatch):
    """A map of the target's layers says nothing of the drafter's."""
    kwargs = {**FLOAT32, "device_map": {"model.layers.7": "cuda:3"}}
    loaded = load_model(saved / "drafter", kwargs, "cpu")
    assert {p.device.type for p in loaded.model.parameters()} == {"cpu"}


@pytest.mark.parametrize("module", ["langchain", "llama_index"])
def test_both_frameworks_hand_the_device_on(module):
    """The option reaches the engine, which refuses what cannot be."""
    package = pytest.importorskip(f"rasd_integrations.{module}", exc_type=ImportError)
    for name in ("ChatRASD", "RASDLLM"):
        if (kind := getattr(package, name, None)) is None:
            continue
        with pytest.raises(ConfigurationError, match="drafter_device is 'cuda:1'"):
            kind(model="m", drafter="self", drafter_device="cuda:1")
        llm = kind(model="m", drafter="d", drafter_device="cuda:1")
        assert llm._rasd._engine.options.drafter_device == "cuda:1"


# --- tensors of another device ---


class Elsewhere(torch.Tensor):
    """A tensor that says it is on ``FOREIGN``; its numbers are here. Meeting one of the CPU is an error."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=FOREIGN
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        if moves and func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy):
            return args[0].inner.clone()  # nothing is moved but back home
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(args[0].inner)

        def unwrapped(value: object) -> object:
            if isinstance(value, cls):
                return value.inner
            # Indices may come from the CPU, as everywhere in torch; numbers in a tensor too.
            if (
                isinstance(value, torch.Tensor)
                and value.ndim
                and func is not torch.ops.aten.index.Tensor
            ):
                msg = f"{func}: tensors on {FOREIGN} and {value.device}"
                raise RuntimeError(msg)
            return value

        out = func(*tree_map(unwrapped, args), **{**tree_map(unwrapped, kwargs), **_here(kwargs)})
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, out)


def _here(kwargs: dict) -> dict:
    return {"device": torch.device("cpu")} if "device" in kwargs else {}


def test_tensors_of_two_devices_do_not_meet():
    """The stand-in is as strict as the real thing."""
    there = Elsewhere(torch.randn(3, 4))
    assert there.device == FOREIGN
    assert (there + there).device == FOREIGN
    with pytest.raises(RuntimeError, match="cuda:1 and cpu"):
        there + torch.randn(3, 4)
    assert torch.equal(there.cpu(), there.inner)


class Abroad:
    """A drafter whose distribution and logits stand on the other device."""

    name = "abroad"
    needs = Needs()

    def __init__(self, inner: ModelDrafter) -> None:
        self.inner = inner

    def start(self, context):
        session = self.inner.start(context)
        stock = session.propose

        def propose(budget):
            draft = stock(budget)
            held = {
                n: None if (t := getattr(draft, n)) is None else Elsewhere(t)
                for n in ("probs", "logits")
            }
            assert all(t is None or t.device == FOREIGN for t in held.values())
            fields = {
                n: getattr(draft, n) for n in ("token_ids", "parents", "source", "node_probs")
            }
            return type(draft)(**fields, **held)

        session.propose = propose
        return session


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_a_draft_is_verified_wherever_its_tensors_stand(sampling):
    """Its distribution and its logits are moved to the target's, in every distribution; the answer is the same."""
    params = SamplingParams(
        max_tokens=24,
        ignore_eos=True,
        seed=3,
        temperature=0.0 if sampling == "greedy" else 0.8,
    )
    config = SpeculationConfig(num_draft_tokens=4)
    target, model = TargetModel(tiny_llama()), TargetModel(tiny_llama(1))
    answers = []
    for drafter in (ModelDrafter(model), Abroad(ModelDrafter(model))):
        decoder = SpeculativeDecoder(target, drafter, config=config)
        answers.append([t for b in decoder.generate(list(range(20)), params) for t in b.token_ids])
    assert answers[0] == answers[1]


def test_the_shortlist_reads_logits_and_hidden_states_from_other_devices():
    """The output layer of a model over several devices need not stand where its inputs come from."""
    model = tiny_llama()
    hidden = torch.randn(3, 48)
    shortlist = Shortlist(model, range(VOCAB), 4)
    expected = shortlist.of_hidden(hidden)
    found = shortlist.of_logits(Elsewhere(model.lm_head(hidden)).cpu())
    np.testing.assert_array_equal(expected.token_ids, found.token_ids)
    moved = shortlist.of_hidden(Elsewhere(hidden))
    np.testing.assert_array_equal(expected.token_ids, moved.token_ids)


# --- layers in several places ---


@pytest.mark.parametrize("on_disk", [["model.layers.1"], ["model.embed_tokens", "lm_head"]])
def test_offloaded_layers_give_the_same_answer(saved, truth, on_disk, tmp_path):
    """Through accelerate's hooks, with every free drafter at work on what the steps leave behind."""
    pytest.importorskip("accelerate")
    parts = [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    places = {part: "disk" if part in on_disk else "cpu" for part in parts}
    kwargs = {**FLOAT32, "device_map": places, "offload_folder": str(tmp_path)}
    with RASD.load(saved / "target", model_kwargs=kwargs) as rasd:
        model = rasd._engine._shared.target.model
        assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
        assert rasd._engine._shared.target.device.type == "cpu"
        answer = rasd.generate(PROMPT, PARAMS)
    assert answer.token_ids == truth
    assert answer.stats.faults == ()
    assert answer.stats.drafted > 0


def test_a_loaded_object_with_offloaded_weights_is_taken(saved, truth, tmp_path):
    """Weights that are not here have no first values; the model is told by its others."""
    pytest.importorskip("accelerate")
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    kwargs = {**FLOAT32, "device_map": places, "offload_folder": str(tmp_path)}
    loaded = load_model(saved / "target", kwargs)
    with RASD.from_model(loaded.model, loaded.tokenizer) as rasd:
        assert rasd.generate(PROMPT, PARAMS).token_ids == truth


def test_ids_go_to_the_first_weights_that_are_here():
    """Weights that are offloaded stand nowhere."""
    model = tiny_llama()
    assert input_device(model) == torch.device("cpu")
    model.model.embed_tokens.to("meta")
    assert input_device(model) == torch.device("cpu")


def test_weights_are_not_packed_where_some_stand_elsewhere():
    """Hooks move plain weights only."""
    model = tiny_llama()
    model.lm_head.to("meta")
    assert pack_linears(model) == 0


def test_layers_keep_their_keys_where_they_stand():
    """Each layer's keys, values and masks stand with its own queries, whatever device the ids came in on."""
    from rasd_integrations.engine.attention import Segment
    from rasd_integrations.engine.kv.buffer import KVBuffer

    positions = torch.arange(5, 8)
    segment = Segment(KVBuffer(16), positions, None)
    meta = torch.device("meta")  # the one other device whose shapes can be computed here
    for device in (torch.device("cpu"), meta):
        for window in (None, 4):
            tail, head = segment.blocked(5, window, device)
            assert {t.device for t in (tail, head) if t is not None} == {device}
    buffer = KVBuffer(16)
    buffer.write(0, torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    buffer.write(1, *(torch.randn(2, 3, 8, device="meta") for _ in range(2)))
    buffer.commit([0, 2])
    assert [buffer.rows(layer, 0, 2)[0].device.type for layer in (0, 1)] == ["cpu", "meta"]
    for made in (buffer.copy(2, 16), GatheredKV(buffer, [1], 16)):
        assert [made.rows(layer, 0, 1)[1].device.type for layer in (0, 1)] == ["cpu", "meta"]


# --- one model, several processes ---


@pytest.mark.parametrize(
    ("drafter", "config", "params", "message"),
    [
        (SuffixDrafter(), {}, {}, "num_draft_tokens is None"),
        (FusedDrafter([SuffixDrafter()]), {"num_draft_tokens": 4}, {}, "by the clock"),
        (None, {}, {"temperature": 0.5}, "seed is None"),
    ],
)
def test_processes_that_could_part_are_refused(drafter, config, params, message):
    """What depends on a clock, or on a draw of its own, would leave the processes waiting for one another."""
    with pytest.raises(ConfigurationError, match=message):
        check_lockstep(drafter, SpeculationConfig(**config), SamplingParams(**params).settled({}))


def test_processes_in_lockstep_are_let_through():
    """Fixed drafts and seeds are the same everywhere."""
    check_lockstep(None, SpeculationConfig(), SamplingParams().settled({}))
    fixed = SpeculationConfig(num_draft_tokens=4)
    check_lockstep(SuffixDrafter(), fixed, SamplingParams(temperature=0.5, seed=1).settled({}))


SHARDED = """
import json, sys
import torch
from rasd_integrations import RASD, SamplingParams
from rasd_integrations.config import SpeculationConfig
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.errors import ConfigurationError

kwargs = {"dtype": "float32", "tp_plan": "auto"}
rasd = RASD.load(sys.argv[1], drafter=SuffixDrafter(), model_kwargs=kwargs,
                 speculation=SpeculationConfig(num_draft_tokens=4))
answer = rasd.generate(sys.argv[2], SamplingParams(max_tokens=24, ignore_eos=True))
try:
    RASD.load(sys.argv[1], model_kwargs=kwargs).generate(sys.argv[2])
    refused = ""
except ConfigurationError as err:
    refused = str(err)
target = rasd._engine._shared.target
out = [list(answer.token_ids), answer.stats.drafted, target.kv_bytes_per_token, refused]
open(f"{sys.argv[3]}/{torch.distributed.get_rank()}.json", "w").write(json.dumps(out))
"""


@pytest.mark.slow
def test_two_processes_run_one_model(tmp_path):
    """Split by transformers' own plan, each with half of the heads: in both the answer of one process."""
    # transformers 5.17 asks that the processes divide the vocabulary.
    model = tiny_llama(vocab_size=260)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with RASD.load(tmp_path, drafter=None, model_kwargs=FLOAT32) as rasd:
        truth = rasd.generate(PROMPT, PARAMS).token_ids
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(port), str(script), str(tmp_path), PROMPT, str(tmp_path),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    whole = TargetModel(model).kv_bytes_per_token
    for rank in (0, 1):
        ids, drafted, kv_bytes, refused = json.loads((tmp_path / f"{rank}.json").read_text())
        assert tuple(ids) == truth
        assert drafted > 0
        assert 2 * kv_bytes == whole
        assert "by the clock" in refused
