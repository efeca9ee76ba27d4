"""From specs to instances: command lines, environments, and all that is derived."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from config_tools import FLAGS, one, read, started, wrong
from msgspec import convert

from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve.config.api_keys import decide
from pipeline.serve.config.instances import instances, is_container, program, write_keys
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.guard import port
from pipeline.serve.server import Server

SERVER = "[instance.chat.server]\n"
ADDED = ("--host", "127.0.0.1", "--port", "8080", "--alias", "chat", "--metrics")
ADDED = (*ADDED, "--cors-origins", "localhost")


def value(cmd: Sequence[str], name: str) -> str | None:
    """What follows the last `name` of a command."""
    at = [place for place, word in enumerate(cmd) if word == name]
    return cmd[at[-1] + 1] if at else None


class TestCommand:
    def test_the_table_as_written_then_what_is_added_then_extra_args(self, tmp_path: Path) -> None:
        text = """
        model = "a b.gguf"
        ctx_size = 4096
        jinja = true
        metrics = false
        lora = ["a", "b"]
        temp = 0.5
        load-mode = "none"
        extra_args = ["--one", "2", "-3"]
        """
        found = one(tmp_path, SERVER + text)
        assert found.cmd == (
            *("--model", "a b.gguf", "--ctx-size", "4096", "--jinja"),
            *("--lora", "a", "--lora", "b", "--temp", "0.5", "--load-mode", "none"),
            *[word for word in ADDED if word != "--metrics"],
            *("--one", "2", "-3"),
        )
        assert found.command[0] == str(tmp_path / "llama-server")
        assert found.folder == str(tmp_path)
        assert convert(found.as_json(), Server) == found

    @pytest.mark.parametrize("layers", ["[1, 5]", "'1 5'"])
    def test_an_option_with_two_values(self, tmp_path: Path, layers: str) -> None:
        cmd = one(tmp_path, f"{SERVER}control_vector_layer_range = {layers}").cmd
        assert cmd == ("--control-vector-layer-range", "1", "5", *ADDED)

    @pytest.mark.parametrize(
        ("text", "without", "kept"),
        [
            ("host = '127.0.0.2'", "--host 127.0.0.1", "--host 127.0.0.2"),
            ("port = 9", "--port 8080", "--port 9"),
            ("port = '9'", "--port 8080", "--port 9"),
            ("alias = 'x,y'", "--alias chat", "--alias x,y"),
            ("metrics = true", "--alias chat --metrics --cors", "--metrics --host"),
            ("cors_origins = '*'", "--cors-origins localhost", "--cors-origins *"),
            ("extra_args = ['-a', 'x']", "--alias chat", "-a x"),
            ("extra_args = ['--port', '9']", "--port 8080", "--port 9"),
            (
                "extra_args = ['--cors_origins', 'x']",
                "--cors-origins localhost",
                "--cors_origins x",
            ),
        ],
    )
    def test_what_the_user_gave_is_not_added(
        self, tmp_path: Path, text: str, without: str, kept: str
    ) -> None:
        cmd = " ".join(one(tmp_path, SERVER + text).cmd)
        assert kept in cmd and without not in cmd

    def test_host_and_port_always(self, tmp_path: Path) -> None:
        assert one(tmp_path, f"{SERVER}host = false\nport = false").cmd == ADDED

    def test_what_an_older_program_has_not(self, tmp_path: Path) -> None:
        for flags in ({}, None):
            assert one(tmp_path, SERVER, flags=flags).cmd == ADDED[:6]

    def test_the_users_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/h")
        found = one(tmp_path, f"{SERVER}model = '~/x.gguf'\ntemp = '~/x'\nlora = ['~/a', 'b']")
        assert found.cmd[:4] == ("--model", "/h/x.gguf", "--temp", "~/x")
        assert found.cmd[4:8] == ("--lora", "/h/a", "--lora", "b")

    @pytest.mark.parametrize(
        ("text", "path"),
        [
            ("chat_template_file = '~/x.jinja'", "/h/x.jinja"),
            ("lora = '~/a,b,~/c'", "/h/a,b,/h/c"),
            ("lora_scaled = '~/a:0.5,~/c:1'", "/h/a:0.5,/h/c:1"),
        ],
    )
    def test_the_users_home_wherever_a_path_stands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, path: str
    ) -> None:
        monkeypatch.setenv("HOME", "/h")
        assert one(tmp_path, SERVER + text).cmd[1] == path


class TestPreparedModel:
    TEXT = "[instance.chat.model]\nref = 'demo'\n"

    def cmd(self, tmp_path: Path, text: str, **more: object) -> tuple[str, ...]:
        model = PreparedModel(**{"path": Path("/m/x y.gguf"), **more})  # type: ignore[arg-type]
        return one(tmp_path, text, models={"chat": model}).cmd

    def test_adapters_in_a_path_that_llama_server_would_split(self, tmp_path: Path) -> None:
        folder = tmp_path / "a:b, c"  # as a drive of Windows
        folder.mkdir()
        adapters = ((folder / "x.gguf", 0.5), (folder / "y.gguf", 1.0))
        cmd = self.cmd(folder, self.TEXT, adapters=adapters)
        assert cmd[-1] == "x.gguf:0.5,y.gguf:1", "relative to where the server runs"
        with pytest.raises(UsageError, match="splits such a list at each , and :"):
            self.cmd(tmp_path, self.TEXT, adapters=adapters)

    def test_it_becomes_the_model(self, tmp_path: Path) -> None:
        assert self.cmd(tmp_path, self.TEXT) == ("--model", "/m/x y.gguf", *ADDED)

    @pytest.mark.parametrize(
        ("text", "more", "added"),
        [
            ("", {"mmproj": Path("/m/p")}, ["--mmproj", "/m/p"]),
            ("mmproj = 'own'", {"mmproj": Path("/m/p")}, []),
            ("no_mmproj = true", {"mmproj": Path("/m/p")}, []),
            ("", {"adapters": ((Path("/m/a:b"), 1), (Path("/c"), 1))}, ["--lora", "/m/a:b,/c"]),
            (
                "",
                {"adapters": ((Path("/m/a"), 0), (Path("/m/c"), 1.5))},
                ["--lora-scaled", "/m/a:0,/m/c:1.5"],
            ),
            ("", {"pooling": "mean"}, ["--embeddings", "--pooling", "mean"]),
            ("", {"pooling": "rank"}, ["--reranking", "--pooling", "rank"]),
            ("embedding = true", {"pooling": "mean"}, []),
            ("pooling = 'cls'", {"pooling": "mean"}, []),
            (
                "",
                {"pooling": "mean", "ctx_size": 256},
                [
                    *("--embeddings", "--pooling", "mean"),
                    *("--batch-size", "256", "--ubatch-size", "256"),
                ],
            ),
            (
                "ctx_size = 128\npooling = 'cls'",
                {"pooling": "mean", "ctx_size": 256},
                ["--batch-size", "128", "--ubatch-size", "128"],
            ),
            (
                "batch_size = 9\npooling = 'cls'",  # a text longer than that is refused
                {"pooling": "mean", "ctx_size": 256},
                ["--ubatch-size", "9"],
            ),
            ("ubatch_size = 9\npooling = 'cls'", {"pooling": "mean", "ctx_size": 256}, []),
            ("", {"fitted": 4096}, ["--ctx-size", "4096"]),
            ("ctx_size = 100", {"fitted": 4096}, []),
        ],
    )
    def test_what_it_asks_for(
        self, tmp_path: Path, text: str, more: dict[str, object], added: list[str]
    ) -> None:
        cmd = self.cmd(tmp_path, f"{self.TEXT}{SERVER}{text}", **more)
        assert list(cmd[cmd.index("localhost") + 1 :]) == added

    def test_one_that_is_not_prepared(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match=r"instance\.chat\.model: is not prepared"):
            one(tmp_path, self.TEXT)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *(("", "chat"), ("embeddings = true", "embedding"), ("embedding = true", "embedding")),
        *(("reranking = true", "rerank"), ("rerank = true", "rerank")),
        *(("pooling = 'mean'", "embedding"), ("pooling = 'rank'", "rerank")),
        *(("embeddings = false", "chat"), ("pooling = 'none'", "chat")),
        ("extra_args = ['--reranking']", "rerank"),
    ],
)
def test_what_it_is_asked_with(tmp_path: Path, text: str, kind: str) -> None:
    assert one(tmp_path, SERVER + text).kind == kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"host": "127.0.0.1", "port": 8080, "prefix": "", "tls": False, "aliases": ()}),
        ("port = '81'\nalias = 'a, b,,chat'", {"port": 81, "aliases": ("a", "b")}),
        ("api_prefix = '/x/'\nssl_cert_file = 'c'", {"prefix": "/x", "tls": True}),
        ("extra_args = ['--port', '82', '--host', '::1']", {"port": 82, "host": "::1"}),
        ("sleep_idle_seconds = 60", {"probe_timeout": 0}),
        ("sleep_idle_seconds = -1", {"probe_timeout": 60}),
    ],
)
def test_how_others_reach_it(tmp_path: Path, text: str, expected: dict[str, object]) -> None:
    found = one(tmp_path, SERVER + text)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.skipif(os.name == "nt", reason="guards no ports")
@pytest.mark.parametrize(
    ("text", "is_guarded"),
    [
        (SERVER, True),
        (f"{SERVER}host = '0.0.0.0'\napi_key = 'none'", True),
        (f"{SERVER}host = '0.0.0.0'", False),  # gets a key
        (f"{SERVER}api_key = 'k'", False),
        (f"{SERVER}ssl_cert_file = 'c'", False),
        ("[gateway]\nenable = true\n" + SERVER, False),
        ("[gateway]\nenable = true\n" + f"{SERVER}api_prefix = '/x'", True),
        ("[instance.control]\nguard = false\n" + SERVER, False),
        ("[instance.chat.control]\nengine = 'vllm'\n" + f"{SERVER}model = 'a/b'", False),
    ],
)
def test_who_is_guarded(tmp_path: Path, text: str, is_guarded: bool) -> None:
    assert one(tmp_path, text).guard is is_guarded


def test_whom_the_guard_lets_in(tmp_path: Path) -> None:
    text = """
    [instance.control]
    hosts = ["*.lan"]
    [instance.chat.control]
    origins = ["https://chat.example", "app://x"]
    [instance.chat.server]
    """
    found = one(tmp_path, text)
    assert found.hosts == ("*.lan",)
    assert found.origins == ("https://chat.example", "app://x")
    assert convert(found.as_json(), Server) == found
    host, cors = found.cmd.index("--host"), found.cmd.index("--cors-origins")
    expected = list(found.command)
    expected[host + 2], expected[cors + 2] = "/x.sock", "*"
    assert port.private_command(found, "/x.sock") == expected

    for key, wanted in (("origins", "as browsers send it"), ("hosts", "a name without scheme")):
        text = f"[instance.chat.control]\n{key} = ['https://a b/']\n"
        (line,) = wrong(tmp_path, text)
        assert f"instance.chat.control.{key}" in line and wanted in line


def test_a_sleeping_one_is_tried_where_the_user_says_so(tmp_path: Path) -> None:
    control = "[instance.chat.control]\nprobe_timeout = 5\n"
    assert one(tmp_path, f"{control}{SERVER}sleep_idle_seconds = 60").probe_timeout == 5


def test_how_it_is_kept(tmp_path: Path) -> None:
    text = """
    background = false
    restart = "always"
    max_restarts = 1
    restart_pause = 2
    ready_timeout = 3
    stop_timeout = 4.5
    probe_timeout = 0
    """
    found = one(tmp_path, f"[instance.chat.control]{text}")
    assert (found.background, found.restart, found.max_restarts) == (False, "always", 1)
    assert (found.restart_pause, found.ready_timeout) == (2, 3)
    assert (found.stop_timeout, found.probe_timeout) == (4.5, 0)


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
@pytest.mark.parametrize(
    ("gpu_ids", "cards"),
    [(None, None), ("all", None), ("none", ""), ("0", "0"), ("2,0", "2,0"), ("1, 0", "1,0")],
)
def test_the_environment_of_gpu_ids(
    tmp_path: Path, engine: str, gpu_ids: str | None, cards: str | None
) -> None:
    control = f"[instance.chat.control]\nengine = '{engine}'\n"
    control += "" if gpu_ids is None else f"gpu_ids = '{gpu_ids}'\n"
    env = dict(one(tmp_path, f"{control}{SERVER}model = 'x'").env)
    assert env.pop("XDG_CONFIG_HOME", "") == (str(tmp_path / "xdg") if engine != "vllm" else "")
    told = {"CUDA_VISIBLE_DEVICES": cards, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert env == ({} if cards is None else told)


def test_an_option_under_another_name(tmp_path: Path) -> None:
    """A file's own value replaces its default, and an override both, whatever they call it."""
    text = "[instance.server]\ngpu_layers = 99\n[instance.a.server]\n"
    over = json.dumps({"instance": {"a": {"server": {"gpu_layers": 0}}}})
    for table, overrides, layers in (
        ("", "", "--gpu-layers 99"),
        ("n_gpu_layers = 20", "", "--n-gpu-layers 20"),
        ("n_gpu_layers = 20", over, "--gpu-layers 0"),
    ):
        asked = read(tmp_path, text + table, overrides=overrides)
        command = " ".join(started(asked, tmp_path)["a"].cmd)
        assert command.count("gpu-layers") == 1
        assert layers in command


