"""What a file asks for, whatever its form: a spec for each instance, not yet a command line."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from pipeline.core.paths import is_windows_device
from pipeline.serve.server import Control

if TYPE_CHECKING:  # pydantic takes a while to load, and the command line needs no tables
    from .tables import GatewayTable, Master

LONGEST_NAME = 64
RESERVED = ("gateway",)  # runs beside the instances
FORBIDDEN = "/\\," + (':*?"<>|' if os.name == "nt" else "")

Value = str | int | float | bool | list[str | int | float]


class InstanceSpec(Struct, frozen=True, kw_only=True):
    """An instance as its file describes it, with the file's defaults. Nothing is looked up yet."""

    name: str
    control: Control
    server: Mapping[str, Value]  # by the option's name without its dashes, in written order
    extra_args: tuple[str, ...] = ()
    model: Mapping[str, str] = {}  # variables of `prepare`; empty: no table
    download_to: Path | None = None  # the file that a prepared model is to be put at
    typed: tuple[str, ...] = ()  # options that the command line gave: texts, see `options.resolve`
    place: str  # where it is written, for messages: `models.toml: instance.chat`
    places: Mapping[str, str] = {}  # of `server.ctx-size` and so on

    @property
    def engine(self) -> str:
        return self.control.engine

    def at(self, key: str) -> str:
        """Where `key` is written, such as `server.ctx-size` or `control.gpu_ids`."""
        return self.places.get(key, f"{self.place}.{key}")

    def is_typed(self, key: str) -> bool:
        """Whether the command line gave `key`."""
        return self.at(key).endswith("=")

    def table_of(self, key: str) -> str:
        """The table in which `key` is written; empty where the command line gave it."""
        return "" if self.is_typed(key) else self.at(key).rpartition(".")[0]

    def line(self, key: str, why: str) -> str:
        """A line about `key`; `why` is such as ` = 3: must be …`, or `: is missing`."""
        place = self.at(key)  # `port=` where the command line gave it
        if not place.endswith("="):
            return place + why
        if why.startswith(" = "):  # a shell needs no quotes
            return place + re.sub(r'^"([^"\\]*)"', r"\1", why.removeprefix(" = "))
        return place[:-1] + why


class Configuration(Struct, frozen=True, kw_only=True):
    """A file of instances, or a profile."""

    folder: Path  # relative paths in the file start there
    label: str  # the file's name, for messages
    master: Master
    gateway: GatewayTable
    gateway_places: Mapping[str, str] = {}  # of its `port` and so on
    specs: tuple[InstanceSpec, ...] = ()
    notes: tuple[str, ...] = ()  # decisions that the user should know
    errors: tuple[str, ...] = ()  # of reading: `check` raises them with its own

    @property
    def enabled(self) -> tuple[InstanceSpec, ...]:
        """The instances that are to be started."""
        if not self.master.enable:
            return ()
        return tuple(spec for spec in self.specs if spec.control.enabled)

    def prepares(self) -> dict[str, dict[str, str]]:
        """The variables of `prepare` for each instance whose model is prepared first."""
        return {spec.name: dict(spec.model) for spec in self.enabled if spec.model}

    def at_gateway(self, key: str) -> str:
        """Where a key of the gateway is written."""
        return self.gateway_places.get(key, f"{self.label}: gateway.{key}")

    def path(self, text: str) -> Path:
        """A path of the file; `~` is the user's home, relative means the file's folder."""
        return beside(self.folder, text)


def projector_of(file: Path) -> Path:
    """The path of the projector beside the model `file`."""
    return file.with_name(f"mmproj-{file.name}")


def beside(folder: Path, text: str) -> Path:
    """`text` as an absolute path; relative means `folder`."""
    try:
        return folder / Path(text).expanduser()
    except (RuntimeError, UnicodeEncodeError):  # there is no such user
        return folder / text


def wrong_name(name: str) -> str:
    """Why an instance cannot have this name; empty where it can."""
    if not name or name != name.strip():
        return "a name must not be empty, nor begin or end with a space"
    if len(name) > LONGEST_NAME:
        return f"a name has at most {LONGEST_NAME} characters"
    if name.startswith(".") or name.endswith("."):
        return "a name must not begin or end with a dot"
    if name.casefold() in RESERVED:
        return "this name is reserved; take another one"
    if is_windows_device(name):
        return "a name must not be that of a device on Windows"
    if any(sign in FORBIDDEN or not sign.isprintable() for sign in name):
        return f"a name must not hold any of {' '.join(FORBIDDEN)} or control characters"
    return ""


def allowed_name(name: str) -> str:
    """`name` where an instance can have it; else one that begins like it, and is as much its own:
    a stored model has the name that its repository gave it."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    start = name[: LONGEST_NAME - len(digest) - 1]
    names = name, f"{start}-{digest}", f"model-{digest}"
    return next(each for each in names if not wrong_name(each))
