"""Harnesses for the files that are read: archives, configurations, and what earlier runs wrote."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import tomllib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import tomli_w
from hostile_input import damaged, encoded, harness, mutated, pieces, replace, texts
from hostile_input import values as json_values
from hypothesis import strategies
from msgspec import convert, to_builtins
from serve.config.config_tools import FLAGS, server_in

from pipeline.core import archives, members
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import active, json_file, receipts, stat_cache
from pipeline.models import lockfile
from pipeline.serve.config import checks, profiles, sources, toml_form, yaml_form
from pipeline.serve.config.configuration import Configuration
from pipeline.serve.config.instances import instances
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.gateway import answers
from pipeline.serve.gateway.ollama import models as ollama_models
from pipeline.serve.gateway.servers import server_list
from pipeline.serve.server import Server
from pipeline.serve.supervisor import books, marker, state, usage
from pipeline.serve.supervisor.state import DesiredState, Folder, Order, ServerStatus, State

# Archives

ENDINGS = (".tar", ".tar.gz", ".zip")
KINDS = {
    "file": tarfile.REGTYPE,
    "folder": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
}
Entry = tuple[str, str, str]  # kind, name, and where a link leads
PARTS = ("a", "A", "ü", "u\u0308", "..", ".", "", "con", "b.", "c ", "d:e", "\\", "f\n", "x" * 300)
names = strategies.lists(strategies.sampled_from(PARTS), min_size=1, max_size=3).map("/".join)
entries = strategies.lists(
    strategies.tuples(strategies.sampled_from([*KINDS, "file", "file"]), names, names), max_size=5
)


def packed(ending: str, listed: list[Entry]) -> bytes:
    """An archive of these; the content of a file is its name."""
    out = io.BytesIO()
    if ending == ".zip":
        with zipfile.ZipFile(out, "w") as zipped, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name may come twice
            for kind, name, to in listed:
                info = zipfile.ZipInfo("x")
                info.filename, info.create_system = name, 3
                modes = {"folder": 0o040755, "link": 0o120777, "fifo": 0o010644}
                info.external_attr = modes.get(kind, 0o100644) << 16
                zipped.writestr(info, b"" if kind == "folder" else (name if kind == "file" else to))
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if ending == ".tar.gz" else "w") as tar:
            for kind, name, to in listed:
                tar_info = tarfile.TarInfo(name)
                tar_info.type, tar_info.linkname = KINDS[kind], to
                tar_info.size = len(name.encode()) if kind == "file" else 0
                tar.addfile(tar_info, io.BytesIO(name.encode()))
    return out.getvalue()


GOOD: list[Entry] = [
    ("file", "README.md", ""),
    ("folder", "bin", ""),
    ("file", "bin/llama-server", ""),
    ("link", "bin/ü", "llama-server"),
]


def unpacked(archive: Path, folder: Path) -> dict[str, bytes] | None:
    """What comes of an archive, by path; None where it is refused. Nothing is written elsewhere."""
    target = folder / "1" / "2" / "3" / "out"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = archives.unpack(archive, target)
        content = {path.relative_to(target).as_posix(): path.read_bytes() for path in made}
        assert all(path.resolve().is_relative_to(target.resolve()) for path in made)
    except PipelineError:
        content = None
        assert not os.path.lexists(target)
    if content is not None:
        shutil.rmtree(target)
    archive.unlink()
    left = [path for path in folder.rglob("*") if not target.is_relative_to(path)]
    assert left == []
    return content


@harness(
    strategies.sampled_from(ENDINGS).flatmap(
        lambda ending: strategies.tuples(
            strategies.just(ending), mutated(packed(ending, GOOD), packed(ending, GOOD[:1] * 2))
        )
    ),
    spoil=replace(archives, "_damage_is_an_error", lambda archive: nullcontext()),
)
def archive_bytes(example: tuple[str, bytes], folder: Path) -> None:
    ending, data = example
    archive = folder / f"ä b{ending}"
    archive.write_bytes(data)
    unpacked(archive, folder)


@harness(
    strategies.tuples(strategies.sampled_from(ENDINGS), entries),
    spoil=replace(members, "_check_part", lambda part: None),
    cases=[(ending, GOOD) for ending in ENDINGS],
)
def archive_members(example: tuple[str, list[Entry]], folder: Path) -> None:
    """What is unpacked has the content that was packed, under names that differ everywhere."""
    ending, listed = example
    archive = folder / f"x{ending}"
    archive.write_bytes(packed(ending, listed))
    content = unpacked(archive, folder)
    if listed == GOOD:
        assert content is not None
    if content is not None:
        written = {
            Path(name).as_posix(): name.encode() for kind, name, _ in listed if kind == "file"
        }
        links = {Path(name).as_posix() for kind, name, _ in listed if "link" in kind}
        assert content.keys() == written.keys() | links
        assert all(content[name] == written[name] for name in written)
        assert len({name.casefold() for name in content}) == len(content)


# Configurations

NOTHING = re.compile("(?!)")


def usable(configuration: Configuration, folder: Path) -> tuple[Server, ...]:
    """Its servers, which can be started and told to a supervisor; none where it has mistakes."""
    try:
        checks.check(
            configuration, server=server_in(folder), flags=FLAGS, environ={"PATH": ""}, cards=2
        )
        servers = instances(
            configuration,
            server=folder / "llama-server",
            flags=FLAGS,
            models={
                spec.name: PreparedModel(path=folder / "m.gguf") for spec in configuration.enabled
            },
            logs=folder / "logs",
            keys=folder / "keys",
            xdg=folder / "xdg",
            environ={"PATH": ""},
        )
    except PipelineError as error:
        printed(error)
        return ()
    for server in servers:
        words = [*server.command, server.log_file, *server.env, *server.env.values()]
        assert not any("\0" in word for word in words)
        assert all(os.fsencode(word) for word in words if word)
        stored = json.loads(json.dumps(to_builtins(server)))
        assert convert(stored, Server) == server
    return servers


def printed(error: PipelineError) -> None:
    """A message can be printed, says something, and does not fill the screen."""
    str(error).encode("utf-8", "backslashreplace")
    assert error.message and len(str(error)) < 20_000


TOML = (
    b'[instance.chat.server]\nmodel = "/m/a.gguf"\nport = 8081\nctx_size = "32k"\n'
    b'[instance.chat.control]\ngpu_ids = "0,1"\nenv = { A = "b" }\nbackground = false\n',
    b'[master]\nenable = true\nmemory = "80%"\n[gateway]\nenable = true\nmodels = { "a-*" = "x" }\n'
    b'[instance.server]\nthreads = 4\n[instance.x.model]\nref = "demo"\nlora = "a.gguf:0.5"\n',
)
toml_texts = pieces(
    *("[instance.chat.server]\n", "[instance.chat.model]\n", "[instance.chat.control]\n", "\n"),
    *("[master]\n", "[gateway]\n", "[instance.server]\n", "[[instance]]\n", "[instance.ü]\n"),
    *("port = ", "model = ", "ref = ", "ctx_size = ", "ctx-size = ", "gpu_ids = ", "env = "),
    *("alias = ", "lora = ", "memory = ", "extra_args = ", "log_file = ", "hosts = ", "a.b.c = "),
    *('"/m.gguf"\n', "8080\n", "1e400\n", "nan\n", "0x7f\n", "true\n", "[1, 2]\n", '"\\u0000"\n'),
    *("1979-05-27T07:32:00Z\n", "07:32:00\n", "{ a = 1 }\n", "'''", '"""', "# ", "[", "]", "{"),
)


