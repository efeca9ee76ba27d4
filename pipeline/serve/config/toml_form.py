"""Files of instances: TOML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import did_you_mean
from pipeline.core.pins import pins
from pipeline.models.address import is_address
from pipeline.models.reference import HUB, WITHOUT_DRAFT, exists, split_scale
from pipeline.serve.server import Control

from . import messages, sources
from .configuration import Configuration, InstanceSpec, Value, alike, beside, wrong_name
from .messages import dotted
from .tables import MODELS, Instances, InstancesFile, InstanceTable, ModelTable, ServerTable, keys

Tables = dict[str, Any]


def load(
    file: Path,
    *,
    engine: str = "",
    overrides: str = "",
    where: str = "",
    patient: bool = False,
    stored: Callable[[Tables], Tables] = lambda tables: {},
) -> Configuration:
    """The instances that `file` asks for.

    `engine` is that of instances which name none. `overrides` is the text of a JSON object that is
    merged over the file, `where` the name of the variable that held it. Raises UsageError that
    names every error; with `patient` they are left in the result, for `check` to raise with its
    own, and only a file that cannot be read raises. `stored` gives the tables of the instances that
    `instances = "models"` stands for.
    """
    file = Path(file).absolute()
    where = where or "overrides"
    wrong: list[str] = []
    over = _spelled(sources.overrides(overrides, where), where, wrong)
    tables = _spelled(sources.toml(file), file.name, wrong)
    wrong += [f"{where}: {why}" for why in _without_effect(tables, over)]
    tables = sources.merged(tables, over)

    def place(path: messages.Path) -> str:
        """`models.toml: instance.chat`, or the variable that gave it."""
        return f"{where if sources.holds(over, path) else file.name}: {dotted(path)}"

    def add_error(path: messages.Path, text: str) -> None:
        wrong.append(f"{place(path)}{text}")

    if engine:
        tables = sources.merged({"instance": {"control": {"engine": engine}}}, tables)
    master = tables.get("master")
    if isinstance(master, dict) and master.get("instances") == MODELS:
        tables = sources.merged({"instance": stored(tables)}, tables)
    read = messages.validated(InstancesFile, tables, keys, add_error)
    section = read.instance
    instances = section.__pydantic_extra__ or {}
    for name in instances:
        if why := wrong_name(name):
            add_error(("instance", name), f": {why}")
    for name, other in alike(instances):
        add_error(("instance", other), f": differs from {name} only in letter case; rename one")
    if not instances and read.master.enable and not wrong:
        wrong.append(f"{file.name}: names no instance; add a table such as [instance.chat.server]")
    if not patient:
        messages.require_none(wrong)
    gateway = read.gateway
    if gateway.api_key_file:
        keyed = str(beside(file.parent, gateway.api_key_file))
        gateway = gateway.model_copy(update={"api_key_file": keyed})
    return Configuration(
        source=str(file),
        folder=file.parent,
        label=file.name,
        master=read.master,
        gateway=gateway,
        gateway_places={key: place(("gateway", key)) for key in gateway.model_fields_set},
        specs=tuple(
            _spec(file.parent, name, section, table, place) for name, table in instances.items()
        ),
        notes=tuple(
            f"{place(('instance', name, 'model', 'ref'))}: taken as a path, for it exists"
            for name, table in instances.items()
            if table.model and HUB.fullmatch(ref := table.model.ref) and exists(file.parent / ref)
        ),
        errors=tuple(wrong),
    )


def _without_effect(tables: dict[str, Any], over: dict[str, Any]) -> Iterator[str]:
    """What overrides say of instances that the file has not, which are taken out of them, and keys
    that they take away and that look like others of the file."""
    there, changed = tables.get("instance"), over.get("instance")
    if isinstance(there, dict) and isinstance(changed, dict):
        instances = [name for name in there if name not in ("control", "server")]
        for name in [name for name in changed if name not in (*there, "control", "server")]:
            del changed[name]
            near = did_you_mean(name, list(there)) or f"; it has {', '.join(instances) or 'none'}"
            yield f"{dotted(('instance', name))}: the file has no such instance{near}"
    for path, others in sources.nothing_to_take(tables, over):
        if near := did_you_mean(str(path[-1]), others):
            yield f"{dotted(path)} = null: there is no such key{near}"


def _spelled(tables: dict[str, Any], label: str, wrong: list[str]) -> dict[str, Any]:
    """Names of options may be written with `_` or `-`: from here on with `_`."""
    section = tables.get("instance")
    if not isinstance(section, dict):
        return tables

    def spelled(options: Any, path: messages.Path) -> Any:
        if not isinstance(options, dict):
            return options
        result: dict[str, Any] = {}
        for key, value in options.items():
            name, dot, rest = key.partition(".")  # what follows a dot is a key of vLLM's JSON
            name = name.replace("-", "_") + dot + rest
            if name in result:
                wrong.append(f"{label}: {dotted((*path, key))}: is given twice, with _ and with -")
            result[name] = value
        return result

    result = {}
    for name, table in section.items():
        if name == "server":
            table = spelled(table, ("instance", "server"))
        elif isinstance(table, dict) and "server" in table:
            table = {**table, "server": spelled(table["server"], ("instance", name, "server"))}
        result[name] = table
    return {**tables, "instance": result}


def _spec(
    folder: Path,
    name: str,
    section: Instances,
    table: InstanceTable,
    place: Callable[[messages.Path], str],
) -> InstanceSpec:
    """The tables of one instance, laid over the defaults key by key."""
    places: dict[str, str] = {}
    control: dict[str, Any] = {}
    server: dict[str, Any] = {}
    for path, layer in ((("instance",), section), (("instance", name), table)):
        for key in layer.control.model_fields_set:
            value = getattr(layer.control, key)
            control[key] = control.get(key, {}) | value if key == "env" else value
            if isinstance(value, list):
                control[key] = tuple(value)
            places[f"control.{key}"] = place((*path, "control", key))
        for key, value in _options(layer.server).items():
            server[key] = value
            places[f"server.{option(key)}"] = place((*path, "server", key))
    extra = server.pop("extra_args", ())
    return InstanceSpec(
        name=name,
        control=Control(**control),
        server={option(key): value for key, value in server.items()},
        extra_args=tuple(extra),
        model=variables(table.model, folder) if table.model else {},
        place=place(("instance", name)),
        places=places,
    )


def option(key: str) -> str:
    """The option that a key means, without its dashes."""
    name, dot, rest = key.partition(".")
    return name.replace("_", "-") + dot + rest


def _options(server: ServerTable) -> dict[str, Value]:
    options: dict[str, Value] = dict(server.__pydantic_extra__ or {})
    if server.extra_args is not None:
        options["extra_args"] = [*server.extra_args]
    return options


def variables(model: ModelTable, folder: Path) -> dict[str, str]:
    """The variables of `prepare` that a model table means, with absolute paths: what is relative
    starts at `folder`, and never where the user happens to be."""
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
    if values.get("mmproj", "none") != "none" and _is_path(values["mmproj"], folder, ""):
        values["mmproj"] = str(beside(folder, values["mmproj"]))
    return values


def _adapter(text: str, folder: Path) -> str:
    """An adapter's reference that means the same wherever the user is, with its scale."""
    name = split_scale(text)[0]
    return text if text == "none" else _reference(name, folder) + text.removeprefix(name)


def _reference(text: str, folder: Path) -> str:
    """A reference that means the same wherever the user is."""
    if text not in pins().demos and _is_path(text, folder):
        return str(beside(folder, text))
    return f"hf:{text}" if not text.startswith("hf:") and HUB.fullmatch(text) else text


def _is_path(text: str, folder: Path, suffix: str = ".gguf") -> bool:
    """Whether it exists, or can be nothing but a path."""
    looks = text.startswith(("./", "../", "~", ".\\", "..\\"))
    if exists(folder / text):
        return True
    is_hub = text.startswith("hf:") or is_address(text)
    return looks or bool(suffix and text.endswith(suffix) and not is_hub)
