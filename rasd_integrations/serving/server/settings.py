"""Options of the server: from flags, the environment (``RASD_SERVE_...``) and a TOML file, in this order."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from rasd_integrations.config import ContextMode, ExecutorName, WeightsName, reject_unknown
from rasd_integrations.errors import ConfigurationError

_PREFIX = "RASD_SERVE_"


class ServerSettings(BaseSettings):
    """What is served, to whom, and how much of it."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True
    )

    file: ClassVar[str | Path | None] = None

    model: str = Field(min_length=1, description="Hub id, local folder, or path of a .gguf file.")
    name: str | None = Field(None, description="Name that clients ask for; the model's by default.")
    host: str = Field("127.0.0.1", description="Address to listen on; another one needs keys.")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one.")
    keys: dict[SecretStr, str] = Field(
        {}, description="API keys, each with its namespace; not a flag, since others could read it."
    )
    store: str | None = Field(
        None,
        description="Drafted from: FOLDER or http://HOST:PORT of Chroma, with #COLLECTION; FOLDER of FAISS.",
    )

    drafter: str | None = Field("auto", description='"auto", "none", "self", or a small model.')
    executor: ExecutorName = Field("auto", description="What runs steps.")
    weights: WeightsName = Field("auto", description="In what form weights are held.")
    dtype: str | None = Field(None, description="Type of the weights, for example float32.")
    context: ContextMode = Field("prompt", description="What the target reads.")
    knowledge_transfer: str | None = Field(None, description="A rule; none is lossless.")
    deterministic: bool = Field(False, description="The same call gives the same text; slower.")
    memory: str | None = Field(
        None, description="Folder of earlier answers to draft from; none: while it runs."
    )
    cache_dir: str | None = Field(None, description="Folder of what later processes find again.")
    prefix_cache_bytes: int | None = Field(
        None, ge=0, description="Memory for earlier prompts; none: an eighth of what is free."
    )

    streams: int = Field(8, ge=1, description="Answers that are decoded at a time.")
    queue: int = Field(32, ge=0, description="Answers that wait; more are refused with 429.")
    body_bytes: int = Field(16 << 20, ge=1024, description="Largest request.")
    prompt_tokens: int | None = Field(None, ge=1, description="Longest prompt; none: the window.")
    answer_tokens: int | None = Field(None, ge=1, description="Longest answer; none: the window.")
    seconds: float = Field(600.0, gt=0, description="Longest time of a request, waiting included.")
    drain_seconds: float = Field(
        30.0, ge=0, description="After SIGTERM, for requests that run; then they are cut."
    )
    log_format: str = Field("text", pattern="^(text|json)$", description="Of one line a request.")

    @classmethod
    def read(cls, flags: Mapping[str, Any], file: str | Path | None = None) -> ServerSettings:
        """Return the settings of flags, environment and file.

        Raises:
            ConfigurationError: An unknown name, a value out of range, no model, or an open door without keys.
        """
        reject_unknown(flags, cls.model_fields, "rasd serve")
        if file is not None and not Path(file).is_file():
            msg = f"The file of settings {str(file)!r} does not exist."
            raise ConfigurationError(msg)
        kind: Any = type("_FromFile", (cls,), {"file": file, "__module__": cls.__module__})
        try:
            found: ServerSettings = kind(**flags)
        except ValidationError as err:
            # The first part of the place only: of keys, the second is a key.
            faults = [f"{e['loc'][0]}: {e['msg']}." for e in err.errors(include_input=False)]
            msg = f"The server's settings cannot be used. {' '.join(faults)}"
            raise ConfigurationError(msg) from None  # the error would show the keys
        except ValueError as err:  # the file is no TOML
            msg = f"The file of settings {str(file)!r} cannot be read: {err}."
            raise ConfigurationError(msg) from err
        found.check_door()
        return found

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (none is read)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (none is read)
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, cls.file)

    def check_door(self) -> None:
        """Refuse to listen beyond this machine without keys.

        Raises:
            ConfigurationError: The host is another than this machine, and there are no keys.
        """
        if not self.keys and not is_local(self.host):
            msg = (
                f"host is {self.host!r}, where others can reach this server, but there are no keys. Give keys in a "
                f'file (--config FILE with [keys] and lines like "sk-..." = "namespace"), or in {_PREFIX}KEYS as JSON.'
            )
            raise ConfigurationError(msg)

    @property
    def namespaces(self) -> dict[str, str]:
        """The namespace of each key."""
        return {key.get_secret_value(): space for key, space in self.keys.items()}

    def engine_options(self) -> dict[str, Any]:
        """Return the options of :class:`~rasd_integrations.runtime.rasd.RASD` but for the namespace."""
        options: dict[str, Any] = {
            "drafter": None if self.drafter in (None, "none") else self.drafter,
            "memory": True if self.memory is None else self.memory,
            "model_kwargs": {"dtype": self.dtype} if self.dtype else {},
        }
        for name in (
            "executor",
            "weights",
            "context",
            "knowledge_transfer",
            "deterministic",
            "cache_dir",
            "prefix_cache_bytes",
        ):
            options[name] = getattr(self, name)
        return options


ENGINE = (
    "name", "store", "drafter", "executor", "weights", "dtype", "context", "knowledge_transfer", "deterministic",
    "memory", "cache_dir", "prefix_cache_bytes", "streams",
)  # fmt: skip
"""Settings of what answers, without those of a server."""


def add_flags(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Add a flag for each setting, or ``only`` some; none for keys, which a list of processes would show."""
    for name, field in ServerSettings.model_fields.items():
        if name in ("model", "keys") or (only is not None and name not in only):
            continue
        switch = field.annotation is bool
        action: Any = {"action": argparse.BooleanOptionalAction} if switch else {"metavar": "X"}
        flag = f"--{name.replace('_', '-')}"
        default = "" if switch or field.default is None else f" ({field.default})"
        told = f"{field.description or ''}{default}".replace("%", "%%")
        parser.add_argument(flag, help=told, default=None, **action)


def is_local(host: str) -> bool:
    """Return True for an address that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
