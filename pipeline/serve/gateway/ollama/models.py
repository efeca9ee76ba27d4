"""What Ollama's clients learn of a model: its file's header, size and digest."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from pipeline.core.errors import PipelineError
from pipeline.core.store import receipts
from pipeline.models import gguf
from pipeline.models.chat_template import OVERRIDES
from pipeline.models.gguf_format import TEMPLATE
from pipeline.serve.gateway.answers import utc
from pipeline.serve.gateway.servers import CHAT, EMBEDDING, Target
from pipeline.serve.gateway.upstream import context_of
from pipeline.serve.server import LLAMA_CPP, Server
from pipeline.serve.supervisor import usage
from pipeline.serve.supervisor.usage import ServerUse

NEVER = "2318-01-01T00:00:00Z"  # when a model is unloaded that stays: as Ollama says it
# What a chat template uses for tools, and for a model that thinks.
TOOLS = re.compile(r"\btools\b")
THINKS = re.compile(r"enable_thinking|reasoning_content|reasoning_effort|<think>")
# The token before the text to insert into, by its id or one of the texts that llama.cpp knows.
INSERT_IDS = ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")
INSERT_TOKENS = {
    text.encode()
    for text in (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    )
}


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What a model's files say. `size` in bytes; `values` are its header's."""

    size: int = 0
    modified_at: Mapping[str, str] = {}  # the field of that name, where it is known
    digest: str = ""  # sha256
    architecture: str = ""
    quant: str = ""
    parameters: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    inserts: bool = False

    @property
    def details(self) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "gguf" if self.architecture else "",
            "family": self.architecture,
            "families": [self.architecture] if self.architecture else [],
            "parameter_size": human(self.parameters) if self.parameters else "",
            "quantization_level": self.quant,
        }


def listed(name: str, target: Target) -> dict[str, Any]:
    """An entry of /api/tags."""
    file = model_file(target.instance)
    return {
        "name": name,
        "model": name,
        **file.modified_at,
        "size": file.size,
        "digest": file.digest,
        "details": file.details,
    }


def running(
    name: str, target: Target, details: Mapping[str, Any], use: ServerUse
) -> dict[str, Any]:
    """An entry of /api/ps. `details`: what the instance says of its model."""
    entry = listed(name, target) | {"expires_at": expires_at(target, use)}
    entry.pop("modified_at", None)
    if context := context_of(details):
        entry["context_length"] = context
    if is_on_cpu(target.instance):
        entry["size_vram"] = 0
    return entry


def expires_at(target: Target, use: ServerUse) -> str:
    """When the model is unloaded if nobody asks for it again."""
    ready_at, last = target.ready_at or 0.0, usage.since_1970(use.last) if use.last else 0.0
    seconds = usage.idle_limit(target.instance, use, was_used=last >= ready_at)
    if seconds is None:
        return NEVER
    is_used = use.in_flight or use.waiting
    return utc((time.time() if is_used else max(last, ready_at)) + seconds)


def shown(name: str, target: Target, details: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of /api/show."""
    file = model_file(target.instance)
    template = chat_template(target.instance, file)
    context = context_of(details) or context_asked(target.instance)
    info = {key: value for key, value in file.values.items() if not key.startswith(TEMPLATE)}
    if file.parameters:
        info["general.parameter_count"] = file.parameters
    if context and file.architecture:  # clients go by it, and cannot have a larger one here
        info[f"{file.architecture}.context_length"] = context
    return {
        "modelfile": f"FROM {name}\n",
        "parameters": f"num_ctx {context}" if context else "",
        "template": template,
        "license": str(file.values.get("general.license", "")),
        **file.modified_at,
        "details": file.details,
        "model_info": info,
        "capabilities": capabilities(target.instance, file, template),
    }


def context_asked(instance: Server) -> int:
    """The context that an instance is started with, in tokens; 0 where that is the model's own."""
    text = instance.argument("--ctx-size") or instance.argument("-c")
    return int(text) if text.isascii() and text.isdecimal() else 0


def capabilities(instance: Server, file: ModelFacts, template: str) -> list[str]:
    """What the model can do, as far as its files tell."""
    if instance.kind == EMBEDDING:
        return ["embedding"]
    if instance.kind != CHAT:
        return []
    can = {
        "completion": True,
        "tools": bool(TOOLS.search(template)) and "--no-jinja" not in instance.cmd,
        "vision": _sees(instance),
        "thinking": bool(THINKS.search(template)),
        "insert": file.inserts,
    }
    return [name for name, is_so in can.items() if is_so]


def chat_template(instance: Server, file: ModelFacts) -> str:
    """The template in effect; empty where that is one of llama.cpp's own, or there is none."""
    if name := instance.argument("--chat-template-file"):
        with suppress(OSError):
            return Path(instance.folder, name).read_text("utf-8", "replace")
    if any(option in instance.cmd for option in OVERRIDES):
        return ""
    return str(file.values.get(TEMPLATE, ""))


def is_on_cpu(instance: Server) -> bool:
    """Whether an instance is known to use no GPU."""
    options = instance.argument("--n-gpu-layers"), instance.argument("--device")
    return instance.gpu_ids == "none" or options[0] == "0" or options[1] == "none"


def model_file(instance: Server) -> ModelFacts:
    """What the model's files say; next to nothing where they are no GGUF, or cannot be read."""
    name = instance.argument("--model") or instance.argument("-m")
    path = Path(instance.folder, name)
    with suppress(OSError, PipelineError):
        stat = path.stat()
        if name and instance.engine == LLAMA_CPP:
            return _read(path, stat.st_size, stat.st_mtime_ns)
    return ModelFacts(digest=_digest(instance.engine, name or instance.name))


def human(count: int) -> str:
    """A number of parameters as Ollama writes it: `134.52M`, `8.0B`."""
    for unit, letter, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{digits}f}{letter}"
    return str(count)


@lru_cache(maxsize=256)
def _read(path: Path, size: int, mtime_ns: int) -> ModelFacts:
    """Raises PipelineError or OSError."""
    shapes: dict[str, list[int]] = {}
    header, *_ = [gguf.read(part, shapes) for part in gguf.shards(path)]
    inserts = any(key in header.values for key in INSERT_IDS)
    return ModelFacts(
        size=gguf.file_bytes(path),
        modified_at={"modified_at": utc(mtime_ns / 1e9)},
        digest=receipts.known_sha256(path) or _digest(path, size, mtime_ns),
        architecture=header.architecture,
        quant=header.quant,
        parameters=sum(map(math.prod, shapes.values())),
        values=header.values,
        inserts=inserts or not INSERT_TOKENS.isdisjoint(gguf.tokens(path, header)),
    )


def _digest(*identity: object) -> str:
    """For clients that tell versions of a model apart by it: another one when the file changes."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _sees(instance: Server) -> bool:
    """Whether an instance has a projector for images."""
    with suppress(PipelineError):
        if name := instance.argument("--mmproj"):
            values = gguf.read(Path(instance.folder, name)).values
            return bool(values.get("clip.has_vision_encoder", True))
    return False
