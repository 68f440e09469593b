"""Weights of 4 and 8 bits: from a GGUF file's blocks bit for bit, rounded, and as modules of a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn

from rasd_integrations import RASD
from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import ConfigurationError, DeviceMemoryError
from rasd_integrations.loading import model as loading
from rasd_integrations.loading import quantised
from rasd_integrations.loading.model import load_model
from rasd_integrations.loading.quantised import (
    Coding,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedWeight,
    packed,
)
from rasd_integrations.loading.rounding import round_weight, rounded_model
from rasd_integrations.runtime import models
from rasd_integrations.storage import marked

TYPES = (
    "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
WIDTH = 192  # of weights that are large enough to be rounded


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a whole model folder, wide enough that its weights are rounded."""
    path = tmp_path / "model"
    wide_llama(tie_word_embeddings=True).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def wide_llama(**changes: object):
    """Return a tiny Llama whose weights are large enough to be rounded."""
    return tiny_llama(hidden_size=WIDTH, intermediate_size=WIDTH, **changes)


def gguf_blocks(name: str, rows: int = 6, columns: int = 1024) -> np.ndarray:
    """Return random blocks of a type whose values are finite."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    kind = gguf.GGMLQuantizationType[name]
    length, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (rows * columns // length, nbytes), dtype=np.uint8)
    while bad := np.flatnonzero(~np.isfinite(gguf.quants.dequantize(raw, kind)).all(-1)).tolist():
        raw[bad] = random.integers(0, 256, (len(bad), nbytes), dtype=np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", TYPES)
def test_blocks_have_the_values_that_gguf_says(name):
    """Bit for bit, negative scales and minimums included."""
    raw = gguf_blocks(name)
    import gguf

    from rasd_integrations.loading.gguf_weights import BLOCKS, read_blocks

    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    weight = read_blocks(torch.from_numpy(raw), BLOCKS[name], len(raw))
    assert weight.shape == wanted.shape
    got = weight.dense().numpy()
    assert np.array_equal(wanted, got)
    order = torch.tensor([3, 0, 5])
    assert np.array_equal(wanted[order], weight.rows(order).dense().numpy())
    assert np.array_equal(wanted[order], weight.dense(order).numpy())


@pytest.mark.parametrize(("bits", "most"), [(8, 0.5), (4, 1.0)])
def test_rounding_takes_the_nearest_code(bits, most):
    """Within half a code; in 4 bits a whole one at the end that a group's largest number does not take."""
    weight = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    got = round_weight(weight, bits)
    apart = (got.dense() - weight).abs().reshape(len(weight), -1, got.coding.group)
    assert bool((apart <= most * got.scales.abs()[..., None] + 1e-6).all())
    assert not got.dense()[3].any()
    inside = apart <= 0.5 * got.scales.abs()[..., None] + 1e-6
    assert float(inside.float().mean()) > 0.99


