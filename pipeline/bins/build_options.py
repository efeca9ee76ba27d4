"""Which programs are requested."""

from __future__ import annotations

import re

from msgspec import Struct

from pipeline.core.process import WINDOWS

# The names that `backend=` takes; `auto` is the first of them that works.
BACKENDS = ("auto", "cuda", "metal", "hip", "sycl", "vulkan", "cpu")
AUTO, SYSTEM = "auto", "system"
# Where the programs come from: compiled here, upstream's, or out of an installed package.
SOURCES = ("build", "prebuilt", "package")
LATEST = "latest"
TAG = r"[A-Za-z0-9]([\w.+-]{0,98}\w)?"
REVISION = r"[A-Za-z0-9]([\w./+-]{0,198}\w)?"
DEFAULT_SOURCE = "prebuilt" if WINDOWS else "build"


class BuildOptions(Struct, frozen=True, kw_only=True):
    """`architectures` are CMake's, for CUDA; `toolkit`: auto, system or a folder; `portable`: None
    where it was not given; `ui`: auto, on or off; `release`: a tag of upstream's, or latest."""

    source: str = DEFAULT_SOURCE
    backend: str = AUTO
    architectures: str = ""
    toolkit: str = AUTO
    portable: bool | None = None
    jobs: int | None = None
    ui: str = AUTO
    release: str = ""

    @property
    def is_for_elsewhere(self) -> bool:
        """Whether it may be meant for machines with other devices."""
        return bool(self.portable or self.architectures)


def architectures(value: str) -> str:
    """CUDA architectures as CMake takes them; 8.9 is 89, and a comma separates as well."""
    words = [word.strip().lower() for word in re.split(r"[;,]", value) if word.strip()]
    architecture = re.compile(r"(\d{1,2}\.\d|\d{2,3})[af]?(-real|-virtual)?|native|all|all-major")
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
