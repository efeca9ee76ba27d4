"""The tables of a configuration file: their keys, and what the values may be.

The checks and the JSON Schemas are made from these types, so the two cannot disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from pipeline.core.text import byte_count
from pipeline.serve import address, placing, server

from .values import JSON_OPTION

MODELS = "models"
Engine = Literal["llama.cpp", "vllm"]
Scalar = str | int | float
DEVICE = re.compile(r"ram|gpu\d+", re.A)
GPU_IDS = re.compile(r"all|none|(\d+|(GPU|MIG)-[\w/-]+)(,(\d+|(GPU|MIG)-[\w/-]+))*", re.A)


# Each validator raises ValueError with what is wrong, which `messages.validated` says.


def gpu_ids(value: str) -> str:
    """The ids without spaces. Raises ValueError."""
    ids = value.replace(" ", "")
    if not GPU_IDS.fullmatch(ids):
        raise ValueError('must be "all", "none", or ids such as "0" or "2,0"')
    if len(set(ids.split(","))) < len(ids.split(",")):
        raise ValueError("names a card twice")
    return ids


def _allowed_by(check: Callable[[str], str]) -> AfterValidator:
    """A validator for texts that `check` takes: it raises ValueError with what is allowed."""

    def checked(value: str) -> str:
        try:
            return check(value)
        except ValueError as allowed:
            raise ValueError(f"must be {allowed}") from None

    return AfterValidator(checked)


def _option(value: Any, _: object) -> Any:
    """What an option may be: text, number, true, false, or a list of texts and numbers."""
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, list):
        if all(
            isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in value
        ):
            return value
        raise ValueError("its items must be texts or numbers")
    kind = "table" if isinstance(value, dict) else type(value).__name__
    raise ValueError(f"must be a text, a number, true, false or a list, not a {kind}")


def _as_json(name: str, value: Any) -> Any:
    """A table as JSON, where the option takes that; else the value as it is."""
    if isinstance(value, dict) and JSON_OPTION.fullmatch(name):
        with suppress(ValueError, RecursionError):  # nan, which is not JSON
            return json.dumps(value, allow_nan=False, ensure_ascii=False, default=str)
    return value


def _word(value: Any) -> Any:
    """One word of extra_args: a number may stand without quotes."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _separated(value: Any) -> Any:
    """A list, for which a text with commas may stand."""
    return [text.strip() for text in value.split(",")] if isinstance(value, str) else value


def _variables(value: dict[str, str]) -> dict[str, str]:
    """The variables, none of which the system would refuse."""
    for name in value:
        if not name or "=" in name:
            raise ValueError(f"names no variable: {name}")
    return value


def _memory(value: Any, _: object) -> Any:
    """How much memory models may take: a text, or a table of them by device."""
    texts = value if isinstance(value, dict) else {"": value}
    for device, text in texts.items():
        if device and not DEVICE.fullmatch(device):
            raise ValueError(f"{device}: must be ram, gpu0, gpu1 and so on")
        begin = f"{device}: must be" if device else 'must be "auto",'
        try:
            if device or text != "auto":
                placing.part(text, 0)
        except (ValueError, TypeError):  # TypeError: no text
            raise ValueError(f'{begin} a size such as "20GiB", or a share such as "80%"') from None
    return value


def _replicas(value: Any) -> tuple[int, int]:
    """The least and the most pods."""
    with suppress(ValueError):
        if isinstance(value, str) or type(value) is int:
            return server.replicas(str(value))
    raise ValueError('must be a number of pods, or the least and the most, such as "0-4"')


def _size(value: str) -> str:
    """A size in bytes."""
    try:
        byte_count(value)
    except ValueError:
        raise ValueError('must be a size such as "4GiB"; "0GiB" for none') from None
    return value


