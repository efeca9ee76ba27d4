"""Files of instances: TOML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import did_you_mean
from pipeline.core.pins import pins
from pipeline.models.reference import HUB, WITHOUT_DRAFT, exists, is_address, split_scale
from pipeline.serve.server import Control

from . import messages, sources
from .configuration import Configuration, InstanceSpec, Value, beside, wrong_name
from .messages import Keys, dotted
from .tables import MODELS, Instances, InstancesFile, InstanceTable, ModelTable

Tables = dict[str, Any]


def load(
    file: Path,
    *,
    engine: str = "",
    overrides: str = "",
    where: str = "overrides",
    stored: Callable[[Tables], Tables] = lambda tables: {},
) -> Configuration:
    """The instances that `file` asks for.

    `engine` is that of instances which name none. `overrides` is the text of a JSON object that is
    merged over the file, `where` the name of the variable that held it. `stored` gives the tables
    of the instances that `instances = "models"` stands for. Raises UsageError where a text cannot
    be read; all other errors are left in the result, for `checks.check` to raise with its own.
    """
    file = Path(file).absolute()
    errors: list[str] = []
    over = _with_underscores(sources.overrides(overrides, where), where, errors)
    tables = _with_underscores(sources.toml(file), file.name, errors)
    errors += [f"{where}: {why}" for why in _without_effect(tables, over)]
    tables = sources.merged(tables, over)

    def place(path: Keys) -> str:
        """`models.toml: instance.chat`, or the variable that gave it."""
        return f"{where if sources.holds(over, path) else file.name}: {dotted(path)}"

    def add_error(path: Keys, text: str) -> None:
        errors.append(f"{place(path)}{text}")

    if engine:
        tables = sources.merged({"instance": {"control": {"engine": engine}}}, tables)
    master = tables.get("master")
    if isinstance(master, dict) and master.get("instances") == MODELS:
        tables = sources.merged({"instance": stored(tables)}, tables)
    read = messages.validated(InstancesFile, tables, add_error)
    instances = read.instance.__pydantic_extra__ or {}
    spellings: dict[str, str] = {}
    for name in instances:
        if why := wrong_name(name):
            add_error(("instance", name), f": {why}")
        other = spellings.setdefault(name.casefold(), name)
        if other != name:
            add_error(("instance", name), f": differs from {other} only in letter case; rename one")
    can_pull = read.master.instances == MODELS and read.gateway.enable and read.gateway.pull
    if not instances and read.master.enable and not errors and not can_pull:
        errors.append(f"{file.name}: names no instance; add a table such as [instance.chat.server]")
    gateway = read.gateway
    if gateway.api_key_file:
        key_file = str(beside(file.parent, gateway.api_key_file))
        gateway = gateway.model_copy(update={"api_key_file": key_file})
    return Configuration(
        folder=file.parent,
        label=file.name,
        master=read.master,
        gateway=gateway,
        gateway_places={key: place(("gateway", key)) for key in gateway.model_fields_set},
        specs=tuple(
            _spec(file.parent, name, read.instance, table, place)
            for name, table in instances.items()
        ),
        notes=tuple(
            f"{place(('instance', name, 'model', 'ref'))}: taken as a path, for it exists"
            for name, table in instances.items()
            if table.model and HUB.fullmatch(ref := table.model.ref) and exists(file.parent / ref)
        ),
        errors=tuple(errors),
    )


def _without_effect(tables: Tables, over: Tables) -> Iterator[str]:
    """What is wrong with overrides that change nothing: instances that the file does not have,
    which are taken out of `over`, nulls for keys that look like others of the file, and nulls of an
    instance for what is a default of all."""
    there, changed = tables.get("instance"), over.get("instance")
    if isinstance(there, dict) and isinstance(changed, dict):
        instances = [name for name in there if name not in ("control", "server")]
        for name in [name for name in changed if name not in (*there, "control", "server")]:
            del changed[name]
            near = did_you_mean(name, list(there)) or f"; it has {', '.join(instances) or 'none'}"
            yield f"{dotted(('instance', name))}: the file has no such instance{near}"
    for path, others in sources.unused_nulls(tables, over):
        default = ("instance", *path[2:])
        is_in_instance = path[0] == "instance" and path[2:3] in (("control",), ("server",))
        if is_in_instance and sources.holds(sources.merged(tables, over), default):
            why = f"{dotted(default)} holds it, for all; take it away there, or write another value"
            yield f"{dotted(path)} = null: {why}"
        elif near := did_you_mean(path[-1], others):
            yield f"{dotted(path)} = null: there is no such key{near}"


def _with_underscores(tables: Tables, label: str, errors: list[str]) -> Tables:
    """The same tables with `_` in the names of options, which may be written with `_` or `-`."""
    section = tables.get("instance")
    if not isinstance(section, dict):
        return tables

    def renamed(options: Any, path: Keys) -> Any:
        if not isinstance(options, dict):
            return options
        result: Tables = {}
        for key, value in options.items():
            name = _respelled(key, "-", "_")
            if name in result:
                errors.append(f"{label}: {dotted((*path, key))}: is given twice, with _ and with -")
            result[name] = value
        return result

    result = {}
    for name, table in section.items():
        if name == "server":
            table = renamed(table, ("instance", "server"))
        elif isinstance(table, dict) and "server" in table:
            table = {**table, "server": renamed(table["server"], ("instance", name, "server"))}
        result[name] = table
    return {**tables, "instance": result}


def _respelled(key: str, old: str, new: str) -> str:
    """The name of an option with `new` for `old`; what follows a dot is a key of vLLM's JSON."""
    name, dot, rest = key.partition(".")
    return name.replace(old, new) + dot + rest