class TestVariables:
    def test_they_win(self, tmp_path: Path) -> None:
        text = (
            "[instance.control]\nenv = {A = 'all', B = 'all'}\n"
            "[instance.chat.control]\ngpu_ids = '1'\n"
            "env = {B = 'mine', OMP_NUM_THREADS = 4, CUDA_VISIBLE_DEVICES = '7', EMPTY = ''}\n"
        )
        assert one(tmp_path, text).env == {
            "A": "all",
            "B": "mine",
            "OMP_NUM_THREADS": "4",
            "CUDA_VISIBLE_DEVICES": "7",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "EMPTY": "",
            "XDG_CONFIG_HOME": str(tmp_path / "xdg"),
        }

    def test_one_is_taken_away(self, tmp_path: Path) -> None:
        text = "[instance.chat.control]\nenv = {A = '1', B = '2'}\n"
        over = '{"instance": {"chat": {"control": {"env": {"A": null}}}}}'
        (spec,) = read(tmp_path, text, overrides=over).specs
        assert spec.control.env == {"B": "2"}

    @pytest.mark.parametrize(
        ("told", "line"),
        [
            ("env = 'A=1'", 'env = "A=1": must be a table'),
            ("env = {A = true}", "env.A = true: must be a text, in quotes"),
            ("env = {'A=B' = '1'}", "env: names no variable: A=B"),
            ("env = {'' = '1'}", "env: names no variable: "),
        ],
    )
    def test_what_is_none(self, tmp_path: Path, told: str, line: str) -> None:
        found = wrong(tmp_path, f"[instance.chat.control]\n{told}\n")
        assert found == [f"models.toml: instance.chat.control.{line}"]


