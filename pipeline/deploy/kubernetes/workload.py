"""An instance of the file as it will run in a cluster: adapted to a pod, and the input for its
manifests."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.environment import is_credential
from pipeline.core.text import plural
from pipeline.models import gguf
from pipeline.models.reference import exists
from pipeline.serve.config.api_keys import NONE, split
from pipeline.serve.config.configuration import Configuration, InstanceSpec, Value, beside
from pipeline.serve.config.options import LISTS, PATHS, with_paths
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP, STRICT, Server

LONGEST = 40  # of our names: suffixes (`-api-key`, a pod's own) have to fit into 63

# Paths in the pod. The claim is LLAMA_PIPELINE_HOME there, with models, receipts and caches.
DATA = "/data"
MODELS = f"{DATA}/models"
TEXTS = "/etc/llama/files"
KEYS, KEY = "/etc/llama/key", "api-key"
KEY_FILE = f"{KEYS}/{KEY}"

SLOTS = 4  # llama-server's without --parallel
SEQUENCES = 256  # vLLM's without --max-num-seqs

# Options that name a file: texts go into a ConfigMap, weights onto the claim.
TEXT_OPTIONS = ("chat-template-file", "chat-template", "grammar-file", "json-schema-file")
WEIGHTS = ("model", "mmproj", "model-draft", "spec-draft-model", *LISTS)
OURS = ("api-key", "api-key-file", "host")
LARGEST = 512 * 1024  # bytes of a text: a ConfigMap holds 1 MiB
EVERYWHERE = "0.0.0.0"  # noqa: S104
IN_CONTAINERS = "/models/"  # where the images of docker/ have them


class Workload(Struct, frozen=True, kw_only=True):
    """`instance` has the paths and the host of the pod. Sizes in bytes; 0: unknown."""

    instance: Server
    part_of: str  # the configuration, as a name
    prepare: Mapping[str, str] = {}  # variables of `prepare`; empty: nothing to do
    converts: bool = False  # preparing is more than a download
    texts: Mapping[str, str] = {}  # small files, by the option that names them
    env: Mapping[str, str] = {}  # from the file
    gpus: int = 0
    slots: int = SLOTS  # concurrent requests
    threads: int = 0  # 0: not set
    memory: int = 0  # of the model and its context
    disk: int = 0  # of the claim, at the peak
    key_here: str = ""  # the file of this machine that holds the key, where the user named one
    replicas: tuple[int, int] = (1, 1)  # the least and the most; equal: no autoscaler
    uses_keda: bool = False  # as the autoscaler, in the place of Kubernetes' own
    idle_seconds: int = 0  # without a request until no pod is left; 0: not set
    model_image: str = ""  # with llama-server's model; empty: it is on the claim

    @property
    def scales(self) -> bool:
        return self.replicas[0] < self.replicas[1]

    @property
    def may_be_several(self) -> bool:
        return self.replicas[1] > 1

    @property
    def has_claim(self) -> bool:
        return not self.model_image

    @property
    def model_files(self) -> list[str]:
        """The files and folders of models that its options name, relative to their folder."""
        words = [part for word in self.instance.cmd for part in word.split(",")]
        start = f"{MODELS}/"
        return list(dict.fromkeys(w.removeprefix(start) for w in words if w.startswith(start)))

    @property
    def name(self) -> str:
        return kubernetes_name(self.instance.name)

    @property
    def is_llama(self) -> bool:
        return self.instance.engine == LLAMA_CPP

    @property
    def has_key(self) -> bool:
        return self.instance.api_key_file is not None

    @property
    def claim(self) -> str:
        return f"{self.name}-models"

    @property
    def files(self) -> str:
        return f"{self.name}-files"

    @property
    def secret(self) -> str:
        return secret_of(self.name)

    @property
    def labels(self) -> dict[str, str]:
        """The labels of every object, which selectors match: these never change."""
        program = "llama-server" if self.is_llama else "vllm"
        return {"app.kubernetes.io/name": program, "app.kubernetes.io/instance": self.name}

    @property
    def all_labels(self) -> dict[str, str]:
        return {**self.labels, "app.kubernetes.io/part-of": self.part_of}


def gpus(gpu_ids: str | None, default: int | None, parts: int = 1) -> tuple[int, str]:
    """The GPUs of an instance, and a note; `default` is for one whose gpu_ids give no number, else
    that of the `parts` of its model."""
    if gpu_ids == "none":
        return 0, ""
    if gpu_ids in (None, "all"):
        if default is not None:
            return default, ""
        problem = "is not set" if gpu_ids is None else 'is "all"'
        number = "one GPU is" if parts == 1 else f"{parts} GPUs are"
        return parts, f"gpu_ids {problem}: {number} requested; set gpus=N, or gpus=0 for none"
    count = len(str(gpu_ids).split(","))
    return count, (
        f"gpu_ids = {gpu_ids}: {plural(count, 'GPU')} requested; the device plugin chooses which, "
        "and numbers them anew"
    )


def secret_of(name: str) -> str:
    """The Secret with the key of what has this name."""
    return f"{name}-api-key"


def kubernetes_name(text: str) -> str:
    """`text` as a name for objects, label values and hosts (RFC 1035, so also RFC 1123).

    Texts that differ in more than letter case get different names: where characters are lost, a
    hash of the text is added.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain)[:LONGEST].strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}".strip("-")
    if name == text.lower():
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{name[: LONGEST - 7].rstrip('-')}-{digest}"