def option(key: str) -> str:
    """The option that a key means, without its dashes."""
    return _respelled(key, "_", "-")


def _spec(
    folder: Path,
    name: str,
    defaults: Instances,
    table: InstanceTable,
    place: Callable[[Keys], str],
) -> InstanceSpec:
    """The tables of one instance, laid over the defaults key by key."""
    places: dict[str, str] = {}
    control: dict[str, Any] = {}
    server: dict[str, Value] = {}
    extra_args: list[str] = []
    for path, layer in ((("instance",), defaults), (("instance", name), table)):
        for key in layer.control.model_fields_set:
            value = getattr(layer.control, key)
            control[key] = control.get(key, {}) | value if key == "env" else value
            if isinstance(value, list):
                control[key] = tuple(value)
            places[f"control.{key}"] = place((*path, "control", key))
        for key, value in (layer.server.__pydantic_extra__ or {}).items():
            server.pop(option(key), None)  # under several names of an option, the last one counts
            server[option(key)] = value
            places[f"server.{option(key)}"] = place((*path, "server", key))
        if layer.server.extra_args is not None:
            extra_args = layer.server.extra_args
            places["server.extra-args"] = place((*path, "server", "extra_args"))
    return InstanceSpec(
        name=name,
        control=Control(**control),
        server=server,
        extra_args=tuple(extra_args),
        model=_variables(table.model, folder) if table.model else {},
        place=place(("instance", name)),
        places=places,
    )


def _variables(model: ModelTable, folder: Path) -> dict[str, str]:
    """The variables of `prepare` for a model table, with absolute paths: relative ones start at
    `folder`, and never in the user's working directory."""
    values = model.model_dump(exclude_none=True)
    values["model"] = _reference(values.pop("ref"), folder)
    if values.get("draft", "none") not in ("none", *WITHOUT_DRAFT):
        values["draft"] = _reference(values["draft"], folder)
    if "lora" in values:
        values["lora"] = ",".join(_adapter(text, folder) for text in values["lora"])
    if "keep_f16" in values:
        values["keep_f16"] = "1" if values["keep_f16"] else "0"
    if "imatrix" in values:
        values["imatrix"] = str(beside(folder, values["imatrix"]))
    is_local = Path(values["model"]).is_absolute()  # else it may be a name in the repository
    mmproj = values.get("mmproj", "none")
    if mmproj != "none" and (is_local or _is_path(mmproj, folder, "")):
        values["mmproj"] = str(beside(folder, mmproj))
    return values


def _adapter(text: str, folder: Path) -> str:
    """An adapter's reference, made independent of the working directory, with its scale."""
    name = split_scale(text)[0]
    return text if text == "none" else _reference(name, folder) + text.removeprefix(name)


def _reference(text: str, folder: Path) -> str:
    """A model reference, made independent of the working directory."""
    if text not in pins().demos and _is_path(text, folder):
        return str(beside(folder, text))
    return f"hf:{text}" if not text.startswith("hf:") and HUB.fullmatch(text) else text


def _is_path(text: str, folder: Path, suffix: str = ".gguf") -> bool:
    """Whether the text means a path: it exists, or looks like one."""
    if exists(folder / text) or text.startswith(("./", "../", "~", ".\\", "..\\")):
        return True
    is_hub = text.startswith("hf:") or is_address(text)
    return bool(suffix and text.endswith(suffix) and not is_hub)