def random_weight(rows: int = 48, columns: int = 64, kind: str = "u4", group: int = 32):
    """Return a weight of random codes with minimums, one group of which has a scale of 0."""
    draw = torch.Generator().manual_seed(1)
    most = 16 if kind.endswith("4") else 256
    codes = torch.randint(0, most, (rows, columns), generator=draw, dtype=torch.uint8)
    scales = torch.rand(rows, columns // group, generator=draw) * 0.02
    scales[0, 0] = 0
    minimums = torch.rand(rows, columns // group, generator=draw) * 0.1
    coding = Coding(kind, group, has_minimum=kind.startswith("u"))
    return QuantisedWeight(
        coding, packed(codes, kind), scales, minimums if coding.has_minimum else None
    )


@pytest.mark.parametrize("kind", ["i4", "u4", "i8", "u8"])
def test_modules_compute_what_dense_ones_do(kind, monkeypatch):
    """A linear layer in parts of its rows, and an embedding with Gemma's factor."""
    weight = random_weight(kind=kind)
    dense, bias = weight.dense(), nn.Parameter(torch.randn(48))
    x = torch.randn(2, 5, 64)
    monkeypatch.setattr(quantised, "_PART", 64 * 10)
    got = QuantisedLinear(weight, bias)(x)
    assert torch.allclose(got, nn.functional.linear(x, dense, bias), atol=1e-5)
    ids = torch.tensor([[3, 0], [47, 3]])
    assert torch.equal(QuantisedEmbedding(weight, torch.float32, 2.5)(ids), dense[ids] * 2.5)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_are_kept_and_mapped(folder, cache, weights, monkeypatch):
    """The second load rounds nothing; codes lie where OpenVINO reads them without a copy."""
    first = load_model(folder, {"dtype": "float32"}, weights=weights).model
    layer = first.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantisedLinear)
    assert ("i8" if weights == "int8" else "i4") == layer.quantised.coding.kind
    assert "i8" == first.model.embed_tokens.quantised.coding.kind
    assert first.lm_head.quantised is first.model.embed_tokens.quantised
    large = [b for b in first.buffers() if b.numel() >= WIDTH * WIDTH // 2]
    assert large
    assert {0} == {buffer.data_ptr() % 64 for buffer in large}
    monkeypatch.setattr("rasd_integrations.loading.rounding.rounded", None)
    second = load_model(folder, {"dtype": "float32"}, weights=weights).model
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    ids = torch.arange(12)[None] % VOCAB
    with torch.inference_mode():
        near = load_model(folder, {"dtype": "float32"}).model(ids).logits
        off = (first(ids).logits - near).norm() / near.norm()
    assert 0 < float(off) < (0.05 if weights == "int8" else 0.5)


def test_what_has_a_forward_of_its_own_stays_dense(cache):
    """Gemma's embedding is quantised with its factor; GPT-2's transposed layers are left alone."""
    gemma = rounded_model(tiny_gemma3(), 8, cache, "gemma")
    assert not isinstance(gemma.model.embed_tokens, QuantisedEmbedding)  # too small
    wide = rounded_model(tiny_gemma3(hidden_size=WIDTH), 8, cache, "wide")
    assert float(wide.model.embed_tokens.scale) == pytest.approx(WIDTH**0.5)
    gpt2 = rounded_model(tiny_gpt2(), 8, cache, "gpt2")
    assert not any(isinstance(m, QuantisedLinear) for m in gpt2.transformer.modules())


def test_a_cache_that_cannot_be_written_is_done_without(folder, monkeypatch):
    """Rounded weights go to a temporary folder, with a warning."""

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(marked, "replaced_folder", full)
    with pytest.warns(RuntimeWarning, match="converted again each time"):
        model = load_model(folder, weights="int8").model
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantisedLinear)
    assert (torch.bfloat16, torch.float32) == (model.dtype, layer.quantised.scales.dtype)


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ("kept", {}, "no GGUF file"),
        ("int8", {"device_map": "cpu"}, "for a CPU"),
        ("int4", {"quantization_config": object()}, "for a CPU"),
    ],
)
def test_weights_that_cannot_be_had_are_refused(folder, weights, options, words):
    """Before anything is loaded."""
    with pytest.raises(ConfigurationError, match=words):
        load_model(folder, options, weights=weights)


def test_a_checkpoint_that_is_quantised_already_is_not_rounded(folder, cache):
    """Its weights are in another form, which would be lost."""
    load_model(folder, weights="int8")
    (made,) = (cache / "models").glob("*-int8")
    tiny_tokenizer().save_pretrained(made)
    with pytest.raises(ConfigurationError, match="quantised already"):
        load_model(made, weights="int4")


def test_weights_are_refused_on_another_device(folder, monkeypatch):
    """A GPU has quantisation of its own."""
    monkeypatch.setattr(loading, "check_device", lambda _device: None)
    with pytest.raises(ConfigurationError, match="quantization_config"):
        load_model(folder, weights="int8", device="cuda:0")