# An instance of the file, adapted to a pod


class AdaptedSpec(Struct, kw_only=True):
    """A spec for a pod."""

    spec: InstanceSpec
    folder: Path  # where relative paths start
    flags: Mapping[str, Flag] = {}  # llama-server's, for one of its own
    texts: dict[str, str] = {}  # by option
    weights: list[Path] = []  # files of this machine to be copied to the claim
    key_here: str = ""  # the file with the key, where the user named one
    notes: list[str] = []
    errors: list[str] = []

    def in_pod(self, name: str, text: str) -> str:
        """The path in the pod for a path of an option; a text that is not a path stays as it is."""
        path = beside(self.folder, text)
        takes_path = name in self.flags and self.flags[name].value.startswith(PATHS)
        if path_in_pod := on_claim(text):
            return path_in_pod
        if not exists(path):
            if takes_path:
                self._add(self.notes, name, f" = {text}: taken as a path in the pod")
        elif name in WEIGHTS:
            if any(path != other and path.name == other.name for other in self.weights):
                why = "another file of this name is copied to the claim; rename one"
                self._add(self.errors, name, f" = {text}: {why}")
            files = gguf.shards(path) if path.is_file() else [path]
            self.weights += [file for file in files if file not in self.weights]
            return str(PurePosixPath(MODELS, path.name))
        elif name in TEXT_OPTIONS:
            try:
                self.texts[name] = small_text(path)
            except ValueError as error:
                self._add(self.errors, name, f" = {text}: {error}")
            return f"{TEXTS}/{name}"
        elif takes_path:
            self._add(self.errors, name, f" = {text}: is on this machine; no pod has it")
        return text

    def _add(self, lines: list[str], name: str, why: str) -> None:
        lines.append(self.spec.line(f"server.{name}", why))


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
    adapted = AdaptedSpec(spec=spec, folder=folder, flags=flags if spec.engine == LLAMA_CPP else {})
    server = _added(spec)
    for name, value in spec.server.items():
        if name.startswith("ssl-") and value is not False:
            why = ": TLS is terminated in front of the pods"
            adapted.errors.append(spec.line(f"server.{name}", why))
        elif name not in OURS:
            server[name] = with_paths(name, value, partial(adapted.in_pod, name))
    if spec.control.sandbox == STRICT:
        why = " = strict: a pod confines its server by its securityContext alone; leave it out"
        adapted.errors.append(spec.line("control.sandbox", why))
    for name, text in spec.control.env.items():
        if is_credential(name, text):
            why = f"{name} can be read in the manifest; a patch can take it from a Secret instead"
            adapted.notes.append("warning: " + spec.line("control.env", f": {why}"))
    if spec.server.get("api-key") and split(spec.server["api-key"]) != [NONE]:
        why = f": is not copied; put it into the Secret {secret_of(kubernetes_name(spec.name))}"
        adapted.notes.append(spec.line("server.api-key", why))
    if key := str(spec.server.get("api-key-file", "")):
        adapted.key_here = str(beside(folder, key))
    typed = tuple(name for name in spec.typed if name in server)
    adapted.spec = replace(spec, server=server, typed=typed, download_to=None)
    return adapted


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


def conflicts(workload: Workload) -> Iterator[str]:
    """What conflicts with the pod: extra_args, which come last and win, an autoscaler that cannot
    do what it should, and an image that holds nothing."""
    instance, least = workload.instance, workload.replicas[0]
    by_metrics = workload.scales and not workload.uses_keda
    if not least and not workload.uses_keda:
        yield f"{instance.name}: replicas from 0: an HPA keeps one pod; use autoscaler=keda"
    if workload.model_image and not workload.model_files:
        yield f"{instance.name}: model_image=: no option names a file in /models"
    if by_metrics and least and instance.engine == LLAMA_CPP and "--metrics" not in instance.cmd:
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
    if (quant := model.get("quant", "").lower()) in ("auto", "fit"):
        yield f"{at('model.quant')} = {quant}: depends on one machine's memory; name a quant"
    if model.get("draft", "none") != "none":
        why = "no pod prepares a draft; without a model: spec_type in the table server"
        yield f"{at('model.draft')} = {model['draft']}: {why}"
    if model.get("lora", "none") != "none":
        why = "no pod prepares an adapter; without a model: lora in the table server"
        yield f"{at('model.lora')} = {model['lora']}: {why}"
    for name in ("imatrix", "mmproj"):
        if Path(model.get(name, "")).is_absolute():
            yield f"{at(f'model.{name}')} = {model[name]}: is on this machine; no pod has it"
