"""One instance as it will run in a cluster: all that its manifests are made from."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.serve.server import LLAMA_CPP, Server

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
LONGEST = 40  # of a name here: what is added (`-api-key`, a pod's own letters) has to fit in 63

# In the pod. The claim is the home of llama-pipeline there: models, notes and caches.
DATA = "/data"
MODELS = f"{DATA}/models"
TEXTS = "/etc/llama/files"
KEYS, KEY = "/etc/llama/key", "api-key"
KEY_FILE = f"{KEYS}/{KEY}"

SLOTS = 4  # that llama-server has where --parallel is left out
SEQUENCES = 256  # the same of vLLM and --max-num-seqs


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`instance` has the paths and the host of the pod. Sizes in bytes; 0: not known."""

    instance: Server
    part_of: str  # the configuration, as a name
    prepare: Mapping[str, str] = field(default_factory=dict)  # variables; empty: nothing to do
    converts: bool = False  # preparing means more than a download
    texts: Mapping[str, str] = field(
        default_factory=dict
    )  # small files, by the option that names them
    env: Mapping[str, str] = field(default_factory=dict)  # that the file gives it
    gpus: int = 0
    slots: int = SLOTS  # requests at once
    threads: int = 0  # 0: not said
    memory: int = 0  # of the model and its context
    disk: int = 0  # of the claim, at the peak
    key_here: str = ""  # the file of this machine that holds the key, where the user named one

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
        return f"{self.name}-api-key"

    @property
    def labels(self) -> dict[str, str]:
        """Of everything, and what a selector asks for: these never change."""
        program = "llama-server" if self.is_llama else "vllm"
        return {"app.kubernetes.io/name": program, "app.kubernetes.io/instance": self.name}

    @property
    def all_labels(self) -> dict[str, str]:
        return {**self.labels, "app.kubernetes.io/part-of": self.part_of}


def cards(gpu_ids: str | None, asked: int | None) -> tuple[int, str]:
    """How many GPUs an instance gets, and what should be said of it.

    `asked` is for those that name no number of them.
    """
    if gpu_ids == "none":
        return 0, ""
    if gpu_ids in (None, "all"):
        if asked is not None:
            return asked, ""
        told = "is not given" if gpu_ids is None else 'is "all"'
        return 1, f"gpu_ids {told}: one GPU is asked for; gpus=… says how many, gpus=0 none"
    count = len(str(gpu_ids).split(","))
    return count, (
        f"gpu_ids = {gpu_ids}: {count} of the cluster's GPUs {'are' if count > 1 else 'is'} asked "
        "for; which ones the device plugin decides, and numbers them anew"
    )


def kubernetes_name(text: str) -> str:
    """`text` as a name of an object, a label's value and a host: RFC 1035, which holds RFC 1123.

    Two texts that differ in more than letter case get two names: one that loses something gets a
    hash of what it was.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    found = re.sub(r"[^a-z0-9]+", "-", plain)[:LONGEST].strip("-")
    if not found[:1].isalpha():
        found = f"model-{found}".strip("-")
    if found == text.lower():
        return found
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{found[: LONGEST - 7].rstrip('-')}-{digest}"
