"""What servers need, held against what the nodes of a cluster have. Nothing here asks anybody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from pipeline.core.errors import UsageError
from pipeline.core.text import plural, size
from pipeline.serve.server import VLLM

from .config import CPU, GPU, INGRESS_CPUS, MEMORY, ClusterServer


class ClusterNode(Struct, frozen=True, kw_only=True):
    """A node, with all that it has, in use or not."""

    ip: str
    resources: Mapping[str, float]
    id: str = ""

    def holds(self, needed: Mapping[str, float]) -> bool:
        return all(self.resources.get(name, 0) >= count for name, count in needed.items())


def require_fit(servers: Sequence[ClusterServer], nodes: Sequence[ClusterNode]) -> None:
    """Raise UsageError that names each server that fits no node, or is divided and does not fit
    all of them together, with the figures."""
    gpus = sum(int(node.resources.get(GPU, 0)) for node in nodes)
    lines, hints = [], ["set server.ctx_size or a smaller quant, gpus=, or add a node with more"]
    for server in servers:
        resources = server.resources
        first, *others = resources.bundles
        if not any(node.holds(first) for node in nodes):
            lines.append(f"{server.name}: needs {shown(first)} on one node, and no node has that")
        elif others and gpus < resources.gpus:
            lines.append(
                f"{server.name}: needs {shown({GPU: resources.gpus})} of all nodes together, "
                f"and they have {gpus}"
            )
        else:
            continue
        if server.server.engine == VLLM and 1 < resources.gpus <= gpus and not others:
            key = f'[instance.{server.name}.server] distributed_executor_backend = "ray"'
            hints.append(f"have vLLM divide the model among nodes: {key}")
    if not lines:
        return
    wanted = {name for server in servers for name in server.resources.amounts}
    lines += [f"node {node.ip}: has {shown(_only(node, wanted))}" for node in nodes]
    raise UsageError("\n".join(lines), "; or ".join(hints))


def short(servers: Sequence[ClusterServer], ingresses: int, nodes: Sequence[ClusterNode]) -> str:
    """A line where the nodes together have too little for the least replicas of all servers, and
    one of each that may have none; empty where they have enough, as far as sums tell."""
    needed: dict[str, float] = {CPU: ingresses * INGRESS_CPUS}
    for server in servers:
        for name, count in server.resources.amounts.items():
            needed[name] = needed.get(name, 0) + count * max(1, server.replicas[0])
    there = {name: sum(node.resources.get(name, 0) for node in nodes) for name in needed}
    missing = {name: count for name, count in needed.items() if count > there[name]}
    if not missing:
        return ""
    has = shown({name: there[name] for name in missing})
    return (
        f"all servers together need {shown(missing)}, and {plural(len(nodes), 'node')} together "
        f"have {has}: some wait for a node, or for others to go"
    )


def _only(node: ClusterNode, names: set[str]) -> dict[str, float]:
    return {name: node.resources.get(name, 0) for name in (CPU, GPU, MEMORY) if name in names} | {
        name: node.resources.get(name, 0) for name in sorted(names - {CPU, GPU, MEMORY})
    }


def shown(amounts: Mapping[str, float]) -> str:
    """Resources for people: `2 CPUs, 1 GPU, 4.1 GB of memory`."""
    return ", ".join(_shown(amounts))


def _shown(amounts: Mapping[str, float]) -> Iterator[str]:
    for name, count in amounts.items():
        if name == MEMORY:
            yield f"{size(int(count))} of memory"
        elif name in (CPU, GPU):
            yield f"{count:g} {name}" + ("" if count == 1 else "s")
        else:
            yield f"{count:g} {name}"
