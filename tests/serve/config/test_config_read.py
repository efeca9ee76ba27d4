"""Files of instances: what is read, merged, and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from config_tools import checked, read, written, wrong

from pipeline.core.errors import UsageError
from pipeline.serve.config import sources
from pipeline.serve.config.toml_form import load

ONE = "[instance.chat.server]\nmodel = 'x'\n"


def test_defaults_of_everything(tmp_path: Path) -> None:
    found = read(tmp_path, ONE)
    assert (found.label, found.folder) == ("models.toml", tmp_path)
    assert found.master.enable and not found.gateway.enable and found.master.max_loading is None
    (spec,) = found.specs
    control = spec.control
    assert (spec.name, spec.engine, spec.place) == (
        *("chat", "llama.cpp", "models.toml: instance.chat"),
    )
    assert (control.enabled, control.background, control.gpu_ids) == (True, True, None)
    assert (control.restart, control.ready_timeout, control.stop_timeout) == ("on-failure", 600, 10)
    assert (control.log_dir, control.log_file) == (None, None)


def test_instances_win_over_defaults_key_by_key(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        [instance.control]
        restart = "never"
        ready_timeout = 5
        gpu_ids = "0"
        [instance.server]
        ctx_size = 1
        threads = 2
        lora = ["a"]
        extra_args = ["--x"]
        [instance.a.control]
        ready_timeout = 7
        [instance.a.server]
        ctx-size = 3
        lora = ["b"]
        n = true
        [instance.b.server]
        extra_args = ["--y", 1]
        [instance.b.control]
        gpu_ids = "all"
        restart = "always"
        """,
    )
    a, b = found.specs
    assert (a.name, b.name) == ("a", "b")
    assert dict(a.server) == {"ctx-size": 3, "threads": 2, "lora": ["b"], "n": True}
    assert list(a.server) == ["threads", "ctx-size", "lora", "n"]  # what counts stands last
    assert a.extra_args == ("--x",)
    assert (a.control.restart, a.control.ready_timeout, a.control.gpu_ids) == ("never", 7, "0")
    assert dict(b.server) == {"ctx-size": 1, "threads": 2, "lora": ["a"]}
    assert b.extra_args == ("--y", "1")
    assert (b.control.restart, b.control.ready_timeout, b.control.gpu_ids) == ("always", 5, "all")
    # a mistake in a value is said where the value stands
    assert a.at("server.ctx-size") == "models.toml: instance.a.server.ctx_size"
    assert a.at("server.threads") == "models.toml: instance.server.threads"
    assert b.at("control.gpu_ids") == "models.toml: instance.b.control.gpu_ids"


def test_only_two_names_are_reserved(tmp_path: Path) -> None:
    text = "".join(f"[instance.{name}.server]\n" for name in ("master", "server2", "all", "model"))
    found = read(tmp_path, text + "[instance.server]\n[instance.control]\n")
    assert [spec.name for spec in found.specs] == ["master", "server2", "all", "model"]


@pytest.mark.parametrize(
    ("text", "enabled"),
    [
        ("", ["a", "b"]),
        ("[master]\nenable = false", []),
        ("[instance.a.control]\nenabled = false", ["b"]),
        ("[instance.control]\nenabled = false", []),
        ("[instance.control]\nenabled = false\n[instance.b.control]\nenabled = true", ["b"]),
    ],
)
def test_what_is_started(tmp_path: Path, text: str, enabled: list[str]) -> None:
    found = read(tmp_path, f"{text}\n[instance.a.server]\n[instance.b.server]\n")
    assert [spec.name for spec in found.enabled] == enabled
    assert len(found.specs) == 2


def test_every_option_value(tmp_path: Path) -> None:
    text = "s = 'x y'\ni = -1\nf = 0.5\nt = true\nn = false\nl = [1, 'b', 2.5]\ne = []\n"
    (spec,) = read(tmp_path, f"[instance.a.server]\n{text}").specs
    assert dict(spec.server) == {
        **{"s": "x y", "i": -1, "f": 0.5, "t": True, "n": False, "l": [1, "b", 2.5], "e": []}
    }


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        *(("all", "all"), ("none", "none"), ("0", "0"), ("2,0", "2,0"), ("2, 0", "2,0")),
        *(("10,1", "10,1"), ("GPU-8f3a-12,MIG-1", "GPU-8f3a-12,MIG-1")),
    ],
)
def test_gpu_ids(tmp_path: Path, told: str, kept: str) -> None:
    (spec,) = read(tmp_path, f"[instance.a.control]\ngpu_ids = '{told}'").specs
    assert spec.control.gpu_ids == kept


