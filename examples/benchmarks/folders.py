"""The same weights in the forms that other engines read, made once and kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from catalog import Weights

from rasd_integrations.loading import load_model

EXPORT_FORMATS = {"float32": "fp32", "bfloat16": "fp16", "float16": "fp16"}


class Unavailable(Exception):  # noqa: N818 - a reason, not a fault
    """An engine cannot run here; the message says why."""


def weights(form: Weights, model: str, dtype: str, cache: Path, python: str) -> Path | str:
    """Return what an engine loads; make it if it is not there.

    Args:
        form: What the engine reads.
        model: Hub id, folder or ``.gguf`` file.
        dtype: Of the weights.
        cache: Folder for what is made.
        python: The engine's interpreter, which exports what only its environment can.

    Raises:
        Unavailable: The form cannot be had.
    """
    if form == "model":
        return model
    if form == "gguf":
        if not model.endswith(".gguf"):
            msg = f"it reads GGUF files only, and the model is {Path(model).name}"
            raise Unavailable(msg)
        return model
    home = cache / f"{Path(model).name.removesuffix('.gguf')}-{dtype}"
    saved = _made(home / "hf", lambda folder: _save(model, dtype, folder))
    if form == "hf":
        return saved
    return _made(home / "openvino", lambda folder: _export(saved, dtype, folder, python))


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Fill ``folder`` beside its place and move it there, so that a broken-off run leaves nothing half done."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            make(made)
            shutil.move(made, folder)
    return folder


def _save(model: str, dtype: str, folder: Path) -> None:
    loaded = load_model(model, {"dtype": dtype})
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    name_rotary_base(folder / "config.json")


def name_rotary_base(path: Path) -> None:
    """Write the rotary base of a ``config.json`` where transformers 4 reads it, too.

    Version 5 writes ``rope_parameters`` alone; version 4, with which a peer may export, then takes its own default
    without a word, and answers over long prompts are noise.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _export(saved: Path, dtype: str, folder: Path, python: str) -> None:
    command = [
        python, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(saved),
        "--task", "text-generation-with-past", "--weight-format", EXPORT_FORMATS[dtype], str(folder),
    ]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=offline)  # noqa: S603
    if done.returncode or not (folder / "openvino_model.xml").is_file():
        lines = done.stderr.strip().splitlines()
        last = lines[-1] if lines else "no message"
        msg = f"optimum-intel could not export it (pip install optimum-intel there): {last}"
        raise Unavailable(msg)
