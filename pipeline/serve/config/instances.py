"""From what was written down to what will be started: command lines and environments."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve import launch, sandbox
from pipeline.serve.flags import Flag
from pipeline.serve.instance import LLAMA_CPP, Instance

from . import api_keys, llama, options, vllm
from .addresses import address
from .configuration import Configuration, InstanceSpec
from .llama import PreparedModel
from .options import ResolvedOptions
from .vllm_installed import VllmOptions

IN_CONTAINER = (Path("/.dockerenv"), Path("/run/.containerenv"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where things go."""

    logs: Path  # outside of containers
    keys: Path  # of API keys, see `write_keys`
    xdg: Path  # an empty one


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
) -> tuple[Instance, ...]:
    """The enabled instances, ready to be started; `checks.check` comes first.

    `server` is the llama-server where the file names none, `flags` its options (None: not known,
    and nothing is added that depends on them), `models` the prepared models by instance, `logs`
    where logs go outside of containers, `keys` the folder of keys (see `write_keys`), `xdg` an
    empty folder. Raises PipelineError where a model or llama-server is missing.
    """
    folders = Folders(
        logs=Path(tempfile.gettempdir()) if is_container(environ) else logs, keys=keys, xdg=xdg
    )
    found = program(configuration, server)
    return tuple(
        _instance(configuration, given(draft, flags), found, models, folders, environ)
        for draft in configuration.enabled
    )


def write_keys(
    configuration: Configuration, flags: Mapping[str, Flag] | None, keys: Path
) -> list[str]:
    """Write the API keys that the instances need; what was made, to be said.

    Raises PipelineError.
    """
    said = []
    for draft in configuration.enabled:
        key = _key(configuration, given(draft, flags), keys)
        if api_keys.write(key) and key.is_made:
            said.append(f"{draft.name}: others can reach it, so a key was made: {key.path}")
    return said


def program(configuration: Configuration, found: Path | None) -> Path | None:
    """The llama-server that will run: the one that the file names, else `found`."""
    named = configuration.master.llama_cpp_path
    if not named:
        return found
    path = configuration.path(named)
    on_path = shutil.which(named) if named == path.name and not path.exists() else None
    return Path(on_path) if on_path else path


def is_container(environ: Mapping[str, str], marks: Iterable[Path] = IN_CONTAINER) -> bool:
    """Whether this runs in a container, where logs go to the temporary folder."""
    told = "KUBERNETES_SERVICE_HOST" in environ or environ.get("container")  # podman's, and ours
    return bool(told) or any(path.exists() for path in marks)


def given(
    draft: InstanceSpec, flags: Mapping[str, Flag] | None, installed: VllmOptions | None = None
) -> ResolvedOptions:
    """What an instance says of its program's options: vLLM's are those of the one that is
    installed, where it was asked, else those of the version that is listed here."""
    if draft.engine == LLAMA_CPP:
        return ResolvedOptions(options.typed(draft, flags or {}), flags or {})
    known = installed.flags if installed else vllm.flags()
    return ResolvedOptions(
        options.typed(draft, known), known, installed.version if installed else ""
    )


def aliases(given: ResolvedOptions) -> list[str]:
    """The model names that an instance is given, each once."""
    is_llama = given.draft.engine == LLAMA_CPP
    text = given.text("alias") if is_llama else vllm.aliases(given)
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def log_file(configuration: Configuration, draft: InstanceSpec, logs: Path) -> Path:
    """Where the output of an instance goes; `logs` where it does not say."""
    control = draft.control
    if control.log_file:
        return configuration.path(control.log_file)
    folder = configuration.path(control.log_dir) if control.log_dir else logs
    return folder / f"{draft.name}.log"


def _instance(
    configuration: Configuration,
    given: ResolvedOptions,
    server: Path | None,
    models: Mapping[str, PreparedModel],
    folders: Folders,
    environ: Mapping[str, str],
) -> Instance:
    draft = given.draft
    control, at = draft.control, address(given)
    key = _key(configuration, given, folders.keys)
    env = _cards(control.gpu_ids)
    if draft.engine == LLAMA_CPP:
        if server is None:
            raise PipelineError(f"{draft.place}: there is no llama-server", "doit build_bins")
        model = _model(draft, models)
        executable = str(server)
        cmd = llama.command(given, at, model, key.path)
        kind, downloads = llama.kind(given, model), launch.downloads(cmd)
        env["XDG_CONFIG_HOME"] = str(folders.xdg)
        prefix, tls = given.text("api-prefix").rstrip("/"), bool(given.text("ssl-cert-file"))
    else:
        executable = vllm.executable(configuration, environ)
        cmd = vllm.command(configuration, given, at)
        kind, downloads = vllm.kind(given), vllm.downloads(given, configuration.folder)
        prefix, tls = "", bool(given.text("ssl-certfile"))
        if control.sandbox == sandbox.STRICT:
            raise UsageError(
                f"{draft.at('control.sandbox')}: vLLM starts programs of its own, and is not kept "
                "in the sandbox",
                "leave it out",
            )
    asleep = given.text("sleep-idle-seconds") not in ("", "-1")
    unsaid = "probe_timeout" not in control.model_fields_set
    return Instance(
        name=draft.name,
        engine=draft.engine,
        executable=executable,
        cmd=cmd,
        env={**env, **control.env},
        downloads=downloads,
        sandbox=control.sandbox if draft.engine == LLAMA_CPP else sandbox.OFF,
        folder=str(configuration.folder),
        log_file=str(log_file(configuration, draft, folders.logs)),
        host=at.host,
        port=at.port,
        prefix=prefix,
        tls=tls,
        aliases=tuple(name for name in aliases(given) if name != draft.name),
        kind=kind,
        api_key_file=str(key.path) if key.path else None,
        background=control.background,
        gpu_ids=control.gpu_ids,
        restart=control.restart,
        max_restarts=control.max_restarts,
        restart_pause=control.restart_pause,
        ready_timeout=control.ready_timeout,
        stop_timeout=control.stop_timeout,
        probe_timeout=0.0 if asleep and unsaid else control.probe_timeout,
    )


def _cards(gpu_ids: str | None) -> dict[str, str]:
    """The environment that shows an instance its cards, in the order of their slots."""
    if gpu_ids in (None, "all"):
        return {}
    shown = "" if gpu_ids == "none" else str(gpu_ids)
    return {"CUDA_VISIBLE_DEVICES": shown, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _key(configuration: Configuration, given: ResolvedOptions, keys: Path) -> api_keys.Key:
    return api_keys.key(given, address(given), configuration.folder, keys)


def _model(draft: InstanceSpec, models: Mapping[str, PreparedModel]) -> PreparedModel | None:
    if not draft.model:
        return None
    if draft.name not in models:
        raise PipelineError(f"{draft.place}.model: is not prepared")
    return models[draft.name]
