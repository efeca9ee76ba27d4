"""Which file or profile is meant: what is said here wins over the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commands import check
from pipeline.commands.request import request
from pipeline.commands.servers_request import ServersRequest, servers_request
from pipeline.commands.session import Session
from pipeline.core.errors import UsageError
from pipeline.core.paths import REPOSITORY
from pipeline.serve.config.named import registry

DEFAULT = str(REPOSITORY / "configs/llm_profiles.yaml")
ENVIRON = {
    "AUTO_INFER_LLAMA_CPP_CONFIG": "/llama.toml",
    "AUTO_INFER_VLLM_CONFIG": "/vllm.toml",
    "LLM_PROFILE_NAME": "small",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))


def source(given: dict[str, object], **environ: str) -> tuple[str, str]:
    parsed = servers_request(given, environ)
    return parsed.source, parsed.engine


def test_nothing_is_meant() -> None:
    assert servers_request({}, {}) == ServersRequest()
    assert servers_request({}, {"LLM_PROFILE_NAME": "  "}).source == ""


def test_what_is_said_wins(tmp_path: Path) -> None:
    assert source({"config": "my.toml"}, **ENVIRON) == (str(tmp_path / "my.toml"), "")
    assert source({"config": "a/../my.toml"}) == source({"config": "my.toml"}), "the same file"
    assert source({"profile": "large"}, **ENVIRON) == (f"{DEFAULT}#large", "")
    assert source({"model": "demo"}, **ENVIRON) == ("", ""), "one model is meant"


@pytest.mark.parametrize(
    ("given", "without", "meant"),
    [
        ({}, (), ("/llama.toml", "")),
        ({"engine": "vllm"}, (), ("/vllm.toml", "vllm")),
        ({"engine": "llama.cpp"}, (), ("/llama.toml", "llama.cpp")),
        ({"engine": "litellm"}, (), ("/llama.toml", "litellm")),
        ({}, ("AUTO_INFER_LLAMA_CPP_CONFIG",), ("/vllm.toml", "vllm")),
        ({}, ("AUTO_INFER_LLAMA_CPP_CONFIG", "AUTO_INFER_VLLM_CONFIG"), (f"{DEFAULT}#small", "")),
        ({}, tuple(ENVIRON), ("", "")),
    ],
)
def test_the_environment(
    given: dict[str, object], without: tuple[str, ...], meant: tuple[str, str]
) -> None:
    environ = {name: value for name, value in ENVIRON.items() if name not in without}
    assert source(given, **environ) == meant


def test_a_second_file_is_told() -> None:
    assert servers_request({}, ENVIRON).besides == "AUTO_INFER_VLLM_CONFIG"
    assert servers_request({"engine": "vllm"}, ENVIRON).besides == ""
    same = {**ENVIRON, "AUTO_INFER_VLLM_CONFIG": "/llama.toml"}
    assert servers_request({}, same).besides == ""


@pytest.mark.parametrize(
    "given",
    [
        {"config": "a", "profile": "b"},
        {"config": "a", "model": "b"},
        {"profile": "a", "hf_model": "b"},
    ],
)
def test_contradictions(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="contradict each other"):
        servers_request(given, {})


def test_names_and_numbers() -> None:
    parsed = servers_request(
        {"name": ("a", "b"), "lines": 0, "max_loading": 2, "background": False}, {}
    )
    assert parsed == ServersRequest(names=("a", "b"), lines=0, max_loading=2, background=False)


def test_the_registry() -> None:
    assert registry({}) == DEFAULT, "wherever the command is typed"
    assert registry({"LLM_PROFILES_CONFIG_PATH": "/p.yaml"}) == "/p.yaml"


def test_what_is_wrong_in_a_model_table_is_told_once_and_where(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    tables = {
        "a": "ref = '$M'",
        "b": "ref = 'demo'\nquant = 'xx'",
        "d": "ref = 'demo'\nlora = 'none-such'",
        "f": "ref = 'demo'\nimatrix = 'none-such'",
        "e": "ref = 'demo'\nrevision = 'v1'",
    }
    models = (f"[instance.{name}.model]\n{text}\n" for name, text in tables.items())
    ports = (f"[instance.{x}.server]\nport = {n}\n" for n, x in enumerate(tables, 9100))
    file.write_text("".join([*models, *ports]))
    words = {"config": str(file)}
    with pytest.raises(UsageError) as caught:
        check.check_servers(Session(request(words), words).servers)
    found = [line for line in caught.value.message.splitlines() if ".model" in line]
    expected = (
        "a.model.ref = $M: not a valid reference",
        'b.model.quant = "xx": must be',
        'd.model.lora = "none-such": not a valid reference',
        f"f.model.imatrix: {tmp_path / 'none-such'} is not a file",
        "e.model: revision: is for Hugging Face repositories only",
    )
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(f"x.toml: instance.{start}")
