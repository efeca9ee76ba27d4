"""An instance as the file has it, made to fit a pod: its host, its key and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from pipeline.models import gguf
from pipeline.models.reference import exists
from pipeline.serve.config.api_keys import NONE, split
from pipeline.serve.config.configuration import Configuration, InstanceSpec, Value, beside
from pipeline.serve.config.options import PATHS
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP, Server

from .workload import DATA, KEY_FILE, MODELS, TEXTS

# Options that name a file: texts go into a ConfigMap, weights are on the claim.
TEXT_OPTIONS = ("chat-template-file", "chat-template", "grammar-file", "json-schema-file")
WEIGHTS = ("model", "mmproj", "model-draft", "spec-draft-model", "lora", "control-vector")
OURS = ("api-key", "api-key-file", "host")
LARGEST = 512 * 1024  # bytes of a text: a ConfigMap holds 1 MiB
EVERYWHERE = "0.0.0.0"  # noqa: S104
IN_CONTAINERS = "/models/"  # where those of docker/ have them


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A draft for a pod. `weights` are files of this machine that have to be on the claim, and
    `key_here` is the one that holds the key, where the user named it."""

    draft: InstanceSpec
    texts: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[Path, ...] = ()
    key_here: str = ""
    notes: tuple[str, ...] = ()
    mistakes: tuple[str, ...] = ()


def on_claim(path: str) -> str:
    """A path of a container with a volume of models, as it is in the pod; empty for any other."""
    if path.startswith(IN_CONTAINERS):
        return f"{MODELS}/{path.removeprefix(IN_CONTAINERS)}"
    return path if path.startswith(f"{DATA}/") else ""


def is_there(path: Path) -> bool:
    """What a configuration's check asks of the files that it names."""
    return bool(on_claim(path.as_posix())) or path.is_file()


def without_programs(configuration: Configuration) -> Configuration:
    """The same without what starts programs on this machine: the image has its own."""
    update = {"llama_cpp_path": None, "pixi_project_dir": None, "python": "python3"}
    return replace(configuration, master=configuration.master.model_copy(update=update))


def fitted(draft: InstanceSpec, folder: Path, flags: Mapping[str, Flag]) -> Fitted:
    """The draft with everything as it is in a pod. `flags` are those of llama-server."""
    told = {name: value for name, value in draft.server.items() if name not in OURS}
    texts: dict[str, str] = {}
    weights: list[Path] = []
    notes, mistakes = [], []
    for name, value in told.items():
        flag = flags.get(name) if draft.engine == LLAMA_CPP else None
        if not isinstance(value, str):
            continue
        path = beside(folder, value)
        if name.startswith("ssl-"):
            mistakes.append(draft.tell(f"server.{name}", ": TLS ends in front of the pods"))
        elif there := on_claim(value):
            told[name] = there
        elif not exists(path):
            if flag and flag.value.startswith(PATHS):
                notes.append(draft.tell(f"server.{name}", f" = {value}: is a path in the pod"))
        elif name in WEIGHTS:
            told[name] = str(PurePosixPath(MODELS, path.name))
            weights += gguf.shards(path) if path.is_file() else [path]
        elif name in TEXT_OPTIONS:
            told[name] = f"{TEXTS}/{name}"
            try:
                texts[name] = small_text(path)
            except ValueError as why:
                mistakes.append(draft.tell(f"server.{name}", f" = {value}: {why}"))
        elif flag and flag.value.startswith(PATHS):
            mistakes.append(
                draft.tell(f"server.{name}", f" = {value}: is of this machine, no pod has it")
            )
    server = {**_added(draft), **told}
    typed = tuple(name for name in draft.typed if name in server)
    key = str(draft.server.get("api-key-file", ""))
    return Fitted(
        draft=replace(draft, server=server, typed=typed, download_to=None),
        texts=texts,
        weights=tuple(weights),
        key_here=str(beside(folder, key)) if key else "",
        notes=tuple(notes),
        mistakes=tuple(mistakes),
    )


def small_text(path: Path) -> str:
    """What a ConfigMap takes. Raises ValueError."""
    try:
        data = path.read_bytes()
        if len(data) > LARGEST:
            raise ValueError(f"has more than {LARGEST // 1024} KiB")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read as a text: {error}") from None


def _added(draft: InstanceSpec) -> dict[str, Value]:
    """What every pod has, before what the file says."""
    has_none = split(draft.server.get("api-key")) == [NONE]
    key: dict[str, Value] = {"api-key": NONE} if has_none else {"api-key-file": KEY_FILE}
    if draft.engine != LLAMA_CPP:
        return {"host": EVERYWHERE, **key}
    return {"host": EVERYWHERE, **key, "metrics": True, "cors-origins": "localhost"}


def misled(instance: Server, *, scales: bool) -> Iterator[str]:
    """What the file says against the pod: extra_args, which come last and win, and an autoscaler
    without metrics."""
    if scales and instance.engine == LLAMA_CPP and "--metrics" not in instance.cmd:
        yield f"{instance.name}: metrics = false: the autoscaler of replicas= looks at them"
    if instance.host != EVERYWHERE:
        yield f"{instance.name}: --host {instance.host}: no Service could reach it; leave it out"
    if instance.api_key_file not in (None, KEY_FILE):
        yield f"{instance.name}: --api-key-file {instance.api_key_file}: write api_key_file = …"
    if instance.engine == LLAMA_CPP and instance.prefix and instance.api_key_file:
        yield (
            f"{instance.name}: api_prefix: llama-server then wants the key for /health too, which "
            "no probe has; leave it out, an Ingress rewrites paths"
        )
    if instance.tls:
        yield f"{instance.name}: TLS ends in front of the pods"


def not_made_there(model: Mapping[str, str], at: Callable[[str], str]) -> Iterator[str]:
    """What of a model table no pod can prepare. `at` tells the place of a key."""
    if model.get("quant", "").lower() == "auto":
        yield f"{at('model.quant')} = auto: is decided by the memory of one machine; name a quant"
    for name in ("imatrix", "mmproj"):
        if Path(model.get(name, "")).is_absolute():
            yield f"{at(f'model.{name}')} = {model[name]}: is of this machine, no pod has it"