@pytest.mark.parametrize(
    ("text", "downloads"),
    [
        ("model = 'a.gguf'", False),
        ("hf_repo = 'org/x'", True),
        ("model = 'a.gguf'\nextra_args = ['--hf-repo-draft', 'org/x']", True),
        ("", True),
    ],
)
def test_who_downloads(tmp_path: Path, text: str, downloads: bool) -> None:
    assert one(tmp_path, SERVER + text).downloads is downloads


class TestLogs:
    @pytest.mark.parametrize(
        ("text", "log"),
        [
            ("log_dir = 'l'", "l/chat.log"),
            ("log_dir = 'l'\nlog_file = 'f.txt'", "f.txt"),
            ("log_file = '/var/x'", "/var/x"),
        ],
    )
    def test_where_it_goes(self, tmp_path: Path, text: str, log: str) -> None:
        found = one(tmp_path, f"[instance.chat.control]\n{text}")
        assert found.log_file == str(tmp_path / log)

    def test_where_nothing_is_said(self, tmp_path: Path) -> None:
        temporary = str(Path(tempfile.gettempdir(), "chat.log"))
        contained = {"PATH": "", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        assert one(tmp_path, SERVER, environ=contained).log_file == temporary
        ours = temporary if is_container({}) else str(tmp_path / "logs" / "chat.log")
        assert one(tmp_path, SERVER).log_file == ours

    def test_what_is_a_container(self, tmp_path: Path) -> None:
        mark = tmp_path / ".dockerenv"
        assert not is_container({}, [mark])
        assert is_container({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [mark])
        assert is_container({"container": "podman"}, [mark])
        mark.touch()
        assert is_container({}, [mark])


class TestProgram:
    @pytest.mark.parametrize(
        ("named", "found"),
        [("", "handed"), ("bin/s", "bin/s"), ("/abs/s", "/abs/s"), ("no-such-program", None)],
    )
    def test_which(self, tmp_path: Path, named: str, found: str | None) -> None:
        master = f"[master]\nllama_cpp_path = '{named}'\n" if named else ""
        configuration = read(tmp_path, master + SERVER)
        there = program(configuration, tmp_path / "handed")
        assert there == tmp_path / (found or named)

    def test_a_bare_name_may_be_on_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = tmp_path / "bin" / "llama-server"
        server.parent.mkdir()
        server.touch(mode=0o755)
        monkeypatch.setenv("PATH", str(server.parent))
        configuration = read(tmp_path, f"[master]\nllama_cpp_path = 'llama-server'\n{SERVER}")
        assert program(configuration, None) == server

    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match="there is no llama-server"):
            instances(
                read(tmp_path, SERVER),
                server=None,
                flags=FLAGS,
                models={},
                logs=tmp_path,
                keys=tmp_path,
                xdg=tmp_path,
                environ={},
            )


def test_only_what_is_enabled(tmp_path: Path) -> None:
    text = "[instance.a.server]\n[instance.b.control]\nenabled = false\n"
    assert list(started(read(tmp_path, text), tmp_path)) == ["a"]
    assert not started(read(tmp_path, f"[master]\nenable = false\n{text}"), tmp_path)


class TestKeys:
    def key(self, tmp_path: Path, text: str) -> tuple[tuple[str, ...], str | None]:
        found = one(tmp_path, SERVER + text)
        return found.cmd, found.api_key_file

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3", "LocalHost"])
    def test_loopback_needs_none(self, tmp_path: Path, host: str) -> None:
        cmd, key = self.key(tmp_path, f"host = '{host}'")
        assert key is None and "--api-key-file" not in cmd

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "myhost"])
    def test_others_can_reach_it_so_one_is_made_once(self, tmp_path: Path, host: str) -> None:
        text = f"{SERVER}host = '{host}'"
        configuration = read(tmp_path, text)
        cmd, key = self.key(tmp_path, f"host = '{host}'")
        path = tmp_path / "keys" / "chat.key"
        assert key == str(path) and value(cmd, "--api-key-file") == key
        assert not path.exists(), "a plan makes nothing"
        said = write_keys(configuration, FLAGS, path.parent)
        assert said == [f"chat: others can reach it, so a key was made: {path}"]
        made = path.read_text()
        assert len(made.strip()) >= 40
        if os.name == "posix":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert write_keys(configuration, FLAGS, path.parent) == []
        assert path.read_text() == made
        assert [file.name for file in path.parent.glob("[!.]*")] == ["chat.key"]

    def test_a_server_behind_the_gateway_has_one_too(self, tmp_path: Path) -> None:
        """Else any page could have it work: it checks neither Host nor Origin."""
        gateway = "\n[gateway]\nenable = true\n"
        cmd, key = self.key(tmp_path, gateway)
        path = tmp_path / "keys" / "chat.key"
        assert key == str(path) and value(cmd, "--api-key-file") == key
        (said,) = write_keys(read(tmp_path, SERVER + gateway), FLAGS, path.parent)
        assert said == f"chat: it is asked through the gateway, so a key was made: {path}"
        for text in ("api_key = 'none'", "api_prefix = '/x'"):
            assert self.key(tmp_path, text + gateway)[1] is None
        assert self.key(tmp_path, "\n[gateway]\nport = 9001\n")[1] is None

    def test_the_gateways_is_decided_alike(self, tmp_path: Path) -> None:
        def path(host: str, file: Path | None, literal: str | None) -> Path | None:
            return decide("gateway", host, file, literal, tmp_path / "keys").path

        assert path("127.0.0.1", None, None) is None
        assert path("0.0.0.0", None, "none") is None
        assert path("0.0.0.0", None, None) == tmp_path / "keys" / "gateway.key"
        assert path("127.0.0.1", None, "s3cret") == tmp_path / "keys" / "gateway.given1.key"
        assert path("0.0.0.0", tmp_path / "k", None) == tmp_path / "k"

    def test_a_program_that_wants_one_gets_one(self, tmp_path: Path) -> None:
        def path(literal: str | None) -> Path | None:
            keys = tmp_path / "keys"
            key = decide("gateway", "127.0.0.1", None, literal, keys, needs_one=True)
            return key.path

        assert path(None) == tmp_path / "keys" / "gateway.key"
        assert path("none") is None

    def test_a_file_of_the_users(self, tmp_path: Path) -> None:
        cmd, key = self.key(tmp_path, "host = '0.0.0.0'\napi_key_file = 'k'")
        assert key == str(tmp_path / "k") and cmd.count("--api-key-file") == 1

    def test_explicitly_none(self, tmp_path: Path) -> None:
        cmd, key = self.key(tmp_path, "host = '0.0.0.0'\napi_key = 'none'")
        assert key is None and "none" not in cmd

    def test_a_literal_one_moves_to_a_file(self, tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        for secret, name in (("s3cret", "1"), ("other", "2"), ("s3cret", "1")):
            text = f"{SERVER}api_key = '{secret}'"
            configuration = read(tmp_path, text)
            cmd, key = self.key(tmp_path, f"api_key = '{secret}'")
            assert key == str(keys / f"chat.given{name}.key") and secret not in " ".join(cmd)
            assert write_keys(configuration, FLAGS, keys) == []
            assert Path(key).read_text() == f"{secret}\n"
            if os.name == "posix":
                assert stat.S_IMODE(Path(key).stat().st_mode) == 0o600

    @pytest.mark.parametrize("told", ["'a,b'", "['a', 'b']"])
    def test_several(self, tmp_path: Path, told: str) -> None:
        configuration = read(tmp_path, f"{SERVER}api_key = {told}")
        write_keys(configuration, FLAGS, tmp_path / "keys")
        assert (tmp_path / "keys" / "chat.given1.key").read_text() == "a\nb\n"

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="may write everywhere")
    def test_a_folder_that_may_not_be_written(self, tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        keys.mkdir(mode=0o500)
        with pytest.raises(PipelineError, match="cannot be written: Permission denied"):
            write_keys(read(tmp_path, f"{SERVER}api_key = 'x'"), FLAGS, keys)

    def test_a_file_in_the_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "keys").touch()
        with pytest.raises(PipelineError, match="cannot be written"):
            write_keys(read(tmp_path, f"{SERVER}api_key = 'x'"), FLAGS, tmp_path / "keys")
