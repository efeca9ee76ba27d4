"""pipeline.lock: what models were made from, and the result, so that they can be reproduced.

One `[[model]]` for each request: the request, the commit and every file with its sha256,
llama.cpp, the converter, the quantization, and the sha256 of the result. Nothing in it depends on
the folder, the machine or the time, so locking twice writes the same bytes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import HERE, Home
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import disk_errors, publish_text
from pipeline.core.text import decoded, require_short_keys

from .quants import TENSOR_TYPES
from .reference import HUB
from .repository import SHA1, of_files
from .resolve import ModelFile, Resolved

FILE = "pipeline.lock"
SCHEMA = 1
HEADER = "# Written by `doit lock`. With frozen=1 exactly this is built, or nothing.\n\n"
KEYS = {"asked", "name", "kind", "precision", "source", "files"}
LockedModel = dict[str, Any]


def read(path: Path) -> list[LockedModel]:
    """The entries of a lock file; none without a file. Raises UsageError."""
    try:
        text = decoded(path.read_bytes())
        require_short_keys(text)
        data = tomllib.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads {SCHEMA}")
        entries: list[LockedModel] = data["model"]
        for entry in entries:
            if missing := KEYS - entry.keys():
                raise ValueError(f"a [[model]] lacks {', '.join(sorted(missing))}")
            if not all(isinstance(entry[name], dict) for name in ("asked", "source")):
                raise ValueError("asked and source of a [[model]] must be tables")
            if not entry["files"]:
                raise ValueError("a [[model]] has no files")
            texts = {f"source.{name}": value for name, value in entry["source"].items()}
            texts |= {name: entry[name] for name in ("name", "kind", "precision")}
            if others := [name for name, value in texts.items() if not isinstance(value, str)]:
                raise ValueError(f"{', '.join(others)} of a [[model]] must be strings")
        requests = [entry["asked"] for entry in entries]
        if duplicates := [request for request in requests if requests.count(request) > 1]:
            raise ValueError(f"{duplicates[0]} is in it twice")
        return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: cannot be read as a lock file: {error}", "restore it, or remove it and lock"
        ) from None


def write(path: Path, entry: LockedModel) -> None:
    """Add `entry`, or replace the one for the same request. Raises UsageError."""
    with disk_errors(path.parent, HERE), only_one(path):
        entries = [other for other in read(path) if other["asked"] != entry["asked"]]
        try:
            publish_text(path, text([*entries, entry]))
        except UnicodeEncodeError:  # the name of a file of the user's own
            raise UsageError(
                f"{path}: cannot be written: a name in the request is not UTF-8",
                "give that file a name in UTF-8",
            ) from None


def text(entries: Iterable[LockedModel]) -> str:
    """A lock file with these entries, each request once."""
    import tomli_w

    by_request = {tuple(sorted(entry["asked"].items())): entry for entry in entries}
    ordered = [by_request[request] for request in sorted(by_request)]
    return HEADER + tomli_w.dumps({"schema": SCHEMA, "model": ordered})


def find(path: Path, request: Mapping[str, str]) -> LockedModel:
    """The entry of a request. Raises UsageError where there is none."""
    entries = read(path)
    for entry in entries:
        if entry["asked"] == request:
            return entry
    known = [" ".join(f"{n}={v}" for n, v in entry["asked"].items()) for entry in entries]
    content = "it holds:\n  " + "\n  ".join(known) if known else "it is missing or empty"
    raise UsageError(
        f"frozen=1: {path} does not pin this request; {content}",
        f"pin it: {doitw('lock')} with the same variables",
    )


def resolved(entry: LockedModel, home: Home) -> Resolved | None:
    """The model of an entry for a repository, or of an adapter's table `base`; None for others.
    Raises PipelineError."""
    if entry["source"].get("type") != "hf":
        return None
    if not SHA1.fullmatch(entry["source"].get("revision", "")):
        raise UsageError(f"{FILE}: an entry's source.revision is not a commit", "lock again")
    if not HUB.fullmatch(entry["source"].get("ref", "")):
        raise UsageError(f"{FILE}: an entry's source.ref names no repository", "lock again")
    try:
        files = []
        for file in entry["files"]:
            blob = file.get("blob", "")  # all that the hub gives for small files
            sha256 = "" if blob else file["sha256"]
            files.append(ModelFile(file["name"], file["size"], sha256, blob))
        model = of_files(
            entry["source"],
            "gguf" if entry["kind"] == "gguf" else "safetensors",
            files,
            home,
            precision=entry["precision"],
            mmproj=entry.get("mmproj", ""),
            encoder=entry.get("encoder", ""),
            base_name=entry.get("base_name", ""),
            why=f"as {FILE} says",
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{FILE}: an entry cannot be read: {error!r}", "lock again") from None
    return replace(model, name=entry["name"])


def types(entry: LockedModel) -> dict[str, str] | None:
    """The types of a mix by tensor, that an entry pins; None where it pins none. Raises
    UsageError."""
    pinned = entry.get("quantization", {}).get("types")
    if pinned is None:
        return None
    kinds = pinned.values() if isinstance(pinned, dict) else [None]
    if not all(isinstance(kind, str) and kind in TENSOR_TYPES for kind in kinds):
        raise UsageError(
            f"{FILE}: quantization.types of an entry does not name a type of ggml for each tensor",
            "lock again",
        )
    return dict(pinned)


def base(entry: LockedModel, home: Home) -> Resolved | None:
    """The config files that the adapter of an entry is converted with, where they are the hub's.
    Raises PipelineError."""
    table = entry.get("base")
    if not isinstance(table, dict) or not KEYS - {"asked"} <= table.keys():
        return None
    return resolved(table, home)


def require_same(path: Path, locked: LockedModel, current: LockedModel) -> None:
    """Raise UsageError that names every difference between what is locked and what is here.

    What is known on one side alone is not compared: the result before it is made, and before they
    are fetched the sha256 of small files, which have a blob id instead. `ray` locks so what is
    made on the nodes alone.
    """
    before, after = dict(_flat(locked)), dict(_flat(current))
    unknown = {
        name
        for name in before.keys() ^ after.keys()
        if name.startswith("result.")
        or name.removesuffix(".sha256") + ".blob" in before.keys() & after.keys()
    }
    different = [
        f"  {name}: locked is {before.get(name, 'nothing')}, here is {after.get(name, 'nothing')}"
        for name in sorted((before.keys() | after.keys()) - unknown)
        if before.get(name) != after.get(name)
    ]
    if different:
        commit = before.get("llama_cpp.commit")
        is_other = commit != after.get("llama_cpp.commit")
        restore = doitw(f"upgrade to={commit}") if is_other and commit else "restore what differs"
        raise UsageError(
            f"frozen=1: {path} and what is here differ:\n" + "\n".join(different),
            f"{restore}, or pin it again: {doitw('lock')} with the same variables",
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value by its dotted name; files by their own names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            own = inner.get("name", number) if isinstance(inner, Mapping) else number
            yield from _flat(inner, f"{name}[{own}]")
    else:
        yield name, value
