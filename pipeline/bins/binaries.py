"""llama.cpp's programs, wherever they come from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import Home, absolute
from pipeline.core.pins import pins
from pipeline.core.process import WINDOWS, indented, outcome
from pipeline.core.store import json_file, receipts, stat_cache
from pipeline.core.store.publish import remove
from pipeline.core.store.receipts import Recipe

IMAGES_OWN = Path("/opt/llama-cpp/bin")  # where docker/Dockerfile puts its programs
PROGRAMS = (
    "llama-server",
    "llama-quantize",
    "llama-gguf-split",
    "llama-perplexity",
    "llama-imatrix",
    "llama-bench",
    "llama-fit-params",
)
# ggml's functions that quantize, for models that are quantized as they are converted: built for
# that, or the library that programs which share one are linked with.
QUANTIZER = "libggml-quantizer.so"
QUANTIZERS = (QUANTIZER, "libggml-base.so.*")

# How --list-devices names their devices, before the number: CUDA0, Vulkan1.
DEVICES = {
    "cuda": "CUDA",
    "metal": "MTL|Metal",
    "hip": "ROCm",
    "sycl": "SYCL",
    "vulkan": "Vulkan",
}
VISIBLE = re.compile(r"\s*(\d|GPU-|MIG-)")  # a list of cards that shows one at least
TIMEOUT = 120  # seconds; a first start reads hundreds of MB, and asks every driver


def program_file(name: str, *, windows: bool = WINDOWS) -> str:
    """The file name of a program, by default on this system."""
    return f"{name}.exe" if windows else name


class ProgramSource(Struct, frozen=True):
    """Programs in a folder, and how they are made. Nothing is done yet."""

    @property
    def tag(self) -> str:
        """Platform, backend and what else distinguishes them."""
        raise NotImplementedError

    @property
    def target(self) -> Path:
        """The folder that is published."""
        raise NotImplementedError

    @property
    def programs(self) -> Path:
        """The folder in `target` that they lie in."""
        return self.target

    @property
    def commit(self) -> str:
        """How receipts of what they make name them."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Disk space that making them takes, roughly."""
        return 0

    @property
    def download(self) -> int:
        """Bytes to download for it, as far as that is known."""
        return 0

    @property
    def has_quantizer(self) -> bool:
        """Whether `Binaries.quantizer` will be among them."""
        return False

    def recipe(self) -> Recipe:
        """Everything that they depend on."""
        raise NotImplementedError

    def required(self) -> Iterable[str]:
        """The names of files without which they are not complete, besides those with a receipt."""
        return ()

    def is_current(self) -> bool:
        """Whether every file is as the recipe made it. Nothing is hashed or downloaded."""
        return receipts.folder_is_current(self.programs, self.recipe(), self.required())

    def make(self, *, force: bool = False, offline: bool = False, refresh: bool = False) -> None:
        """Make and publish them, unless that is done. Raises PipelineError."""
        raise NotImplementedError

    def clean(self) -> None:
        """Remove them."""
        remove(self.target)

    def forget(self) -> None:
        """Drop their receipts."""
        receipts.forget_folder(self.programs)


class Binaries(Struct, frozen=True, kw_only=True):
    """A folder of programs; `commit` names llama.cpp's, and is empty for folders of others."""

    folder: Path
    commit: str
    home: Home

    def program(self, name: str) -> Path:
        """The path of a program. Raises PipelineError where it is missing."""
        path = self.folder / program_file(name)
        if not path.exists():
            raise PipelineError(
                f"{self.folder}: there is no {path.name} in it",
                f"build it: {doitw('build_bins')}"
                if self.commit
                else "LLAMA_SERVER_BINS_DIR names this folder; add the program or unset it",
            )
        return path

    def find(self, name: str) -> Path | None:
        """The path of a program; None where it is missing: upstream's archives lack some."""
        path = self.folder / program_file(name)
        return path if path.exists() else None

    def has(self, name: str) -> bool:
        """Whether there is such a program."""
        return self.find(name) is not None

    @property
    def quantizer(self) -> Path | None:
        """The library with ggml's functions that quantize; None where there is none, or programs of
        another llama.cpp than the pinned one lie there: its llama-quantize may go another way."""
        if (self.commit or packed(self.folder, "commit")) != pins().llama_cpp_commit:
            return None
        found = (path for name in QUANTIZERS for path in sorted(self.folder.glob(name)))
        return next(found, None)

    def sha256(self, name: str) -> str:
        """SHA-256 of a program, from its receipt or hashed once."""
        return program_sha256(self.program(name), self.home)

    def recipe(self, name: str) -> Mapping[str, Any]:
        """How the receipts of what it makes name a program."""
        return {"commit": self.commit, "build": f"sha256:{self.sha256(name)}"}