@pytest.mark.parametrize("told", ["", "x", "-1", "0,", ",0", "0;1", "all,0", "1.0", "0 1x"])
def test_gpu_ids_that_are_none(tmp_path: Path, told: str) -> None:
    (line,) = wrong(tmp_path, f"[instance.a.control]\ngpu_ids = '{told}'")
    assert line == (
        f'models.toml: instance.a.control.gpu_ids = "{told}": '
        'must be "all", "none", or ids such as "0" or "2,0"'
    )


def test_a_card_that_is_named_twice(tmp_path: Path) -> None:
    (line,) = wrong(tmp_path, "[instance.a.control]\ngpu_ids = '1,0,1'")
    assert line.endswith("names a card twice")


class TestModels:
    def test_the_variables_of_prepare(self, tmp_path: Path) -> None:
        (tmp_path / "here.gguf").touch()
        (tmp_path / "org" / "model").mkdir(parents=True)
        text = """
        [instance.a.model]
        ref = "org/other:Q4_K_M"
        quant = "q8_0"
        revision = "main"
        filename = "f"
        pattern = "*"
        mmproj = "none"
        keep_f16 = true
        [instance.b.model]
        ref = "here.gguf"
        imatrix = "../text.txt"
        keep_f16 = false
        [instance.c.model]
        ref = "org/model"
        [instance.d.model]
        ref = "demo"
        [instance.e.control]
        enabled = false
        [instance.e.model]
        ref = "demo"
        """
        assert read(tmp_path, text).prepares() == {
            "a": {
                **{"model": "hf:org/other:Q4_K_M", "quant": "q8_0", "revision": "main"},
                **{"filename": "f", "pattern": "*", "mmproj": "none", "keep_f16": "1"},
            },
            "b": {
                **{"model": str(tmp_path / "here.gguf"), "keep_f16": "0"},
                "imatrix": str(tmp_path / "../text.txt"),
            },
            "c": {"model": str(tmp_path / "org" / "model")},
            "d": {"model": "demo"},
        }

    @pytest.mark.parametrize(
        ("lora", "meant"),
        [
            ('"here.gguf"', "{0}/here.gguf"),
            ('["here.gguf:0.5", "org/repo:Q8_0:2", "./gone"]',
             "{0}/here.gguf:0.5,hf:org/repo:Q8_0:2,{0}/gone"),
            ('"org/one, here.gguf:0"', "hf:org/one,{0}/here.gguf:0"),
            ('"none"', "none"),
        ],
    )  # fmt: skip
    def test_adapters(self, tmp_path: Path, lora: str, meant: str) -> None:
        (tmp_path / "here.gguf").touch()
        text = f'[instance.a.model]\nref = "demo"\nlora = {lora}'
        found = read(tmp_path, text).prepares()["a"]
        assert found == {"model": "demo", "lora": meant.format(tmp_path)}

    @pytest.mark.parametrize("lora", ['""', "[1]", '[""]', "true"])
    def test_adapters_that_are_no_text(self, tmp_path: Path, lora: str) -> None:
        (said, *_) = wrong(tmp_path, f'[instance.a.model]\nref = "demo"\nlora = {lora}')
        assert "instance.a.model.lora" in said

    def test_a_path_that_exists_wins_and_that_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "org" / "model").mkdir(parents=True)
        found = read(tmp_path, "[instance.a.model]\nref = 'org/model'")
        (note,) = found.notes
        assert note == "models.toml: instance.a.model.ref: taken as a path, for it exists"

    @pytest.mark.parametrize(
        ("ref", "model"),
        [
            *(("gone.gguf", "{}/gone.gguf"), ("./gone", "{}/gone"), ("/abs/x", "/abs/x")),
            *(("org/x.gguf", "{}/org/x.gguf"), ("hf:org/x", "hf:org/x"), ("org/x", "hf:org/x")),
            *(("org/x@v1:Q8_0", "hf:org/x@v1:Q8_0"), ("nonsense", "nonsense")),
        ],
    )
    def test_where_the_user_is_does_not_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str, model: str
    ) -> None:
        elsewhere = tmp_path / "elsewhere"
        (elsewhere / "org" / "x").mkdir(parents=True)
        (elsewhere / "gone.gguf").touch()
        monkeypatch.chdir(elsewhere)
        folder = tmp_path / "here"
        found = read(folder, f"[instance.a.model]\nref = '{ref}'\nmmproj = 'p.gguf'")
        model = model.format(folder)  # a projector beside a path is one, too
        told = {"model": model, "mmproj": str(folder / "p.gguf") if model[0] == "/" else "p.gguf"}
        assert found.prepares() == {"a": told}


