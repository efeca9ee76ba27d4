"""The variables of `kubernetes`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from pipeline.core.errors import UsageError
from pipeline.core.variables import Group, fill, integer, path, read, variable, variables

# Patterns of ASCII, compiled when they are used: every command reads this table.
IMAGE = (
    r"([\w.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # RFC 1123
QUANTITY = r"[1-9]\d*(Mi|Gi|Ti|M|G|T)"
REPLICAS = r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?"


def matching(pattern: str, allowed: str) -> Callable[[str], str]:
    """A parser for texts that match; `allowed` describes them."""

    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value.strip(), re.ASCII):
            raise ValueError(allowed)
        return value.strip()

    return parse


def replicas(value: str) -> tuple[int, int]:
    """The least and the most pods: `2`, or `1-4`."""
    match = re.fullmatch(REPLICAS, value.strip(), re.ASCII)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if most < least:
        raise ValueError("a number of pods, 2, or the least and the most of them, 1-4")
    return least, most


class Options(Group):
    """Variables for all instances. `replicas` are the least and the most pods; equal: no
    autoscaling."""

    image: str = variable(
        matching(IMAGE, "an image, such as registry.example/llama:1.0"),
        "the image with this project and llama.cpp's programs",
        "",
        shown="required for llama.cpp",
    )
    vllm_image: str = variable(
        matching(IMAGE, "an image, such as vllm/vllm-openai:v0.33.0"),
        "the image with vLLM",
        "",
        shown="vLLM's own, of the version whose options are known",
    )
    namespace: str = variable(
        matching(LABEL, "small letters, digits and -, at most 63"),
        "the namespace of all objects",
        "",
        shown="the one of `kubectl`",
    )
    replicas: tuple[int, int] = variable(
        replicas,
        "pods of each instance, `2`; or the least and the most, `1-4`, and an autoscaler",
        (1, 1),
        shown="1",
    )
    storage: str = variable(
        matching(QUANTITY, "a size, such as 50Gi"),
        "the size of each claim, such as `50Gi`",
        "",
        shown="what the model needs, else `100Gi`",
    )
    storage_class: str = variable(
        matching(r"[a-z0-9][-a-z0-9.]*", "a storage class"),
        "the storage class of the claims",
        "",
        shown="the cluster's",
    )
    gpus: int | None = variable(
        integer(0, 64),
        "GPUs of the instances whose `gpu_ids` name none",
        shown="1",
    )
    out: str = variable(
        path,
        "the folder that `kubernetes` writes; the file that `provenance` writes, `-` prints it",
        "",
        shown="`deploy/<configuration>` in the home; beside the file",
    )

    @property
    def scales(self) -> bool:
        return self.replicas[0] < self.replicas[1]


def options(words: Mapping[str, str]) -> Options:
    """The options among the variables of the command line. Raises UsageError."""
    table = variables(Options)
    return fill(Options, read({n: v for n, v in words.items() if n in table}, table.values()))


def require_images(options: Options, engines: Mapping[str, str]) -> None:
    """Raise UsageError where an engine has no image. `engines` has the variable of each."""
    for engine, name in engines.items():
        if not getattr(options, name):
            raise UsageError(
                f"{name}=: is missing, and there are instances of {engine}",
                "build docker/Dockerfile, push it where the cluster finds it, and name it here",
            )
