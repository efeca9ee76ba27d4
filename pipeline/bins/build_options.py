"""Which programs are requested."""

from __future__ import annotations

import re

from pipeline.core.process import WINDOWS
from pipeline.core.variables import Group, choice, flag, integer, path, text, variable

# The names that `backend=` takes; `auto` is the first of them that works.
BACKENDS = ("auto", "cuda", "metal", "hip", "sycl", "vulkan", "cpu")
AUTO, SYSTEM = "auto", "system"
REQUIRED, OFF = "required", "off"  # of attestations
# Where the programs come from: compiled here, upstream's, or out of an installed package.
SOURCES = ("build", "prebuilt", "package")
LATEST = "latest"
TAG = r"[A-Za-z0-9]([\w.+-]{0,98}\w)?"
REVISION = r"[A-Za-z0-9]([\w./+-]{0,198}\w)?"
DEFAULT_SOURCE = "prebuilt" if WINDOWS else "build"


def architectures(value: str) -> str:
    """CUDA architectures as CMake takes them; 8.9 is 89, and a comma separates as well."""
    words = [word.strip().lower() for word in re.split(r"[;,]", value) if word.strip()]
    architecture = re.compile(
        r"(\d{1,2}\.\d|\d{2,3})[af]?(-real|-virtual)?|native|all|all-major", re.ASCII
    )
    if not words or not all(architecture.fullmatch(word) for word in words):
        raise ValueError("such as 89, 8.9 or 86-real;90-virtual; native, all or all-major")
    return ";".join(word.replace(".", "") for word in words)


def release_name(value: str) -> str:
    """A tag, or `latest`. Raises ValueError with what is allowed."""
    if not re.fullmatch(TAG, value, re.ASCII):
        raise ValueError(f"{LATEST}, or a tag of upstream's such as b10605 or v0.5.0")
    return value


def revision_name(value: str) -> str:
    """A name that git could have for a commit. Raises ValueError with what is allowed."""
    if not re.fullmatch(REVISION, value, re.ASCII) or re.search(r"\.\.|//|\.lock$", value):
        raise ValueError("latest, pinned, previous, a tag such as b11549, or a commit")
    return value


def attestation(value: str) -> str:
    """`auto`, `required`, `off`, or a path."""
    word = text(value).lower()
    return word if word in (AUTO, REQUIRED, OFF) else text(value)


class BuildOptions(Group):
    """Which of llama.cpp's programs are requested, and how they are made."""

    backend: str = variable(
        choice(*BACKENDS),
        "`cuda`, `metal`, `hip`, `sycl`, `vulkan`, `cpu`, or `auto`: the first of these that works "
        "here; see [backends](backends.md)",
        AUTO,
    )
    source: str = variable(
        choice(*SOURCES),
        "where llama.cpp's programs come from: `build` (compiled here), `prebuilt` (upstream's "
        "own), `package` (an [installed package](packages.md))",
        DEFAULT_SOURCE,
        shown="`build`; on Windows `prebuilt`",
        name="bins",
    )
    release: str = variable(
        release_name,
        "of `bins=prebuilt`: a tag such as `b10605`, a version, or `latest`",
        shown="the pinned one",
    )
    attestation: str = variable(
        attestation,
        "of `bins=prebuilt`: GitHub's [attestation](provenance.md) of the release, checked with "
        "`gh`: `auto` says where it cannot be, `required` refuses then, `off`; or a bundle's path",
        AUTO,
    )
    architectures: str = variable(
        architectures,
        "what CUDA is compiled for, as CMake takes it: `89`, `8.9`, `86-real;90-virtual`, "
        "`all-major`; the GPU need not be here",
        shown="this machine's GPUs",
        name="cuda_architectures",
    )
    toolkit: str = variable(
        path,
        "`auto` (the system's, else NVIDIA's wheels), `system`, or the folder of a toolkit",
        AUTO,
        name="cuda_toolkit",
    )
    portable: bool | None = variable(
        flag,
        "programs for every processor of this kind: all variants are built, the best is loaded",
        shown="0; 1 for `package`",
    )
    jobs: int | None = variable(
        integer(1, 1024),
        "how many compilers run at once, as far as the memory allows",
        shown="one a processor",
    )
    ui: str = variable(
        choice("auto", "on", "off"),
        "llama-server's page: `on`, `off`, or `auto` (unless nothing here can build it)",
        AUTO,
    )

    @property
    def is_for_elsewhere(self) -> bool:
        """Whether it may be meant for machines with other devices."""
        return bool(self.portable or self.architectures)
