"""What the command line says of a cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.core.errors import UsageError
from pipeline.core.variables import Variable, integer, read, text

from .workload import LABEL

IMAGE = re.compile(
    r"([\w.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
QUANTITY = re.compile(r"[1-9]\d*(Mi|Gi|Ti|M|G|T)")
REPLICAS = re.compile(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """For all instances. `gpus` is for those whose gpu_ids say no number; `storage` is the size of
    each claim, empty: what the model needs."""

    image: str = ""
    vllm_image: str = ""
    namespace: str = ""
    replicas: tuple[int, int] = (1, 1)  # at least, at most; equal: no autoscaling
    storage: str = ""
    storage_class: str = ""
    gpus: int | None = None

    @property
    def scales(self) -> bool:
        return self.replicas[0] < self.replicas[1]


def matching(pattern: re.Pattern[str], allowed: str) -> Callable[[str], str]:
    """A text of that form."""

    def parse(value: str) -> str:
        if not pattern.fullmatch(value.strip()):
            raise ValueError(allowed)
        return value.strip()

    return parse


def replicas(value: str) -> tuple[int, int]:
    """`2`, or `1-4`."""
    found = REPLICAS.fullmatch(value.strip())
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if most < least:
        raise ValueError("a number of pods, 2, or the least and the most of them, 1-4")
    return least, most


TABLE = (
    Variable("image", matching(IMAGE, "an image, such as registry.example/llama:1.0")),
    Variable("vllm_image", matching(IMAGE, "an image, such as vllm/vllm-openai:v0.33.0")),
    Variable("namespace", matching(LABEL, "small letters, digits and -, at most 63")),
    Variable("replicas", replicas),
    Variable("storage", matching(QUANTITY, "a size, such as 50Gi")),
    Variable("storage_class", matching(re.compile(r"[a-z0-9][-a-z0-9.]*"), "a storage class")),
    Variable("gpus", integer(0, 64)),
    Variable("out", text),
)


def options(given: Mapping[str, str]) -> Options:
    """Those of `given` that are for a cluster. Raises UsageError."""
    names = {variable.name for variable in TABLE} - {"out"}
    values = read({name: value for name, value in given.items() if name in names}, TABLE)
    return Options(**values)  # type: ignore[arg-type]


def require_images(options: Options, engines: Mapping[str, str]) -> None:
    """Raise UsageError where an engine has no image. `engines` tells its variable."""
    for engine, variable in engines.items():
        if not getattr(options, variable):
            raise UsageError(
                f"{variable}=: is missing, and there are instances of {engine}",
                "build docker/Dockerfile, push it where the cluster finds it, and name it here",
            )
