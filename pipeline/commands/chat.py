"""`chat`: a conversation in the terminal, or one answer, with a model or a running server."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from pathlib import Path

from msgspec.structs import replace

from pipeline.chat import completions, terminal
from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import Home
from pipeline.core.text import decoded, encodable
from pipeline.deploy import claude
from pipeline.models import chat_template, gguf
from pipeline.serve.keys import first_key
from pipeline.serve.server import Server
from pipeline.serve.supervisor import liveness, state
from pipeline.serve.supervisor.state import READY, require_known

from . import estimate, ps, serve
from .model import Model
from .session import Session


def check(session: Session) -> None:
    """Raise UsageError where variables contradict each other, or name nothing to talk with."""
    request = session.request
    typed = session.servers.variables.keys() if session.servers else set[str]()
    named = {
        "model=": bool(request.reference),
        "url=": bool(request.servers.url),
        "config= or profile=": bool({"config", "profile"} & typed),
    }
    if not (any(named.values()) or request.servers.names or session.servers):
        raise UsageError(
            "nobody to talk to; pass model=… (try model=demo), name=… of a running server, or url=…"
        )
    given = [name for name, is_given in named.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other", "leave one out")
    if request.reference and request.servers.names:
        raise UsageError("model= and name= contradict each other", "leave one out")
    if len(request.servers.names) > 1:
        raise UsageError(f"name={','.join(request.servers.names)}: names more than one")
    if request.api_key_file and not request.servers.url:
        why = "chat serves the model for itself alone"
        if not request.reference:
            why = "a running server's key is known from its file"
        raise UsageError(f"api_key_file=: {why}", "leave it out; it is for url=")
    for name, value in (("prompt", request.prompt), ("system", request.system)):
        if encodable(value) != value:
            raise UsageError(f"{name}=: is not UTF-8", "set the terminal to UTF-8")
    question(request.prompt)


@cache
def question(prompt: str) -> str:
    """What a pipe or a file holds, and `prompt` after it; empty: the terminal asks. Raises
    UsageError where there is neither."""
    text = ""
    if _has_text(bool(prompt)):
        try:
            text = decoded(sys.stdin.buffer.read()).strip()
        except ValueError as error:
            raise UsageError(f"stdin: {error}") from None
    both = "\n\n".join(filter(None, (text, prompt)))
    if not both and not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "nothing to ask: no terminal, no prompt= and nothing in a pipe",
            f'{doitw("chat model=demo")} prompt="…"',
        )
    return both


def _has_text(is_asked: bool) -> bool:
    """Whether stdin is to be read: with a question given, only where somebody put something."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return not is_asked or stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def check_model(model: Model) -> None:
    """Raise UsageError where the header of the model, wherever it is, says that it cannot chat; a
    header that cannot be had yet is looked at once the model is here."""
    chain = model.chain()
    if chain is None or model.base:
        return
    try:
        header = estimate.outlook(model, chain).header
    except UsageError:
        raise
    except PipelineError:
        return
    # What is converted gets its template with the tokenizer, at the end.
    is_whole = chain.conversion is None or chain.final.is_file()
    typed = [f"--{name.replace('_', '-')}" for name in model.request.server]
    overridden = chat_template.is_overridden(typed)
    require_chat(chain.resolved.name, header, has_template=overridden or not is_whole)


def require_chat(name: str, header: gguf.Header | None, *, has_template: bool) -> None:
    """Raise UsageError where the header is that of a model that cannot chat; `has_template`: the
    template comes from elsewhere."""
    if header is None:
        return
    if header.is_encoder or header.pooling != "none":
        kind = "a reranker" if header.pooling == "rank" else "an embedding model"
        raise UsageError(
            f"{name}: is {kind} ({header.architecture}), it writes no answers",
            "name a chat model, such as model=org/model-Instruct-GGUF; "
            f"{doitw('serve model=…')} serves this one for what it does",
        )
    if not has_template and not header.has_chat_template:
        raise UsageError(
            f"{name}: has no chat template, so it is probably a base model, not one to talk to",
            "take its -Instruct or -chat sibling, or name a template: server.chat_template=chatml",
        )


def require_chat_server(home: Home, server: Server, name: str) -> None:
    """As `require_chat`, of the model of a server, where its file is here."""
    if path := serve.model_file(server):
        header = gguf.read_cached(path, home.run)
        require_chat(name, header, has_template=chat_template.is_overridden(server.command))


