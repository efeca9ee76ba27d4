"""An instance of the file adapted to a pod: its host, its key and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from msgspec import Struct, field
from msgspec.structs import replace

from pipeline.models import gguf
from pipeline.models.reference import exists
from pipeline.serve.config.api_keys import NONE, split
from pipeline.serve.config.configuration import Configuration, InstanceSpec, Value, beside
from pipeline.serve.config.options import PATHS
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP, Server

from .workload import DATA, KEY_FILE, MODELS, TEXTS

# Options that name a file: texts go into a ConfigMap, weights onto the claim.
TEXT_OPTIONS = ("chat-template-file", "chat-template", "grammar-file", "json-schema-file")
WEIGHTS = ("model", "mmproj", "model-spec", "spec-spec-model", "lora", "control-vector")
OURS = ("api-key", "api-key-file", "host")
LARGEST = 512 * 1024  # bytes of a text: a ConfigMap holds 1 MiB
EVERYWHERE = "0.0.0.0"  # noqa: S104
IN_CONTAINERS = "/models/"  # where the images of docker/ have them


class AdaptedSpec(Struct, frozen=True, kw_only=True):
    """A spec for a pod. `weights` are files of this machine to be copied to the claim, `key_here`
    its file with the key, where the user named one."""

    spec: InstanceSpec
    texts: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[Path, ...] = ()
    key_here: str = ""
    notes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


def on_claim(path: str) -> str:
    """The path in the pod for one on a container's volume of models; empty for any other."""
    if path.startswith(IN_CONTAINERS):
        return f"{MODELS}/{path.removeprefix(IN_CONTAINERS)}"
    return path if path.startswith(f"{DATA}/") else ""


def is_available(path: Path) -> bool:
    """Whether a file that the configuration names will exist: in the pod, or here to be copied."""
    return bool(on_claim(path.as_posix())) or path.is_file()


def without_programs(configuration: Configuration) -> Configuration:
    """The configuration without this machine's programs: the image has its own."""
    update = {"llama_cpp_path": None, "pixi_project_dir": None, "python": "python3"}
    return replace(configuration, master=configuration.master.model_copy(update=update))


def adapt(spec: InstanceSpec, folder: Path, flags: Mapping[str, Flag]) -> AdaptedSpec:
    """The spec with all values as they are in a pod. `flags` are llama-server's options."""
    options = {name: value for name, value in spec.server.items() if name not in OURS}
    texts: dict[str, str] = {}
    weights: list[Path] = []
    notes, errors = [], []
    for name, value in options.items():
        flag = flags.get(name) if spec.engine == LLAMA_CPP else None
        if not isinstance(value, str):
            continue
        path = beside(folder, value)
        if name.startswith("ssl-"):
            errors.append(spec.line(f"server.{name}", ": TLS is terminated in front of the pods"))
        elif in_pod := on_claim(value):
            options[name] = in_pod
        elif not exists(path):
            if flag and flag.value.startswith(PATHS):
                notes.append(spec.line(f"server.{name}", f" = {value}: taken as a path in the pod"))
        elif name in WEIGHTS:
            options[name] = str(PurePosixPath(MODELS, path.name))
            weights += gguf.shards(path) if path.is_file() else [path]
        elif name in TEXT_OPTIONS:
            options[name] = f"{TEXTS}/{name}"
            try:
                texts[name] = small_text(path)
            except ValueError as error:
                errors.append(spec.line(f"server.{name}", f" = {value}: {error}"))
        elif flag and flag.value.startswith(PATHS):
            errors.append(
                spec.line(f"server.{name}", f" = {value}: is on this machine; no pod has it")
            )
    server = {**_added(spec), **options}
    typed = tuple(name for name in spec.typed if name in server)
    key = str(spec.server.get("api-key-file", ""))
    return AdaptedSpec(
        spec=replace(spec, server=server, typed=typed, download_to=None),
        texts=texts,
        weights=tuple(weights),
        key_here=str(beside(folder, key)) if key else "",
        notes=tuple(notes),
        errors=tuple(errors),
    )


def small_text(path: Path) -> str:
    """A text that fits into a ConfigMap. Raises ValueError."""
    try:
        data = path.read_bytes()
        if len(data) > LARGEST:
            raise ValueError(f"is larger than {LARGEST // 1024} KiB")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read as text: {error}") from None


def _added(spec: InstanceSpec) -> dict[str, Value]:
    """The options of every pod; those of the file win."""
    has_none = split(spec.server.get("api-key")) == [NONE]
    key: dict[str, Value] = {"api-key": NONE} if has_none else {"api-key-file": KEY_FILE}
    if spec.engine != LLAMA_CPP:
        return {"host": EVERYWHERE, **key}
    return {"host": EVERYWHERE, **key, "metrics": True, "cors-origins": "localhost"}


def conflicts(instance: Server, *, scales: bool) -> Iterator[str]:
    """What conflicts with the pod: extra_args, which come last and win, and an autoscaler without
    metrics."""
    if scales and instance.engine == LLAMA_CPP and "--metrics" not in instance.cmd:
        yield f"{instance.name}: metrics = false: the autoscaler of replicas= needs them"
    if instance.host != EVERYWHERE:
        yield f"{instance.name}: --host {instance.host}: no Service could reach it; leave it out"
    if instance.api_key_file not in (None, KEY_FILE):
        yield f"{instance.name}: --api-key-file {instance.api_key_file}: write api_key_file = …"
    if instance.engine == LLAMA_CPP and instance.prefix and instance.api_key_file:
        yield (
            f"{instance.name}: api_prefix: llama-server then requires the key for /health too, "
            "which no probe has; leave it out and let an Ingress rewrite paths"
        )
    if instance.tls:
        yield f"{instance.name}: TLS is terminated in front of the pods"


def unpreparable(model: Mapping[str, str], at: Callable[[str], str]) -> Iterator[str]:
    """What no pod can prepare in a table `model`. `at` is the place of a key in the file."""
    if model.get("quant", "").lower() == "auto":
        yield f"{at('model.quant')} = auto: depends on one machine's memory; name a quant"
    if model.get("draft", "none") != "none":
        why = "no pod prepares a draft; without a model: spec_type in the table server"
        yield f"{at('model.draft')} = {model['draft']}: {why}"
    if model.get("lora", "none") != "none":
        why = "no pod prepares an adapter; without a model: lora in the table server"
        yield f"{at('model.lora')} = {model['lora']}: {why}"
    for name in ("imatrix", "mmproj"):
        if Path(model.get(name, "")).is_absolute():
            yield f"{at(f'model.{name}')} = {model[name]}: is on this machine; no pod has it"
