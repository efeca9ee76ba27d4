"""The options of a llama-server, from a help in the form of the real one."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path

import pytest

from pipeline.commands import server_options
from pipeline.commands.request import Request
from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve import flags
from pipeline.serve.config import messages, options
from pipeline.serve.flags import Flag, parse_help

HELP = r"""load_backend: loaded CPU backend
----- common params -----

-h,    --help, --usage                  print usage and exit
-t,    --threads N                      number of CPU threads (default: -1)
                                        (env: LLAMA_ARG_THREADS)
--cpu-strict <0|1>                      strict placement (default: 0)
--poll <0...100>                        polling level, see --cpu-strict and -t
-c,    --ctx-size N                     size of the context
-n,    --predict, --n-predict N         number of tokens (-1 = infinity)
-fa,   --flash-attn [on|off|auto]       set it ('on', 'off', or 'auto')
-kvo,  --kv-offload, -nkvo, --no-kv-offload
                                        whether to offload the cache
-e,    --escape, --no-escape            process escapes (\n, \t)
-ctk,  --cache-type-k TYPE              data type for K
                                        allowed values: f32, f16
--pooling {none,mean,cls,last,rank}     pooling type
--control-vector-layer-range START END
                                        layers to apply it to
-m,    --model FNAME                    model path to load

----- server params -----

