"""Profiles: one server, chosen by its name from a YAML registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError, did_you_mean
from pipeline.serve.server import LLAMA_CPP, VLLM

from . import messages, sources, synonyms, yaml_form
from .configuration import Configuration, wrong_name
from .profile_options import Reading, instance_spec
from .profile_tables import Profile, Registry
from .tables import GatewayTable, Master


def load_profile(
    file: Path,
    name: str,
    environ: Mapping[str, str],
    *,
    variables: Mapping[str, str] | None = None,
    patient: bool = False,
) -> Configuration:
    """The profile `name` of the registry `file`, as a configuration of one instance.

    `environ` may hold overrides. `variables` are those of the command line, in its own names and as
    texts: options (`parallel`, `server.jinja`) and what chooses the file (`OF_MODEL`); it wins over
    all. Raises UsageError that names every error; with `patient` those in values are left in the
    result.
    """
    file = Path(file).absolute()
    if not file.exists():
        there = ", ".join(sources.files(file.parent, ".yaml", ".yml")) or "no YAML file"
        raise UsageError(
            f"{file}: there is no registry of profiles",
            f"in {file.parent} there is {there}; LLM_PROFILES_CONFIG_PATH names the registry",
        )
    read = yaml_form.read(file)
    reading = Reading(label=file.name, name=name, folder=file.parent, read=read)
    profiles = _profiles(reading, read.content)
    if name not in profiles:
        raise UsageError(
            f"{file.name}: there is no profile {name}{did_you_mean(name, list(profiles))}",
            f"it has {', '.join(profiles) or 'none'}",
        )
    if why := wrong_name(name):
        reading.wrong.append(f"{reading.place()}: {why}")
    profile = _validated(reading, profiles[name])
    spec = instance_spec(reading, profile, environ, variables or {})
    if not patient:
        messages.require_none(reading.wrong)
    return Configuration(
        master=Master(),
        gateway=GatewayTable(),
        source=f"profile:{name}",
        folder=file.parent,
        label=file.name,
        specs=(spec,),
        notes=tuple(reading.notes),
        errors=tuple(reading.wrong),
    )


def _profiles(reading: Reading, content: Any) -> dict[str, Any]:
    """The profiles by name. Raises UsageError where the file has none."""
    is_table = isinstance(content, dict)
    if not is_table or "profiles" not in content:
        keys = ", ".join(map(str, content)) if is_table else f"a {type(content).__name__}"
        raise UsageError(f"{reading.label}: has no key profiles", f"it has {keys}")
    profiles = content["profiles"]
    if not isinstance(profiles, dict):
        raise UsageError(f"{reading.label}: profiles: must be a table of profiles by name")
    return {str(name): profile for name, profile in profiles.items()}


def _validated(reading: Reading, table: Any) -> Profile:
    """The profile; its errors go to `reading`. A key without a value is one that is not there."""

    def add_error(path: messages.Path, text: str) -> None:
        reading.wrong.append(f"{reading.place(*path[2:])}{text}")

    registry = messages.validated(
        Registry, {"profiles": {reading.name: _with_values(table or {})}}, lambda _: [], add_error
    )
    profile = registry.profiles.get(reading.name) or Profile()
    for path, table in (((), profile), (("gpu",), profile.gpu)):
        for key in table.__pydantic_extra__ or {}:
            near = _near(key, list(type(table).model_fields), profile.backend)
            reading.notes.append(f"{reading.place(*path, key)}: is not known and not used{near}")
    return profile


def _near(key: str, known: list[str], backend: str) -> str:
    """The key that was meant: of this table, or an option of the engine, which has its own."""
    if near := did_you_mean(key, known):
        return near
    engine = LLAMA_CPP if backend == "llamacpp" else VLLM
    meant = synonyms.option(key.replace("_", "-"), engine) or ""
    return f"; did you mean {backend}.{meant.replace('-', '_')}?" if meant else ""


def _with_values(table: Any, depth: int = 2) -> Any:
    """A profile and its tables without the keys that have no value."""
    if not isinstance(table, dict) or not depth:
        return table
    return {
        str(key): _with_values(value, depth - 1)
        for key, value in table.items()
        if value is not None and value != ""
    }
