"""The keys that clients send: they are kept in files, never on a command line."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from pipeline.core.errors import PipelineError
from pipeline.core.process import private
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import part, publish_file
from pipeline.serve.keys import KEY, RULE, is_loopback, wrong_file
from pipeline.serve.server import LLAMA_CPP

from .configuration import Configuration, InstanceSpec, Value, beside
from .options import SECRETS, ResolvedOptions, normalized

NONE = "none"
BYTES = 32  # of a key that is made: 43 letters


class Key(Struct, frozen=True):
    """The file with the key of a server; `text` is what has to be written there first."""

    path: Path | None = None
    text: str = ""
    is_made: bool = False  # ours, made once and kept


def key(configuration: Configuration, resolved: ResolvedOptions, keys: Path) -> Key:
    """The key of an instance. With a gateway before it clients have no need to ask it themselves,
    and a key keeps web pages from doing so: the server itself checks neither Host nor Origin. With
    an api-prefix it would want the key for /health too."""
    spec, file = resolved.spec, resolved.text("api-key-file")
    return decide(
        spec.name,
        resolved.address.host,
        configuration.path(file) if file else None,
        spec.server.get("api-key"),
        keys,
        needs_one=configuration.gateway.enable and not resolved.text("api-prefix"),
    )


def decide(
    name: str,
    host: str,
    file: Path | None,
    literal: Value | None,
    keys: Path,
    *,
    needs_one: bool = False,
) -> Key:
    """The key of what `name` serves at `host`: a file of the user's, a literal one that moves to a
    file in `keys`, or one that is made because others can reach it, or the program wants one."""
    if file:
        return Key(file)
    literals = split(literal)
    if literals == [NONE]:
        return Key()
    if literals:
        text = "".join(f"{key}\n" for key in literals)
        return Key(_given_file(keys, name, text), text)
    is_open = is_loopback(host) and not needs_one
    return Key() if is_open else Key(keys / f"{name}.key", is_made=True)


def split(literal: Value | None) -> list[str]:
    """The keys of `api_key`: one text with commas, or a list."""
    listed = literal if isinstance(literal, list) else [literal]
    texts = [str(item) for item in listed if item is not None and not isinstance(item, bool)]
    return [key for text in texts for key in text.split(",") if key]


def errors(resolved: ResolvedOptions, folder: Path) -> Iterator[str]:
    """What is wrong with the keys of an instance."""
    spec = resolved.spec
    is_llama = spec.engine == LLAMA_CPP
    file = resolved.text("api-key-file")
    if file and (why := wrong_file(beside(folder, file), is_read_as_it_is=is_llama)):
        yield spec.line("server.api-key-file", f" = {file}: {why}")
    literal = spec.server.get("api-key")
    for why in wrong_literal(literal, spec.at("server.api-key-file") if file else ""):
        yield spec.line("server.api-key", f": {why}")
    if not is_llama and len(keys := split(literal)) > 1 and NONE not in keys:
        yield spec.line("server.api-key", ": vLLM reads one key")
    yield from _visible_secrets(spec)


def gateway_errors(configuration: Configuration) -> Iterator[str]:
    """What is wrong with the key of the gateway."""
    literal, file = configuration.gateway.api_key, configuration.gateway.api_key_file
    place = configuration.at_gateway("api_key_file")
    if file and (why := wrong_file(Path(file))):
        yield f"{place} = {file}: {why}"
    for why in wrong_literal(literal, place if file else ""):
        yield f"{configuration.at_gateway('api_key')}: {why}"


def wrong_literal(literal: Value | None, file: str) -> Iterator[str]:
    """Why a literal key cannot be used; `file` is where a key file is named too, or empty."""
    keys = split(literal)
    if literal not in (None, False) and not keys:
        yield 'must be a key, or "none"'
    if keys and file:
        yield f"contradicts {file}; leave one out"
    if not all(map(KEY.fullmatch, keys)):
        yield RULE
    if len(keys) > 1 and NONE in keys:
        yield "none is not a key"


def _visible_secrets(spec: InstanceSpec) -> Iterator[str]:
    """The errors of secrets that would stand on the command line, where all processes see it."""
    named = [(spec.at("server.extra-args"), normalized(word)) for word in spec.extra_args]
    hf_token = spec.server.get("hf-token")
    if hf_token is not None and not isinstance(hf_token, bool):  # vLLM: true means its own
        named.append((spec.at("server.hf-token"), "--hf-token"))
    is_table = spec.engine == LLAMA_CPP and not spec.is_typed("server.hf-token")
    token = "write a model table" if is_table else "set HF_TOKEN"
    for place, word in named:
        option = word.partition("=")[0]
        if option in SECRETS:
            instead = "write api_key = …" if option == "--api-key" else token
            why = f"{option} would be visible in the process list; {instead}"
            yield f"{place.removesuffix('=')}: {why}"


def warnings(resolved: ResolvedOptions) -> Iterator[str]:
    """What the user should know about keys."""
    host = resolved.address.host
    if split(resolved.spec.server.get("api-key")) == [NONE] and not is_loopback(host):
        yield f"{resolved.spec.place}: {host} can be reached by others, without a key"


def write(key: Key) -> bool:
    """Write the key's file, readable by its owner alone, unless it is there already. Returns
    whether it was written. Raises PipelineError."""
    if key.path is None or not (key.is_made or key.text):
        return False
    try:
        key.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with only_one(key.path):
            there = _read(key.path)
            if there and (key.is_made or there == key.text):
                return False
            made = part(key.path)
            made.unlink(missing_ok=True)
            with open(made, "x", encoding="utf-8", newline="\n", opener=private) as file:
                file.write(key.text or f"{secrets.token_urlsafe(BYTES)}\n")
            publish_file(made, key.path)
    except OSError as error:
        raise PipelineError(f"{key.path}: cannot be written: {error.strerror}") from None
    return True


def _given_file(keys: Path, name: str, text: str) -> Path:
    """The file of a literal key. Another key gets another file, so that a server that runs with
    the old one is seen to differ, and goes on until it is started again."""
    number = 1
    while (there := _read(path := keys / f"{name}.given{number}.key")) and there != text:
        number += 1
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
