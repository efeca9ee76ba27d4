"""An instance of the file as a node runs it: what a cluster decides itself is left out of it, and
what no node could know is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pipeline.bins.binaries import DEVICES
from pipeline.core.environment import is_credential
from pipeline.core.text import plural
from pipeline.models import quants
from pipeline.serve.config import instances, vllm
from pipeline.serve.config.api_keys import NONE, split
from pipeline.serve.config.configuration import Configuration, InstanceSpec, Value
from pipeline.serve.config.options import LISTS, PATHS, normalized
from pipeline.serve.flags import Flag
from pipeline.serve.server import DEMAND, LLAMA_CPP, VLLM

from .config import Resources

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # Ray makes names of files of it
SHARE = 0.001  # of a backend that a node has: any number of servers use it
WITH_GPU = 4 * 1024**3  # bytes of memory: the weights only pass through the page cache

# Keys of `control` that a node heeds; the cluster decides all others.
KEPT = (
    *("engine", "env", "sandbox", "restart", "max_restarts", "restart_pause", "ready_timeout"),
    *("stop_timeout", "probe_timeout"),
)
UNUSED = {
    "background": "a cluster's servers are never in the foreground",
    "log_dir": "logs are in the folder of the node's Ray session",
    "log_file": "logs are in the folder of the node's Ray session",
    "guard": "only the gateway reaches it",
    "hosts": "only the gateway reaches it",
    "origins": "only the gateway reaches it",
    "pinned": "replicas= keeps it loaded",
    "priority": "Ray places replicas in the order in which they are needed",
    "start": "replicas= says how many there are without a request",
}
OURS = {
    "host": "each replica listens on its node's own address",
    "port": "each replica takes a free port",
    "api-key-file": "only the gateway has the key of a replica, a new one each time",
    "api-prefix": "only the gateway reaches it",
}
IN_WORDS = ("--host", "--port", "--api-key", "--api-key-file", "--api-prefix")
MASTER = ("pixi_project_dir", "pixi_environment", "api_server_module", "python", "llama_cpp_path")
PATHS_OF_MASTER = ("pixi_project_dir", "python", "llama_cpp_path")

EXECUTOR = "distributed-executor-backend"  # of vLLM; `ray`: on several nodes
IN_GROUP = "pipeline.deploy.ray.vllm_in_group"  # stands for vLLM's module there


def errors(spec: InstanceSpec, flags: Mapping[str, Flag]) -> Iterator[str]:
    """What a cluster cannot run of an instance. `flags` are llama-server's options."""
    if not NAME.fullmatch(spec.name):
        yield f"{spec.place}: on a cluster a name has letters, digits, ., _ and - ; rename it"
    if any(key != NONE for key in split(spec.server.get("api-key"))):
        why = "would be in Serve's configuration; leave it out, the gateway's key is for clients"
        yield spec.line("server.api-key", f": {why}")
    for name, text in spec.control.env.items():
        if is_credential(name, text):
            why = f"{name} would be in Serve's configuration; set it on the nodes"
            yield spec.line("control.env", f": {why}")
    for word in spec.extra_args:
        if (option := normalized(word).partition("=")[0]) in IN_WORDS:
            yield spec.line("server.extra-args", f": {option}: is decided on the cluster")
    for name, value in spec.server.items():
        if name.startswith("ssl-") and value is not False:
            yield spec.line(f"server.{name}", ": replicas speak plain HTTP with the gateway")
        takes_path = name in flags and flags[name].value.startswith(PATHS)
        if (takes_path or name in LISTS or (name == "model" and spec.engine == LLAMA_CPP)) and (
            path := next((path for path in _paths(name, value) if not is_absolute(path)), "")
        ):
            why = f" = {path}: a node has no folder to start at; write the path that all nodes have"
            yield spec.line(f"server.{name}", why)
    yield from _errors_of_divided(spec)
    if (quant := spec.model.get("quant", "")).upper() in quants.DECIDED:
        yield f"{spec.at('model.quant')} = {quant}: depends on one machine's memory; name a quant"


