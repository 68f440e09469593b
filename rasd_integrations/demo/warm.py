"""``rasd warm``: prefills documents into a folder. Needs none of the demo's packages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from rasd_integrations.config import ExecutorName
from rasd_integrations.demo.corpus import Document, read_documents
from rasd_integrations.demo.models import SMALL, demo_model
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.prompting import Prompt
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.storage.cache_folder import cache_folder
from rasd_integrations.storage.marked import marked_folders


def warm(
    paths: Sequence[str],
    cache_dir: str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    namespace: str = "",
    system: str = "",
    before: str = "",
    disk_gib: float | None = None,
    executor: ExecutorName = "auto",
) -> None:
    """Prefill every document and print what the folder contains.

    Args:
        paths: Files, and folders of ``.md`` and ``.txt`` files.
        cache_dir: The folder, which the LLM is given later.
        model: As ``--model``; default the packaged SmolLM2.
        dtype: Type of the weights.
        namespace: Namespace of the cached prefixes.
        system: System message of the later prompts.
        before: Text before the document in the user message.
        disk_gib: Most that the documents may take there.
        executor: The later executor; ``"openvino-kv8"`` caches keys and values in 8 bits.

    Raises:
        ConfigurationError: A path has no text, a document exceeds the window, the folder is read-only.
    """
    documents = [d for path in paths for d in read_documents(path, "PATH")]
    with RASD(
        demo_model(model or SMALL, cache_dir),
        model_kwargs={"dtype": dtype} if dtype else {},
        namespace=namespace,
        cache_dir=cache_dir,
        prefix_disk_bytes=None if disk_gib is None else int(disk_gib * 2**30),
        prefix_cache_bytes=0,
        executor=executor,
    ) as rasd:
        heads = [_head(rasd, document, system, before) for document in documents]
        with tqdm(desc="Read documents", unit=" tokens", unit_scale=True, disable=False) as bar:
            rasd.ensure_loaded()
            rasd.warm(heads, partial(_show, bar))
    folders = marked_folders(cache_folder("prefixes", cache_dir))
    files = [file for folder in folders for file in folder.files()]
    size = sum(stat.st_size for _, stat in files) / 1e6
    print(
        f"{len(documents)} documents are read. {cache_dir} holds {len(files)} files, {size:,.0f} MB."
    )


def _head(rasd: RASD, document: Document, system: str, before: str) -> Prompt:
    """Return the beginning of prompts on a document."""
    text = before + document.text
    prompt: Prompt = text
    if system or rasd.has_chat_template:
        first = [{"role": "system", "content": system}] if system else []
        prompt = [*first, {"role": "user", "content": text}]
    if (tokens := rasd.count_tokens(prompt)) >= rasd.window:
        msg = (
            f"{document.name} has {tokens} tokens with its template, but the model's window is "
            f"{rasd.window}. Split the file, or use a model with a longer context."
        )
        raise ConfigurationError(msg)
    return prompt


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
