"""What a server says of the models that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rasd_integrations.config import SAMPLING_DEFAULTS
from rasd_integrations.errors import ModelLoadError, ServerError
from rasd_integrations.serving.wire import OWN

_Kind = Literal["rasd", "vllm", "other"]


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of its model; what it does not say has its default.

    Attributes:
        name: Of the model, as requests give it.
        kind: Whose server it is.
        window: Longest prompt and answer, in tokens; ``None``: it does not say.
        has_chat_template: Messages can be formatted.
        has_reasoning: Reasoning is marked in the output.
        max_tokens: Longest answer of a call without ``max_tokens``.
    """

    name: str
    kind: _Kind = "other"
    window: int | None = None
    has_chat_template: bool = True
    has_reasoning: bool = False
    max_tokens: int = SAMPLING_DEFAULTS["max_tokens"]

    @property
    def is_final(self) -> bool:
        """True unless it is ours and still loads the model: it then has no window to tell."""
        return self.kind != "rasd" or self.window is not None


def served_in(listed: Any, asked: str, address: str) -> Served:
    """Return what a server's list of models says of the one that is asked for.

    Args:
        listed: Its answer.
        asked: The model's name; empty: the only one that is served.
        address: Where the server is, for errors.

    Raises:
        ModelLoadError: It is not in the list, or none was named and there are several.
        ServerError: It is no list.
    """
    data = listed.get("data") if isinstance(listed, Mapping) else None
    if not isinstance(data, list):
        msg = (
            f"{address}/models answered {repr(listed)[:80]}, which is no list of models. Check base_url; "
            f"it usually ends in /v1."
        )
        raise ServerError(msg)
    entries = {one["id"]: one for one in data if isinstance(one, Mapping) and "id" in one}
    name = asked or (next(iter(entries)) if len(entries) == 1 else "")
    if name not in entries:
        named = f"model is {asked!r}" if asked else "No model is named"
        served = ", ".join(map(repr, entries)) or "none"
        msg = f"{named}, and {address} serves {served}. Name one of those."
        raise ModelLoadError(msg)
    card = entries[name]
    window, owner = card.get("max_model_len"), card.get("owned_by")
    kind: _Kind = owner if owner in ("rasd", "vllm") else "other"
    told = card.get(OWN) if kind == "rasd" else None  # none while it loads
    own: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    most = own.get("max_tokens")
    return Served(
        str(name),
        kind,
        window if isinstance(window, int) else None,
        has_chat_template=own.get("chat_template") is not False,
        has_reasoning=own.get("reasoning") is True,
        max_tokens=most if isinstance(most, int) else SAMPLING_DEFAULTS["max_tokens"],
    )
