"""The gateway of a configuration: beside its servers, in the foreground, or by another program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from msgspec.structs import replace

from pipeline.bins.build_options import BuildOptions
from pipeline.core import environment, log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import absolute
from pipeline.core.store.publish import publish_text
from pipeline.core.variables import variables
from pipeline.serve.config import api_keys, tables
from pipeline.serve.gateway import app, other_engines, remote
from pipeline.serve.gateway import servers as running
from pipeline.serve.gateway import settings as gateways
from pipeline.serve.keys import first_key, is_loopback
from pipeline.serve.server import DEMAND, GATEWAY, Server
from pipeline.serve.stopping import run_attached
from pipeline.serve.supervisor import liveness

from . import check, launch
from .servers import GATEWAY_OPTIONS, Servers
from .session import Session
from .variables import LITELLM, ROUTER

STOP_SECONDS = 30.0  # for LiteLLM or a router to finish its streams


def settings(servers: Servers) -> tuple[gateways.GatewaySettings, api_keys.Key]:
    """The gateway's settings in the file, overridden by the command line, and its key, which may
    still have to be written. Raises PipelineError."""
    table, own = servers.configuration.gateway, servers.request
    host = own.host if "host" in servers.variables else table.host
    named = own.api_key_file or table.api_key_file
    file = Path(named) if named else None
    is_litellm = servers.requested.engine == LITELLM  # without a key it refuses to start
    key = api_keys.decide(GATEWAY, host, file, table.api_key, servers.keys, needs_one=is_litellm)
    chosen = gateways.of_table(
        table,
        host=host,
        port=own.port if "port" in servers.variables else table.port,
        api_key_file=str(key.path) if key.path else None,
        programs=_program_words(servers) if table.pull else (),
        config=servers.requested.config if table.pull and _takes_in_all(servers) else "",
        without_key=file is None and table.api_key == api_keys.NONE,
    )
    return chosen, key


def _program_words(servers: Servers) -> tuple[str, ...]:
    """What the command line says of llama.cpp's programs."""
    names = {each.name for each in variables(BuildOptions).values()}
    return tuple(f"{name}={value}" for name, value in servers.variables.items() if name in names)


def _takes_in_all(servers: Servers) -> bool:
    """Whether `up` of the file alone would start what is prepared later."""
    return servers.configuration.master.instances == tables.MODELS and not servers.set_overrides


def ready(servers: Servers) -> gateways.GatewaySettings:
    """The settings, with the key written. Raises PipelineError."""
    chosen, key = settings(servers)
    if api_keys.write(key) and key.is_made:
        is_open = not is_loopback(chosen.host)
        reason = "others can reach it" if is_open else "LiteLLM does not start without a key"
        log.info(f"gateway: {reason}, so one was made: {key.path}")
    gateways.check(chosen)
    return chosen


def instance(servers: Servers) -> Server:
    """The gateway as one more server of the supervisor. Raises PipelineError."""
    return gateways.as_instance(servers.at, settings(servers)[0])


def run(session: Session) -> None:
    """Serve in the foreground until asked to stop. Raises PipelineError."""
    if session.request.servers.remote:
        run_remote(session)
    else:
        run_local(session.require_servers())


def run_remote(session: Session) -> None:
    """The gateway of servers that run elsewhere. Raises PipelineError."""
    typed = session.variables
    if others := [name for name in ("config", "profile", "engine") if name in typed]:
        raise UsageError(f"servers= and {others[0]}= contradict each other", "leave one out")
    chosen, view = remote.read(absolute(session.request.servers.remote))
    own = {name: getattr(session.request, name) for name in GATEWAY_OPTIONS if name in typed}
    app.run(view, replace(chosen, **own))


def run_local(servers: Servers) -> None:
    """The gateway of this machine's servers, or another program for them. Raises PipelineError."""
    check.check_servers(servers)
    chosen, engine = ready(servers), servers.requested.engine
    if engine == ROUTER:
        router(servers, chosen)
        return
    if not liveness.is_running(servers.at):
        log.info(
            f"warning: no server of {servers.configuration.label} is up; start them: {doitw('up')}"
        )
    if engine == LITELLM:
        litellm(servers, chosen)
    else:
        app.run(running.View(servers.at), chosen)


def litellm(servers: Servers, chosen: gateways.GatewaySettings) -> None:
    """LiteLLM's proxy for the servers. Raises PipelineError where it is not installed."""
    import yaml

    if chosen.hold_timeout is not None:
        log.info("warning: not used: gateway.hold_timeout (LiteLLM holds no requests)")
    if chosen.origins or chosen.hosts:
        log.info("warning: not used: gateway.origins, gateway.hosts (LiteLLM checks neither)")
    if chosen.pull:
        log.info("warning: not used: gateway.pull (LiteLLM has no models prepared)")
    for spec in servers.configuration.enabled:
        if spec.control.start == DEMAND:
            log.info(f"warning: LiteLLM loads no model: {doitw(f'load name={spec.name}')} does")
    made = other_engines.litellm_config(launch.servers_of(servers), chosen)
    file = _written(servers, "litellm.yaml", yaml.safe_dump(dict(made.config)))
    program = shutil.which("litellm")
    if program is None:
        raise PipelineError(
            "litellm: there is no such program on PATH", "install it: pipx install 'litellm[proxy]'"
        )
    keys = {name: first_key(Path(path)) for name, path in made.key_files.items()}
    words = [program, "--config", str(file), "--host", chosen.host, "--port", str(chosen.port)]
    env = environment.litellm(os.environ) | keys
    run_attached([*words, "--telemetry", "False"], env=env, patience=STOP_SECONDS)


def router(servers: Servers, chosen: gateways.GatewaySettings) -> None:
    """llama-server's own router for the servers. Raises PipelineError if it cannot serve them."""
    instances = launch.servers_of(servers)
    file = _written(servers, "router.ini", other_engines.router_preset(instances, chosen))
    words = [str(servers.server), *other_engines.router_arguments(file, len(instances), chosen)]
    env = environment.servers(os.environ, downloads=any(server.downloads for server in instances))
    # the models' relative paths start in the configuration's folder
    folder = Path(instances[0].folder)
    run_attached(words, env={**env, **instances[0].env}, patience=STOP_SECONDS, folder=folder)


def _written(servers: Servers, name: str, text: str) -> Path:
    file = servers.at.path / name
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    publish_text(file, text)
    log.info(f"wrote {file}")
    return file
