"""Profiles: one server, chosen by its name from a YAML registry.

The command line wins over the environment, that over the profile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from pipeline.core.errors import UsageError, did_you_mean
from pipeline.core.paths import absolute
from pipeline.serve.server import LLAMA_CPP, VLLM, Control

from . import messages, sources, synonyms, yaml_form
from .configuration import Configuration, InstanceSpec, Value, beside, projector_of, wrong_name
from .messages import Keys, dotted, shown
from .named import CARDS, OF_PROFILES, PROFILE, unknown_overrides
from .profile_tables import Profile, Registry, Tuning
from .tables import GatewayTable, Master, gpu_ids
from .toml_form import option

WHOLE = re.compile(r"-?[1-9][0-9]{0,10}|0")  # what stays the same text as a number
# Variables that choose a file of a repository, instead of the profile's own.
OF_MODEL = ("filename", "pattern", "quant", "revision", "mmproj", "draft", "lora")
SAME = {"gpu-layers": "n-gpu-layers"}  # two names of one option
LLAMA_TUNING = {"max_concurrent_requests": "parallel", "max_batch_tokens": "batch-size"}
VLLM_TUNING = {
    "tensor_parallel_size": "tensor-parallel-size",
    "max_model_len": "max-model-len",
    "max_batch_tokens": "max-num-batched-tokens",
    "max_concurrent_requests": "max-num-seqs",
    "gpu_memory_fraction": "gpu-memory-utilization",
}


def load_profile(
    file: Path,
    name: str,
    environ: Mapping[str, str],
    variables: Mapping[str, str] | None = None,
) -> Configuration:
    """The profile `name` of the registry `file`, as a configuration of one instance.

    `environ` may hold overrides. `variables` are those of the command line, in its own names and as
    texts: options (`parallel`, `server.jinja`) and what chooses the file (`OF_MODEL`). Raises
    UsageError where there is no such profile, or the file cannot be read; all other errors are left
    in the result, for `checks.check` to raise with its own.
    """
    file = Path(file).absolute()
    if not file.exists():
        there = ", ".join(sources.files(file.parent, ".yaml", ".yml")) or "no YAML file"
        raise UsageError(
            f"{file}: there is no registry of profiles",
            f"in {file.parent} there is {there}; LLM_PROFILES_CONFIG_PATH names the registry",
        )
    read = yaml_form.read(file)
    tables = _tables(file.name, read.content)
    if name not in tables:
        from_environment = environ.get(PROFILE, "").strip() == name
        where = f"{PROFILE}={name}: " if from_environment else ""
        raise UsageError(
            f"{where}{file.name}: there is no profile {name}{did_you_mean(name, list(tables))}",
            f"it has {', '.join(tables) or 'none'}",
        )
    reader = ProfileReader(label=file.name, name=name, folder=file.parent, read=read)
    if why := wrong_name(name):
        reader.errors.append(f"{reader.place()}: {why}")
    reader.validate(tables[name])
    spec = reader.spec(environ, variables or {})
    return Configuration(
        master=Master(),
        gateway=GatewayTable(),
        folder=file.parent,
        label=file.name,
        specs=(spec,),
        notes=tuple(reader.notes),
        errors=tuple(reader.errors),
    )


def _tables(label: str, content: Any) -> dict[str, Any]:
    """The tables of the profiles by name. Raises UsageError where the file has none."""
    is_table = isinstance(content, dict)
    if not is_table or "profiles" not in content:
        keys = ", ".join(map(str, content)) if is_table else f"a {type(content).__name__}"
        raise UsageError(f"{label}: has no key profiles", f"it has {keys}")
    profiles = content["profiles"]
    if not isinstance(profiles, dict):
        raise UsageError(f"{label}: profiles: must be a table of profiles by name")
    return {str(name): profile for name, profile in profiles.items()}


class ProfileReader(Struct, kw_only=True):
    """Turns a profile into an instance: its options so far, with the notes and errors."""

    label: str
    name: str
    folder: Path
    read: yaml_form.Read
    profile: Profile = field(default_factory=Profile)
    server: dict[str, Value] = {}
    places: dict[str, str] = {}
    notes: list[str] = []
    errors: list[str] = []

    @property
    def is_llama(self) -> bool:
        return self.profile.backend == "llamacpp"

    @property
    def engine(self) -> str:
        return LLAMA_CPP if self.is_llama else VLLM

    @property
    def program(self) -> str:
        """The engine's program, for messages."""
        return "llama-server" if self.is_llama else "vLLM"

    @property
    def tuned_tables(self) -> tuple[tuple[tuple[str, ...], Tuning], ...]:
        """The tables with keys that are common to both engines, each with its path."""
        return ((), self.profile), (("gpu",), self.profile.gpu)

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

    def put_default(self, name: str, value: Value, place: str) -> None:
        """Set an option that is not set yet."""
        if name not in self.server:
            self.put(name, value, place)

    def put_text(self, name: str, text: str, place: str) -> None:
        """Set an option from outside of the profile. Relative paths start where the user is."""
        if name == "api-key-file":
            self.server.pop("api-key", None)
            text = str(absolute(text))
        is_number = WHOLE.fullmatch(text) and "cpu-mask" not in name  # 11 is hexadecimal there
        self.put(name, int(text) if is_number else text, place)

    def validate(self, table: Any) -> None:
        """Read the profile's table. A key without a value counts as one that is not there."""

        def add_error(path: Keys, text: str) -> None:
            self.errors.append(f"{self.place(*path[2:])}{text}")

        content = {"profiles": {self.name: _with_values(table or {})}}
        registry = messages.validated(Registry, content, add_error)
        self.profile = registry.profiles.get(self.name) or Profile()
        for path, tuning in self.tuned_tables:
            for key in tuning.__pydantic_extra__ or {}:
                near = self._near(key, list(type(tuning).model_fields))
                self.notes.append(f"{self.place(*path, key)}: is not known and not used{near}")

    def _near(self, key: str, known: list[str]) -> str:
        """`; did you mean X?` for a key of this table, or an option of the engine."""
        if near := did_you_mean(key, known):
            return near
        meant = synonyms.option(option(key), self.engine) or ""
        return f"; did you mean {self.profile.backend}.{meant.replace('-', '_')}?" if meant else ""

    def spec(self, environ: Mapping[str, str], variables: Mapping[str, str]) -> InstanceSpec:
        """The profile's instance. Its table is put first, the environment and the command line
        over it; then what follows from other keys, where none of them has set it."""
        extra_args = self._put_table()
        self._put_overrides(environ)
        chosen = self._put_variables(variables)
        self._put_tuning()
        self._put_labels()
        model, download_to = self._model(chosen)
        return InstanceSpec(
            name=self.name,
            control=Control(engine=self.engine, gpu_ids=self._gpu_ids(environ)),
            server=self.server,
            extra_args=extra_args,
            model=model,
            download_to=download_to,
            typed=tuple(self.server),  # `jinja: on` is true in YAML, too
            place=self.place(),
            places=self.places,
        )

    def _put_table(self) -> tuple[str, ...]:
        """Set the options that stand in the engine's table; returns its extra_args."""
        backend = self.profile.backend
        table = self.profile.llamacpp if self.is_llama else self.profile.vllm
        extra_args: tuple[str, ...] = ()
        for key, value in (table.__pydantic_extra__ or {}).items():
            place = self.place(backend, key)
            meant = synonyms.OF_A_PROFILE.get(option(key), "") if self.is_llama else ""
            if meant:
                self.errors.append(f"{place}: there is no such key; did you mean {meant}?")
            elif key != "extra_args":
                self.put(option(key), value, place)
            elif isinstance(value, list):
                extra_args = tuple(map(str, value))
                self.places["server.extra-args"] = place
            else:
                self.errors.append(f"{place} = {shown(value)}: must be a list")
        return extra_args

    def _put_overrides(self, environ: Mapping[str, str]) -> None:
        """Set what the environment overrides; a blank variable is unset."""
        self.errors += unknown_overrides(environ)
        for variable, name in OF_PROFILES.items():
            text = environ.get(variable, "").strip()
            if text and self.is_llama:
                self.put_text(name, text, variable)
            elif text:
                self.notes.append(f"{variable}: is for llama-server, and this profile is vLLM's")

    def _put_variables(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Set the options of the command line; returns its variables for the model."""
        chosen = {key: text for key, text in variables.items() if key in OF_MODEL}
        if not self.is_llama:
            chosen.pop("revision", None)  # an option of vLLM
            self.errors += [f"{x}=: is for a GGUF, and this profile is vLLM's" for x in chosen]
        for key, text in variables.items():
            if key not in chosen:
                self.put_text(option(key.removeprefix("server.")), text, f"{key}=")
        return chosen

    def _put_tuning(self) -> None:
        """Set the options for the keys that are common to both engines."""
        values: dict[str, tuple[int | float, str]] = {}  # by key, with the place
        for key in Tuning.model_fields:
            for path, table in self.tuned_tables:
                value = getattr(table, key)
                if value is None:
                    continue
                place = self.place(*path, key)
                if key in values:
                    self.errors.append(f"{place}: is given beside gpu too; leave one out")
                values[key] = (value, place)
        for key, name in (LLAMA_TUNING if self.is_llama else VLLM_TUNING).items():
            if key in values:
                self.put_default(name, *values.pop(key))
        if self.is_llama and "max_model_len" in values:
            self._put_context(*values.pop("max_model_len"))
        self.notes += [
            f"{place}: {self.program} has no such option" for _, place in values.values()
        ]

    def _put_context(self, length: int | float, place: str) -> None:
        """llama-server divides its context among the requests, so that of one is multiplied."""
        if "ctx-size" in self.server:
            return
        slots = self.server.get("parallel", 1)
        slots = slots if isinstance(slots, int) and slots > 0 else 1
        self.put("ctx-size", int(length) * slots, place)
        if slots > 1:
            self.notes.append(f"{place}: {length} tokens for each of {slots} requests")

    def _put_labels(self) -> None:
        """Set what the labels turn on."""
        profile, server = self.profile, self.server.keys()
        if profile.model_id:
            alias = "alias" if self.is_llama else "served-model-name"
            self.put_default(alias, profile.model_id, self.place("model_id"))
        if not profile.supports_embeddings:
            return
        place = self.place("supports_embeddings")
        if self.is_llama and not server & {"embeddings", "embedding", "reranking", "rerank"}:
            self.put("embeddings", True, place)
        elif not self.is_llama and not server & {"runner", "convert"}:
            self.put("runner", "pooling", place)
        else:
            return
        if profile.task_type and "embed" not in profile.task_type.lower():
            self.notes.append(f"{place}: {self.program} then answers for embeddings alone")

    def _model(self, chosen: Mapping[str, str]) -> tuple[dict[str, str], Path | None]:
        """The variables of `prepare` for the model, and the path where the profile wants it, while
        it is missing there. `chosen` wins: it names another file than the profile's."""
        if not self.is_llama:
            self._put_model()
        if not self.is_llama or "model" in self.server:
            return {}, None
        table, target = self.profile.llamacpp, self._target(chosen)
        self.places["model.ref"] = place = self.place("llamacpp")
        if target and target.is_file():
            others = {key: chosen[key] for key in chosen if key != "filename"}
            projector = projector_of(target)  # as it was put there by the download
            mmproj = {"mmproj": str(projector)} if projector.is_file() else {}
            return {"model": str(target)} | mmproj | others, None
        if not table.hf_repo_id:
            why = f"{target} does not exist, and no hf_repo_id says where it comes from"
            if target is None:
                why = "names no file: gguf_path, or model_root with hf_filename"
            self.errors.append(f"{place}: {why}")
            return {}, None
        wanted = {"model": f"hf:{table.hf_repo_id}"}
        name = table.hf_filename or Path(table.gguf_path or "").name
        if name and not chosen.keys() & {"pattern", "quant"}:
            wanted["filename"] = name
        return {**wanted, **chosen}, target

    def _put_model(self) -> None:
        """Set what vLLM serves."""
        if model := self.profile.vllm.model:
            self.put("model", model, self.place("vllm", "model"))
        elif model := self.profile.model_id:
            self.put("model", model, self.place("model_id"))

    def _target(self, chosen: Mapping[str, str]) -> Path | None:
        """The path of the model's file; None where the profile has none, or `chosen` names another
        one of the repository."""
        table = self.profile.llamacpp
        if table.hf_repo_id and chosen.keys() & {"pattern", "quant", "revision"}:
            return None
        root = beside(self.folder, table.model_root) if table.model_root else None
        file = None if "filename" in chosen else table.gguf_path
        if root and not file:
            file = chosen.get("filename") or table.hf_filename
        return beside(root or self.folder, file) if file else None

    def _gpu_ids(self, environ: Mapping[str, str]) -> str | None:
        """The graphics cards that the server sees."""
        cards = environ.get(CARDS, "").strip()
        self.places["control.gpu_ids"] = CARDS if cards else self.place("gpu", "device_ids")
        if not cards:
            return self.profile.gpu.device_ids
        try:
            return gpu_ids(cards)
        except ValueError as error:
            self.errors.append(f"{CARDS} = {shown(cards)}: {error}")
            return None


def _with_values(table: Any, depth: int = 2) -> Any:
    """A profile and its tables without the keys that have no value."""
    if not isinstance(table, dict) or not depth:
        return table
    return {
        str(key): _with_values(value, depth - 1)
        for key, value in table.items()
        if value is not None and value != ""
    }
