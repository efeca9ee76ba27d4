"""Harnesses for what users configure: files of instances, profiles, and overrides."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
from hostile_input import damaged, encoded, harness, mutated, pieces, replace, texts
from hostile_input import values as json_values
from hypothesis import strategies
from msgspec import convert, to_builtins
from serve.config.config_tools import FLAGS, server_in

from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve.config import checks, profiles, sources, toml_form, yaml_form
from pipeline.serve.config.configuration import Configuration
from pipeline.serve.config.instances import instances
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.server import Server

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
    cases=[
        *TOML,
        b"a = nan",
        b"a" + b".a" * 20_000 + b" = 1",
        b"a = " + b"[" * 5000,
        b"a = " + b"9" * 5000,
    ],
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
    read = tomllib.loads(sources.text_of(file).replace("\r\n", "\n"))
    assert repr(tables) == repr(read)  # nan is not equal to itself
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
        b"a: " + b"[" * 1200,
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
