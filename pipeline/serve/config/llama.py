"""The command line of one llama-server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePath

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError
from pipeline.models import quants, reference
from pipeline.models.gguf import shards
from pipeline.serve import launch

from .configuration import InstanceSpec, beside
from .messages import shown
from .options import ResolvedOptions, expanded, missing, words

# What else names a model, or makes a router of the server.
SOURCES = ("model", "model-url", "hf-repo", "docker-repo", "models-dir", "models-preset")

DRAFTS = ("spec-draft-model", "model-draft", "spec-draft-hf")

ADAPTERS = ("lora", "lora-scaled")
AUTO_SLOTS = 4  # of llama-server, where parallel does not say
FILES, FOLDERS = ("FNAME", "FILE", "JINJA_TEMPLATE_FILE"), ("PATH", "DIR")  # hints
SCALED = "FNAME:SCALE,..."
LISTS = (*ADAPTERS, "control-vector", "control-vector-scaled")  # with commas
# These need not be there, or are checked elsewhere.
WRITTEN = ("log-file", "log-prompts-dir", "lookup-cache-dynamic", "hf-file", "api-key-file")


class PreparedModel(Struct, frozen=True, kw_only=True):
    """A prepared model."""

    path: PurePath  # a pod's may be none of this system
    mmproj: PurePath | None = None
    draft: PurePath | None = None
    spec_type: str = ""  # how tokens are drafted
    adapters: tuple[tuple[PurePath, float], ...] = ()  # LoRA, with their scales
    pooling: str = "none"  # of a chat model; else what the GGUF's metadata says, `rank` and so on
    ctx_size: int = 0  # in tokens, as trained; 0: not known
    fitted: int = 0  # the context that it is served with where the options name none; 0: any


def command(
    resolved: ResolvedOptions, model: PreparedModel | None, key: Path | None, folder: Path
) -> tuple[str, ...]:
    """The arguments: the prepared model, the table as written, what is added, extra_args. `folder`
    is where the server runs. Raises UsageError."""
    arguments = ["--model", str(model.path)] if model else []
    table = expanded(resolved)
    table.pop("api-key", None)
    added = [*words(table), *missing(resolved, "alias")]
    if "metrics" in resolved.flags and not resolved.says("metrics"):
        added += ["--metrics"]
    # The server answers pages of any origin unless told otherwise.
    if "cors-origins" in resolved.flags and not resolved.says("cors-origins"):
        added += ["--cors-origins", "localhost"]
    if key and not resolved.text("api-key-file"):
        added += ["--api-key-file", str(key)]
    if model:
        added += [*_of_model(resolved, model), *_adapters(model.adapters, folder)]
    return (*arguments, *added, *resolved.spec.extra_args)


def kind(resolved: ResolvedOptions, model: PreparedModel | None) -> str:
    """chat, embedding or rerank."""
    pooling = resolved.text("pooling") or (model.pooling if model else "none")
    if resolved.is_on("reranking", "rerank") or pooling == "rank":
        return "rerank"
    if resolved.is_on("embeddings", "embedding") or pooling != "none":
        return "embedding"
    return "chat"


def errors(
    resolved: ResolvedOptions, folder: Path, is_there: Callable[[Path], bool] = Path.is_file
) -> Iterator[str]:
    """A model that is named twice, and files that are missing."""
    spec = resolved.spec
    for key, options, whose in (
        ("model", SOURCES[:4], "the model table"),
        ("draft", DRAFTS, "draft="),
        ("lora", ADAPTERS, "lora="),
    ):
        given = next((name for name in options if resolved.text(name)), "")
        if given and spec.model.get(key, "none") != "none":
            yield spec.line(f"server.{given}", f": contradicts {whose}; leave one out")
    if spec.model:
        yield from _model_errors(spec)
    batch, slots = resolved.number("batch-size"), resolved.number("parallel") or AUTO_SLOTS
    if 1 < batch < slots:  # llama-server would abort
        yield spec.line("server.batch-size", f" = {batch}: must be at least {slots}, its slots")
    for name, text in _inputs(resolved):
        path = beside(folder, text)
        flag = resolved.flags.get(name)
        if flag and flag.value in FOLDERS:
            why = "" if is_there(path) or path.exists() else f"{path} does not exist"
        else:
            why = "" if is_there(path) else f"{path} is no file"
        if name == "model" and path.is_file():
            why = _not_whole(path)
        if why:
            yield spec.line(f"server.{name}", f" = {text}: {why}")


def _not_whole(path: Path) -> str:
    """Why this is no whole model: a part of a split one is missing."""
    try:
        shards(path)
    except PipelineError as error:
        return error.message
    return ""


def _inputs(resolved: ResolvedOptions) -> Iterator[tuple[str, str]]:
    """The options that name a file or folder which has to be there, each with one name."""
    for name, value in resolved.spec.server.items():
        flag = resolved.flags.get(name)
        hint = "FNAME" if name in ("model", "mmproj") else flag.value if flag else ""
        if name in WRITTEN or isinstance(value, bool) or hint not in (*FILES, *FOLDERS, SCALED):
            continue
        for item in map(str, value if isinstance(value, list) else [value]):
            for text in item.split(",") if name in LISTS else [item]:
                yield name, text.rpartition(":")[0] if hint == SCALED else text


def _model_errors(spec: InstanceSpec) -> Iterator[str]:
    """What is wrong in the model table."""
    try:
        reference.parse(spec.model["model"])
    except UsageError as error:
        yield spec.line("model.ref", f" = {error.message.removeprefix('model=')}")
    quant = spec.model.get("quant", quants.AUTO)
    if quant.upper() != quants.AUTO:
        try:
            quants.parse(quant)
        except ValueError as allowed:
            yield spec.line("model.quant", f" = {shown(quant)}: must be {allowed}")
    imatrix = spec.model.get("imatrix")
    if imatrix and not Path(imatrix).is_file():
        yield f"{spec.at('model.imatrix')}: {imatrix} is no file"


def warnings(resolved: ResolvedOptions) -> Iterator[str]:
    """What is allowed and perhaps not meant."""
    if not resolved.spec.model and not resolved.says(*SOURCES):
        place = resolved.spec.place
        yield f"{place}: names no model, so llama-server routes to the models it finds"
    drafting = next((name for name in DRAFTS[:2] if resolved.text(name)), "")
    if drafting and not resolved.says("spec-type"):
        why = ": llama-server loads it, and does not use it without spec_type=draft-simple"
        yield resolved.spec.line(f"server.{drafting}", why)


def _of_model(resolved: ResolvedOptions, model: PreparedModel) -> list[str]:
    """What a prepared model asks for: its projector, its endpoint, a batch for a whole text."""
    arguments: list[str] = []
    if model.mmproj and not resolved.says("mmproj", "mmproj-url", "no-mmproj"):
        arguments += ["--mmproj", str(model.mmproj)]
    if model.draft:
        arguments += ["--spec-draft-model", str(model.draft)]
    if model.spec_type and not resolved.says("spec-type"):
        # without it llama-server loads a draft model, and does not use it
        arguments += ["--spec-type", model.spec_type]
    if not resolved.says("embeddings", "embedding", "reranking", "rerank", "pooling"):
        arguments += launch.endpoint_options(model.pooling)
    if model.fitted and not resolved.says("ctx-size"):
        arguments += ["--ctx-size", str(model.fitted)]
    if model.pooling != "none" and not resolved.says("ubatch-size"):
        ctx_size = resolved.number("ctx-size") or model.fitted or model.ctx_size
        batch = resolved.number("batch-size")
        words = launch.batch_options(model.pooling, ctx_size, batch) if batch or ctx_size else []
        arguments += words[2:] if resolved.says("batch-size") else words
    return arguments


def _adapters(adapters: Sequence[tuple[PurePath, float]], folder: Path) -> list[str]:
    """The options for LoRA adapters, in their order: requests count them."""
    if all(scale == 1 for _, scale in adapters):
        files = [_unsplit(path, ",", folder) for path, _ in adapters]
        return ["--lora", ",".join(files)] if files else []
    scaled = [f"{_unsplit(path, ',:', folder)}:{scale:g}" for path, scale in adapters]
    return ["--lora-scaled", ",".join(scaled)]


def _unsplit(path: PurePath, signs: str, folder: Path) -> str:
    """A path in which llama-server finds none of these signs, at which it splits: relative to
    `folder` where the whole one has some, as behind the drive of Windows. Raises UsageError."""
    texts = [str(path)]
    with suppress(ValueError):  # another drive
        texts.append(os.path.relpath(path, folder))
    for text in texts:
        if not any(sign in text for sign in signs):
            return text
    raise UsageError(
        f"lora={path}: llama-server splits such a list at each {' and '.join(signs)}",
        "move it to a path without them, or leave its scale out"
        if "," not in texts[0]
        else "move it to a path without them",
    )
