"""`claude`: Claude Code on the models of a gateway, or of one server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct, field

from pipeline.core import log, process
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import user_folder
from pipeline.deploy import claude
from pipeline.serve.address import url
from pipeline.serve.keys import first_key

from . import gateway
from .session import Session


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where Claude Code is to connect, and what to advise where nothing answers."""

    url: str
    key_file: str | None
    patterns: Mapping[str, str] = field(default_factory=dict)
    advice: str


def run(session: Session, words: Sequence[str]) -> None:
    """Print the commands that start it, or start it. Raises PipelineError."""
    requested = session.request.servers
    if requested.start and session.request.json:
        raise UsageError("start= and format=json contradict each other", "leave one out")
    if len(requested.names) > 1:
        raise UsageError(f"name={','.join(requested.names)}: names more than one model")
    at = address(session)
    key = first_key(Path(at.key_file)) if at.key_file else ""
    available = claude.chat_models(at.url, key, at.advice)
    models = claude.choose(available, at.patterns, next(iter(requested.names), ""))
    context = claude.context_of(at.url, key, models[""])
    if context is None:
        log.info(
            f"warning: {models['']} does not report its context size; Claude Code assumes its own"
        )
    if warning := claude.too_small(models[""], context):
        log.info(f"warning: {warning}")
    env = claude.environment(at.url, models, context, os.environ)
    if requested.start:
        start(env, key, words)
    elif session.request.json:
        command = [claude.PROGRAM, *words]
        result = {"env": env, "unset": claude.DROPPED, "command": command}
        print(json.dumps({**result, "key_variable": claude.KEY, "key_file": at.key_file}))
    else:
        form = claude.powershell if process.WINDOWS else claude.shell
        print(form(env, at.key_file, words))


def address(session: Session) -> Endpoint:
    """The gateway of the configuration, or what `url=` names. Raises PipelineError."""
    request = session.request
    if request.servers.url:
        return Endpoint(
            url=claude.base_of(request.servers.url),
            key_file=request.api_key_file or None,
            advice=f"start a server: {doitw('serve model=…')}",
        )
    servers = session.require_servers()
    settings, _ = gateway.settings(servers)
    source = servers.requested.config or servers.requested.profile
    return Endpoint(
        url=url(settings.host, settings.port),
        key_file=settings.api_key_file,
        patterns=settings.models,
        advice=f"{doitw('up')} starts the servers of {source}, and the gateway if it has [gateway] "
        f"enable = true; {doitw('gateway')} starts the gateway alone",
    )


def start(env: Mapping[str, str], key: str, words: Sequence[str]) -> None:
    """Claude Code in the user's terminal and folder, until it ends. Raises PipelineError."""
    program = shutil.which(claude.PROGRAM)
    if program is None:
        raise PipelineError(
            f"{claude.PROGRAM}: there is no such program on PATH",
            "install Claude Code: npm install -g @anthropic-ai/claude-code",
        )
    kept = {name: value for name, value in os.environ.items() if name not in claude.DROPPED}
    env = {**kept, **env, claude.KEY: key or claude.NO_KEY}
    status = process.attached([program, *words], cwd=user_folder(), env=env)
    if status:
        raise PipelineError(f"{claude.PROGRAM} ended with {status}")
