"""One instance as it will run in a cluster: the input for its manifests."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping

from msgspec import Struct, field

from pipeline.core.text import plural
from pipeline.serve.server import LLAMA_CPP, Server

LONGEST = 40  # of our names: suffixes (`-api-key`, a pod's own) have to fit into 63

# Paths in the pod. The claim is LLAMA_PIPELINE_HOME there, with models, receipts and caches.
DATA = "/data"
MODELS = f"{DATA}/models"
TEXTS = "/etc/llama/files"
KEYS, KEY = "/etc/llama/key", "api-key"
KEY_FILE = f"{KEYS}/{KEY}"

SLOTS = 4  # llama-server's without --parallel
SEQUENCES = 256  # vLLM's without --max-num-seqs


class Workload(Struct, frozen=True, kw_only=True):
    """`instance` has the paths and the host of the pod. Sizes in bytes; 0: unknown."""

    instance: Server
    part_of: str  # the configuration, as a name
    prepare: Mapping[str, str] = field(
        default_factory=dict
    )  # variables of `prepare`; empty: nothing to do
    converts: bool = False  # preparing is more than a download
    texts: Mapping[str, str] = field(
        default_factory=dict
    )  # small files, by the option that names them
    env: Mapping[str, str] = field(default_factory=dict)  # from the file
    gpus: int = 0
    slots: int = SLOTS  # concurrent requests
    threads: int = 0  # 0: not set
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
        """The labels of every object, which selectors match: these never change."""
        program = "llama-server" if self.is_llama else "vllm"
        return {"app.kubernetes.io/name": program, "app.kubernetes.io/instance": self.name}

    @property
    def all_labels(self) -> dict[str, str]:
        return {**self.labels, "app.kubernetes.io/part-of": self.part_of}


def gpus(gpu_ids: str | None, default: int | None) -> tuple[int, str]:
    """How many GPUs an instance gets, and a note for the user.

    `default` is for instances whose gpu_ids give no number.
    """
    if gpu_ids == "none":
        return 0, ""
    if gpu_ids in (None, "all"):
        if default is not None:
            return default, ""
        problem = "is not set" if gpu_ids is None else 'is "all"'
        return 1, f"gpu_ids {problem}: one GPU is requested; set gpus=N, or gpus=0 for none"
    count = len(str(gpu_ids).split(","))
    return count, (
        f"gpu_ids = {gpu_ids}: {plural(count, 'GPU')} requested; the device plugin chooses which, "
        "and numbers them anew"
    )


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