def chat(session: Session) -> None:
    """Ask once, or talk until the user leaves. Raises PipelineError."""
    request = session.request
    with talking(session) as (server, require_running):
        if text := question(request.prompt):
            ask(server, request.system, text)
            return
        history = session.home.run / "chat" / "history"
        terminal.converse(server, request.system, history, require_running)


def ask(server: completions.ChatServer, system: str, text: str) -> None:
    """Print the answer to one question, as it comes. Raises PipelineError."""
    import asyncio

    conversation, last = completions.Conversation(system), ""
    conversation.ask(text)

    def show(text: str, reasoning: str) -> None:
        nonlocal last
        last = text or last
        print(text, end="", flush=True)

    try:
        ending = asyncio.run(completions.answer(server, conversation.messages, show))
    finally:
        if last and not last.endswith("\n"):
            print(flush=True)
    if ending.is_full:
        raise PipelineError(ending.cut, f"use {server.larger}")
    if ending.cut:
        log.info(f"warning: {ending.cut}")


Talk = tuple["completions.ChatServer", Callable[[], None]]


@contextmanager
def talking(session: Session) -> Iterator[Talk]:
    """The server to talk with, and a function that raises PipelineError once it has ended."""
    request = session.request
    if request.reference:
        with served(session.model) as talk:
            yield talk
    elif request.servers.url:
        yield at_url(session), lambda: None
    else:
        yield running(session), lambda: None


@contextmanager
def served(original: Model) -> Iterator[Talk]:
    """The prepared model on a free port of this machine, while the block runs."""
    model = copy(original)
    model.request = model.request.replace(port=serve.free_port())
    file = model.home.logs / f"chat-{model.request.port}.log"
    server = replace(serve.checked_server(model), log_file=str(file))
    require_chat_server(model.home, server, model.require_resolved().name)
    with serve.temporary(model.home, server) as require_running:
        yield chat_server(server, "ctx_size=…, a larger one"), require_running


def chat_server(server: Server, larger: str) -> completions.ChatServer:
    """How a server that the pipeline started is reached."""
    key = first_key(Path(server.api_key_file)) if server.api_key_file else ""
    return completions.ChatServer(
        url=server.url,
        model=server.model_name,
        key=key,
        context=claude.context_of(server.url, key, server.model_name),
        larger=larger,
    )


def at_url(session: Session) -> completions.ChatServer:
    """The server of url=, with the model of name=, or its only one. Raises PipelineError."""
    request = session.request
    url = claude.base_of(request.servers.url)
    key = first_key(Path(request.api_key_file)) if request.api_key_file else ""
    models = claude.chat_models(url, key, f"start a server: {doitw('serve model=…')}")
    names = request.servers.names
    if not names and len(models) > 1:
        raise UsageError(f"{url} has more than one model", f"name=… is one of {', '.join(models)}")
    require_known(names, models)
    model = names[0] if names else models[0]
    context = claude.context_of(url, key, model)
    return completions.ChatServer(url=url, model=model, key=key, context=context)


def running(session: Session) -> completions.ChatServer:
    """The server that name= names, or the only one that is up. Raises PipelineError."""
    places = ps.by_name(session)
    servers = {name: server for name, (_, server) in places.items()}
    chats = [name for name, server in servers.items() if server.kind == serve.CHAT]
    names = session.request.servers.names
    if not servers:
        hint = doitw("chat url=… name=…")
        ps.require_none_on_a_cluster(session, "whose gateway has to be asked", hint)
        raise PipelineError("nothing is up", f"{doitw('up config=…')} starts servers")
    require_known(names, list(servers))
    if not names and len(chats) != 1:
        raise UsageError("no server named", f"name=… is one of {', '.join(chats) or 'none'}")
    server = servers[names[0] if names else chats[0]]
    if server.kind != serve.CHAT:
        others = f"chat servers: {', '.join(chats)}" if chats else "no server for chat is up"
        raise UsageError(f"{server.name}: is for {server.kind}, it writes no answers", others)
    there = liveness.living(places[server.name][0])
    states = {status.name: status.state for status in there.instances} if there else {}
    if (now := states.get(server.name, "not up")) != READY:
        start = doitw(f"load name={server.name}") if now == state.ASLEEP else doitw("up")
        raise PipelineError(
            f"{server.name}: is {now}", f"{doitw('ps')} shows its state, {start} starts it"
        )
    require_chat_server(session.home, server, server.name)
    return chat_server(server, "a larger ctx_size in its file")
