"""What a container's variables ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.paths import REPOSITORY
from pipeline.deploy.__main__ import COMMANDS
from pipeline.deploy.boot import boot, source
from pipeline.serve.config import named
from pipeline.serve.server import LLAMA_CPP, VLLM

LLAMA = {
    "AUTO_INFER_LLAMA_CPP_ON_BOOT": "1",
    "AUTO_INFER_LLAMA_CPP_CONFIG": "/config/llama.toml",
}
VLLMS = {"AUTO_INFER_VLLM_ON_BOOT": "True", "AUTO_INFER_VLLM_CONFIG": "/config/vllm.toml"}
PACKAGE = {
    "AUTO_INFER_LLAMA_CPP_GET_PKG_ON_BOOT": "true",
    "AUTO_INFER_LLAMA_CPP_PKG_PATH": "/pkg/llama.tar.gz",
}


def test_nothing_is_started_unless_it_is_asked_for() -> None:
    paths = {name: value for name, value in {**LLAMA, **VLLMS, **PACKAGE}.items() if "/" in value}
    assert boot(paths | {"LLM_PROFILE_NAME": " "}, ["echo", "hi"]) == boot({}, ["echo", "hi"])
    assert boot({}, ["echo"]).command == ("echo",)
    assert boot(dict.fromkeys(("AUTO_INFER_VLLM_ON_BOOT",), "0")) == boot({})


def test_all_at_once() -> None:
    plan = boot({**LLAMA, **VLLMS, **PACKAGE, "LLM_PROFILE_NAME": "small"})
    assert plan.package == "/pkg/llama.tar.gz"
    assert [item.words for item in plan.sources] == [
        ("config=/config/llama.toml",),
        ("config=/config/vllm.toml", "engine=vllm"),
        ("profile=small",),
    ]
    registry = REPOSITORY / "configs" / "llm_profiles.yaml"
    assert plan.sources[2].name == f"{registry}#small"


def test_all_mistakes_are_said_at_once() -> None:
    wrong = {
        "AUTO_INFER_LLAMA_CPP_ON_BOOT": "yes",
        "AUTO_INFER_VLLM_ON_BOOT": "1",
        "AUTO_INFER_LLAMA_CPP_GET_PKG_ON_BOOT": "1",
    }
    with pytest.raises(UsageError) as error:
        boot(wrong)
    assert error.value.message.splitlines() == [
        "AUTO_INFER_LLAMA_CPP_ON_BOOT=yes: must be 1 or true, or 0 or false",
        "AUTO_INFER_LLAMA_CPP_GET_PKG_ON_BOOT is set, but AUTO_INFER_LLAMA_CPP_PKG_PATH names "
        "no file",
        "AUTO_INFER_VLLM_ON_BOOT is set, but AUTO_INFER_VLLM_CONFIG names no file",
    ]


def test_a_command_names_a_program() -> None:
    with pytest.raises(UsageError, match="first word is empty"):
        boot({}, ["", "echo"])
    assert boot({}, ["echo", ""]).command == ("echo", "")


def test_one_file_is_started_once() -> None:
    with pytest.raises(UsageError, match="name the same file"):
        boot({**LLAMA, **VLLMS, "AUTO_INFER_VLLM_CONFIG": "/config/llama.toml"})


def test_by_hand_no_switch_is_needed() -> None:
    server = source({"AUTO_INFER_LLAMA_CPP_CONFIG": "/config/llama.toml"}, LLAMA_CPP)
    assert server.words == ("config=/config/llama.toml",)
    with pytest.raises(UsageError, match="AUTO_INFER_VLLM_CONFIG names no file"):
        source(LLAMA, VLLM)


def test_a_registry_that_is_mounted_for_the_container_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "llm_profiles.yaml"
    monkeypatch.setattr(named, "MOUNTED_REGISTRY", mounted)
    assert named.registry({}) == str(REPOSITORY / "configs" / "llm_profiles.yaml")
    mounted.touch()
    assert named.registry({}) == str(mounted)
    assert named.registry({"LLM_PROFILES_CONFIG_PATH": "/config/mine.yaml"}) == "/config/mine.yaml"


WRONG = {
    "a switch": ({"AUTO_INFER_LLAMA_CPP_ON_BOOT": "yes"}, "AUTO_INFER_LLAMA_CPP_ON_BOOT=yes"),
    "a package": (PACKAGE, "/pkg/llama.tar.gz"),
    "a file": (LLAMA, "doit plan config=/config/llama.toml"),
}


@pytest.mark.skipif(os.name == "nt", reason="containers are Linux")
@pytest.mark.parametrize("what", WRONG)
def test_where_people_log_in_a_wrong_configuration_ends_nothing(tmp_path: Path, what: str) -> None:
    variables, text = WRONG[what]
    notice = tmp_path / "notice"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AUTO_")}
    clean |= variables | {"LLAMA_PIPELINE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pipeline.deploy", "entrypoint", "echo", "alive"]

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=REPOSITORY, env=clean | more, capture_output=True, text=True, timeout=120
        )

    ended = run()
    assert ended.returncode == 3 and ended.stdout == ""
    stayed = run(INFER_DEV_NOTICE=str(notice))
    assert stayed.returncode == 0 and stayed.stdout.endswith("alive\n")
    assert "error: " in stayed.stderr
    assert notice.read_text().startswith("The start of this container failed")
    assert text in notice.read_text()
    assert run(INFER_DEV_NOTICE=str(tmp_path / "gone" / "notice")).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="containers are Linux")
def test_a_misspelled_variable_is_named_where_nothing_is_started(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AUTO_")}
    clean |= {"LLAMA_PIPELINE_HOME": str(tmp_path), "AUTO_INFER_LLAMA_CP_ON_BOOT": "1"}
    why = "AUTO_INFER_LLAMA_CP_ON_BOOT is set, and not read; did you mean"
    for words in (["entrypoint", "echo", "alive"], ["entrypoint"], ["boot"]):
        command = [sys.executable, "-m", "pipeline.deploy", *words]
        done = subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, text=True)
        assert why in done.stderr, words


def test_a_package_is_installed_under_either_name() -> None:
    assert COMMANDS["install-llama-cpp-pkg"] is COMMANDS["get-llama-cpp-pkg"]