def _errors_of_divided(spec: InstanceSpec) -> Iterator[str]:
    """What cannot be of a vLLM on several nodes."""
    if not is_divided(spec):
        return
    if spec.control.gpu_ids not in (None, "all"):
        why = f" = {spec.control.gpu_ids}: names cards of one machine, and several are used"
        yield spec.line("control.gpu_ids", why)
    if instances.resolve(spec, None).number("data-parallel-size") > 1:
        why = ": vLLM places each of these by itself; write control.replicas instead"
        yield spec.line("server.data-parallel-size", why)


def is_divided(spec: InstanceSpec) -> bool:
    """Whether vLLM's GPUs may be on several nodes."""
    return spec.engine == VLLM and instances.resolve(spec, None).text(EXECUTOR) == "ray"


def _paths(name: str, value: Value) -> Iterator[str]:
    """The paths in the value of an option: in a list, between commas, before a scale."""
    for item in value if isinstance(value, list) else [value]:
        for text in str(item).split(",") if name in LISTS else [str(item)]:
            if isinstance(item, str) and text:
                yield text.rpartition(":")[0] if name.endswith("-scaled") else text


def is_absolute(path: str) -> bool:
    """Whether it names a place on any machine; `~` is somebody's on each."""
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def of_file(configuration: Configuration) -> Iterator[str]:
    """What a cluster cannot do of what holds for all instances."""
    gateway, master = configuration.gateway, configuration.master
    if any(key != NONE for key in split(gateway.api_key)):
        why = "would be in Serve's configuration; write api_key_file, a file that all nodes have"
        yield f"{configuration.at_gateway('api_key')}: {why}"
    if gateway.pull:
        yield f"{configuration.at_gateway('pull')}: a cluster serves the models of its file alone"
    for name in PATHS_OF_MASTER:
        path = getattr(master, name)
        if path and ("/" in path or "\\" in path) and not is_absolute(path):
            why = "a node has no folder to start at; write the path that all nodes have"
            yield f"{configuration.label}: master.{name} = {path}: {why}"
    if "api_server_module" in master.model_fields_set and any(map(is_divided, configuration.specs)):
        why = f'cannot be chosen with {EXECUTOR.replace("-", "_")} = "ray"; leave it out'
        yield f"{configuration.label}: master.api_server_module: {why}"


def notes(spec: InstanceSpec) -> Iterator[str]:
    """What a cluster leaves unused of an instance, which works on one machine."""
    for key, why in UNUSED.items():
        is_demand = key == "start" and spec.control.start == DEMAND  # see replicas()
        if f"control.{key}" in spec.places and not is_demand:
            yield spec.line(f"control.{key}", f": not used: {why}")
    for name, why in OURS.items():
        if name in spec.server:
            yield spec.line(f"server.{name}", f": not used: {why}")


def unused_of_file(configuration: Configuration) -> Iterator[str]:
    """The same of what holds for all instances."""
    for name in ("memory", "max_loading", "swap_wait", "saved_slots"):
        if name in configuration.master.model_fields_set:
            why = "the cluster places replicas"
            yield f"{configuration.label}: master.{name}: not used: {why}"
    if not configuration.gateway.enable:
        yield f"{configuration.label}: the gateway runs too: nothing else reaches the replicas"


def replicas(spec: InstanceSpec) -> tuple[int, int]:
    """The least and the most replicas: `start = "demand"` alone means none until a request."""
    if spec.control.start == DEMAND and "control.replicas" not in spec.places:
        return 0, 1
    return spec.control.replicas


