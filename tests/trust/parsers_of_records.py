"""Harnesses for the files that earlier runs, and the processes beside this one, wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hostile_input import damaged, encoded, harness, replace, texts
from hostile_input import values as json_values
from hypothesis import strategies
from msgspec import convert, to_builtins
from parsers_of_configurations import json_texts, printed, toml_of

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import active, json_file, receipts, stat_cache
from pipeline.models import lockfile
from pipeline.serve.gateway import answers
from pipeline.serve.gateway.ollama import models as ollama_models
from pipeline.serve.gateway.servers import server_list
from pipeline.serve.server import Server
from pipeline.serve.supervisor import books, marker, state, usage
from pipeline.serve.supervisor.state import DesiredState, Folder, Order, ServerStatus, State

ENTRY = {
    "asked": {"model": "org/model", "quant": "q8_0"},
    "name": "model",
    "kind": "gguf",
    "precision": "F16",
    "source": {"type": "hf", "ref": "org/model", "revision": "0" * 40},
    "files": [{"name": "ü.gguf", "size": 9, "sha256": "a" * 64}],
    "base": {"kind": "gguf", "source": {"type": "hf"}, "files": []},
    "result": {"name": "x", "sha256": "b" * 64},
}


@harness(
    damaged({"schema": 1, "model": [ENTRY]}),
    spoil=replace(lockfile, "KEYS", set()),
    cases=[
        {"schema": 1, "model": [{**ENTRY, key: value}]}
        for key, value in (("files", [1]), ("files", {"a": 1}), ("base", {}), ("mmproj", 3))
    ]
    + [{"schema": 1, "model": "x"}, {"schema": True, "model": {}}, {"schema": 1, "model": [ENTRY]}],
)
def lock_file(document: Any, folder: Path) -> None:
    if (data := toml_of(document)) is None:
        return
    file = folder / "pipeline.lock"
    file.write_bytes(data)
    try:
        for entry in lockfile.read(file):
            assert lockfile.find(file, entry["asked"])["name"] == entry["name"]
            lockfile.require_same(file, entry, entry)
            with suppress(PipelineError):
                lockfile.resolved(entry, Home(folder))
            with suppress(PipelineError):
                lockfile.base(entry, Home(folder))
            with suppress(UsageError):
                lockfile.require_same(file, entry, ENTRY)
    except UsageError as error:
        printed(error)


@harness(
    strategies.dictionaries(texts, texts, min_size=1, max_size=3),
    spoil=replace(lockfile, "publish_text", lambda path, text: path.write_text(text, "latin-1")),
    cases=[{"model": "/ü/\udcff.gguf"}],
)
def lock_file_round_trip(asked: dict[str, str], folder: Path) -> None:
    file = folder / "pipeline.lock"
    entry = {**ENTRY, "asked": asked}
    try:
        lockfile.write(file, entry)
    except UsageError as error:
        printed(error)
    else:
        assert lockfile.find(file, asked) == entry
        before = file.read_bytes()
        lockfile.write(file, entry)
        assert file.read_bytes() == before
    file.unlink(missing_ok=True)


RECEIPTS = {
    "schema": 1,
    "artifacts": {
        "a ü": {
            **{"recipe": {"step": "x"}, "size": 0, "mtime_ns": 1, "sha256": "a" * 64},
            **{"made_at": "2026-11-28T00:00:00+00:00", "seconds": 1.5, "source": {"type": "hf"}},
            **{"keep": False, "sandbox": "bubblewrap"},
        }
    },
}


@harness(
    damaged(RECEIPTS),
    spoil=replace(receipts, "_read", lambda path: json.loads(path.read_text())["artifacts"]),
    cases=[
        {"schema": 1, "artifacts": {"a ü": {**RECEIPTS["artifacts"]["a ü"], key: value}}}  # type: ignore[index]
        for key in ("recipe", "size", "mtime_ns", "sha256", "made_at", "seconds", "source", "keep")
        for value in ([], "x", {}, -1, 1e400)
    ],
)
def receipts_file(document: Any, folder: Path) -> None:
    target = folder / "a ü"
    target.touch()
    (folder / receipts.FILE).write_text(json.dumps(document), "utf-8")
    found = receipts.load(folder)
    for name, entry in found.items():
        assert isinstance(name, str)
        assert convert(to_builtins(entry), receipts.Entry) == entry, "of other types"
    for ask in (receipts.status, receipts.known_sha256, receipts.revalidate):
        ask(target)
    receipts.folder_is_current(folder)
    receipts.save(folder, found)
    assert receipts.load(folder) == found


@harness(
    strategies.tuples(texts, json_values),
    spoil=replace(
        receipts, "publish_text", lambda path, text: path.write_text(text.replace("\\", ""))
    ),
    cases=[("a\udcff", 1)],
)
def receipts_round_trip(example: tuple[str, Any], folder: Path) -> None:
    """Names and recipes as a disk may have them, letters that are not UTF-8 among them."""
    name, value = example
    if json.loads(json.dumps(value)) != value:  # not a number
        return
    entry = receipts.Entry(
        recipe={name: value}, size=1, mtime_ns=None, sha256="", made_at="", seconds=0.0
    )
    receipts.save(folder, {name: entry})
    assert receipts.load(folder) == {name: entry}


SERVER = Server(name="chat", executable="x", cmd=("-m", "x"), folder="/", log_file="/x")
STATUS = ServerStatus(
    name="chat", state="ready", pid=os.getpid(), started=1.0, ready_at=2.0, retry_at=3.0
)
DOCUMENTS = {
    "wanted.json": DesiredState(
        config="x", instances=(SERVER,), orders={"chat": Order(loads=True, number=1)}, asked=1
    ),
    "state.json": State(pid=1, started=1.0, asked=1, instances=(STATUS,)),
    "usage/1.json": usage.Usage(pid=1, started=1.0, servers={"chat": usage.ServerUse(keep=1.0)}),
    "books.json": {"chat": books.Account(command="x", need={"ram": 1})},
}


@harness(
    strategies.fixed_dictionaries(
        {name: damaged(to_builtins(value)) for name, value in DOCUMENTS.items()}
    ),
    spoil=replace(json_file, "read", lambda path, parse: parse(json.loads(path.read_text()))),
    cases=[
        {**{name: to_builtins(value) for name, value in DOCUMENTS.items()}, "state.json": document}
        for number in (-1, 0, 2**31, 2**70, 1e308, float("nan"), float("inf"))
        for document in (
            {"pid": number, "started": 1.0, "asked": 1},
            *(
                {"pid": 1, "started": 1.0, "asked": 1, "instances": [instance]}
                for key in ("pid", "started", "ready_at", "retry_at", "load_seconds")
                for instance in [{**to_builtins(STATUS), key: number}]
            ),
        )
    ],
)
def state_files(documents: dict[str, Any], folder: Path) -> None:
    """What the supervisor, the gateway and `ps` make of the state, whatever it says."""
    at = Folder(folder / "run" / "instances" / "x")
    at.usage.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (at.path / name).write_text(json.dumps(document), "utf-8")
    wanted, written = state.read_wanted(at), state.read_state(at)
    books.read(at)
    for status in state.statuses_of(written).values():
        marker.find(status.pid, status.started, "x")
    if written:
        marker.find(written.pid, written.started, "x")
    servers = server_list(wanted, written)
    answers.models(servers, {})
    answers.health(servers, detailed=True)
    gateways = usage.Gateways(at)
    gateways.read()
    for target in servers.targets:
        gateways.use(target.name)
        for each in gateways.usages:
            ollama_models.expires_at(target, each.servers.get(target.name, usage.ServerUse()))
    for read, write, document in (
        (state.read_wanted, state.write_wanted, wanted),
        (state.read_state, state.write_state, written),
    ):
        if document is not None:
            write(at, document)  # type: ignore[operator]
            assert read(at) == document or "NaN" in at.state.read_text() + at.wanted.read_text()


def _cache_is_read(parse: Callable[[Any], Any]) -> Callable[[Path, Callable[[Any], Any]], Any]:
    return lambda path, given: parse(json.loads(path.read_text()))


@harness(
    strategies.one_of(
        damaged({"FILE": {"stamp": [0, 1], "value": "x"}}).map(json.dumps), json_texts
    ),
    spoil=replace(stat_cache.json_file, "read", _cache_is_read(lambda data: dict(data.items()))),
    cases=[json.dumps({"FILE": value}) for value in (None, 1, "x", [], {}, {"stamp": 1})],
)
def stat_cache_file(text: str, folder: Path) -> None:
    file, cache = folder / "model ü", folder / "cache.json"
    file.touch()
    cache.write_bytes(encoded(text.replace("FILE", json.dumps(str(file))[1:-1])))
    stat_cache.recall(cache, file)
    stat_cache.remember(cache, file, text, stat_cache.stamp(file))
    assert stat_cache.recall(cache, file) == text
    stat_cache.forget(cache, folder)
    assert stat_cache.recall(cache, file) is None


@harness(
    strategies.tuples(damaged({"command": "serve", "files": ["/x"]}), texts),
    spoil=replace(active, "convert", lambda data, kind: data["command"].partition(" ")),
    cases=[({"command": "x"}, stem) for stem in ("-1", "0", "9" * 30, "x", "１")],
)
def active_runs(example: tuple[Any, str], folder: Path) -> None:
    document, stem = example
    runs = folder / "active"
    runs.mkdir(exist_ok=True)
    own = runs / f"{os.getppid()}.json"
    own.write_text(json.dumps(document), "utf-8")
    odd = runs / f"{stem}.json"
    with suppress(OSError, ValueError):
        odd.write_text(json.dumps(document), "utf-8")
    for run in active.others(folder):
        assert isinstance(run.command, str)
        assert run.files is None or all(isinstance(name, str) for name in run.files)
    with suppress(OSError, ValueError):
        odd.unlink()