@harness(
    strategies.one_of(toml_texts.map(encoded), mutated(*TOML)),
    spoil=replace(sources, "text_of", lambda file: file.read_text("utf-8")),
    cases=[*TOML, b"a" + b".a" * 20_000 + b" = 1", b"a = " + b"[" * 5000, b"a = " + b"9" * 5000],
)
def toml_configuration(data: bytes, folder: Path) -> None:
    file = folder / "models ü.toml"
    file.write_bytes(data)
    try:
        tables = sources.toml(file)
        configuration = toml_form.load(file)
    except UsageError as error:
        printed(error)
        return
    assert tables == tomllib.loads(sources.text_of(file).replace("\r\n", "\n"))
    usable(configuration, folder)


TABLES: Mapping[str, Any] = {
    "master": {"enable": True, "memory": {"ram": "20GiB"}, "max_loading": 2},
    "gateway": {"enable": True, "port": 9000, "hosts": ["*.lan"], "models": {"a-*": "chat"}},
    "instance": {
        "control": {"gpu_ids": "0", "restart": "always", "ready_timeout": 5},
        "server": {"threads": 4},
        "chat": {
            "control": {"env": {"A": "b"}, "log_file": "chat.log", "priority": 1, "sandbox": "off"},
            "server": {
                **{
                    "model": "llama-server",
                    "port": 8081,
                    "ctx_size": "32k",
                    "alias": "a,b",
                    "temp": 0.5,
                },
                **{
                    "host": "127.0.0.1",
                    "jinja": True,
                    "tags": ["x"],
                    "extra_args": ["--lora", "b"],
                },
            },
        },
    },
}