def cards(spec: InstanceSpec, default: int) -> tuple[int, dict[str, float], str]:
    """The GPUs that a replica needs, the cards that it names as resources of a node, and a note for
    the user. `default` is for an instance that names none."""
    ids = spec.control.gpu_ids
    if is_divided(spec):
        count = vllm.gpus(instances.resolve(spec, None))
        return count, {}, f"{plural(count, 'GPU')} requested, on as few nodes as have them"
    if ids == "none":
        return 0, {}, ""
    if ids in (None, "all"):
        problem = "is not set" if ids is None else 'is "all"'
        return default, {}, f"gpu_ids {problem}: {plural(default, 'GPU')} requested; see gpus="
    named = str(ids).split(",")
    if all(each.isdecimal() for each in named):
        note = f"gpu_ids = {ids}: {plural(len(named), 'GPU')} requested; Ray chooses which"
        return len(named), {}, note
    return 0, {f"card:{each}": 1.0 for each in named}, ""


def resources(
    spec: InstanceSpec, *, threads: int, memory: int, default_gpus: int
) -> tuple[Resources, str]:
    """What a replica needs of a node, and a note about its GPUs. `memory` in bytes of all devices;
    0: unknown, so none is reserved."""
    gpus, custom, note = cards(spec, default_gpus)
    if name := backend(spec):
        custom[f"backend:{name}"] = SHARE
    on_card = gpus or custom
    return Resources(
        cpus=float(threads or 1),
        gpus=gpus,
        memory=min(memory, WITH_GPU) if on_card else memory,
        custom=custom,
        is_divided=is_divided(spec),
    ), note


def backend(spec: InstanceSpec) -> str:
    """The backend that `device` names and a number of GPUs does not imply; empty for any."""
    return backend_of(str(spec.server.get("device", "")))


def backend_of(device: str) -> str:
    """The backend of a device such as `Vulkan0`, but for CUDA's."""
    for name, pattern in DEVICES.items():
        if name != "cuda" and re.match(rf"({pattern})\d*\b", device):
            return name
    return ""


def text(spec: InstanceSpec, configuration: Configuration, ctx_size: int) -> str:
    """The file with this instance alone, for a node. `ctx_size` is its context in tokens where no
    option names one; 0: the server's own."""
    import tomli_w

    server: dict[str, Any] = {
        name.replace("-", "_"): _plain(value)
        for name, value in spec.server.items()
        if name not in OURS and name != "api-key"
    }
    if ctx_size and not {"ctx-size", "c"} & {*spec.server}:
        server["ctx_size"] = ctx_size
    if spec.extra_args:
        server["extra_args"] = list(spec.extra_args)
    control: dict[str, Any] = {
        name: _plain(getattr(spec.control, name))
        for name in KEPT
        if f"control.{name}" in spec.places or name == "engine"
    }
    ids = spec.control.gpu_ids
    if ids and ids != "all" and not all(each.isdecimal() for each in ids.split(",")):
        control["gpu_ids"] = ids
    tables: dict[str, Any] = {"control": control, "server": server}
    if spec.model:
        tables["model"] = _model(spec.model)
    master = configuration.master
    own = {n: getattr(master, n) for n in MASTER if n in master.model_fields_set}
    if is_divided(spec):
        own["api_server_module"] = IN_GROUP
    file = {**({"master": own} if own else {}), "instance": {spec.name: tables}}
    return tomli_w.dumps(file)


def _plain(value: Any) -> Any:
    """The value for TOML: a decimal by its text, as the option gets it."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if type(value) not in (int, float, bool, str) else value


def _model(words: Mapping[str, str]) -> dict[str, Any]:
    """The table `model` of these variables of `prepare`."""
    table: dict[str, Any] = {"ref": words["model"]}
    table |= {name: value for name, value in words.items() if name not in ("model", "keep_f16")}
    if "keep_f16" in words:
        table["keep_f16"] = words["keep_f16"] == "1"
    return table


def files(spec: InstanceSpec) -> Iterator[str]:
    """The files and folders of this machine that every node needs, at the same path."""
    names = ("model", "draft", "mmproj", "imatrix")
    texts = [spec.model.get(name, "") for name in names]
    texts += [text.partition(":")[0] for text in spec.model.get("lora", "").split(",")]
    texts.append(str(spec.server.get("model", "")))
    yield from (text for text in dict.fromkeys(texts) if text and Path(text).is_absolute())
