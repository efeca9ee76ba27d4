"""What a profile adds up to. The command line wins over the environment, that over the profile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field
from pydantic_core import PydanticCustomError

from pipeline.core.paths import absolute
from pipeline.serve.server import LLAMA_CPP, VLLM, Control

from . import synonyms, yaml_form
from .configuration import InstanceSpec, Value, beside, projector_of
from .messages import dotted, shown
from .named import CARDS, OF_PROFILES, unknown_overrides
from .profile_tables import LlamaCpp, Profile, Tuning
from .tables import gpu_ids
from .toml_form import option

WHOLE = re.compile(r"-?[1-9][0-9]{0,10}|0")  # what stays the same text as a number
# What the command line says of a repository's file. Where it does, the profile's own is not meant.
OF_MODEL = ("filename", "pattern", "quant", "revision", "mmproj", "draft", "lora")
SAME = {"gpu-layers": "n-gpu-layers"}  # two names of one option
VLLM_TUNING = {
    "tensor_parallel_size": "tensor-parallel-size",
    "max_model_len": "max-model-len",
    "max_batch_tokens": "max-num-batched-tokens",
    "max_concurrent_requests": "max-num-seqs",
    "gpu_memory_fraction": "gpu-memory-utilization",
}
Tunings = dict[str, tuple[int | float, str]]  # by key: the value, and where it stands


class Reading(Struct, kw_only=True):
    """A profile while it is read: its options so far, and what is to be said."""

    label: str
    name: str
    folder: Path
    read: yaml_form.Read
    server: dict[str, Value] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def place(self, *path: str | int) -> str:
        """`llm_profiles.yaml: line 12: profiles.chat.llamacpp.port`."""
        whole = ("profiles", self.name, *path)
        line = self.read.line(whole)
        return f"{self.label}: {f'line {line}: ' if line else ''}{dotted(whole)}"

    def put(self, name: str, value: Value, place: str) -> None:
        """Set an option, over what was set before."""
        name = SAME.get(name, name)
        self.server[name] = value
        self.places[f"server.{name}"] = place


def _override(reading: Reading, name: str, text: str, place: str) -> None:
    """Set what is said outside of the profile. Relative paths there start where the user is."""
    if name == "api-key-file":
        reading.server.pop("api-key", None)
        text = str(absolute(text))
    reading.put(name, int(text) if WHOLE.fullmatch(text) else text, place)


def instance_spec(
    reading: Reading,
    profile: Profile,
    environ: Mapping[str, str],
    variables: Mapping[str, str],
) -> InstanceSpec:
    """The instance that the profile means, with what the environment and `variables`, those of
    the command line, change."""
    is_llama = profile.backend == "llamacpp"
    engine = LLAMA_CPP if is_llama else VLLM
    extra = _table(reading, profile)
    _set_overrides(reading, is_llama, environ)
    chosen = {key: variables[key] for key in OF_MODEL if key in variables}
    options = {key: text for key, text in variables.items() if key not in chosen}
    if not is_llama:
        if "revision" in chosen:
            options["revision"] = chosen.pop("revision")  # vLLM has one, too
        reading.wrong += [f"{key}=: is for a GGUF, and this profile is vLLM's" for key in chosen]
    for key, text in options.items():
        _override(reading, option(key.removeprefix("server.")), text, f"{key}=")
    tune = _tune_llama if is_llama else _tune_vllm
    tune(reading, _tuning(reading, profile))
    _label(reading, profile, is_llama)
    model, download_to = _file(reading, profile.llamacpp, chosen) if is_llama else ({}, None)
    if not is_llama and (name := profile.vllm.model or profile.model_id):
        path = ("vllm", "model") if profile.vllm.model else ("model_id",)
        reading.put("model", name, reading.place(*path))
    return InstanceSpec(
        name=reading.name,
        control=Control(engine=engine, gpu_ids=_cards(reading, profile, environ)),
        server=reading.server,
        extra_args=extra,
        model=model,
        download_to=download_to,
        typed=tuple(reading.server),  # `jinja: on` is true in YAML, too
        place=reading.place(),
        places=reading.places,
    )


def _table(reading: Reading, profile: Profile) -> tuple[str, ...]:
    """Set the options that stand in the engine's table; returns its extra_args."""
    table = profile.llamacpp if profile.backend == "llamacpp" else profile.vllm
    extra: tuple[str, ...] = ()
    for key, value in (table.__pydantic_extra__ or {}).items():
        place = reading.place(profile.backend, key)
        meant = synonyms.OF_A_PROFILE.get(option(key), "") if table is profile.llamacpp else ""
        if meant:
            reading.wrong.append(f"{place}: there is no such key; did you mean {meant}?")
        elif key != "extra_args":
            reading.put(option(key), value, place)
        elif isinstance(value, list):
            extra = tuple(map(str, value))
        else:
            reading.wrong.append(f"{place} = {shown(value)}: must be a list")
    return extra


