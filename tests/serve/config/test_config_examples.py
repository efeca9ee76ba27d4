"""The examples and schemas of configs/: current, valid, and planned with the real program."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from config_tools import started
from conftest import REPOSITORY

from pipeline.core.process import capture
from pipeline.serve.config import checks, schema
from pipeline.serve.config.configuration import Configuration
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.profiles import load_profile
from pipeline.serve.config.toml_form import load
from pipeline.serve.flags import Flag, parse_help
from pipeline.serve.server import Server

CONFIGS = REPOSITORY / "configs"
TOML = sorted(CONFIGS.glob("*.toml"))
README = REPOSITORY / "README.md"
REGISTRY = CONFIGS / "llm_profiles.yaml"
POOLING = {"embed": "mean", "rerank": "rank"}


def schema_of(name: str) -> Any:
    return json.loads((CONFIGS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", schema.FILES)
def test_schemas_are_current(name: str) -> None:
    text = (CONFIGS / name).read_text(encoding="utf-8")
    again = "from pathlib import Path; from pipeline.serve.config import schema; "
    assert text == schema.text(schema.FILES[name]), f"{again}schema.write(Path('configs'))"
    jsonschema.Draft202012Validator.check_schema(json.loads(text))


@pytest.mark.parametrize("file", TOML, ids=lambda file: file.stem)
def test_examples_fit_their_schema(file: Path) -> None:
    jsonschema.validate(tomllib.loads(file.read_text("utf-8")), schema_of("instances.schema.json"))
    assert file.read_text("utf-8").startswith("#:schema ./instances.schema.json\n")


def test_the_file_in_the_readme_fits_the_schema_and_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    jsonschema.validate(tomllib.loads(text), schema_of("instances.schema.json"))
    file = tmp_path / "models.toml"
    file.write_text(text, encoding="utf-8")
    found = load(file)
    assert [spec.name for spec in found.specs] == ["chat", "embed"] and not found.errors


def test_the_registry_fits_its_schema() -> None:
    text = REGISTRY.read_text("utf-8")
    jsonschema.validate(yaml.safe_load(text), schema_of("llm_profiles.schema.json"))
    assert text.startswith("# yaml-language-server: $schema=./llm_profiles.schema.json\n")


@pytest.mark.parametrize(
    "told",
    [
        {"master": {"enabl": True}},
        {"instance": {"control": {"restart": "sometimes"}}},
        {"instance": {"chat": {"server": {"x": {}}}}},
        {"instance": {"chat": {"model": {}}}},
        {"instance": {"chat": {"sever": {}}}},
        {"instance": {"chat": 3}},
    ],
)
def test_the_schema_refuses_what_the_reading_does(told: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(told, schema_of("instances.schema.json"))


@pytest.mark.parametrize(
    "told",
    [
        {"master": {"llama_cpp_path": "x", "max_loading": 2}},
        {"instance": {"server": {"a": 1, "b": [1, "x"], "c": True, "extra_args": ["-x", 1]}}},
        {"instance": {"chat": {"control": {"gpu_ids": "2,0", "stop_timeout": 1}}}},
    ],
)
def test_the_schema_accepts_what_the_reading_does(told: dict[str, Any]) -> None:
    jsonschema.validate(told, schema_of("instances.schema.json"))


@pytest.fixture(scope="module")
def server(built: Path) -> Path:
    return next(path for path in built.glob("*-cpu/llama-server*"))


@pytest.fixture(scope="module")
def flags(server: Path) -> dict[str, Flag]:
    return parse_help(capture([server, "--help"]) or "")


def planned(
    configuration: Configuration, server: Path, flags: dict[str, Flag], folder: Path
) -> dict[str, Server]:
    """The instances, checked as `plan` would on a machine with two cards."""
    checks.check(configuration, server=server, flags=flags, environ=os.environ, cards=2)
    models = {
        name: PreparedModel(
            path=folder / f"{name}.gguf",
            pooling=POOLING.get(name, "none"),
            ctx_size=512,
        )
        for name in configuration.prepares()
    }
    return started(configuration, folder, models=models, flags=flags)


@pytest.mark.build
@pytest.mark.parametrize("file", TOML, ids=lambda file: file.stem)
def test_examples_are_planned(
    file: Path, server: Path, flags: dict[str, Flag], tmp_path: Path
) -> None:
    found = planned(load(file), server, flags, tmp_path)
    assert len({(one.host, one.port) for one in found.values()}) == len(found)
    cards = {name: one.env.get("CUDA_VISIBLE_DEVICES") for name, one in found.items()}
    engines = {name: one.engine for name, one in found.items()}
    kinds = {name: one.kind for name, one in found.items()}
    match file.stem:
        case "one-chat":
            assert cards == {"chat": None} and found["chat"].port == 8080
        case "two-models-two-gpus":
            assert cards == {"chat": "0", "coder": "1"}
        case "cpu-only":
            assert cards == {"chat": ""}
        case "chat-embed-rerank":
            assert kinds == {"chat": "chat", "embed": "embedding", "rerank": "rerank"}
        case "vllm-pixi":
            assert engines == {"chat": "vllm"} and found["chat"].cmd[0] == "run"
        case "mixed-engines":
            assert engines == {"chat": "vllm", "embed": "llama.cpp"}
        case name:
            raise AssertionError(f"{name}: say here what it shows")


@pytest.mark.build
@pytest.mark.parametrize("name", yaml.safe_load(REGISTRY.read_text("utf-8"))["profiles"])
def test_profiles_are_planned(
    name: str, server: Path, flags: dict[str, Flag], tmp_path: Path
) -> None:
    configuration = load_profile(REGISTRY, name, {})
    (instance,) = planned(configuration, server, flags, tmp_path).values()
    assert instance.aliases and (instance.engine == "vllm") == (name == "vllm-chat")
