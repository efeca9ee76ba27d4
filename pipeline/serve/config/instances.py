"""From what was written down to what will be started: command lines and environments."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pipeline.bins import binaries
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.serve.flags import Flag
from pipeline.serve.guard import port
from pipeline.serve.keys import is_loopback
from pipeline.serve.server import LLAMA_CPP, OFF, STRICT, Keeping, Server

from . import api_keys, llama, options, vllm
from .configuration import Configuration, InstanceSpec
from .llama import PreparedModel
from .options import ResolvedOptions

PROBE_TIMEOUT = 60.0  # seconds
IN_CONTAINER = (Path("/.dockerenv"), Path("/run/.containerenv"))


def instances(
    configuration: Configuration,
    *,
    server: Path | None,
    flags: Mapping[str, Flag] | None,
    models: Mapping[str, PreparedModel],
    logs: Path,
    keys: Path,
    xdg: Path,
    environ: Mapping[str, str],
) -> tuple[Server, ...]:
    """The enabled instances, ready to be started; `checks.check` comes first.

    `server` is the llama-server where the file names none, `flags` its options (None: not known,
    and nothing is added that depends on them), `models` the prepared models by instance, `logs`
    where logs go outside of containers, `keys` the folder of keys (see `write_keys`), `xdg` an
    empty folder. Raises PipelineError where a model or llama-server is missing.
    """
    logs = log_folder(logs, environ)
    executable = program(configuration, server)
    servers = []
    for spec in configuration.enabled:
        resolved = resolve(spec, flags)
        key = api_keys.key(configuration, resolved, keys).path
        log = log_file(configuration, spec, logs)
        if spec.engine != LLAMA_CPP:
            servers.append(_vllm_server(configuration, resolved, environ, key=key, log=log))
            continue
        if executable is None:
            raise PipelineError(
                f"{spec.place}: there is no llama-server", f"build it: {doitw('build_bins')}"
            )
        if spec.model and spec.name not in models:
            raise PipelineError(f"{spec.place}.model: is not prepared")
        model, folder = models.get(spec.name) if spec.model else None, configuration.folder
        servers.append(
            llama_server(resolved, executable, model, key=key, folder=folder, log=log, xdg=xdg)
        )
    return tuple(servers)


def write_keys(
    configuration: Configuration, flags: Mapping[str, Flag] | None, keys: Path
) -> list[str]:
    """Write the API keys that the instances need. Returns a message for each key that was made.
    Raises PipelineError."""
    made = []
    for spec in configuration.enabled:
        resolved = resolve(spec, flags)
        key = api_keys.key(configuration, resolved, keys)
        if api_keys.write(key) and key.is_made:
            is_open = not is_loopback(resolved.address.host)
            why = "others can reach it" if is_open else "it is asked through the gateway"
            made.append(f"{spec.name}: {why}, so a key was made: {key.path}")
    return made


def program(configuration: Configuration, default: Path | None) -> Path | None:
    """The llama-server that will run: the one that the file names, else `default`."""
    named = configuration.master.llama_cpp_path
    if not named:
        return default
    path = configuration.path(named)
    on_path = shutil.which(named) if named == path.name and not path.exists() else None
    return Path(on_path) if on_path else path


def is_container(environ: Mapping[str, str], marks: Iterable[Path] = IN_CONTAINER) -> bool:
    """Whether this runs in a container."""
    is_set = "KUBERNETES_SERVICE_HOST" in environ or environ.get("container")  # podman's, and ours
    return bool(is_set) or any(path.exists() for path in marks)


def resolve(
    spec: InstanceSpec,
    flags: Mapping[str, Flag] | None,
    installed: vllm.VllmOptions | None = None,
) -> ResolvedOptions:
    """The options of an instance, as its program takes them. Those of vLLM are looked up in
    `installed` where that is known, else in the version listed here."""
    if spec.engine == LLAMA_CPP:
        return options.resolve(spec, flags or {})
    known, others = installed or vllm.listed(), None if installed else flags or {}
    return options.resolve(spec, known.flags, program=f"vLLM {known.version}", others=others)


def aliases(resolved: ResolvedOptions) -> list[str]:
    """The model names that an instance is given, each once."""
    option = "alias" if resolved.spec.engine == LLAMA_CPP else "served-model-name"
    value = resolved.value(option)
    text = ",".join(map(str, value)) if isinstance(value, list) else resolved.text(option)
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def log_folder(logs: Path, environ: Mapping[str, str]) -> Path:
    """Where logs go by default: the temporary folder in a container, else `logs`."""
    return Path(tempfile.gettempdir()) if is_container(environ) else logs


def log_file(configuration: Configuration, spec: InstanceSpec, logs: Path) -> Path:
    """Where the output of an instance goes; `logs` where it does not say."""
    control = spec.control
    if control.log_file:
        return configuration.path(control.log_file)
    folder = configuration.path(control.log_dir) if control.log_dir else logs
    return folder / f"{spec.name}.log"


def _vllm_server(
    configuration: Configuration,
    resolved: ResolvedOptions,
    environ: Mapping[str, str],
    *,
    key: Path | None,
    log: Path,
) -> Server:
    spec, folder = resolved.spec, configuration.folder
    if spec.control.sandbox == STRICT:
        raise UsageError(
            f"{spec.at('control.sandbox')}: vLLM starts programs of its own, and is not kept "
            "in the sandbox",
            "leave it out",
        )
    return Server(
        **_common(resolved, key, folder, log),
        executable=vllm.executable(configuration, environ),
        cmd=vllm.command(configuration, resolved),
        env={**cards(spec.control.gpu_ids), **spec.control.env},
        downloads=vllm.downloads(resolved, folder),
        sandbox=OFF,
        kind=vllm.kind(resolved),
    )


def llama_server(
    resolved: ResolvedOptions,
    executable: Path,
    model: PreparedModel | None,
    *,
    key: Path | None,
    folder: Path,
    log: Path,
    xdg: Path,
) -> Server:
    """A llama-server as its options ask for it: the one place where its command line is made.

    `key` is the file of its API keys, `folder` where relative paths start, `xdg` an empty folder.
    """
    control = resolved.spec.control
    guard = binaries.is_ours(executable) if control.guard is None else control.guard
    cmd = llama.command(resolved, model, key, folder)
    server = Server(
        **_common(resolved, key, folder, log),
        executable=str(executable),
        cmd=cmd,
        env={**cards(control.gpu_ids), "XDG_CONFIG_HOME": str(xdg), **control.env},
        downloads=llama.downloads(cmd),
        sandbox=control.sandbox,
        origins=control.origins,
        hosts=control.hosts,
        kind=llama.kind(resolved, model),
        tuned=tuple(llama.tuned(resolved, model)),
    )
    return replace(server, guard=guard and port.can_guard(server))


def _common(resolved: ResolvedOptions, key: Path | None, folder: Path, log: Path) -> dict[str, Any]:
    """What a server of either engine is known by, and how it is kept."""
    spec = resolved.spec
    probe_timeout = spec.control.probe_timeout
    if probe_timeout is None:
        sleeps = resolved.text("sleep-idle-seconds") not in ("", "-1")  # a probe would wake it
        probe_timeout = 0.0 if sleeps else PROBE_TIMEOUT
    return {
        "name": spec.name,
        "engine": spec.engine,
        **reached_at(resolved),
        "aliases": tuple(name for name in aliases(resolved) if name != spec.name),
        "folder": str(folder),
        "log_file": str(log),
        "api_key_file": str(key) if key else None,
        "probe_timeout": probe_timeout,
        **{name: getattr(spec.control, name) for name in Keeping.__struct_fields__},
    }


def reached_at(resolved: ResolvedOptions) -> dict[str, Any]:
    """How others reach a server of either engine."""
    return {
        "host": resolved.address.host,
        "port": resolved.address.port,
        "prefix": resolved.text("api-prefix").rstrip("/"),
        "tls": bool(resolved.text("ssl-cert-file", "ssl-certfile")),
    }


def cards(gpu_ids: str | None) -> dict[str, str]:
    """The environment that shows an instance its cards, in the order of their slots."""
    if gpu_ids in (None, "all"):
        return {}
    shown = "" if gpu_ids == "none" else str(gpu_ids)
    return {"CUDA_VISIBLE_DEVICES": shown, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