def _set_overrides(reading: Reading, is_llama: bool, environ: Mapping[str, str]) -> None:
    """Set what the environment overrides; a blank variable is unset."""
    reading.wrong += unknown_overrides(environ)
    for name, overridden in OF_PROFILES.items():
        text = environ.get(name, "").strip()
        if text and is_llama:
            _override(reading, overridden, text, name)
        elif text:
            reading.notes.append(f"{name}: is for llama-server, and this profile is vLLM's")


def _tuning(reading: Reading, profile: Profile) -> Tunings:
    """The keys of no engine that the profile has."""
    tunings: Tunings = {}
    for key in Tuning.model_fields:
        for path, table in (((), profile), (("gpu",), profile.gpu)):
            value = getattr(table, key)
            if value is None:
                continue
            place = reading.place(*path, key)
            if key in tunings:
                reading.wrong.append(f"{place}: is given beside gpu too; leave one out")
            tunings[key] = (value, place)
    return tunings


def _tune_vllm(reading: Reading, tunings: Tunings) -> None:
    for key, (value, place) in tunings.items():
        name = VLLM_TUNING.get(key)
        if name is None:
            reading.notes.append(f"{place}: vLLM has no such option")
        elif name not in reading.server:
            reading.put(name, value, place)


def _tune_llama(reading: Reading, tunings: Tunings) -> None:
    """llama-server divides its context among the requests, so that of one is multiplied."""
    for key, name in (("max_concurrent_requests", "parallel"), ("max_batch_tokens", "batch-size")):
        if key in tunings and name not in reading.server:
            reading.put(name, *tunings[key])
    if "max_model_len" in tunings and "ctx-size" not in reading.server:
        length, place = tunings["max_model_len"]
        slots = reading.server.get("parallel", 1)
        slots = slots if isinstance(slots, int) and slots > 0 else 1
        reading.put("ctx-size", int(length) * slots, place)
        if slots > 1:
            reading.notes.append(f"{place}: {length} tokens for each of {slots} requests")
    for key in ("num_gpus", "tensor_parallel_size", "gpu_memory_fraction"):
        if key in tunings:
            reading.notes.append(f"{tunings[key][1]}: llama-server has no such option")


def _label(reading: Reading, profile: Profile, is_llama: bool) -> None:
    """What the labels turn on."""
    name = "alias" if is_llama else "served-model-name"
    if profile.model_id and name not in reading.server:
        reading.put(name, profile.model_id, reading.place("model_id"))
    if not profile.supports_embeddings:
        return
    place, server = reading.place("supports_embeddings"), reading.server.keys()
    if is_llama and not server & {"embeddings", "embedding", "reranking", "rerank"}:
        reading.put("embeddings", True, place)
    elif not is_llama and not server & {"runner", "convert"}:
        reading.put("runner", "pooling", place)
    else:
        return
    if profile.task_type and "embed" not in profile.task_type.lower():
        program = "llama-server" if is_llama else "vLLM"
        reading.notes.append(f"{place}: {program} then answers for embeddings alone")


def _file(
    reading: Reading, table: LlamaCpp, chosen: Mapping[str, str]
) -> tuple[dict[str, str], Path | None]:
    """The variables of `prepare` for the model, and the file that it is wanted at where it is
    still missing. `chosen` wins: what it names is another file than the profile's."""
    if "model" in reading.server:
        return {}, None
    is_other = bool(chosen.keys() & {"pattern", "quant", "revision"} and table.hf_repo_id)
    root = beside(reading.folder, table.model_root) if table.model_root else None
    name = chosen.get("filename") or table.hf_filename
    gguf_path = None if "filename" in chosen else table.gguf_path
    file = gguf_path or (name if root else None)
    path = beside(root or reading.folder, file) if file and not is_other else None
    reading.places["model.ref"] = place = reading.place("llamacpp")
    if path and path.is_file():
        others = {key: chosen[key] for key in chosen if key != "filename"}
        projector = projector_of(path)  # as it was put there by the download
        mmproj = {"mmproj": str(projector)} if projector.is_file() else {}
        return {"model": str(path)} | mmproj | others, None
    if not table.hf_repo_id:
        why = f"{path} does not exist, and no hf_repo_id says where it comes from"
        if path is None:
            why = "names no file: gguf_path, or model_root with hf_filename"
        reading.wrong.append(f"{place}: {why}")
        return {}, None
    wanted = {"model": f"hf:{table.hf_repo_id}"}
    name = name or (Path(table.gguf_path).name if table.gguf_path else "")
    if name and not chosen.keys() & {"pattern", "quant"}:
        wanted["filename"] = name
    return {**wanted, **chosen}, path


def _cards(reading: Reading, profile: Profile, environ: Mapping[str, str]) -> str | None:
    """The cards that it sees, as `gpu_ids` says it."""
    cards = environ.get(CARDS, "").strip()
    reading.places["control.gpu_ids"] = CARDS if cards else reading.place("gpu", "device_ids")
    if not cards:
        return profile.gpu.device_ids
    try:
        return gpu_ids(cards)
    except PydanticCustomError as error:
        reading.wrong.append(f"{CARDS} = {shown(cards)}: {error.message()}")
        return None
