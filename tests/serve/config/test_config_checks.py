"""What is wrong with the options, found before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from config_tools import FLAGS, checked, read, server_in

from pipeline.core.errors import UsageError
from pipeline.serve.config import checks, synonyms, vllm
from pipeline.serve.config.instances import resolve
from pipeline.serve.config.synonyms import RENAMED
from pipeline.serve.flags import Flag, parse_help
from pipeline.serve.flags import read as read_flags
from pipeline.serve.keys import RULE

SERVER = "[instance.chat.server]\n"
ROUTER = "note: models.toml: instance.chat: names no model, so llama-server routes to the models it"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ctx_sise = 1", "ctx_sise: llama-server has no --ctx-sise; did you mean ctx_size?"),
        ("m = 'x'", "m: llama-server has no --m"),
        ("jinja = 1", "jinja = 1: --jinja takes no value; write true, or leave it out"),
        ("jinja = 'on'", 'jinja = "on": --jinja takes no value; write true, or leave it out'),
        ("jinja = []", "jinja = […]: --jinja takes no value; write true, or leave it out"),
        ("ctx_size = true", "ctx_size = true: --ctx-size takes a value: N"),
        ("flash_attn = true", "flash_attn = true: must be one of on, off, auto, in quotes"),
        ("flash_attn = 'onn'", 'flash_attn = "onn": must be one of on, off, auto'),
        (
            "pooling = ['mean', 'men']",
            'pooling = "men": must be one of none, mean, cls, last, rank',
        ),
        ("mlock = true", "mlock: llama-server has no --mlock any more; use load_mode"),
        (
            "draft-max = 4",
            "draft_max: llama-server has no --draft-max any more; use spec_draft_n_max",
        ),
        (
            "gpu_layers = 1\nn_gpu_layers = 1",
            "n_gpu_layers and gpu_layers are one option; write one of them",
        ),
        ("chat_template = 'llama3'", 'chat_template = "llama3": is not a template: every prompt'),
        ("chat_template = 'my.jinja'\nno_jinja = false", 'chat_template = "my.jinja": is no'),
        (
            "control_vector_layer_range = [1]",
            "control_vector_layer_range = […]: --control-vector-layer-range takes 2 values: "
            "START END",
        ),
        ("control_vector_layer_range = '1'", 'control_vector_layer_range = "1": --control-vector'),
        (
            "control_vector_layer_range = [1, 'x']",
            'control_vector_layer_range = "x": must be a whole number',
        ),
        (
            "jinja = true\nno-jinja = true",
            "no_jinja and jinja contradict each other; leave one out",
        ),
        (
            "spec_type = 'ngram-mod,draft-simpel'",
            'spec_type = "ngram-mod,draft-simpel": must be one or more of none, draft-simple, '
            "ngram-mod, with commas between them; did you mean draft-simple?",
        ),
        (
            "ssl_cert_file = 'keys'",
            "ssl_cert_file: llama-server speaks plain HTTP without ssl_key_file; write both",
        ),
        (
            "extra_args = ['--ssl-key-file', 'keys']",
            "ssl-key-file: llama-server speaks plain HTTP without ssl_cert_file; write both",
        ),
        ("port = 0", "port = 0: must be a whole number from 1 to 65535"),
        ("port = 65536", "port = 65536: must be a whole number from 1 to 65535"),
        ("port = 'http'", 'port = "http": must be a whole number from 1 to 65535'),
        (f"port = '{'9' * 5000}'", 'port = "999'),
        ("port = [1, 2]", "port = […]: must be a whole number from 1 to 65535"),
        ("api_prefix = 'http://a/b?c'", 'api_prefix = "http://a/b?c": must be a path, such as'),
        ("model = 'none.gguf'", "model = none.gguf: "),
        ("mmproj = 'none.gguf'", "mmproj = none.gguf: "),
        ("api_key_file = 'none'", "api_key_file = none: "),
        ("api_key = ''", 'api_key: must be a key, or "none"'),
        ("api_key = true", "api_key = true: --api-key takes a value: KEY"),
        ("api_key = ['a', 'none']", "api_key: none is not a key"),
        ("api_key = '#a'", "api_key: a key must not begin with # or hold spaces"),
        ('api_key = "a\\nb"', "api_key: a key must not begin with # or hold spaces"),
        (
            "api_key = 'a'\napi_key_file = 'keys'",
            "api_key: contradicts models.toml: instance.chat.server.api_key_file; leave one out",
        ),
        (
            "extra_args = ['--verbose', '--ctx-size 4096']",
            "extra_args: --ctx-size and its value are one text; write them as two",
        ),
        (
            "extra_args = ['--verbose', '--ctx_size=4096']",
            "extra_args: --ctx_size and its value are one text; write them as two",
        ),
        (
            "extra_args = ['-c=4096']",
            "extra_args: -c and its value are one text; write them as two",
        ),
        (
            "extra_args = ['--api-key', 'x']",
            "extra_args: --api-key would be visible in the process list; write api_key = …",
        ),
        (
            "extra_args = ['--api_key=x']",
            "extra_args: --api-key would be visible in the process list; write api_key = …",
        ),
        (
            "hf_token = 'x'",
            "hf_token: --hf-token would be visible in the process list; write a model table",
        ),
        (
            "extra_args = ['-hft', 'x']",
            "extra_args: -hft would be visible in the process list; write a model table",
        ),
    ],
)
def test_a_mistake(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "keys").write_text("a\n")
    found = checked(tmp_path, SERVER + text)
    assert found[0].startswith(f"models.toml: instance.chat.server.{line}"), found


@pytest.mark.parametrize(
    "text",
    [
        *("flash_attn = 'on'", "flash_attn = false", "jinja = true", "device = 'CUDA0'"),
        *("chat_template = 'chatml'", "chat_template = '{{ messages }}'"),
        "chat_template = 'llama3'\nno_jinja = true",
        "no_jinja = false\njinja = true",
        *("spec_type = 'ngram-mod,none'", "spec_type = ['none', 'ngram-mod']"),
        "jinja = true\n[instance.server]\nno_jinja = true",
        *("control_vector_layer_range = [1, 5]", "control_vector_layer_range = '1 5'"),
        "chat_template = 'llama3'\nextra_args = ['--no-jinja']",
        *(
            "extra_args = ['--whatever', 'x', '- a b', '-1 2', '--x=a b']",
            "extra_args = ['--tags', '--ctx-size=1', '-c', '4']",
            "port = '9'",
            "n_gpu_layers = 'all'",
        ),
    ],
)
def test_no_mistake(tmp_path: Path, text: str) -> None:
    assert len(checked(tmp_path, SERVER + text)) == 1
    assert checked(tmp_path, SERVER + text)[0].startswith(ROUTER)


@pytest.mark.parametrize(("text", "good"), [("", False), ("# a\n \n", False), ("# a\nb", True)])
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_a_file_without_a_key_would_let_everybody_in(
    tmp_path: Path, engine: str, text: str, good: bool
) -> None:
    (tmp_path / "keys").write_text(text)
    (tmp_path / "x").touch()
    control = f"[instance.chat.control]\nengine = '{engine}'\n"
    table = f"{control}{SERVER}model = 'x'\nhost = '0.0.0.0'\napi_key_file = 'keys'\n"
    found = [line for line in checked(tmp_path, table) if "note" not in line]
    place = "models.toml: instance.chat.server.api_key_file = keys"
    wrong = f"{place}: {tmp_path / 'keys'} holds no key"
    assert found == ([] if good else [wrong])


def test_a_key_file_is_read_as_llama_server_reads_it(tmp_path: Path) -> None:
    table = f"{SERVER}model = 'models.toml'\napi_key_file = 'keys'\n"
    for text in ("a \n", "\tb\n", "good\nc \n", "a\n # another\n", "a\n \n"):
        (tmp_path / "keys").write_text(text)
        (line,) = checked(tmp_path, table)
        assert line.endswith(
            "has a space or a carriage return beside a key, which becomes part of it"
        )
    (tmp_path / "keys").write_text("a\n# one\n\nb")
    assert checked(tmp_path, table) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (
            b"\xef\xbb\xbfa\nb\n",
            "begins with a byte order mark (BOM); save it as UTF-8 without",
        ),
        ("a\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a\n".encode("utf-16-be"), "holds zero bytes, as UTF-16 does; save it as UTF-8"),
        ("a\n".encode("utf-32"), "is UTF-32; save it as UTF-8"),
        (b"a\nb\xff\n", "line 2: is not UTF-8; save it as UTF-8"),
        ("a\nschlüssel\n".encode(), f"line 2: {RULE}"),
        ("a\u200b\n".encode(), f"line 1: {RULE}"),
        (b"# one\ntwo words\n", f"line 2: {RULE}"),
        (b"a\x07\n", f"line 1: {RULE}"),
        (b"a\rb\r", f"line 1: {RULE}"),
        (b"a" * 4097, f"line 1: {RULE}"),
    ],
)
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "gateway"])
def test_a_key_that_not_every_program_reads_alike(
    tmp_path: Path, engine: str, data: bytes, why: str
) -> None:
    (tmp_path / "keys").write_bytes(data)
    (tmp_path / "x").touch()
    table = f"[instance.chat.control]\nengine = '{engine}'\n{SERVER}model = 'x'\n"
    if engine == "gateway":
        table = f"{SERVER}model = 'x'\n[gateway]\n"
    (line,) = checked(tmp_path, f"{table}api_key_file = 'keys'\n")
    assert line.endswith(f": {tmp_path / 'keys'}: {why}")


def test_all_mistakes_of_file_and_options_at_once(tmp_path: Path) -> None:
    text = """
    [master]
    max_loading = 0
    [instance.server]
    ctx_sise = 1
    [instance.a.server]
    model = "gone.gguf"
    [instance.b.control]
    gpu_ids = "0,3"
    [instance.b.server]
    port = 8080
    [instance.b.model]
    ref = "demo"
    [instance.c.server]
    port = 1
    model = "gone.gguf"
    [instance.c.model]
    ref = "demo"
    """
    gone = tmp_path / "gone.gguf"
    assert checked(tmp_path, text, cards=2) == [
        "models.toml: master.max_loading = 0: must be at least 1",
        "models.toml: instance.server.ctx_sise: llama-server has no --ctx-sise"
        "; did you mean ctx_size?",
        f"models.toml: instance.a.server.model = gone.gguf: {gone} is not a file",
        "models.toml: instance.b.control.gpu_ids = 0,3: there is no card 3 (there are 2, from 0)",
        "models.toml: instance.c.server.model: contradicts the model table; leave one out",
        f"models.toml: instance.c.server.model = gone.gguf: {gone} is not a file",
        "models.toml: instance.b.server.port: 127.0.0.1:8080 is taken by instance.a.server.port",
    ]


@pytest.mark.parametrize(
    ("one", "two", "clash"),
    [
        ("", "", True),
        ("port = 1", "port = 2", False),
        ("host = '127.0.0.2'", "", False),
        ("host = '0.0.0.0'", "", True),
        ("", "host = '::'", True),
        ("host = '::1'", "host = '0:0:0:0:0:0:0:1'", True),
        ("host = 'FE80::0'", "host = '[fe80::]'", True),
        ("host = '::1'", "host = '::2'", False),
        ("host = 'localhost'", "", True),
        ("host = 'MyHost'", "host = 'myhost'", True),
        ("extra_args = ['--port', '1']", "port = 1", True),
    ],
)
def test_two_on_one_port(tmp_path: Path, one: str, two: str, clash: bool) -> None:
    text = f"[instance.a.server]\napi_key = 'x'\n{one}\n[instance.b.server]\napi_key = 'x'\n{two}\n"
    found = [line for line in checked(tmp_path, text) if "is taken by" in line]
    assert len(found) == clash
    off = f"{text}[instance.b.control]\nenabled = false"
    assert not [line for line in checked(tmp_path, off) if "is taken by" in line]


def test_the_port_of_the_gateway(tmp_path: Path) -> None:
    text = f"{SERVER}port = 9000\n[gateway]\nenable = true\n"
    (line,) = checked(tmp_path, text)
    assert line == "models.toml: gateway.port: 127.0.0.1:9000 is taken by instance.chat.server.port"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("api_key_file = 'keys'", []),
        ("host = '0.0.0.0'\napi_key = 'none'", []),
        ("[gateway.models]\n'a*' = 'chat'\n'b*' = 'Mine'\n'c' = 'off'", []),
        ("host = 'a:1'", ['host = "a:1": must be one host name or address alone, such as']),
        ("api_key_file = 'gone'", ["api_key_file = {}/gone: {}/gone is not a file"]),
        ("api_key_file = 'empty'", ["api_key_file = {}/empty: {}/empty holds no key"]),
        (
            "api_key = 'a b'\napi_key_file = 'keys'",
            [
                "api_key: contradicts models.toml: gateway.api_key_file; leave one out",
                f"api_key: {RULE}",
            ],
        ),
        (
            "[gateway.models]\n'claude-*' = 'chta'\nx = 'gone'",
            [
                'models."claude-*" = "chta": is neither an instance nor an alias; '
                "did you mean chat?",
                'models.x = "gone": is neither an instance nor an alias',
            ],
        ),
    ],
)
def test_the_table_of_the_gateway(tmp_path: Path, text: str, lines: list[str]) -> None:
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "keys").write_text("a\n")
    off = "[instance.off.control]\nenabled = false\n"
    found = checked(tmp_path, f"{off}{SERVER}alias = 'mine'\n[gateway]\n{text}\n")
    found = [line for line in found if "note" not in line]
    assert len(found) == len(lines)
    for one, start in zip(found, lines, strict=True):
        assert one.startswith(f"models.toml: gateway.{start.replace('{}', str(tmp_path))}")


def test_what_overrides_bring_is_said_to_be_theirs(tmp_path: Path) -> None:
    """As in docker/stack.env: the file of a key, for all."""
    told = {"api_key_file": "gone", "host": "0.0.0.0"}
    over = json.dumps({"instance": {"server": told}, "gateway": told})
    text = f"{SERVER}api_key = 'x'\n[gateway]\napi_key = 'y'\n"
    gone = f" = gone: {tmp_path}/gone is not a file"
    assert checked(tmp_path, text, overrides=over, where="OVERRIDES") == [
        f"OVERRIDES: instance.server.api_key_file{gone}",
        "models.toml: instance.chat.server.api_key: contradicts "
        "OVERRIDES: instance.server.api_key_file; leave one out",
        f"OVERRIDES: gateway.api_key_file = {tmp_path}/gone: {tmp_path}/gone is not a file",
        "models.toml: gateway.api_key: contradicts OVERRIDES: gateway.api_key_file; leave one out",
    ]


def test_an_option_in_the_environment(tmp_path: Path) -> None:
    """Nothing would know of it: with the prefix the server is never seen to be ready."""
    wrong = ("LLAMA_ARG_API_PREFIX", "LLAMA_API_KEY", "LLAMA_ARG_NEW")
    instead = ("api_prefix", "api_key", "NAME")
    env = ", ".join(f"{name} = 'x'" for name in (*wrong, "LLAMA_LOG_COLORS", "HF_TOKEN"))
    control = f"[instance.chat.control]\nenv = {{{env}}}\n"
    assert checked(tmp_path, control + SERVER) == [
        f"models.toml: instance.chat.control.env.{variable}: is an option of llama-server, which "
        f"nothing here would know of; write server.{option}"
        for variable, option in zip(wrong, instead, strict=True)
    ]


def test_two_that_write_one_log(tmp_path: Path) -> None:
    text = (
        "[instance.control]\nlog_file = 'l'\n[instance.a.server]\n[instance.b.server]\nport = 1\n"
    )
    (line,) = checked(tmp_path, text)
    assert line == "models.toml: instance.control.log_file: l is written by instance.a"


@pytest.mark.parametrize("log", ["models.toml", "x/../m.gguf"])
def test_a_log_in_place_of_what_is_read(tmp_path: Path, log: str) -> None:
    """It would be renamed, and later removed as an old log."""
    (tmp_path / "m.gguf").touch()
    control = f"[instance.chat.control]\nlog_file = '{log}'\n"
    (line,) = checked(tmp_path, f"{control}{SERVER}model = 'm.gguf'\n")
    name = Path(log).name
    place = "models.toml: instance.chat.control.log_file"
    assert line == f"{place}: {name} is read here; name another file"


@pytest.mark.parametrize("other", ["./l", "folder/../l", "link/l"])
def test_one_log_by_two_paths(tmp_path: Path, other: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    logs = {"a": "l", "b": other}
    text = "".join(f"[instance.{x}.control]\nlog_file = '{log}'\n" for x, log in logs.items())
    (line,) = checked(tmp_path, text + "[instance.b.server]\nport = 1\n")
    assert line == "models.toml: instance.b.control.log_file: l is written by instance.a"


@pytest.mark.parametrize(
    ("gpu_ids", "cards", "wrong"),
    [
        *(("0", 1, ""), ("1,0", 2, ""), ("all", 0, ""), ("none", 0, ""), ("7", None, "")),
        ("0", 0, "there is no card 0 (none)"),
        ("0,2,3", 2, "there is no card 2, 3 (there are 2, from 0)"),
        ("GPU-1a", 0, ""),
    ],
)
def test_cards_that_are_not_there(
    tmp_path: Path, gpu_ids: str, cards: int | None, wrong: str
) -> None:
    text = f"[instance.chat.control]\ngpu_ids = '{gpu_ids}'\n{SERVER}"
    found = [line for line in checked(tmp_path, text, cards=cards) if "note" not in line]
    assert found == (
        [f"models.toml: instance.chat.control.gpu_ids = {gpu_ids}: {wrong}"] if wrong else []
    )


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("jinja = false", "jinja = false: leaves the option out; no_jinja = true turns it off"),
        ("threads = [1, 2]", "threads: llama-server takes the last one alone; "),
        ("ctx_size = '32k'", 'ctx_size = "32k": taken as 32768'),
        ("host = '[::1]'", 'host = "[::1]": taken as "::1"'),
        ("api_prefix = 'llm'", 'api_prefix = "llm": taken as "/llm"'),
        ("api_prefix = '/llm/'", 'api_prefix = "/llm/": taken as "/llm"'),
        ("api_prefix = '/'", 'api_prefix = "/": taken as ""'),
        ("host = '0.0.0.0'\napi_key = 'none'", "0.0.0.0 can be reached by others, without a key"),
        (
            "spec_type = ['ngram-mod', 'draft-simple']",
            "server.spec_type = draft-simple: no draft model is named, so llama-server does ",
        ),
    ],
)
def test_what_is_said(tmp_path: Path, text: str, warning: str) -> None:
    assert any(warning in line for line in checked(tmp_path, SERVER + text))


@pytest.mark.parametrize(
    "text", ["api_key = ['a', 'b']", "alias = ['a', 'b']", "tags = ['a', 'b']"]
)
def test_what_adds_up_is_not_said_to_be_the_last_one(tmp_path: Path, text: str) -> None:
    assert not any("last one alone" in line for line in checked(tmp_path, SERVER + text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ref = 'gone.gguf'", "ref = {}/gone.gguf: {}/gone.gguf does not exist"),
        ("ref = 'nonsense'", "ref = nonsense: not a valid reference"),
        (
            "ref = 'demo'\nquant = 'q44'",
            'quant = "q44": must be auto, fit, a size such as 4.8bpw or 3GiB, or a type of '
            "llama-quantize",
        ),
        ("ref = 'demo'\nimatrix = 'gone'", "imatrix: {}/gone is not a file"),
    ],
)
def test_a_mistake_in_a_model_table(tmp_path: Path, text: str, line: str) -> None:
    (found,) = checked(tmp_path, f"[instance.a.model]\n{text}")
    assert found.startswith(f"models.toml: instance.a.model.{line.format(tmp_path, tmp_path)}")


class TestProgram:
    def found(self, folder: Path, named: str, server: Path | None = None) -> str:
        configuration = read(folder, f"[master]\nllama_cpp_path = '{named}'\n{SERVER}")
        with pytest.raises(UsageError) as caught:
            checks.check(configuration, server=server, flags=None, environ={})
        return caught.value.message

    def test_what_cannot_be_one(self, tmp_path: Path) -> None:
        place = "models.toml: master.llama_cpp_path"
        (tmp_path / "file").touch()
        assert self.found(tmp_path, "gone") == f"{place} = gone: {tmp_path / 'gone'} is not a file"
        assert "is a folder; name the llama-server in it" in self.found(tmp_path, ".")
        if os.name == "posix":
            assert self.found(tmp_path, "file").endswith("may not be executed")

    def test_beside_all_other_mistakes(self, tmp_path: Path) -> None:
        text = f"[master]\nllama_cpp_path = '.'\n{SERVER}model = 'gone'\nport = 0"
        with pytest.raises(UsageError) as caught:
            checks.check(read(tmp_path, text), server=None, flags=None, environ={})
        assert len(caught.value.message.splitlines()) == 3

    def test_none_at_all(self, tmp_path: Path) -> None:
        says = r"there is no llama-server; name one, or run .*build_bins"
        with pytest.raises(UsageError, match=says):
            checks.check(read(tmp_path, SERVER), server=None, flags=None, environ={})

    def test_none_is_needed_for_vllm_alone(self, tmp_path: Path) -> None:
        text = "[instance.control]\nengine = 'vllm'\n[instance.a.server]\nmodel = 'org/x'"
        checks.check(read(tmp_path, text), server=None, flags=None, environ={})

    def test_options_are_not_known(self, tmp_path: Path) -> None:
        server = server_in(tmp_path)
        configuration = read(tmp_path, f"{SERVER}whatever = 1")
        checks.check(configuration, server=server, flags=None, environ={})


def test_nothing_is_checked_of_what_is_off(tmp_path: Path) -> None:
    assert checked(tmp_path, f"[master]\nenable = false\n{SERVER}ctx_sise = 1") == []
    assert checked(tmp_path, f"[instance.chat.control]\nenabled = false\n{SERVER}x = 1") == []


def test_aliases_are_known_of_every_flag() -> None:
    assert FLAGS["gpu-layers"].names == ("-ngl", "--gpu-layers", "--n-gpu-layers")
    assert FLAGS["host"].names == ("--host",)
    assert not FLAGS["device"].choices
    assert "draft-max" not in FLAGS


def test_flags_of_the_cache_keep_their_aliases(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text(
        '{"model": {"name": "--model", "value": "F", "names": ["-m"], "help": ""}}'
    )
    assert read_flags(Path("none"), "0", tmp_path)["model"].names == ("-m",)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("a.server]\nmax_model_len = 1", "server.max_model_len: llama-server has no --max-model-len"
         "; did you mean ctx_size?"),
        ("a.server]\nserver_port = 1", "server.server_port: llama-server has no --server-port"
         "; did you mean port?"),
        ("a.server]\nnum_ctx = 1", "server.num_ctx: llama-server has no --num-ctx"
         "; did you mean ctx_size?"),
        ("a.server]\nngl = 1", "server.ngl: llama-server has no --ngl; did you mean gpu_layers?"),
        ("a.server]\nquantization = 'q8_0'", "server.quantization: llama-server has no "
         "--quantization; did you mean model.quant?"),
        ("a.server]\ngpu_ids = '0'", "server.gpu_ids: llama-server has no --gpu-ids"
         "; did you mean control.gpu_ids?"),
        ("a.server]\ngpu_memory_utilization = 0.9", "server.gpu_memory_utilization: llama-server "
         "has no --gpu-memory-utilization"),
        ("a]\nctx_size = 1", "ctx_size: there is no such key; did you mean server.ctx_size?"),
        ("a.control]\ngpus = '0'", "control.gpus: there is no such key; did you mean gpu_ids?"),
        ("a.model]\nref = 'demo'\nquantization = 'q8_0'", "model.quantization: there is no such "
         "key; did you mean quant?"),
    ],
)  # fmt: skip
def test_what_other_programs_call_it(tmp_path: Path, table: str, line: str) -> None:
    assert f"models.toml: instance.a.{line}" in checked(tmp_path, f"[instance.{table}")


@pytest.mark.build
def test_synonyms_against_the_real_programs(built: Path) -> None:
    from pipeline.core.process import capture

    (server,) = built.glob("linux-*-cpu/llama-server*") if os.name == "posix" else [Path()]
    flags = parse_help(capture([server, "--help"]) or "")
    llama, others = zip(*synonyms.MEANINGS.values(), strict=True)
    assert {*llama} - {""} <= flags.keys() and {*others} - {""} <= vllm.listed().flags.keys()


@pytest.mark.build
def test_renamed_options_against_the_real_program(built: Path, tmp_path: Path) -> None:
    from pipeline.core.process import capture

    (server,) = built.glob("linux-*-cpu/llama-server*") if os.name == "posix" else [Path()]
    flags: dict[str, Flag] = parse_help(capture([server, "--help"]) or "")
    for old, new in RENAMED.items():
        assert old not in flags, f"--{old} is back"
        assert new.replace("_", "-") in flags, f"--{new} is no more"


@pytest.mark.parametrize(
    "text", ['rpc = "10.0.0.2:50052"', 'extra_args = ["--rpc", "10.0.0.2:50052"]']
)
def test_rpc_is_never_used_without_a_warning(tmp_path: Path, text: str) -> None:
    """And a llama-server without it is an error that says where it is."""
    text = f"{SERVER}{text}\n"
    (error,) = checked(tmp_path, text)
    assert "compiled without RPC" in error and "bins=prebuilt" in error
    rpc = {"rpc": Flag("--rpc", "SERVERS", ("--rpc",))}
    resolved = resolve(read(tmp_path, text).enabled[0], {**FLAGS, **rpc})
    assert not [*checks.of_server(resolved, tmp_path)]
    (warning,) = (line for line in checks.warnings(resolved) if "rpc" in line)
    assert "10.0.0.2:50052" in warning and "unencrypted" in warning
    assert "only for a private network" in warning
