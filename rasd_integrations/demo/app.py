"""The tour and the single question: load, index, ask, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rasd_integrations.demo.corpus import Document, read_documents, topics_for
from rasd_integrations.demo.embeddings import MiniLM
from rasd_integrations.demo.measure import Measured, timed_stream, transformers_answer
from rasd_integrations.demo.models import demo_model
from rasd_integrations.demo.pipelines import langchain_prompt, llama_index_engine
from rasd_integrations.demo.report import print_report
from rasd_integrations.demo.stores import build_faiss, cut, open_chroma
from rasd_integrations.loading import load_model, load_tokenizer
from rasd_integrations.text.prompt.template import ChatTemplate

if TYPE_CHECKING:
    from langchain_chroma import Chroma
    from langchain_core.documents import Document as LangChainDocument
    from langchain_core.runnables import Runnable

    from rasd_integrations.langchain import ChatRASD
    from rasd_integrations.stats import DecodingStats

CHARACTERS_PER_TOKEN = 3.5
PROMPT_OVERHEAD = 192
BASELINE = "transformers"
Asked = dict[str, str]
"""``search``, the text to retrieve with, and ``question``."""
NOTE = (
    "Cold reads the documents; cached finds their keys and values from an earlier question. Greedy "
    "decoding gives the same tokens in exact arithmetic; in bfloat16 two tokens can tie, and wide and "
    "narrow steps may then choose differently (--dtype float32 does not)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command line."""

    docs: str | None = None
    store: str = ".rasd/chroma"
    model: str | None = None
    dtype: str | None = None
    context_tokens: int = 2048
    max_tokens: int = 96

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Options of ``from_pretrained``."""
        return {"dtype": self.dtype} if self.dtype else {}

    def llm_options(self, namespace: str) -> dict[str, Any]:
        """Return the options of both frameworks' LLMs; a namespace keeps their caches apart."""
        return {
            "model": self.model,
            "model_kwargs": self.model_kwargs,
            "max_tokens": self.max_tokens,
            "namespace": namespace,
        }

    @property
    def characters(self) -> int:
        """About how many characters of documents fit in the context."""
        return int((self.context_tokens - PROMPT_OVERHEAD) * CHARACTERS_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Library:
    """The documents, cut and embedded."""

    documents: list[Document]
    chunks: list[LangChainDocument]
    store: Chroma
    embed: MiniLM

    @property
    def texts(self) -> dict[str, str]:
        """Whole documents by name."""
        return {d.name: d.text for d in self.documents}


def progress_bars() -> Progress:
    """Return progress bars on standard error."""
    count, time, text = MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    return Progress(text, BarColumn(bar_width=20), count, time, console=Console(stderr=True))


def run_demo(options: Options) -> None:
    """Ask three pipelines the same long-context questions and print the results."""
    options, library, llm = opened(options)
    prompt = langchain_prompt(library.store, library.texts, options.characters)
    topics = topics_for(options.docs, library.documents)
    asked = [{"search": search, "question": q} for search, qs in topics.items() for q in qs]
    with progress_bars() as bars:

        def run(label: str, answer: Callable[[Asked], Measured]) -> list[Measured]:
            return [answer(q) for q in bars.track(asked, description=label)]

        results = {
            "LangChain": run("LangChain, Chroma", partial(_stream, prompt | llm, llm.stats)),
            "LlamaIndex": run("LlamaIndex, FAISS", _llama_index(options, library)),
        }
        llm.close()  # transformers loads the weights again: twice at once they may not fit
        results[BASELINE] = run("transformers generate", _transformers(options, prompt))
    print_report(Console(), results, BASELINE, f"{Path(options.model or '').stem}. {NOTE}")


def _stream(chain: Runnable[Asked, Any], stats: DecodingStats, q: Asked) -> Measured:
    return timed_stream(q["question"], (m.text for m in chain.stream(q)), stats)


def _llama_index(options: Options, library: Library) -> Callable[[Asked], Measured]:
    from llama_index.core import QueryBundle

    from rasd_integrations.llama_index import RASDLLM

    index = build_faiss(library.chunks, library.store, library.embed)
    llm = RASDLLM(store=index, **options.llm_options("llama-index")).load()
    engine = llama_index_engine(index, library.texts, options.characters, llm)

    def pieces(q: Asked) -> Iterator[str]:
        bundle = QueryBundle(query_str=q["question"], custom_embedding_strs=[q["search"]])
        response: Any = engine.query(bundle)
        yield from response.response_gen

    return lambda q: timed_stream(q["question"], pieces(q), llm.stats)


def _transformers(options: Options, prompt: Runnable[Asked, Any]) -> Callable[[Asked], Measured]:
    loaded = load_model(options.model or "", options.model_kwargs)
    template = ChatTemplate(loaded.tokenizer)

    def answer(q: Asked) -> Measured:
        (message,) = prompt.invoke(q).to_messages()
        ids = template.encode_messages([{"role": "user", "content": message.text}])
        return transformers_answer(q["question"], loaded, ids, options.max_tokens)

    return answer


def opened(options: Options) -> tuple[Options, Library, ChatRASD]:
    """Return the options with a model, the indexed documents, and the loaded LLM over both."""
    from rasd_integrations.langchain import ChatRASD

    documents = read_documents(options.docs)  # errors come before any download or indexing
    options = replace(options, model=demo_model(options.model))
    load_tokenizer(options.model or "", options.model_kwargs)
    chunks = cut(documents)
    with progress_bars() as bars:
        task = bars.add_task("Index documents", total=len(chunks))
        embed = MiniLM(progress=lambda n: bars.advance(task, n))
        store = open_chroma(documents, chunks, embed, Path(options.store))
        bars.update(task, completed=len(chunks))
    embed.progress = lambda _: None
    llm = ChatRASD(store=store, **options.llm_options("langchain"))
    return options, Library(documents, chunks, store, embed), llm.load()


def ask(options: Options, question: str) -> None:
    """Stream the answer to one question over the documents, then print its figures."""
    options, library, llm = opened(options)
    chain = langchain_prompt(library.store, library.texts, options.characters) | llm

    def pieces() -> Iterator[str]:
        for message in chain.stream({"search": question, "question": question}):
            print(message.text, end="", flush=True)
            yield message.text

    answer = timed_stream(question, pieces(), llm.stats)
    print()
    Console(stderr=True).print(
        f"{answer.tokens} tokens in {answer.steps} steps, first after {answer.first_s:.2f} s, "
        f"then {answer.decode_ms:.1f} ms each; the prompt has {answer.prompt_tokens} tokens. {answer.quoted or ''}",
        style="dim",
    )