def toml_of(document: Any) -> bytes | None:
    """A document as TOML; None where TOML has no such value."""
    with suppress(Exception):
        return tomli_w.dumps(document).encode()
    return None


@harness(
    damaged(TABLES),
    spoil=replace(sources, "UNUSABLE", NOTHING),
    cases=[
        {"instance": {"a": {"server": {"model": "llama-server", "port": 1, name: "\0"}}}}
        for name in ("alias", "host", "model", "tags", "cors_origins")
    ]
    + [
        {"instance": {"a": {"server": {"model": "llama-server"}, "control": {key: "a\0b"}}}}
        for key in ("log_file", "log_dir")
    ]
    + [{"instance": {"a": {"server": {"model": "llama-server", "extra_args": ["\0"]}}}}],
)
def toml_tables(document: Any, folder: Path) -> None:
    """Known keys with any values: what is accepted can be started."""
    if (data := toml_of(document)) is None:
        return
    file = folder / "models.toml"
    file.write_bytes(data)
    try:
        configuration = toml_form.load(file)
    except UsageError as error:
        printed(error)
        return
    usable(configuration, folder)


PROFILE = (
    b"profiles:\n  chat:\n    model_id: m\n    backend: llamacpp\n    gpu:\n      device_ids: [0]\n"
    b"      max_model_len: 4096\n    llamacpp:\n      gguf_path: /m.gguf\n      port: 8081\n"
    b"      ctx_size: 4096\n      flash_attn: on\n",
)
yaml_texts = pieces(
    *("profiles:\n", "  chat:\n", "    backend: llamacpp\n", "    llamacpp:\n", "    gpu:\n"),
    *("      port: ", "      gguf_path: ", "      ctx_size: ", "      alias: ", "    model_id: "),
    *("8080\n", "/m.gguf\n", "on\n", "~\n", "010\n", "1:30\n", "1.10\n", ".inf\n", ".nan\n"),
    *("!!int ", "!!float ", "!!timestamp ", "!!bool ", "!!binary ", "!!set ", "!!python/name:os "),
    *("&a ", "*a\n", "<<: *a\n", "{a: b}\n", "[1, 2]\n", '"\\ud800"\n', '"\\0"\n', "? ", "- "),
    *("_\n", "2001-99-99\n", "|\n", ">\n", "---\n", "...\n", "%YAML 9.9\n", "\t", "=\n"),
)
# Each mapping holds the one before twice.
DOUBLING = "".join(f"x{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


def profile_text(value: str) -> bytes:
    return encoded(f"profiles:\n  chat:\n    llamacpp:\n      port: {value}\n")


@harness(
    strategies.one_of(yaml_texts.map(encoded), mutated(*PROFILE)),
    spoil=replace(yaml_form, "UNUSABLE", NOTHING),
    cases=[
        *PROFILE,
        *map(profile_text, ("!!int _", "!!float _", "!!int ''", "!!timestamp x", "!!bool maybe")),
        *map(profile_text, ("!!timestamp 2001-99-99", "!!int 0x", "!!float ':'", "!!binary é")),
        *map(profile_text, ("!!set {a}", "!!omap [a: 1]", "? [a]", "{? {} : 1}", "=", '"\\0"')),
        b"x0: &a0\n  k: v\n" + encoded(DOUBLING) + b"profiles:\n  chat:\n    <<: *a39\n",
        b"a: &a\n  <<: *a\nprofiles: {}\n",
        b"profiles: &a [*a]\n",
        b"a: " + b"[" * 2000,
        encoded('profiles:\n  chat:\n    llamacpp:\n      gguf_path: "/m\\ud800.gguf"\n'),
        encoded('profiles:\n  chat:\n    llamacpp:\n      gguf_path: "/m\\0.gguf"\n'),
        *(
            encoded(
                f'profiles:\n  chat:\n    llamacpp: {{gguf_path: llama.gguf, alias: "{odd}"}}\n'
            )
            for odd in ("\\0", "\\ud800")
        ),
    ],
)
def yaml_profile(data: bytes, folder: Path) -> None:
    file = folder / "profiles.yaml"
    file.write_bytes(data)
    (folder / "llama.gguf").touch()
    try:
        configuration = profiles.load_profile(file, "chat", {})
    except UsageError as error:
        printed(error)
        return
    usable(configuration, folder)


class Bare(str):
    """A word without quotes."""


options = strategies.dictionaries(
    strategies.sampled_from(["port", "ctx_size", "alias", "temp", "jinja", "seed", "load_mode"]),
    strategies.one_of(
        strategies.booleans(),
        strategies.integers(-10, 2**33),
        strategies.floats(-2, 2),
        strategies.sampled_from(["32k", "on", "no", "010", "mlock", "a,b", "8081"]).map(Bare),
        strategies.just(Bare("1.10")),
        texts,
    ),
)


def yaml_of(value: Any) -> str:
    """A value as a file would have it."""
    if isinstance(value, (Bare, bool)):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


@harness(options, spoil=replace(sources.Decimal, "__str__", lambda self: repr(float(self))))
def normalised_profile(table: dict[str, Any], folder: Path) -> None:
    """A profile that is read, written from what was read, and read again is the same."""
    (folder / "m.gguf").touch()

    def read(llamacpp: Mapping[str, Any]) -> Configuration:
        lines = [f"      {key}: {yaml_of(value)}\n" for key, value in llamacpp.items()]
        file = folder / "profiles.yaml"
        file.write_bytes(encoded("profiles:\n  chat:\n    llamacpp:\n" + "".join(lines)))
        return profiles.load_profile(file, "chat", {})

    try:
        first = read({**table, "gguf_path": "m.gguf"})
    except UsageError as error:
        printed(error)
        return
    if first.errors:
        return
    once = first.specs[0].server
    again = read({**once, "gguf_path": "m.gguf"}).specs[0].server
    assert {k: str(v) for k, v in again.items()} == {k: str(v) for k, v in once.items()}
    if table.get("temp") == "1.10":
        assert str(once["temp"]) == "1.10"


json_texts = strategies.one_of(
    pieces(
        *('{"instance": ', '{"chat": ', '{"server": ', '{"port": ', '"a": ', "{", "}", "[", "]"),
        *(", ", "null", "true", "1", "-0", "1e999", "NaN", "Infinity", '"\\ud800"', '"\\u0000"'),
    ),
    json_values.map(lambda value: json.dumps(value, allow_nan=True)),
)


@harness(
    json_texts,
    spoil=replace(sources, "_once", dict),
    cases=[
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        "\ufeff{}",
        '{"a": 1e5}',
    ],
)
def json_overrides(text: str, folder: Path) -> None:
    try:
        over = sources.overrides(text, "OVERRIDES")
    except UsageError as error:
        printed(error)
        return
    if text.strip("\ufeff \n\r\t"):
        pairs = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=list)
        assert over == json.loads(text.removeprefix("\ufeff"))
        assert len(pairs) == len(over), "a key is given twice"
    once = sources.merged(TABLES, over)
    assert sources.merged(once, over) == once
    file = folder / "models.toml"
    file.write_bytes(TOML[0])
    with suppress(UsageError):
        usable(toml_form.load(file, overrides=text), folder)


# What earlier runs wrote

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
            assert lockfile.find(file, entry["asked"]) == entry
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
    spoil=replace(active, "_run", lambda data: data["command"].partition(" ")),
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