class TestGguf:
    """A file whose weights stay in their blocks."""

    @pytest.fixture(params=["Q8_0", "Q4_0", "Q5_1"])
    def file(self, tmp_path, request) -> Path:
        """Return a random Llama whose matrices are of one type."""
        pytest.importorskip("gguf", reason="the extra gguf is not installed")
        pytest.importorskip("accelerate", reason="the extra gguf is not installed")
        from tiny_gguf import write_gguf

        return write_gguf(tmp_path / "tiny.gguf", request.param)

    def test_its_values_are_those_of_the_dense_model(self, file):
        """Rows that transformers puts into another order included; embeddings and head share one weight."""
        dense = load_model(file, {"dtype": "float32"}).model
        kept = load_model(file, {"dtype": "float32"}, weights="kept").model
        layer = kept.model.layers[0]
        assert isinstance(layer.self_attn.q_proj, QuantisedLinear)
        assert kept.lm_head.quantised is kept.model.embed_tokens.quantised
        modules = dict(kept.named_modules())
        for name, weight in dense.state_dict().items():
            module = modules[name.rpartition(".")[0]]
            is_kept = isinstance(module, (QuantisedLinear, QuantisedEmbedding))
            got = module.quantised.dense() if is_kept else module.weight
            assert torch.equal(weight, got), name
        assert dense.generation_config.eos_token_id == kept.generation_config.eos_token_id
        assert str(file) == kept.name_or_path

    def test_its_folder_is_about_as_large_as_the_file(self, file, cache):
        """Nothing dense is kept beside it."""
        load_model(file, weights="kept")
        (made,) = (cache / "models").glob("*-blocks")
        index = json.loads((made / "model.safetensors.index.json").read_text())
        assert any(name.endswith("quantised.codes") for name in index["weight_map"])
        assert not any(name.endswith("q_proj.weight") for name in index["weight_map"])

    def test_a_family_of_another_form_is_converted(self, file, monkeypatch, caplog):
        """With one line that says why."""
        from rasd_integrations.loading import gguf_weights

        def refused(*_args: object) -> None:
            msg = "blk.0.ffn_gate_exps.weight becomes several tensors"
            raise gguf_weights.UnknownLayoutError(msg)

        monkeypatch.setattr(gguf_weights, "GgufWeights", refused)
        model = load_model(file, weights="kept").model
        assert not any(isinstance(module, QuantisedLinear) for module in model.modules())
        assert "becomes several tensors" in caplog.text

    def test_auto_keeps_a_file_that_would_not_fit(self, file, monkeypatch, caplog):
        """And says so; with memory, or where steps are eager, weights are dense."""
        pytest.importorskip("openvino")
        room = 7 * file.stat().st_size
        monkeypatch.setattr(models, "memory_available", lambda _device: room)
        assert models._fitting_weights(file, {}, None, "auto") == "kept"
        assert "weights='dense'" in caplog.text
        assert models._fitting_weights(file, {}, None, "eager") == "dense"
        assert models._fitting_weights(file, {"device_map": "auto"}, None, "auto") == "dense"
        assert models._fitting_weights(file, {}, "cuda:0", "auto") == "dense"
        room = 8 * file.stat().st_size
        assert models._fitting_weights(file, {}, None, "auto") == "dense"

    @pytest.mark.slow
    def test_answers_with_drafts_are_those_without(self, file):
        """In float32, through the option of `RASD`; the same weights verify and decode."""
        options = {"weights": "kept", "model_kwargs": {"dtype": "float32"}}
        prompt = "abcd abcd abcd abcd " * 3
        params = SamplingParams(max_tokens=24)
        drafted = RASD.load(str(file), **options)
        plain = RASD.load(str(file), drafter=None, **options)
        eager = RASD.load(str(file), drafter=None, executor="eager", **options)
        texts = {llm.generate(prompt, params).text for llm in (drafted, plain, eager)}
        assert len(texts) == 1
        assert drafted.stats.drafted > 0


def test_a_form_that_does_not_exist_is_refused():
    """By name, with those that do."""
    with pytest.raises(ConfigurationError, match="'kept', 'int8', 'int4'"):
        RASD("model", weights="int2")


def test_weights_that_cannot_fit_are_refused_before_they_are_read(folder, monkeypatch):
    """With the need, what is free, and a form that fits; the type is a `MemoryError` too."""
    dense = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2  # float32
    monkeypatch.setattr(models, "memory_available", lambda _device: int(0.6 * dense))
    with pytest.raises(
        DeviceMemoryError, match=r"need at least .* GB .* free: weights='int8' needs"
    ):
        models.shared_model(folder, {})
    monkeypatch.setattr(models, "memory_available", lambda _device: 1)
    with pytest.raises(MemoryError, match="use a smaller model"):
        models.shared_model(folder, {}, weights="int8")
    monkeypatch.setattr(models, "memory_available", lambda _device: 2 * dense)
    assert models.shared_model(folder, {"dtype": "float32"}, weights="int8").target.window > 0


@pytest.mark.parametrize("weights", ["kept", "int8"])
def test_a_loaded_model_is_used_as_it_is(weights):
    """Its weights are the caller's."""
    with pytest.raises(ConfigurationError, match="used as it is"):
        RASD.from_model(tiny_llama(), tiny_tokenizer(), weights=weights)
