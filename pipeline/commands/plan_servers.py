"""`plan config=…` and `up dry_run=1`: what `up` would start. Nothing is made, nothing started."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.paths import Home
from pipeline.core.process import shown
from pipeline.core.text import size, table
from pipeline.deploy.kubernetes.workload import without_programs
from pipeline.models.reference import WITHOUT_DRAFT, split_scale
from pipeline.serve import sandbox
from pipeline.serve.config import checks, instances
from pipeline.serve.config.configuration import InstanceSpec
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.guard import port
from pipeline.serve.server import LLAMA_CPP, Server
from pipeline.serve.supervisor import control, state
from pipeline.serve.supervisor.state import DesiredState

from . import beside, check, launch, ps, serve
from . import plan as planning
from .servers import BESIDE, Servers
from .up import chosen, planned
from .variables import CONTAINER

PATH = re.compile(r"[/.~]|.*\.gguf$")  # a reference that is a path
IMAGE_HOME, IMAGE_PROGRAM = Path("/data"), Path("/opt/llama-cpp/bin/llama-server")


def planned_here(servers: Servers) -> DesiredState:
    """What `up` would start, as far as it is known now. Raises PipelineError."""
    check.check_servers(servers, log.info)
    servers.require_placed()
    check.require_known(servers.models.values())
    instances = planned(servers)
    for server in instances:
        serve.require_fitting(servers.home, server)
    for warning in launch.warnings(servers, instances):
        log.info(f"warning: {warning}")
    return chosen(servers, instances)


def of_container(servers: Servers) -> tuple[Server, ...]:
    """The instances as the image of docker/Dockerfile starts them. The files, GPUs and repositories
    that the file names are not checked: this machine may have none of them. A model that the
    container prepares is named by its reference. Raises PipelineError."""
    configuration = servers.configuration
    programs, at = servers.programs, state.folder(Home(IMAGE_HOME), servers.requested.source)
    flags = serve.known_flags(programs) if programs.are_done() else None
    gateway = configuration.gateway
    checks.check(
        replace(
            without_programs(configuration),
            specs=tuple(map(_without_files, configuration.specs)),
            gateway=gateway.model_copy(update={"api_key_file": None}),
            errors=(*configuration.errors, *servers.misplaced(has_gateway=True)),
        ),
        server=IMAGE_PROGRAM,
        flags=flags,
        environ=os.environ,
        note=log.info,
        is_there=lambda _: True,
    )
    made = instances.instances(
        configuration,
        server=IMAGE_PROGRAM,
        flags=flags,
        models={spec.name: _unprepared(spec) for spec in configuration.enabled if spec.model},
        logs=at.path,
        keys=at.path / "keys",
        xdg=Home(IMAGE_HOME).run / "xdg",
        environ={"container": "oci", "PATH": os.devnull},  # not this machine's programs
    )
    for spec in configuration.enabled:
        if spec.model:
            log.info(f"{spec.place}: {spec.model['model']} is prepared in the container")
    if gateway.enable:
        log.info(f"the gateway listens on {gateway.host}:{gateway.port}")
    return made


def _unprepared(spec: InstanceSpec) -> PreparedModel:
    """Its model, by its reference."""
    named = spec.model.get("draft", "none")
    spec_type = WITHOUT_DRAFT.get(named, "" if named == "none" else beside.SIMPLE)
    lora = spec.model.get("lora", "none")
    pairs = [split_scale(text) for text in lora.split(",") if lora != "none"]
    return PreparedModel(
        path=PurePosixPath(spec.model["model"]),
        adapters=tuple((PurePosixPath(text), scale) for text, scale in pairs),
        draft=PurePosixPath(named) if spec_type == beside.SIMPLE else None,
        spec_type=spec_type,
    )


def _without_files(spec: InstanceSpec) -> InstanceSpec:
    """The instance without what is only held against files of this machine."""
    server = {name: value for name, value in spec.server.items() if name != "api-key-file"}
    model = {name: value for name, value in spec.model.items() if name != "imatrix"}
    if PATH.match(model.get("model", "")):
        model["model"] = "demo"
    return replace(spec, server=server, model=model)


def plan(servers: Servers) -> None:
    """Print the instances: text, or a JSON list with format=json. Raises PipelineError."""
    in_container = servers.requested.target == CONTAINER
    desired = None if in_container else planned_here(servers)
    instances = desired.instances if desired else of_container(servers)
    if servers.request.json:
        print(json.dumps([server.as_json() for server in instances], indent=1))
    elif desired is None:
        print(text(instances))
    else:
        parts = [steps_text(servers), memory_text(desired), text(instances), unknown(servers)]
        print("\n\n".join(filter(None, parts)))


def changes(servers: Servers) -> None:
    """Print what `up` would start, keep, restart and stop. Raises PipelineError."""
    at, names = servers.at, servers.requested.names
    rows = control.changes(at, control.merged(at, planned_here(servers), names))
    control.warn_of_outdated(at)
    if servers.request.json:
        print(json.dumps([{"name": name, "change": change} for name, change in rows]))
    else:
        print(table(rows) or "nothing to do")


def steps_text(servers: Servers) -> str:
    """What has to be prepared first, and what that costs."""
    plans: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    if servers.needs_programs and not servers.models:
        state = planning.UP_TO_DATE if servers.programs.are_done() else planning.TO_DO
        rows.append((state, "build_bins", str(servers.programs.binaries.folder)))
    for name, model in servers.models.items():
        if any(model in other.beside.values() for other in servers.models.values()):
            continue  # is planned with its model
        with model.asking_anew():
            plans.append(planning.collect(model))
        for step in plans[-1]["steps"]:
            what, _, of = step["name"].partition(":")
            of_model = f":{name}{BESIDE + of if of in model.beside else ''}"
            of_model = of_model if what in ("fetch", "convert", "quantize") else ""
            row = (step["state"], what + of_model, step["what"])
            rows += [] if row in rows else [row]
    if plans:
        peak, free = max(plan["disk_peak_bytes"] for plan in plans), plans[0]["disk_free_bytes"]
        rows.append(("download", size(sum(plan["download_bytes"] for plan in plans)), "at most"))
        rows.append(("disk", size(peak), f"for the largest step, {size(free)} free"))
        needed = [plan["memory"]["total_bytes"] for plan in plans if plan["memory"]]
        rows.append(("memory", size(sum(needed)), "for one server of each model"))
    return table(rows)


def text(instances: tuple[Server, ...]) -> str:
    """The instances for people."""
    if not instances:
        return "nothing would be started"
    rows, commands = [("name", "engine", "address", "gpus", "log")], []
    for server in instances:
        gpus = server.gpu_ids or "all"
        rows.append((server.name, server.engine, server.shown_url, gpus, server.log_file))
        env = [f"{name}={value}" for name, value in server.env.items()]
        lines = [f"{server.name}, in {server.folder}:", shown(["env", *env, *server.command])]
        if server.engine == LLAMA_CPP:
            lines += [f"sandbox: {sandbox.shown(server)}", f"guard: {port.shown(server)}"]
        commands.append("\n".join(lines))
    return "\n\n".join([table(rows), *commands])


def memory_text(desired: DesiredState) -> str:
    """What each server takes, where some are loaded on demand; empty where all stay loaded."""
    if not desired.unloads:
        return ""
    rows = [("memory", "loaded", "needs")]
    for server in desired.instances:
        if server.name in desired.needs:
            when = "never unloaded" if server.pinned else f"start = {server.start}"
            rows.append((server.name, when, ps.needs(desired.needs[server.name])))
    rows.append(("together", "at most", ps.needs(desired.memory)))
    return table(rows)


def unknown(servers: Servers) -> str:
    """What is not known before the models are here."""
    missing = [name for name, model in servers.models.items() if not model.is_done("fetch")]
    if not missing:
        return ""
    return f"options that depend on the model are known once it is here: {', '.join(missing)}"
