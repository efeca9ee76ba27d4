"""The variables of `kubernetes`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from pipeline.core.errors import UsageError
from pipeline.core.variables import Group, choice, fill, integer, path, read, variable, variables
from pipeline.serve.server import replicas

# Patterns of ASCII, compiled when they are used: every command reads this table.
IMAGE = (
    r"([\w.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # RFC 1123
QUANTITY = r"[1-9]\d*(Mi|Gi|Ti|M|G|T)"
HOST = r"(?!([^.]*\.)*\d+$)(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
PARENT = r"([-a-z0-9]+/)?[a-z0-9]([-.a-z0-9]*[a-z0-9])?(:[a-z0-9]([-.a-z0-9]*[a-z0-9])?)?"
NAME = "{name}"  # in model_image: the instance's
HPA, KEDA = "hpa", "keda"


def matching(pattern: str, allowed: str) -> Callable[[str], str]:
    """A parser for texts that match; `allowed` describes them."""

    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value.strip(), re.ASCII):
            raise ValueError(allowed)
        return value.strip()

    return parse


def model_image(value: str) -> str:
    """An image, with NAME for that of the instance."""
    matching(IMAGE, "an image, such as registry.example/models/{name}:1.0")(
        value.replace(NAME, "x")
    )
    return value.strip()


class Options(Group):
    """Variables for all instances. `replicas` are the least and the most pods; equal: no
    autoscaling."""

    image: str = variable(
        matching(IMAGE, "an image, such as registry.example/llama:1.0"),
        "the image with this project and llama.cpp's programs; for `ray` with Ray too",
        shown="required by `kubernetes` for llama.cpp; without it `ray` writes nothing for KubeRay",
    )
    vllm_image: str = variable(
        matching(IMAGE, "an image, such as vllm/vllm-openai:v0.33.0"),
        "the image with vLLM",
        shown="vLLM's own, of the version whose options are known",
    )
    namespace: str = variable(
        matching(LABEL, "small letters, digits and -, at most 63"),
        "the namespace of all objects",
        shown="the one of `kubectl`",
    )
    replicas: tuple[int, int] | None = variable(
        replicas,
        "pods of each instance, `2`; or the least and the most, `0-4`, and an autoscaler",
        shown="as the file says, else 1",
    )
    autoscaler: str = variable(
        choice(HPA, KEDA),
        "`hpa`, Kubernetes' own, by the servers' metrics; `keda`, by the gateway's requests",
        shown="`keda` for pods from 0, else `hpa`",
    )
    gateway_replicas: int = variable(integer(1, 100), "pods or replicas of the gateway", 2)
    model_image: str = variable(
        model_image,
        "an image with the models, mounted in the place of a claim; `{name}` in it is the "
        "instance's",
        shown="none: a claim",
    )
    route: str = variable(
        matching(HOST, "a host name in small letters, no address, such as chat.example.com"),
        "the host name of an HTTPRoute to the gateway",
        shown="none: no route",
    )
    route_parent: str = variable(
        matching(PARENT, "[NAMESPACE/]NAME[:LISTENER] of a Gateway"),
        "the Gateway of that route: `[NAMESPACE/]NAME[:LISTENER]`",
        shown="required with `route`",
    )
    storage: str = variable(
        matching(QUANTITY, "a size, such as 50Gi"),
        "the size of each claim, such as `50Gi`",
        shown="what the model needs, else `100Gi`",
    )
    storage_class: str = variable(
        matching(r"[a-z0-9][-a-z0-9.]*", "a storage class: small letters, digits, - and ."),
        "the storage class of the claims",
        shown="the cluster's",
    )
    gpus: int | None = variable(
        integer(0, 64),
        "GPUs of the instances whose `gpu_ids` name none",
        shown="1; of `ray` none where this machine has no card of NVIDIA's",
    )
    out: str = variable(
        path,
        "the folder that `kubernetes`, `ray` or `compare` writes; the file that `provenance` "
        "writes, `-` prints it; the `.svg`, `.html` or `.dot` that `graph` writes",
        shown="`deploy/<configuration>` or `reports/<model>` in the home; beside the file; `graph` "
        "prints text",
    )


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
