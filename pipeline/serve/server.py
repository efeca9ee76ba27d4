"""The server: one record of what is started and how it is watched, whether the command line, a file
or a profile defines it.

`config/` makes it; `supervise` runs one in the foreground, `supervisor/` many in the background.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct, field, to_builtins
from msgspec.structs import replace

from . import address

LLAMA_CPP, VLLM = "llama.cpp", "vllm"
AUTO, STRICT, OFF = SANDBOX_MODES = ("auto", "strict", "off")  # see sandbox.py
GATEWAY = "gateway"  # the engine of the server that forwards to the others
BOOT, DEMAND = "boot", "demand"  # when a server is loaded: at `up`, or when a request names it
SERVICE = ("SERVICE_NAME", "SERVICE_VERSION")  # the name that a deployment gives its server


REPLICAS = re.compile(r"(0|[1-9][0-9]{0,3})(?:-([1-9][0-9]{0,3}))?")


def replicas(value: str) -> tuple[int, int]:
    """The least and the most pods of a server on a cluster: `2`, or `0-4`. Raises ValueError."""
    match = REPLICAS.fullmatch(value.strip())
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= most >= least:
        raise ValueError("a number of pods, 2, or the least and the most of them, 0-4")
    return least, most


class Keeping(Struct, frozen=True, kw_only=True):
    """When a server runs, and how it is restarted and stopped. Times in seconds."""

    background: bool = True
    gpu_ids: str | None = None
    restart: str = "on-failure"  # always, never
    max_restarts: int = 5  # in a row; a server that stays ready for a while starts anew at 0
    restart_pause: float = 1.0  # before the first one; each further one waits twice as long
    ready_timeout: float = 600.0
    stop_timeout: float = 10.0
    start: str = BOOT
    idle_timeout: float = 0.0  # without a request until it is unloaded; 0: when memory is wanted
    pinned: bool = False  # never unloaded to make room
    priority: int = 0  # lower ones are unloaded first, higher ones loaded first


class Control(Keeping, frozen=True, kw_only=True):
    """The table `control` of a file, whose keys and checks are in config/tables.py: a model on the
    command line has the same, and starts without pydantic, which takes a tenth of a second."""

    enabled: bool = True
    engine: str = LLAMA_CPP
    log_dir: str | None = None
    log_file: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    sandbox: str = "auto"
    guard: bool | None = None  # None: of a llama-server that the pipeline made
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    replicas: tuple[int, int] = (1, 1)  # the least and the most pods on a cluster
    probe_timeout: float | None = None  # for one token; None: 60, or 0 where it may sleep


class Server(Keeping, frozen=True, kw_only=True):
    """A server as it will be started and watched. Times in seconds; 0 turns a probe off.

    A change of any field needs a restart. It holds no key, only the path of a file with one.
    """

    name: str
    engine: str = LLAMA_CPP
    executable: str
    cmd: tuple[str, ...]  # the arguments after the executable
    env: Mapping[str, str] = field(default_factory=dict)  # over the inherited one
    downloads: bool = False  # it fetches what it serves itself: then it inherits more
    sandbox: str = "off"
    tuned: tuple[str, ...] = ()  # options among them that `tune` has found
    folder: str  # where it runs: relative paths among its options start there
    log_file: str
    contents: str = ""  # a digest of the files that it reads: see served.contents

    # how others reach it
    host: str = "127.0.0.1"
    port: int = 8080
    prefix: str = ""  # before every path, such as llama-server's --api-prefix
    tls: bool = False
    aliases: tuple[str, ...] = ()  # the model names that it answers to, beside its own name
    kind: str = "chat"  # chat, embedding or rerank: what a request to try it with looks like
    api_key_file: str | None = None  # also what it is asked with
    guard: bool = False  # whoever starts it listens in its place: see guard/
    origins: tuple[str, ...] = ()  # whose pages the guard lets ask it, beside this machine's
    hosts: tuple[str, ...] = ()  # the names that it may be asked under, beside this machine's
    probe_timeout: float = 60.0  # for one token, once health answers

    @property
    def command(self) -> list[str]:
        return [self.executable, *self.cmd]

    def argument(self, option: str) -> str:
        """The value of an option on the command line; empty where it has none."""
        return next((value for name, value in pairwise(self.cmd) if name == option), "")

    @property
    def adapters(self) -> list[tuple[Path, str]]:
        """The LoRA adapters that its options name, with their scales."""
        return self._scaled("--lora")

    @property
    def control_vectors(self) -> list[tuple[Path, str]]:
        """The control vectors that its options name, with their scales."""
        return self._scaled("--control-vector")

    def _scaled(self, name: str) -> list[tuple[Path, str]]:
        """The files of an option and of its form with scales."""
        files = []
        for option, value in pairwise(self.cmd):
            if option in (name, f"{name}-scaled"):
                for text in value.split(","):
                    path, _, scale = (f"{text}:1" if option == name else text).rpartition(":")
                    files.append((Path(self.folder, path), scale))
        return files

    @property
    def named_paths(self) -> list[Path]:
        """The files and folders that its options name, as far as they exist. A word may hold
        several, with scales: `a.gguf,b.gguf:0.5`."""
        words = [
            part
            for word in self.cmd
            for part in (word, *word.split(","), *re.split(r"[,:=]", word))
            if part and not part.startswith("-")
        ]
        paths = [Path(self.folder, word) for word in dict.fromkeys(words)]
        # a word may be no path at all, such as a template: too long for one, or a zero byte in it
        return [path for path in paths if os.path.exists(path)]  # noqa: PTH110

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases, each once."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))

    @property
    def model_name(self) -> str:
        """The name that clients ask for: the first alias, else its own."""
        return self.aliases[0] if self.aliases else self.name

    @property
    def address(self) -> str:
        """The host under which this machine reaches it."""
        return address.reached(self.host)

    @property
    def url(self) -> str:
        return address.url(self.host, self.port, self.prefix, tls=self.tls)

    @property
    def shown_url(self) -> str:
        """The URL for people."""
        return address.shown(self.host, self.port, self.prefix, tls=self.tls)

    def is_as(self, other: Server | None) -> bool:
        """Whether both run alike. The desired state that an older version of the pipeline wrote
        lacks `contents`: that alone is no difference."""
        if other and not (self.contents and other.contents):
            other = replace(other, contents=self.contents)
        return self == other

    def as_json(self) -> dict[str, Any]:
        """What `plan` shows and the supervisor reads; `msgspec.convert` is the inverse."""
        return {"name": self.name, **to_builtins(self)}


def elsewhere(name: str, **known: Any) -> Server:
    """A server that others start, and whose log they keep: `known` says how it is reached."""
    return Server(name=name, executable="", cmd=(), folder="", log_file="", **known)


def service(environ: Mapping[str, str]) -> dict[str, str]:
    """`service` for a summary; nothing where the environment names none."""
    name_and_version = " ".join(filter(None, (environ.get(name, "").strip() for name in SERVICE)))
    return {"service": name_and_version} if name_and_version else {}
