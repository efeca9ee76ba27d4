"""What a container's variables ask for."""

from __future__ import annotations

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.paths import REPOSITORY
from pipeline.deploy.boot import boot, source
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
    told = boot({**LLAMA, **VLLMS, **PACKAGE, "LLM_PROFILE_NAME": "small"})
    assert told.package == "/pkg/llama.tar.gz"
    assert [one.words for one in told.sources] == [
        ("config=/config/llama.toml",),
        ("config=/config/vllm.toml", "engine=vllm"),
        ("profile=small",),
    ]
    registry = REPOSITORY / "configs" / "llm_profiles.yaml"
    assert told.sources[2].name == f"{registry}#small"


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
    told = source({"AUTO_INFER_LLAMA_CPP_CONFIG": "/config/llama.toml"}, LLAMA_CPP)
    assert told.words == ("config=/config/llama.toml",)
    with pytest.raises(UsageError, match="AUTO_INFER_VLLM_CONFIG names no file"):
        source(LLAMA, VLLM)