Option = Annotated[str | int | float | bool | list[Scalar], WrapValidator(_option)]
Word = Annotated[str, BeforeValidator(_word), WithJsonSchema({"type": ["string", "number"]})]
Amount = Annotated[str | dict[str, str], WrapValidator(_memory)]
Size = Annotated[str, AfterValidator(_size)]
Replicas = Annotated[
    tuple[int, int],
    BeforeValidator(_replicas),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 9999},
                {"type": "string", "pattern": f"^{server.REPLICAS.pattern}$"},
            ]
        }
    ),
]
Variables = Annotated[dict[str, Word], AfterValidator(_variables)]
Host = Annotated[str, Field(min_length=1), _allowed_by(address.host)]
GpuIds = Annotated[str, AfterValidator(gpu_ids)]
Origin = Annotated[str, _allowed_by(address.origin)]
HostName = Annotated[str, _allowed_by(address.host_pattern)]
Seconds = Annotated[float, Field(ge=0, le=86400 * 7, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Adapters = Annotated[
    list[Text],
    BeforeValidator(_separated),
    WithJsonSchema({"type": ["string", "array"], "minLength": 1, "items": {"type": "string"}}),
]


OPEN = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)


class Table(BaseModel):
    """A table with fixed keys: any other one is a mistake."""

    model_config = {**OPEN, "extra": "forbid"}


class Master(Table):
    """What holds for all instances."""

    enable: bool = True
    """false: nothing is started."""
    llama_cpp_path: Text | None = None
    """The llama-server executable; else the installed package's, that of bins/, that on PATH."""
    max_loading: Annotated[int, Field(ge=1)] | None = None
    """So many instances load at once; absent: all."""
    memory: Amount = "auto"
    """What models may take together: auto, a size such as 20GiB, a share such as 80%, or a table
    of these by device (ram, gpu0, ...)."""
    swap_wait: Annotated[float, Field(ge=0, le=placing.PATIENCE)] = 1.0
    """Seconds that a request waits at most before models that are used often make room."""
    instances: Literal["models"] | None = None
    """models: every model on disk can be asked for by name, beside the instances of this file."""
    saved_slots: Size = "4GiB"
    """What the conversations of unloaded llama-servers may take on the disk; 0GiB: none is kept."""
    pixi_project_dir: Text | None = None
    """vLLM: a Pixi project in which it is installed."""
    pixi_environment: Text = "default"
    """vLLM: the environment of that project."""
    api_server_module: Text = "vllm.entrypoints.openai.api_server"
    """vLLM: the module that is run."""
    python: Text | None = None
    """vLLM without a Pixi project: the Python that has it; else the one on PATH."""


class ControlTable(Table):
    """How an instance is started and kept."""

    enabled: bool = True
    """Start this instance."""
    engine: Engine = "llama.cpp"
    """The program that serves."""
    background: bool = True
    """Start it and go on; false: stay with it."""
    log_dir: Text | None = None
    """The folder of its log, which is named after it."""
    log_file: Text | None = None
    """Its log; wins over log_dir."""
    gpu_ids: GpuIds | None = None
    """\"all\" changes nothing, \"none\" hides all cards, \"2,0\" shows these, in this order."""
    env: Variables = Field(default_factory=dict)
    """Variables of its environment, over those that it inherits."""
    sandbox: Literal["auto", "strict", "off"] = "auto"
    """llama-server in the sandbox: no network but its port, no writes but its log."""
    guard: bool | None = None
    """llama-server without a key: pages of other sites cannot use it; false: they can; absent: true
    for one that the pipeline made."""
    origins: list[Origin] = Field(default_factory=list)
    """Whose pages may ask it, beside those of this machine: origins, with *."""
    hosts: list[HostName] = Field(default_factory=list)
    """The names that it may be asked by without a key, beside this machine's own, with *."""
    restart: Literal["on-failure", "always", "never"] = "on-failure"
    """When it is started again after it ended by itself."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """In a row; then it is given up."""
    restart_pause: Seconds = 1.0
    """Before the first restart, in seconds; each further one waits twice as long."""
    ready_timeout: Annotated[Seconds, Field(ge=1)] = 600.0
    """Seconds until it must be ready."""
    stop_timeout: Seconds = 10.0
    """Seconds that it gets to stop."""
    probe_timeout: Seconds = 60.0
    """Seconds for one token, once it is healthy; 0 turns this probe off."""
    replicas: Replicas = Field(default_factory=lambda: (1, 1))
    """Pods on a cluster, or the least and the most of them, 0-4; one machine runs one server."""
    start: Literal["boot", "demand"] = "boot"
    """boot: loaded by `up`; demand: loaded when a request at the gateway names it."""
    idle_timeout: Seconds = 0.0
    """Seconds without a request until it is unloaded; 0: only when its memory is wanted."""
    pinned: bool = False
    """true: never unloaded to make room for another one."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Of idle ones, those of a lower priority are unloaded first; of those that wait, one of a
    higher priority is loaded first."""


class ModelTable(Table):
    """A model that is prepared before the launch: the variables of `prepare`."""

    ref: Text
    """org/model, org/model:QUANT, a path of a .gguf or of a folder, demo or demo-embed."""
    quant: Text | None = None
    """A type of llama-quantize, or auto."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face repository."""
    filename: Text | None = None
    """Which GGUF file of a repository."""
    pattern: Text | None = None
    """Choose among the GGUF files of a repository, with * and ?."""
    mmproj: Text | None = None
    """The projector: a path, a file's name in the repository, or none."""
    imatrix: Text | None = None
    """Path of an importance matrix, or of a text to compute one from."""
    draft: Text | None = None
    """A smaller model that drafts for it, as ref, or ngram, or mtp."""
    lora: Adapters | None = None
    """LoRA adapters, each as ref, a path of a .gguf or a folder of PEFT, with :SCALE behind it."""
    keep_f16: bool | None = None
    """Keep the unquantized GGUF after quantizing."""


class GatewayTable(Table):
    """One address for all instances."""

    enable: bool = False
    """Start it beside the instances."""
    host: Host = "127.0.0.1"
    """Where it listens."""
    port: Annotated[int, Field(ge=1, le=65535)] = 9000
    """Where it listens."""
    hold_timeout: Seconds | None = None
    """Seconds that a request waits for an instance to load; else that instance's ready_timeout."""
    api_key: Text | None = None
    """The key that clients send; "none": none, though others can reach it."""
    api_key_file: Text | None = None
    """A file that holds the key."""
    models: dict[str, Text] = Field(default_factory=dict)
    """Names that clients ask for, with * and ?, and the instance that answers to them."""
    origins: list[Origin] = Field(default_factory=list)
    """Whose pages may ask it, beside those of this machine: origins, with *."""
    hosts: list[HostName] = Field(default_factory=list)
    """The names that it may be asked by without a key, beside this machine's own, with *."""
    inspect: bool = False
    """Keep the contents of the last requests, for the dashboard."""
    pull: bool = False
    """Clients may have models of the hub prepared, by Ollama's /api/pull."""


class OptionsTable(BaseModel):
    """Options of a server among keys of its own."""

    model_config = OPEN | ConfigDict(
        json_schema_extra={
            "patternProperties": {f"^{JSON_OPTION.pattern}$": {"type": ["string", "object"]}}
        }
    )
    __pydantic_extra__: dict[str, Option] = Field(init=False)

    @model_validator(mode="before")
    @classmethod
    def _tables_as_json(cls, values: Any) -> Any:
        """The options with a text in place of each table that stands for JSON."""
        if not isinstance(values, dict):
            return values
        return {name: _as_json(str(name), value) for name, value in values.items()}


class ServerTable(OptionsTable):
    """Options of the server, `_` for `-`. A text or a number is passed as `--key value`, true as
    `--key`, false not at all, a list as `--key value` once for each."""

    extra_args: list[Word] | None = None
    """Words of the command line as they are, last."""


class InstanceTable(Table):
    """One server."""

    control: ControlTable = Field(default_factory=ControlTable)
    server: ServerTable = Field(default_factory=ServerTable)
    model: ModelTable | None = None


class Instances(BaseModel):
    """`control` and `server` are the defaults of all; every other key is an instance."""

    model_config = OPEN
    __pydantic_extra__: dict[str, InstanceTable] = Field(init=False)

    control: ControlTable = Field(default_factory=ControlTable)
    server: ServerTable = Field(default_factory=ServerTable)


class InstancesFile(Table):
    """A file of instances."""

    model_config = ConfigDict(title="Instances of llama-server and vLLM")

    master: Master = Field(default_factory=Master)
    instance: Instances = Field(default_factory=Instances)
    gateway: GatewayTable = Field(default_factory=GatewayTable)


def keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys that a table at this path of a file of instances may have."""
    match path:
        case ():
            return list(InstancesFile.model_fields)
        case ("master",):
            return list(Master.model_fields)
        case ("gateway",):
            return list(GatewayTable.model_fields)
        case ("instance", "control") | ("instance", _, "control"):
            return list(ControlTable.model_fields)
        case ("instance", _, "model"):
            return list(ModelTable.model_fields)
        case ("instance", _):
            return list(InstanceTable.model_fields)
    return []