def program_sha256(path: Path, home: Home) -> str:
    """SHA-256 of a program or library, from its receipt or hashed once."""
    return receipts.known_sha256(path) or stat_cache.identity(home.run / "programs.json", path)


def packed(folder: Path, key: Literal["backend", "commit", "tree"]) -> str:
    """What the manifest of a package says of its programs in `folder`; empty where there is
    none."""
    return json_file.read(folder.parent / "manifest.json", lambda data: str(data[key])) or ""


def is_ours(program: Path) -> bool:
    """Whether the pipeline made, fetched or packed a program, or will make it. Any other may be of
    any version, or a script that starts one."""
    folder = program.resolve().parent
    return not program.is_file() or bool(packed(folder, "backend") or receipts.load(folder))


def chosen_folder() -> str:
    """The value of LLAMA_SERVER_BINS_DIR, right or wrong; empty where it is not set."""
    return os.environ.get("LLAMA_SERVER_BINS_DIR", "").strip()


def external(home: Home) -> Binaries | None:
    """The folder that LLAMA_SERVER_BINS_DIR names, if any; an installed package goes before a
    container image's own. Raises UsageError."""
    chosen = chosen_folder()
    if not chosen:
        return None
    folder, installed = absolute(chosen), home.bins / "package" / "bin"
    if folder == IMAGES_OWN and (installed / program_file("llama-server")).is_file():
        folder = installed
    if not (folder / program_file("llama-server")).is_file():
        raise UsageError(
            f"LLAMA_SERVER_BINS_DIR={chosen}: there is no {program_file('llama-server')} in it",
            "name the folder that holds llama.cpp's programs, or unset it to have them built",
        )
    return Binaries(folder=folder, commit="", home=home)


# What they print


def try_out(server: Path, backend: str, hint: str, *, needs_device: bool = True) -> str:
    """The version that llama-server prints. Raises PipelineError where it does not start, or sees
    no device of its backend."""
    version = output_of(server, "--version", hint)
    devices = output_of(server, "--list-devices", hint)
    if needs_device and not shows(devices, backend):
        raise PipelineError(
            f"{server.name} --list-devices shows no device of {backend}:\n{indented(devices)}",
            hidden_cards(backend) or hint,
        )
    named = (line for line in version.splitlines() if line.startswith("version: "))
    return next(named, version.splitlines()[0]).removeprefix("version: ")


def hidden_cards(backend: str) -> str:
    """What to change where the environment hides all cards from programs for `backend`; empty
    where it hides none. CUDA reads its list up to the first entry that is not a card."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if backend != "cuda" or shown is None or VISIBLE.match(shown):
        return ""
    return f"CUDA_VISIBLE_DEVICES={shown} hides all cards: unset it, or pass backend=cpu"


def shows(devices: str, backend: str) -> bool:
    """Whether a device of the backend is listed. The CPU backend needs none."""
    return backend == "cpu" or bool(re.search(rf"^ *({DEVICES[backend]})\d*:", devices, re.M))


def devices(server: Path, env: Mapping[str, str]) -> list[str]:
    """The devices that --list-devices lists, without their free memory; none where it fails."""
    _, out, err = outcome([server, "--list-devices"], timeout=TIMEOUT, env=env)
    names = re.findall(r"^ *(\w+\d+: .+?)(?: \(\d+ MiB, .*)?$", out + err, re.M)
    return [name for name in names if not name.startswith("CPU")]


def output_of(server: Path, option: str, hint: str) -> str:
    """The output of the server with an option. Raises PipelineError where it fails or is empty."""
    status, out, err = outcome([server, option], timeout=TIMEOUT)
    text = (out + err).encode("utf-8", "replace").decode("utf-8").strip()
    if status or not text:
        raise PipelineError(
            f"{server.name} does not run ({option} ended with {status}):\n{indented(text)}", hint
        )
    return text