MANY = """
[master]
enabl = true
max_loading = 0
[gateway]
port = "x"
[gateway.models]
a = 3
[instance.control]
restart = "alway"
ready_timeout = "5"
stop_timeout = -1
[instance.server]
n = {a = 1}
[instance.chat.control]
gpu_ids = 0
background = "yes"
engine = "vlm"
[instance.chat.server]
extra_args = "--x"
day = 2020-01-01
mixed = [1, [2]]
[instance.chat.model]
qant = "q4"
[instance."a.b"]
serve = 3
[instance.Chat.server]
[instance.".x".server]
[extra]
"""


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    keys = "master, instance, gateway"
    assert sorted(wrong(tmp_path, MANY)) == sorted(
        f"models.toml: {line}"
        for line in [
            "master.enabl: there is no such key; did you mean enable?",
            "master.max_loading = 0: must be at least 1",
            'gateway.port = "x": must be a whole number',
            "gateway.models.a = 3: must be a text, in quotes",
            "instance.control.restart = \"alway\": must be 'on-failure', 'always' or 'never'"
            "; did you mean always?",
            'instance.control.ready_timeout = "5": must be a number',
            "instance.control.stop_timeout = -1: must be at least 0",
            "instance.server.n: must be a text, a number, true, false or a list, not a table",
            "instance.chat.control.gpu_ids = 0: must be a text, in quotes",
            'instance.chat.control.background = "yes": must be true or false',
            "instance.chat.control.engine = \"vlm\": must be 'llama.cpp' or 'vllm'"
            "; did you mean vllm?",
            'instance.chat.server.extra_args = "--x": must be a list',
            "instance.chat.server.day = 2020-01-01: "
            "must be a text, a number, true, false or a list, not a date",
            "instance.chat.server.mixed = […]: its items must be texts or numbers",
            "instance.chat.model.ref: is missing",
            "instance.chat.model.qant: there is no such key; did you mean quant?",
            'instance."a.b".serve: there is no such key; did you mean server?',
            "instance.Chat: differs from chat only in letter case; rename one",
            'instance.".x": a name must not begin or end with a dot',
            f"extra: there is no such key; the keys are {keys}",
        ]
    )


@pytest.mark.parametrize("seconds", ["0", "0.5"])
def test_no_server_is_ready_at_once(tmp_path: Path, seconds: str) -> None:
    """It would be killed and started again until it is given up; ready_timeout= is the same."""
    text = f"[instance.chat.control]\nready_timeout = {seconds}\n"
    (line,) = wrong(tmp_path, text)
    assert line == (
        f"models.toml: instance.chat.control.ready_timeout = {seconds}: must be at least 1"
    )


def test_what_is_right_is_read_beside_mistakes(tmp_path: Path) -> None:
    found = load(written(tmp_path, MANY))
    assert len(found.errors) == 20
    chat = found.specs[0]
    assert chat.control.restart == "on-failure" and chat.control.gpu_ids is None
    assert not chat.server and not chat.model


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("instance = 3", "instance = 3: must be a table"),
        ("[[instance]]\n[[instance]]", "instance = […]: must be a table"),
        ("[instance]\nchat = 3", "instance.chat = 3: must be a table"),
        ("[instance]\nserver = 3\n[instance.a.server]", "instance.server = 3: must be a table"),
        ("[instance.a]\nserver = []", "instance.a.server = […]: must be a table"),
        ("[master]\n[instance]", "names no instance"),
        ("[instance.a.server]\na_b = 1\na-b = 2", "instance.a.server.a-b: is given twice"),
        ("[instance.a.server]\nf = true\n[master]\nllama_cpp_path = ''", "must not be empty"),
        ("[instance.a.control]\nready_timeout = nan", "must be"),
        ("[instance.a.control]\nstop_timeout = true", "must be a number"),
    ],
)
def test_a_wrong_table(tmp_path: Path, text: str, line: str) -> None:
    (found,) = wrong(tmp_path, text)
    assert found.startswith("models.toml: ") and line in found