--swa-full                              use the full cache (default: false)
"""
FLAGS = parse_help(HELP)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("help", ""), ("usage", ""), ("threads", "N"), ("cpu-strict", "<0|1>")),
        *(("poll", "<0...100>"), ("predict", "N"), ("n-predict", "N"), ("escape", "")),
        *(("no-escape", ""), ("kv-offload", ""), ("no-kv-offload", ""), ("swa-full", "")),
        *(("cache-type-k", "TYPE"), ("pooling", "{none,mean,cls,last,rank}"), ("model", "FNAME")),
        *(("control-vector-layer-range", "START END"), ("flash-attn", "[on|off|auto]")),
    ],
)
def test_an_option_of_the_help(name: str, value: str) -> None:
    assert (FLAGS[name].name, FLAGS[name].value) == (f"--{name}", value)


def test_nothing_but_options_is_taken_for_one() -> None:
    assert len(FLAGS) == 18
    assert parse_help("usage: program [--model X]\n  see --help\n") == {}
    assert parse_help("----- common params -----\n\n--- \n-- x\n") == {}


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("--x TYPE   for K\n   allowed values: f32, f16\n   (default: f16)", ["f32", "f16"]),
        (
            "--x MODE  how (default: auto)\n  - none: not\n    at all\n  - a+b: both",
            ["none", "a+b", "auto"],
        ),
        ("--x N  Values:\n   - 0: nothing\n   - 1: errors", []),
        ("--x FORMAT  of the log (default: auto)", []),
    ],
)
def test_choices_of_the_description(text: str, choices: list[str]) -> None:
    assert parse_help(text)["x"].choices == choices


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        *(
            ("[on|off|auto]", ["on", "off", "auto"]),
            ("<0|1>", ["0", "1"]),
            ("{a,b-c}", ["a", "b-c"]),
        ),
        *(("N", []), ("<0...100>", []), ("", []), ("lo-hi", []), ("[KEY]", [])),
    ],
)
def test_choices_where_the_help_lists_them(value: str, choices: list[str]) -> None:
    assert Flag("--x", value).choices == choices


def words(server: dict[str, str]) -> list[str]:
    """The words of a command line for options as they are typed. Raises UsageError."""
    spec = server_options.spec(Request(server=server))
    known = FLAGS | {name: Flag(f"--{name}", "X") for name in ("host", "port")}
    given = options.resolve(spec, known)
    messages.require_none(options.errors(given))
    own = (*server_options.NAMED, "host", "port", "api_key")
    asked = {n: v for n, v in given.spec.server.items() if n.replace("-", "_") not in own}
    return options.words(asked)


def test_values_and_either_spelling_of_names() -> None:
    given = {"cache_type_k": "f16", "flash-attn": "off", "n_predict": "-1", "poll": "50"}
    assert words(given) == [
        *("--cache-type-k", "f16", "--flash-attn", "off", "--n-predict", "-1", "--poll", "50")
    ]
    assert words({}) == []


@pytest.mark.parametrize("word", ["1", "true", "YES", "On"])
def test_a_switch_that_is_on(word: str) -> None:
    assert words({"swa_full": word, "no-escape": word}) == ["--swa-full", "--no-escape"]


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF", ""])
def test_a_switch_that_is_off_is_left_out(word: str) -> None:
    assert words({"swa_full": word}) == []


def test_all_mistakes_at_once_each_with_what_is_allowed() -> None:
    wrong = {"ctx_sise": "1", "flash_attn": "maybe", "swa_full": "5", "m": "x", "poll": "1"}
    with pytest.raises(UsageError) as caught:
        words(wrong)
    assert caught.value.message.splitlines() == [
        "server.ctx_sise: llama-server has no --ctx-sise; did you mean ctx_size?",
        "server.flash_attn=maybe: must be one of on, off, auto",
        "server.swa_full=5: --swa-full takes no value; write true, or leave it out",
        "server.m: llama-server has no --m; did you mean model?",
    ]


def program(path: Path, prints: str, status: int = 0) -> tuple[Path, str]:
    """A program that prints this and counts its runs; and its sha256."""
    count = path.with_name("runs")
    path.write_text(
        f'#!/bin/sh\nprintf x >>{shlex.quote(str(count))}\n[ "$*" = --help ] || exit 9\n'
        f"printf '%s\\n' {shlex.quote(prints)}\nexit {status}\n"
    )
    path.chmod(0o755)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")


@POSIX
def test_a_program_is_asked_once_for_each_sha256(tmp_path: Path) -> None:
    server, digest = program(tmp_path / "server", HELP)
    cache = tmp_path / "cache" / "flags"
    assert flags.read(server, digest, cache) == flags.read(server, digest, cache) == FLAGS
    assert (tmp_path / "runs").read_text() == "x"
    server, newer = program(server, HELP + "--brand-new                 an option\n")
    assert newer != digest
    assert "brand-new" in flags.read(server, newer, cache)
    assert "brand-new" not in flags.read(server, digest, cache)
    assert (tmp_path / "runs").read_text() == "xx"
    assert {path.name for path in cache.iterdir()} == {f"{digest}.json", f"{newer}.json"}


@POSIX
@pytest.mark.parametrize(
    ("says", "is_there"),
    [
        ('error while handling argument "--rpc": RPC not supported in this build', False),
        ('error while handling argument "--rpc": failed to find RPC backend', False),
        ("Failed to connect to 127.0.0.1:1", True),
    ],
)
def test_rpc_is_an_option_where_the_program_has_it(
    tmp_path: Path, says: str, is_there: bool
) -> None:
    server = tmp_path / "server"
    text = HELP + "--rpc SERVERS                 comma-separated list\n"
    server.write_text(
        f'#!/bin/sh\n[ "$1" = --rpc ] && {{ echo {shlex.quote(says)} >&2; exit 1; }}\n'
        f"printf '%s\\n' {shlex.quote(text)}\n"
    )
    server.chmod(0o755)
    assert ("rpc" in flags.read(server, "x", tmp_path)) == is_there


@POSIX
@pytest.mark.parametrize("garbage", ["", "{", "[]", "null", "3", '{"model": 1}', '{"model": {}}'])
def test_a_broken_cache_is_asked_anew(tmp_path: Path, garbage: str) -> None:
    server, digest = program(tmp_path / "server", HELP)
    (tmp_path / f"{digest}.json").write_text(garbage)
    assert flags.read(server, digest, tmp_path) == FLAGS
    assert "model" in json.loads((tmp_path / f"{digest}.json").read_text())


@POSIX
@pytest.mark.parametrize(
    ("prints", "status"),
    [("", 0), ("hello", 0), (HELP, 1), ("\0\x80\xff" * 99, 0), ("--modal X   no", 0)],
    ids=["nothing", "hello", "fails", "bytes", "another program"],
)
def test_a_program_whose_help_is_no_help(tmp_path: Path, prints: str, status: int) -> None:
    server, digest = program(tmp_path / "server", prints, status)
    with pytest.raises(PipelineError, match="lists no options of llama"):
        flags.read(server, digest, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@POSIX
def test_what_a_program_says_that_does_not_run_is_shown(tmp_path: Path) -> None:
    server, _ = program(tmp_path / "server", "")
    server.write_text(
        '#!/bin/sh\necho "libc.so.6: version \\`GLIBC_2.38\' not found" >&2; exit 1\n'
    )
    with pytest.raises(PipelineError, match="GLIBC_2\\.38' not found"):
        flags.read(server, "0" * 64, tmp_path)
    server.write_text("#!/lib/no-such-loader.so\n")
    with pytest.raises(PipelineError, match="what starts it is not"):
        flags.read(server, "0" * 64, tmp_path)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="none"):
        flags.read(tmp_path / "none", "0" * 64, tmp_path)
