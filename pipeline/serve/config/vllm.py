"""The command line of one vLLM server."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from pipeline.serve.flags import Flag, parse_help

from .addresses import Address, missing
from .configuration import Configuration, beside
from .options import ResolvedOptions, expanded, words

LISTED = Path(__file__).with_name("vllm_flags.txt")
LOADED = ("model", "tokenizer", "hf-config-path", "speculative-config.model")
KEYS = ("api-key", "api-key-file")  # go to the server by VLLM_API_KEY
NUMBERS = ("INT", "COUNT", "FLOAT")  # hints of the list: COUNT is a whole number with units
OURS = {"api-key-file": Flag("--api-key-file", "FILE", ("--api-key-file",))}


@cache
def flags() -> dict[str, Flag]:
    """The options of vLLM's server, of the version that the list names."""
    return parse_help(LISTED.read_text(encoding="utf-8")) | OURS


@cache
def version() -> str:
    """The version whose options are listed."""
    return LISTED.read_text(encoding="utf-8").splitlines()[0].removeprefix("vLLM ")


def executable(configuration: Configuration, environ: Mapping[str, str]) -> str:
    """Pixi, or the Python that has vLLM: absolute where it is found."""
    master = configuration.master
    search = environ.get("PATH")
    if master.pixi_project_dir:
        return shutil.which("pixi", path=search) or "pixi"
    if not master.python:
        names = (shutil.which(name, path=search) for name in ("python", "python3"))
        return next(filter(None, names), "python")
    if "/" in master.python or "\\" in master.python or master.python.startswith("~"):
        return str(configuration.path(master.python))
    return shutil.which(master.python, path=search) or master.python


def python(configuration: Configuration) -> list[str]:
    """What follows the executable before Python's own arguments."""
    master = configuration.master
    if not master.pixi_project_dir:
        return []
    project = str(configuration.path(master.pixi_project_dir))
    environment = ("--environment", master.pixi_environment)
    return ["run", "--manifest-path", project, *environment, "python"]


def command(
    configuration: Configuration, resolved: ResolvedOptions, at: Address
) -> tuple[str, ...]:
    """The arguments after the executable."""
    program = [*python(configuration), "-m", configuration.master.api_server_module]
    table = words({name: value for name, value in expanded(resolved).items() if name not in KEYS})
    added = missing(resolved, at, "served-model-name")
    return (*program, *table, *added, *resolved.spec.extra_args)


def kind(resolved: ResolvedOptions) -> str:
    """chat, embedding or rerank."""
    task = resolved.text("task", "convert")
    if task in ("score", "classify", "rerank"):
        return "rerank"
    return (
        "embedding" if task.startswith("embed") or resolved.text("runner") == "pooling" else "chat"
    )


def downloads(resolved: ResolvedOptions, folder: Path) -> bool:
    """Whether it loads from the network: a model, tokenizer or adapter is no path; relative ones
    start at `folder`."""
    named = [resolved.text(name) for name in LOADED]
    adapters = resolved.value("lora-modules")
    for text in map(str, adapters if isinstance(adapters, list) else [adapters or ""]):
        named.append(_in_json(text, "path") or text.rpartition("=")[2])
    named.append(_in_json(resolved.text("speculative-config"), "model"))
    return any(name and not beside(folder, name).exists() for name in named)


def _in_json(text: str, key: str) -> str:
    """The text under `key` where `text` is an object in JSON; empty where it is none."""
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return str(content.get(key) or "")
    return ""


def errors(configuration: Configuration, resolved: ResolvedOptions) -> Iterator[str]:
    """No model, or one that is not there."""
    spec, folder = resolved.spec, configuration.folder
    model = resolved.text("model")
    if spec.model:
        yield f"{spec.at('model')}: prepares a GGUF for llama.cpp; vLLM takes server.model"
    elif not model:
        yield f"{spec.at('server.model')}: is missing: a folder, or a name on Hugging Face"
    elif model.startswith(("/", "./", "../", "~")) and not beside(folder, model).exists():
        yield spec.line("server.model", f" = {model}: {beside(folder, model)} does not exist")


def warnings(configuration: Configuration, environ: Mapping[str, str]) -> Iterator[str]:
    """What will be missing at the start."""
    program = executable(configuration, environ)
    if not Path(program).is_absolute():
        yield f"{configuration.label}: {program}, which starts vLLM, is not on PATH"
    project = configuration.master.pixi_project_dir
    if project:
        folder = configuration.path(project)
        manifests = ("pixi.toml", "pyproject.toml")
        if not folder.is_file() and not any((folder / name).is_file() for name in manifests):
            place = f"{configuration.label}: master.pixi_project_dir"
            yield f"{place} = {project}: {folder} holds no Pixi project"