def test_a_key_is_not_shown(tmp_path: Path) -> None:
    (line,) = wrong(tmp_path, f"[gateway]\napi_key = 12345\n{ONE}")
    assert line == "models.toml: gateway.api_key: must be a text, in quotes"
    (line,) = wrong(tmp_path, f"{ONE}hf_token = 2020-01-01")
    assert "2020" not in line


@pytest.mark.parametrize(
    "name",
    [
        *("", " a", "a/b", "a\\b", "..", ".hidden", "a,b", "x" * 65, "a\nb", "a\x7f", "dot."),
        *("con", "NUL", "aux.x", "Com1", "lpt9"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    (line,) = wrong(tmp_path, f"[instance.{json.dumps(name)}.server]\n".replace("\x7f", "\\u007f"))
    assert "a name" in line


ORIGINS = (
    "*",
    "null",
    "app://obsidian.md",
    "vscode-webview://*",
    "http://192.168.1.5:*",
    "file://",
)
HOSTS = ("gpu-box.lan", "*.lan", "llama_cpp", "*")


def test_origins_and_hosts_of_the_gateway(tmp_path: Path) -> None:
    listed = f"origins = {list(ORIGINS)}\nhosts = {list(HOSTS)}"
    found = read(tmp_path, f"[gateway]\n{listed}\n{ONE}").gateway
    assert (tuple(found.origins), tuple(found.hosts)) == (ORIGINS, HOSTS)
    for origin in ("https://chat.example/", "chat.example", "https://a.example/x", "localhost:80"):
        (line,) = wrong(tmp_path, f"[gateway]\norigins = ['{origin}']\n{ONE}")
        assert f'gateway.origins.0 = "{origin}": must be as browsers send it' in line
    for host in ("http://a", "a:9000", "a/b", "", "a b"):
        (line,) = wrong(tmp_path, f"[gateway]\nhosts = ['{host}']\n{ONE}")
        assert f'gateway.hosts.0 = "{host}": must be a name without scheme and port' in line


def test_the_gateway_has_its_name_for_itself(tmp_path: Path) -> None:
    (line,) = wrong(tmp_path, "[instance.Gateway.server]")
    assert line == "models.toml: instance.Gateway: this name is reserved; take another one"


@pytest.mark.parametrize("name", ["a", "Qwen2.5", "ü ñ", "x" * 64, "a-b_c", "console", "com10"])
def test_names_that_can_be(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, f'[instance."{name}".server]').specs[0].name == name


class TestTexts:
    @pytest.mark.parametrize(
        ("told", "line"),
        [
            (b"", "is empty"),
            (b" \n\t\n", "is empty"),
            (b"[master\n", "line 1, column 8: is not TOML"),
            (b"[master]\nenable = yes\n", "line 2, column 10: is not TOML"),
            (b"a = 1\na = 2\n", "is not TOML: Cannot overwrite a value"),
            (b"x = '\xff'", "line 1: is not UTF-8"),
            (b"[a]\n\nx = '\xfc'", "line 3: is not UTF-8"),
            ("[master]\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
            ("[master]\n".encode("utf-16-le"), "holds zero bytes, as UTF-16 does"),
            ("[master]\n".encode("utf-32"), "is UTF-32"),
            (b"x = " + b"[" * 100_000, "nested too deeply"),
            (b"instance" + b".a" * 5000 + b" = 1", "nested too deeply"),
            (b"#" * (4 * 1024 * 1024 + 1), "is larger than 4 MB"),
            (b"x" + b".a" * 20_000 + b" = 1", "nested too deeply"),
            (b'[instance.x]\ny = ["\\u0000"]', "instance.x.y.0: holds a zero byte or half"),
            (b"x = " + b"9" * 5000, "holds a number of more than 64 bits"),
            (b"x = [0x" + b"f" * 4000 + b"]", "holds a number of more than 64 bits"),
        ],
    )
    def test_what_is_no_toml(self, tmp_path: Path, told: bytes, line: str) -> None:
        file = tmp_path / "mödels.toml"
        file.write_bytes(told)
        with pytest.raises(UsageError) as caught:
            load(file)
        assert str(file) in caught.value.message and line in caught.value.message

    @pytest.mark.parametrize(
        ("line", "hint"),
        [
            ('model = "C:\\Users\\m.gguf"', "write a path with backslashes in single quotes"),
            ("x = True # on", "a switch is true or false, in lower case"),
            ("x = \u201ca\u201d", "it has quotes or spaces of a text program"),
            ("x = [", "configs/ has examples"),
            ("y = true", "a key or a table of this name is given before"),
            ("x = {a = 1, a = 2}", "a key or a table of this name is given before"),
            ("model = /models/m.gguf", "a text is written in quotes"),
            ("memory = 20GiB", "a text is written in quotes"),
            ("host = 0.0.0.0 # all", "a text is written in quotes"),
            ("port = 80,", "a line ends without a comma"),
            ("port: 80", "a value follows =, not a colon"),
        ],
    )
    def test_what_is_often_meant(self, tmp_path: Path, line: str, hint: str) -> None:
        file = tmp_path / "models.toml"
        file.write_text(f"y = 1\n{line}\n", encoding="utf-8")
        with pytest.raises(UsageError, match=r"line 2|is not TOML") as caught:
            load(file)
        assert caught.value.hint.startswith(hint)

    def test_a_value_where_an_instance_is_expected(self, tmp_path: Path) -> None:
        where = "models.toml: instance.port = 8080: must be a table; options of all instances go"
        assert checked(tmp_path, "[instance]\nport = 8080")[0].startswith(where)
        (line,) = checked(tmp_path, "[[instance]]\nname = 'a'")
        assert line.endswith("each instance is a table of its own, such as [instance.chat.server]")

    def test_a_wrong_value_is_not_missing_too(self, tmp_path: Path) -> None:
        (line,) = checked(tmp_path, "[instance.chat.model]\nref = ''")
        assert line == 'models.toml: instance.chat.model.ref = "": must not be empty'

    def test_a_byte_order_mark_and_windows_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "models.toml"
        file.write_bytes(b"\xef\xbb\xbf[instance.a.server]\r\nport = 1\r\n")
        assert load(file).specs[0].server == {"port": 1}
        over = '\ufeff{"instance": {"server": {"port": 2}}}'
        file.write_text("[instance.a.server]\n")
        assert load(file, overrides=over).specs[0].server == {"port": 2}

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is a folder"):
            load(tmp_path)
        written(tmp_path, ONE, "other.toml")
        with pytest.raises(UsageError, match="there is no such file") as caught:
            load(tmp_path / "models.toml")
        assert "other.toml" in caught.value.hint
        with pytest.raises(UsageError, match="there is no such file"):
            load(tmp_path / "none" / "models.toml")
        with pytest.raises(UsageError, match="cannot be read"):
            load(tmp_path / "a\0b")

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="may read everything")
    def test_what_may_not_be_read(self, tmp_path: Path) -> None:
        file = written(tmp_path, ONE)
        file.chmod(0)
        with pytest.raises(UsageError, match="cannot be read: Permission denied"):
            load(file)


class TestOverrides:
    def test_they_are_merged_deep(self, tmp_path: Path) -> None:
        over = {
            "master": {"max_loading": 2},
            "instance": {
                "server": {"threads": 9},
                "a": {"server": {"ctx-size": 5, "gone": None}},
                "b": {"server": {"port": 1}},
            },
        }
        text = """
        [instance.server]
        threads = 1
        batch_size = 2
        [instance.a.server]
        ctx_size = 4
        gone = 1
        port = 3
        [instance.b]
        """
        found = read(tmp_path, text, overrides=json.dumps(over), where="THE_OVERRIDES")
        a, b = found.specs
        assert dict(a.server) == {"threads": 9, "batch-size": 2, "ctx-size": 5, "port": 3}
        assert dict(b.server) == {"threads": 9, "batch-size": 2, "port": 1}
        assert found.master.max_loading == 2
        assert a.at("server.ctx-size") == "THE_OVERRIDES: instance.a.server.ctx_size"
        assert a.at("server.port") == "models.toml: instance.a.server.port"

    def test_their_mistakes_name_the_variable(self, tmp_path: Path) -> None:
        over = '{"instance": {"a": {"control": {"restart": 3}}}, "mastr": {}}'
        found = wrong(tmp_path, "[instance.a.control]\nx = 1", overrides=over, where="VARIABLE")
        assert [line.partition(": ")[0] for line in sorted(found)] == [
            *("VARIABLE", "VARIABLE", "models.toml")
        ]

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"glm": {"server": {"port": 1}}}, "instance.glm: the file has no such instance"),
            ({"glm": None}, "instance.glm: the file has no such instance"),
            ({"glm4": {"server": {"ctx_sise": None}}}, "instance.glm4.server.ctx_sise = null: th"),
        ],
    )
    def test_what_the_file_has_not(self, tmp_path: Path, changed: object, why: str) -> None:
        text = "[instance.glm4.server]\nctx-size = 4"
        over = json.dumps({"instance": changed})
        (line,) = wrong(tmp_path, text, overrides=over, where="VARIABLE")
        assert line.startswith(f"VARIABLE: {why}")
        assert line.endswith(("did you mean glm4?", "did you mean ctx_size?"))

    @pytest.mark.parametrize("key", ["server.ctx_size", "server.ctx-size", "control.env.A"])
    def test_a_default_cannot_be_taken_from_one_instance(self, tmp_path: Path, key: str) -> None:
        """It would stay, as if nothing had been said."""
        text = "[instance.server]\nctx-size = 4\n[instance.control.env]\nA = '1'\n[instance.a]"
        table, *inner, last = key.split(".")
        told = {table: {inner[0]: {last: None}} if inner else {last: None}}
        over = json.dumps({"instance": {"a": told}})
        (line,) = wrong(tmp_path, text, overrides=over, where="VARIABLE")
        name = key.replace("-", "_")
        why = f"instance.{name} holds it, for all; take it away there, or write another value"
        assert line == f"VARIABLE: instance.a.{name} = null: {why}"
        for_all = json.dumps({"instance": {"a": told, **told}})
        assert not read(tmp_path, text, overrides=for_all).errors

    def test_the_instances_of_the_file_are_named(self, tmp_path: Path) -> None:
        over = '{"instance": {"zeta": {}}}'
        (line,) = wrong(tmp_path, "[instance.a]\n[instance.b]", overrides=over, where="VARIABLE")
        assert line == "VARIABLE: instance.zeta: the file has no such instance; it has a, b"

    @pytest.mark.parametrize("text", ["", "  ", "\n", "{}"])
    def test_blank_is_none(self, tmp_path: Path, text: str) -> None:
        assert read(tmp_path, ONE, overrides=text, where="X") == read(tmp_path, ONE)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("{", "line 1, column 2: is not JSON"),
            ("3", "must be a JSON object"),
            ("[]", "must be a JSON object"),
            ('{"a": 1, "a": 2}', "a is given twice"),
            ('{"a": NaN}', "NaN is not a number"),
            ('{"a": -Infinity}', "-Infinity is not a number"),
            ('{"a": 1e400}', "1e400 is not a number"),
            ("[" * 100_000, "nested too deeply"),
            ('{"a": {"b": "\\ud800"}}', "a.b: holds a zero byte or half of a letter"),
            ('{"a":' * 99 + "1" + "}" * 99, "nested too deeply"),
        ],
    )
    def test_what_is_no_object(self, tmp_path: Path, text: str, why: str) -> None:
        with pytest.raises(UsageError) as caught:
            read(tmp_path, ONE, overrides=text, where="VARIABLE")
        assert caught.value.message.startswith("VARIABLE: ") and why in caught.value.message


