"""What LlamaIndex asks of an LLM class, as a suite of tests: the framework itself has none.

Subclass :class:`LLMContract` in a test file, name the class ``Test...`` and say how an LLM is made; each test
makes its own. The model behind it must be one that follows simple instructions: it answers from a line of
its prompt, calls the tool that fits, fills arguments from the question.

Groups that an LLM's class rules out (function calling, for one that is no ``FunctionCallingLLM``) are skipped;
all else is asked of every class. Nothing in it may open a connection.
"""

from __future__ import annotations

from typing import Any

from contract_agents import FunctionAgents, ReActAgents
from contract_endpoints import Endpoints, Options, Prompts
from contract_rag import ChatEngines, Synthesizers
from contract_running import Observers, Running
from contract_tools import Structured, ToolCalling

GROUPS = (
    Endpoints,
    Prompts,
    Options,
    Synthesizers,
    ChatEngines,
    ToolCalling,
    Structured,
    FunctionAgents,
    ReActAgents,
    Observers,
    Running,
)


class LLMContract(*GROUPS):
    """The whole suite.

    A subclass overrides ``make_llm`` and, where it can, ``configure``, ``prompts_read``, ``steps``, ``slow_down``
    and ``count_tokens``; what cannot be seen is skipped. It may set ``max_tokens_option`` and ``stop_option``
    (the class's names for these), ``context_window`` (the model's true one), ``bos`` (the text of the token that
    begins its prompts) and ``secret_options`` (options whose values hold the word "secret").
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """See that no group hides a test of another under the same name."""
        super().__init_subclass__(**kwargs)
        names = [name for group in GROUPS for name in vars(group) if name.startswith("test_")]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"Two groups have tests of one name: {', '.join(twice)}."
            raise TypeError(msg)
