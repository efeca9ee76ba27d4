"""LoRA adapters: the files of one, and whether it changes the model that it is given to, by the
rules of llama.cpp's src/llama-adapter.cpp, from the headers of both.

llama-server ends at the first tensor that does not fit, after it has loaded the model, and says
nothing of an adapter without tensors, or of those that it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.store import stat_cache

from . import checkpoint, contents, gguf, peft, safetensors
from .gguf import Header
from .peft import BASE_CONFIG, CONFIG, WEIGHTS
from .resolve import ModelFile, Resolved, folder_name, in_place, local_slug, short_name
from .safetensors import Head
from .weights import INDEX

Shapes = Mapping[str, list[int]]
A, B = ".lora_a", ".lora_b"
NO_ADAPTER = "is no LoRA adapter in GGUF, by its metadata"


def gguf_path(path: Path, home: Home) -> Resolved:
    """An adapter in GGUF that is used in place. Raises PipelineError where it is none."""
    contents.require_finished(path)
    require(gguf.read_cached(path, home.run / "gguf.json"), str(path))
    return in_place([path], "")


def folder_is_known(path: Path, home: Home) -> bool:
    """Whether the sha256 of an adapter's files are known."""
    book, files = home.run / "sha256.json", [path / name for name in (CONFIG, WEIGHTS, BASE_CONFIG)]
    return all(stat_cache.recall(book, file) is not None for file in files if file.is_file())


def check_folder(path: Path) -> tuple[list[str], dict[str, Any], Head]:
    """The files of an adapter that PEFT saved, its config and the header of its weights. Raises
    PipelineError where it is none that can be converted."""
    there = [file.name for file in path.iterdir() if file.is_file()]
    ggufs = sorted(name for name in there if name.endswith(".gguf"))
    if ggufs and {CONFIG, WEIGHTS}.isdisjoint(there):
        raise PipelineError(f"{path}: is a folder", f"pass the GGUF: lora={path / ggufs[0]}")
    names = peft.files(there, str(path))
    contents.require_finished(path / WEIGHTS)
    config = checkpoint.document((path / CONFIG).read_bytes(), str(path / CONFIG))
    head = safetensors.read(path / WEIGHTS)
    peft.require_convertible(config, head.shapes, str(path))
    if BASE_CONFIG in there:
        base = checkpoint.document((path / BASE_CONFIG).read_bytes(), str(path / BASE_CONFIG))
        names += [BASE_CONFIG] if is_config(base) else []
    return names, config, head


def folder(path: Path, home: Home) -> Resolved:
    """An adapter that PEFT saved, without its base. A file is hashed again when it has changed.
    Raises PipelineError where it is none that can be converted."""
    names, config, head = check_folder(path)
    book = home.run / "sha256.json"
    return Resolved(
        kind="safetensors",
        name=short_name(folder_name(path.resolve())),
        slug=local_slug(path),
        folder=path,
        local=True,
        source={"type": "folder", "ref": str(path)},
        files=tuple(
            ModelFile(name, (path / name).stat().st_size, stat_cache.identity(book, path / name))
            for name in names
        ),
        precision=safetensors.own_precision(head.dtypes),
        base_name=str(config.get("base_model_name_or_path") or ""),
    )


def is_config(document: Mapping[str, Any]) -> bool:
    """Whether a config.json names its model's architecture, without which none can be converted."""
    try:
        return bool(checkpoint.architecture(document, BASE_CONFIG))
    except PipelineError:
        return False


def config_of(model: Resolved) -> Resolved | None:
    """What the converter reads of an adapter's base: the files of a model beside its weights. None
    where there is no config.json."""
    files = tuple(f for f in model.files if not f.name.endswith((".safetensors", INDEX, ".gguf")))
    has_config = any(file.name == BASE_CONFIG for file in files)
    return replace(model, files=files, base=None) if has_config else None


def own_config(adapter: Resolved) -> Resolved | None:
    """The same, where the adapter brings it."""
    files = tuple(file for file in adapter.files if file.name == BASE_CONFIG)
    return replace(adapter, files=files, base=None) if files else None


def require(header: Header, where: str) -> None:
    """Raise PipelineError where a GGUF is no LoRA adapter."""
    if is_adapter(header):
        return
    if header.values.get("general.type") in (None, "model"):
        raise PipelineError(f"{where}: is a model, not a LoRA adapter", "pass it as model=")
    raise PipelineError(f"{where}: {NO_ADAPTER}", "pass a LoRA adapter")


def is_adapter(header: Header) -> bool:
    """Whether a GGUF is a LoRA adapter, by its metadata."""
    is_lora = header.values.get("adapter.type") == "lora"
    return header.values.get("general.type") == "adapter" and is_lora


def problem(adapter: Path, model: Iterable[Path]) -> str:
    """Why the file `adapter` is no adapter for the model, whole or in parts; empty where it is one.
    Raises PipelineError for a file that is no GGUF."""
    own, parts = gguf.read(adapter), [*model]
    if not is_adapter(own):
        return NO_ADAPTER
    architecture = gguf.read(parts[0]).architecture
    if own.architecture != architecture:
        return f"is an adapter for {own.architecture}, and the model is {architecture}"
    shapes: dict[str, list[int]] = {}
    for part in parts:
        shapes |= gguf.shapes(part)
    return difference(gguf.shapes(adapter), shapes)


def difference(adapter: Shapes, model: Shapes) -> str:
    """Why an adapter with tensors of these shapes does not fit the model's."""
    if not adapter:
        return "holds no tensors"
    if ignored := [name for name in adapter if not name.endswith((A, B))]:
        return f"changes {ignored[0]}, which llama.cpp leaves as it is"
    for name in dict.fromkeys(tensor.removesuffix(A).removesuffix(B) for tensor in adapter):
        a, b, base = adapter.get(name + A), adapter.get(name + B), model.get(name)
        if a is None or b is None:
            return f"has only one of the two tensors for {name}"
        if base is None:
            return f"changes {name}, which the model has not"
        if min(len(a), len(b), len(base)) < 2:
            return f"changes {name}, which is not of two dimensions"
        is_embedding = name.endswith("token_embd.weight")  # its two are transposed
        made = [b[1], a[1]] if is_embedding else [a[0], b[1]]
        if made != base[:2] or (not is_embedding and a[1] != b[0]):
            return f"makes {name} {made[0]} × {made[1]}, the model's has {base[0]} × {base[1]}"
    return ""