@pytest.mark.parametrize(
    ("under", "over", "result"),
    [
        ({}, {}, {}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
        ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
        ({"a": {"b": 1}}, {"a": {"b": None}}, {"a": {}}),
        ({}, {"a": {"b": None, "c": 1}}, {"a": {"c": 1}}),
        ({"a": False}, {"a": None}, {}),
    ],
)
def test_merging(under: dict[str, object], over: dict[str, object], result: object) -> None:
    before = json.dumps(under)
    merged = sources.merged(under, over)
    assert merged == result
    assert sources.merged(merged, over) == merged, "twice is once"
    assert json.dumps(under) == before, "nothing is changed in place"


@pytest.mark.parametrize(
    ("engine", "found"),
    [("", ["llama.cpp", "vllm", "llama.cpp"]), ("vllm", ["vllm", "vllm", "llama.cpp"])],
)
def test_engines(tmp_path: Path, engine: str, found: list[str]) -> None:
    text = "[instance.a.server]\n[instance.b.control]\nengine='vllm'\n[instance.c.control]\n"
    configuration = read(tmp_path, f"{text}engine = 'llama.cpp'", engine=engine)
    assert [spec.engine for spec in configuration.specs] == found


def test_the_key_of_the_gateway_starts_at_the_file(tmp_path: Path) -> None:
    found = read(tmp_path, f"[gateway]\napi_key_file = 'keys/g'\n{ONE}")
    assert found.gateway.api_key_file == str(tmp_path / "keys" / "g")
