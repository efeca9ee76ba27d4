"""Harnesses for what users type and set: references, command lines, variables, the environment; and
the lines of logs."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hostile_input import harness, pieces, replace, texts
from hypothesis import strategies

from pipeline.commands import request
from pipeline.commands.variables import TABLE
from pipeline.core import environment, process
from pipeline.core.errors import UsageError
from pipeline.core.variables import Variable, read
from pipeline.models import reference
from pipeline.serve import logfile
from pipeline.serve.config import values
from pipeline.serve.flags import Flag, parse_help
from pipeline.tasks import command_line

# References

references = pieces(
    *(
        "org",
        "/",
        "model",
        ":",
        "Q4_K_M",
        "@",
        "main",
        "hf:",
        "hf://",
        "https://",
        "huggingface.co",
    ),
    *("http://", "git@hf.co:", "blob", "tree", "resolve", "/a.gguf", "-00001-of-00002", "?", "#"),
    *(
        "show_file_info=",
        "%2f",
        "%00",
        "%ff",
        "..",
        "~",
        "demo",
        "ngram",
        "[",
        "]",
        "\\",
        "datasets",
    ),
)


def _exists(path: Path) -> bool:
    path.stat()
    return True


@harness(
    strategies.one_of(references, texts),
    spoil=replace(reference, "exists", _exists),
    cases=[
        *("a" * 300, "/" + "a/" * 3000, "x\0y", "~nobody-here/x", "https://[", "http://a:b/c/d"),
        *(
            "https://huggingface.co/a/b%2f..%2f/blob/main/x.gguf",
            "a/b:" + "x" * 50_000,
            "a" * 100_000,
        ),
        *(
            "https://hf.co/a/b/blob/main/%00.gguf",
            "hf://a/b/\udcff.gguf",
            "\ud800",
            "-" * 50_000 + "/",
        ),
    ],
)
def model_references(text: str, folder: Path) -> None:
    """A text means one thing, and what it means can be written as that text again."""
    for parse in (reference.parse, reference.repository, reference.is_address):
        try:
            parsed: Any = parse(text)
        except UsageError as error:
            str(error).encode("utf-8", "backslashreplace")
            assert len(str(error)) < 2 * len(text) + 20_000
            continue
        if isinstance(parsed, reference.Reference) and parsed.kind == "hub":
            owner, _, name = parsed.repo.partition("/")
            assert owner and name and "/" not in name
            assert not {owner, name} & {".", ".."} and not parsed.repo.startswith(".")
            plain = f"hf:{parsed.repo}" + (f":{parsed.quant}" if parsed.quant else "")
            again = reference.parse(plain + (f"@{parsed.revision}" if parsed.revision else ""))
            assert (again.repo, again.quant, again.revision) == (
                *(parsed.repo, parsed.quant, parsed.revision),
            )
    reference.split_scale(text)


# The command line

words = strategies.lists(
    strategies.one_of(
        strategies.sampled_from(
            [
                *("serve", "up", "list", "help", "run", "clean", "info", "test", "claude", "ps"),
                *(
                    "model=demo",
                    "--model",
                    "--model=x",
                    "--offline",
                    "-v",
                    "-n2",
                    "--",
                    "-",
                    "--=x",
                ),
                *(
                    "server.x=y",
                    "--server.x",
                    "--server.",
                    "server.=",
                    "=",
                    "x=",
                    "-a",
                    "*",
                    "q*:x",
                ),
                *(
                    "--print-diagnostics",
                    "--n-gpu-layers",
                    "-h",
                    "--help",
                    "--continue",
                    "-nv",
                    "1",
                ),
            ]
        ),
        texts,
    ),
    max_size=6,
)


def _value(word: str, rest: Any, *, is_flag: bool) -> str:
    return str(rest.popleft())


@harness(
    words,
    spoil=replace(command_line, "_value", _value),
    cases=[["info"], ["--"], ["serve", "--model"], ["--model=\udcff"], ["x" * 100_000]],
)
def command_words(typed: list[str], folder: Path) -> None:
    """What is understood means the same when it is typed."""
    for is_plain in (False, True):
        try:
            understood = command_line.understood(typed, is_plain=is_plain)
            given = dict(word.split("=", 1) for word in understood if "=" in word)
            command_line.require_read(understood, given)
        except UsageError as error:
            assert error.message
            continue
        assert command_line.understood(understood, is_plain=is_plain) == understood


assigned = strategies.dictionaries(
    strategies.sampled_from([each.name for each in TABLE]),
    strategies.one_of(
        strategies.sampled_from(
            ["1", "0", "on", "demo", "auto", "q4_k_m", "8080", "0.0.0.0", "4.8bpw", "3GiB", "none"]
        ),
        texts,
    ),
    min_size=1,
    max_size=6,
)


@harness(
    assigned,
    spoil=lambda patch: patch.setitem(globals(), "TABLE", [Variable("model", {}.__getitem__)]),
    cases=[
        {each.name: value}
        for each in TABLE
        for value in ("", "٣", "9" * 5000, "~nobody-here/x", "\udcff", "nan", "inf", "-" * 9)
    ],
)
def variables(given: dict[str, str], folder: Path) -> None:
    given = {name: value.replace("\0", "") for name, value in given.items()}  # as a shell has them
    try:
        parsed = read(given, TABLE)
    except UsageError as error:
        assert error.message
        return
    assert parsed.keys() == given.keys()
    request.elsewhere(next(iter(given)))


# Options of a server

HELP = """\
-c,    --ctx-size N                     size of the context
--temp N                                temperature (default: 0.80)
--poll <0...100>                        polling level
-ts,   --tensor-split N0,N1,N2,...      fractions
-fa,   --flash-attn [on|off|auto]       attention
--chat-template-kwargs JSON             parameters
--host HOST                             host
"""
FLAGS = parse_help(HELP)


@harness(
    strategies.tuples(
        strategies.sampled_from(sorted(FLAGS)),
        strategies.one_of(
            texts,
            strategies.integers(),
            strategies.floats(),
            pieces("1", "k", "32", ".", "e", ",", "/", "Mi"),
        ),
    ),
    spoil=replace(values, "_within", lambda *bounds: None),
    cases=[
        *(("ctx-size", text) for text in ("9" * 5000, "1e5", "٣٢", "9999999k", "-0")),
        ("ctx-size", 2**40),
        ("chat-template-kwargs", "[" * 100_000),
        ("tensor-split", "1," * 50_000),
    ],
)
def option_values(example: tuple[str, Any], folder: Path) -> None:
    """A value is refused, or taken as one that is read the same again."""
    name, value = example
    flag: Flag = FLAGS[name]
    try:
        taken = values.read(name, flag, value)
    except ValueError as allowed:
        assert str(allowed)
        return
    assert values.read(name, flag, taken) == taken
    if name == "ctx-size":
        assert 0 <= int(str(taken)) < 2**31


# The environment

VARIABLES = (
    *(
        "PATH",
        "HOME",
        "HF_TOKEN",
        "LLAMA_ARG_PORT",
        "CUDA_VISIBLE_DEVICES",
        "GITHUB_TOKEN",
        "X_KEY",
    ),
    *(
        "LLAMA_CACHE",
        "VLLM_API_KEY",
        "GGML_TOKEN",
        "PYTHONPATH",
        "http_proxy",
        "AWS_SECRET",
        "LC_ALL",
    ),
)
SECRETS = ("hf_" + "a" * 30, "https://user:pass@host/", "Bearer x", "sk-" + "b" * 30)
environs = strategies.dictionaries(
    strategies.one_of(strategies.sampled_from(VARIABLES), texts),
    strategies.one_of(strategies.sampled_from(SECRETS), texts),
    max_size=6,
)


@harness(
    environs,
    spoil=replace(environment, "is_credential", lambda name, value: False),
    cases=[
        {"GGML_TOKEN": "x"},
        {"HOME": SECRETS[0]},
        {"PATH": "a" * 100_000},
        {"PATH": "a:" * 50_000},
    ],
)
def passed_environment(environ: dict[str, str], folder: Path) -> None:
    """No program gets a secret, or a variable that would change its launch; twice is as once."""
    for passed in (
        *(environment.servers, environment.tools, environment.own, environment.litellm),
        environment.without_credentials,
    ):
        some = passed(environ)
        assert some.items() <= environ.items()
        assert passed(some) == some
        assert "PYTHONPATH" not in some
        assert not any(
            value in SECRETS for name, value in some.items() if "proxy" not in name.lower()
        )
        assert not {"HF_TOKEN", "GITHUB_TOKEN", "X_KEY", "GGML_TOKEN", "VLLM_API_KEY"} & some.keys()
    assert "LLAMA_ARG_PORT" not in environment.servers(environ)


# Logs


@harness(
    strategies.lists(strategies.one_of(texts, strategies.binary(max_size=20)), max_size=8),
    spoil=replace(logfile, "_text", lambda line: line.decode("ascii", "replace")),
    cases=[["x" * 3_000_000], ["\r", "\r\n"], [b"\xff\n"]],
)
def log_lines(written: list[str | bytes], folder: Path) -> None:
    """Whatever a server prints, its log holds it in lines that can be read."""
    data = b"\n".join(
        line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
        for line in written
    )
    reading, writing = os.pipe()
    if len(data) > 60_000:  # more than a pipe holds
        data = data[:60_000]
    os.write(writing, data + b"\n")
    os.close(writing)
    with os.fdopen(reading, "rb") as out:
        lines = list(process.lines_of(SimpleNamespace(stdout=out, returncode=None)))  # type: ignore[arg-type]
    file = folder / "server ü.log"
    file.unlink(missing_ok=True)
    log = logfile.Log(file)
    for line in lines:
        log(line)
    log.close()
    if lines:
        assert list(logfile.lines(file, len(lines) + 5)) == lines
        assert list(logfile.lines(file, 1)) == lines[-1:]
        assert len(logfile.quoted(lines)) < 100_000
    # what another program wrote there
    file.write_bytes(data)
    for line in logfile.lines(file, 10):
        line.encode()
