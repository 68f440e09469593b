"""``rasd warm``: documents read ahead of their questions into a folder. Needs none of the demo's packages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from rasd_integrations.config import ExecutorName
from rasd_integrations.demo.corpus import Document, read_documents
from rasd_integrations.demo.models import SMALL, demo_model
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.prompting import Prompt
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.storage.marked import marked_folders


def warm(
    paths: Sequence[str],
    cache: str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    namespace: str = "",
    system: str = "",
    before: str = "",
    cache_gib: float | None = None,
    executor: ExecutorName = "auto",
) -> None:
    """Prefill every document and say what the folder holds then.

    Args:
        paths: Files, and folders of ``.md`` and ``.txt`` files.
        cache: The folder.
        model: What ``--model`` takes; ``None``: the packaged SmolLM2.
        dtype: Of the weights.
        namespace: Who may reuse it.
        system: The system message that prompts will begin with.
        before: What stands before the document in the user message.
        cache_gib: Most that the folder may hold.
        executor: What runs the model later; with ``"openvino-kv8"`` what is kept is in 8 bits.

    Raises:
        ConfigurationError: A path has no text, a document does not fit the window, the folder is read-only.
    """
    documents = [d for path in paths for d in read_documents(path, "PATH")]
    limit = {} if cache_gib is None else {"prefix_cache_dir_bytes": int(cache_gib * 2**30)}
    with RASD(
        demo_model(model or SMALL),
        model_kwargs={"dtype": dtype} if dtype else {},
        namespace=namespace,
        prefix_cache_dir=cache,
        prefix_cache_bytes=0,
        executor=executor,
        **limit,  # type: ignore[arg-type]
    ) as rasd:
        heads = [_head(rasd, document, system, before) for document in documents]
        with tqdm(desc="Read documents", unit=" tokens", unit_scale=True, disable=False) as bar:
            rasd.ensure_loaded()
            rasd.warm(heads, lambda done, total: _show(bar, done, total))
    shelves = marked_folders(Path(cache).expanduser())
    held = [f for shelf in shelves if shelf.kind == "kept prompts" for f in shelf.files()]
    size = sum(stat.st_size for _, stat in held) / 1e6
    print(f"{len(documents)} documents are read. {cache} holds {len(held)} files, {size:,.0f} MB.")


def _head(rasd: RASD, document: Document, system: str, before: str) -> Prompt:
    """Return what the prompts on a document begin with."""
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
