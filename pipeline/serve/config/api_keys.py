"""The keys that clients have to send: kept in files of their own, never on a command line."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.locks import only_one
from pipeline.core.publish import part, publish_file
from pipeline.serve.instance import VLLM

from .addresses import Address
from .configuration import Draft, beside
from .options import Given, spelled

NONE = "none"
BYTES = 32  # of a key that is made: 43 letters


@dataclass(frozen=True, slots=True)
class Key:
    """Where the key of an instance stands; `text` is what has to be written there first."""

    path: Path | None = None
    text: str = ""
    is_made: bool = False  # ours, made once and kept


def key(given: Given, at: Address, folder: Path, keys: Path) -> Key:
    """The key of an instance: a file of the user's, a literal one that moves to a file, or one
    that is made because others can reach it."""
    draft = given.draft
    file, literal = given.text("api-key-file"), literals(draft)
    if file:
        return Key(beside(folder, file))
    if literal == [NONE]:
        return Key()
    if literal:
        text = "".join(f"{one}\n" for one in literal)
        return Key(_given_file(keys, draft.name, text), text)
    return Key() if at.is_loopback else Key(keys / f"{draft.name}.key", is_made=True)


def literals(draft: Draft) -> list[str]:
    """The keys that stand in the file."""
    told = draft.server.get("api-key")
    listed = told if isinstance(told, list) else [] if told in (None, False, True) else [told]
    return [one for text in listed for one in str(text).split(",") if one]


def mistakes(given: Given, folder: Path) -> Iterator[str]:
    """What cannot be meant about keys."""
    draft = given.draft
    if file := given.text("api-key-file"):
        path, named = beside(folder, file), f"{draft.at('server.api-key-file')} = {file}"
        lines = [line.strip() for line in _read(path).splitlines()]
        if not path.is_file():
            yield f"{named}: {path} is no file"
        elif not any(line and not line.startswith("#") for line in lines):
            yield f"{named}: {path} cannot be read, or holds no key"
    place = draft.at("server.api-key")
    told = literals(draft)
    if "api-key" in draft.server and not told and draft.server["api-key"] is not False:
        yield f'{place}: must be a key, or "none"'
    if told and given.text("api-key-file"):
        yield f"{place}: contradicts api_key_file; leave one out"
    if any(one.startswith("#") or not one.isprintable() or " " in one for one in told):
        yield f"{place}: a key must not begin with # or hold spaces or control characters"
    if len(told) > 1 and (NONE in told or draft.engine == VLLM):
        yield f"{place}: {'none is no key' if NONE in told else 'vLLM reads one key'}"
    for word in draft.extra_args:
        if spelled(word).partition("=")[0] == "--api-key":
            where = draft.at("server.extra-args")
            yield f"{where}: --api-key would stand in the list of processes; write api_key = …"


def remarks(given: Given, at: Address) -> Iterator[str]:
    """What the user should know about keys."""
    if literals(given.draft) == [NONE] and not at.is_loopback:
        yield f"{given.draft.place}: {at.host} can be reached by others, without a key"


def write(key: Key) -> bool:
    """Write the key's file, unless it is there already; whether it was written.

    Raises PipelineError.
    """
    if key.path is None or not (key.is_made or key.text):
        return False
    try:
        key.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with only_one(key.path):
            there = _read(key.path)
            if there and (key.is_made or there == key.text):
                return False
            _publish(key.path, key.text or f"{secrets.token_urlsafe(BYTES)}\n")
    except OSError as error:
        raise PipelineError(f"{key.path}: cannot be written: {error.strerror}") from None
    return True


def _publish(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    made = part(path)
    made.unlink(missing_ok=True)
    handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    publish_file(made, path)


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
