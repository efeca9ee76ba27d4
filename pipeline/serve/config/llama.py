"""The command line of one llama-server."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError
from pipeline.models import quants, reference
from pipeline.models.gguf import shards
from pipeline.serve.flags import RPC

from .configuration import InstanceSpec, beside
from .messages import shown
from .options import LISTS, NO_RPC, PATHS, ResolvedOptions, expanded, missing, words

# Options that name a model, or make a router of the server.
SOURCES = ("model", "model-url", "hf-repo", "docker-repo", "models-dir", "models-preset")
DRAFTS = ("spec-draft-model", "model-draft", "spec-draft-hf")
SPEC_TYPE = "spec-type"
WITH_MODEL = ("draft-simple", "draft-eagle3", "draft-dflash", "draft-dspark")
ADAPTERS = ("lora", "lora-scaled")
JINJA = "jinja"
NO_TEMPLATE = (
    "is not a template: every prompt would be this text; a file is named by chat_template_file, "
    "and a template of llama.cpp's own, other than chatml, wants no_jinja = true beside it"
)
OPTIONS_IN_ENVIRONMENT = ("LLAMA_ARG_", "LLAMA_API_KEY")
VARIABLE = re.compile(r"\(env: (\w+)\)")  # in the help of an option
AUTO_SLOTS = 4  # of llama-server without parallel
FOLDERS = ("PATH", "DIR")  # hints
FILE_PATHS = {"ui-config-file", "mcp-servers-config", "models-preset"}  # files, whatever the hint
LOADED = {"model", "mmproj", "lora", "control-vector", "spec-draft-model"}  # GGUFs
SCALED = "FNAME:SCALE,..."
# Without a number of its own it has that of the other option.
FOLLOWS = {"threads-batch": ("threads",)}
# With these it prints something and ends.
PRINTING = ("help", "version", "cache-list", "completion-bash", "list-devices")
# These need not be there, or are checked elsewhere.
WRITTEN = ("log-file", "log-prompts-dir", "lookup-cache-dynamic", "hf-file", "api-key-file")

# Options for which llama-server needs the network (common/arg.cpp of the pinned llama.cpp): models
# by repository or address, and its own presets. With a projector it also fetches images that a
# request names by address.
MODEL = {"-m", "--model"}
DOWNLOADS = re.compile(
    r"-hf\w*|-mu|-mmu|-mm|-dr|--hf-(repo|file)(-draft)?|--spec-draft-hf|--docker-repo|--mmproj"
    r"|--(model|mmproj|lora)-url|--models-preset|--(embd|fim|gpt-oss|vision)-[\w.-]+"
)


class PreparedModel(Struct, frozen=True, kw_only=True):
    """A prepared model."""

    path: PurePath  # that of a pod may not be one of this system
    mmproj: PurePath | None = None
    draft: PurePath | None = None
    spec_type: str = ""  # how tokens are drafted
    adapters: tuple[tuple[PurePath, float], ...] = ()  # LoRA, with their scales
    pooling: str = "none"  # as in the GGUF's metadata; `none` for a chat model
    ctx_size: int = 0  # in tokens, as trained; 0: not known
    fitted: int = 0  # the context to serve it with, unless the options name one; 0: any
    tuned: Mapping[str, str] = {}  # options that were measured to be fast here


def command(
    resolved: ResolvedOptions, model: PreparedModel | None, key: Path | None, folder: Path
) -> tuple[str, ...]:
    """The arguments: the prepared model, the table as written, what is added, extra_args. `folder`
    is where the server runs. Raises UsageError."""
    arguments = ["--model", str(model.path)] if model else []
    table = expanded(resolved)
    table.pop("api-key", None)
    added = [*words(table, resolved.flags), *missing(resolved, "alias")]
    if "metrics" in resolved.flags and not resolved.has("metrics"):
        added += ["--metrics"]
    # By default llama-server lets pages of any origin read its answers.
    if "cors-origins" in resolved.flags and not resolved.has("cors-origins"):
        added += ["--cors-origins", "localhost"]
    if key and not resolved.text("api-key-file"):
        added += ["--api-key-file", str(key)]
    if model:
        added += [*_of_model(resolved, model), *_adapters(model.adapters, folder)]
        added += words({**tuned(resolved, model)})
    return (*arguments, *added, *resolved.spec.extra_args)


def tuned(resolved: ResolvedOptions, model: PreparedModel | None) -> dict[str, str]:
    """Of the options that were measured to be fast, those that the user leaves open."""
    return {
        name: value
        for name, value in (model.tuned if model else {}).items()
        if name in resolved.flags and not resolved.has(name, *FOLLOWS.get(name, ()))
    }


def downloads(arguments: Iterable[str]) -> bool:
    """Whether llama-server may need the network when started with these arguments. Without a model
    it is a router, which fetches models on request."""
    options = {word.replace("_", "-") for word in arguments}
    return not options & MODEL or any(map(DOWNLOADS.fullmatch, options))


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
    yield from _named_twice(spec, resolved)
    if spec.model:
        yield from _model_errors(spec)
    if resolved.flags and RPC not in {*resolved.flags, *spec.server} and resolved.has(RPC):
        yield spec.line("server.extra-args", f": --{RPC}{NO_RPC}")
    yield from _prints_only(resolved)
    yield from _options_in_environment(resolved)
    batch, slots = resolved.number("batch-size"), resolved.number("parallel") or AUTO_SLOTS
    if 1 < batch < slots:  # llama-server would abort
        yield spec.line("server.batch-size", f" = {batch}: must be at least {slots}, its slots")
    if (template := resolved.text("chat-template")) and not _is_template(resolved, template):
        why = f" = {shown(template)}: {NO_TEMPLATE}"
        yield spec.line("server.chat-template", why)
    for name, text in _inputs(resolved):
        if not text:
            yield spec.line(f"server.{name}", ": names nothing; leave it out")
        elif why := _wrong_file(resolved, name, beside(folder, text), is_there):
            yield spec.line(f"server.{name}", f" = {text}: {why}")


def _wrong_file(
    resolved: ResolvedOptions, name: str, path: Path, is_there: Callable[[Path], bool]
) -> str:
    """Why the option does not take the file or folder `path`; empty where it does."""
    flag = resolved.flags.get(name)
    names = flag.plain_names if flag else {name}
    may_be_folder = flag is not None and flag.value in FOLDERS and not names & FILE_PATHS
    with suppress(OSError):  # the name is too long, or a folder above it closed
        if may_be_folder and path.is_file():
            return f"{path} is a file, not a folder"
        if may_be_folder and (is_there(path) or path.exists()):
            return ""
        if is_there(path):
            return _wrong_content(resolved, name, names, path)
    return f"{path} does not exist" if may_be_folder else f"{path} is not a file"


def _wrong_content(resolved: ResolvedOptions, name: str, names: set[str], path: Path) -> str:
    """The same of a file that is there, or is to be on another machine."""
    flag = resolved.flags.get(name)
    if name == "model":
        return _not_whole(path) if path.is_file() else ""
    if flag and flag.value != SCALED and not names & LOADED and path.is_file():
        from . import files

        return files.wrong(names, path, takes_names=takes_template_names(resolved))
    return ""


def _named_twice(spec: InstanceSpec, resolved: ResolvedOptions) -> Iterator[str]:
    """The errors of options that name what the table of the model names too."""
    for key, options, whose in (
        ("model", SOURCES[:4], "the model table"),
        ("draft", DRAFTS, "draft="),
        ("lora", ADAPTERS, "lora="),
    ):
        given = next((name for name in options if resolved.text(name)), "")
        if given and spec.model.get(key, "none") != "none":
            if spec.is_typed(f"server.{given}") and key == "model":  # beside model= or a profile
                whose = "the model that is named"
            yield spec.line(f"server.{given}", f": contradicts {whose}; leave one out")
    draft, types = spec.model.get("draft", "none"), _spec_types(resolved)
    wanted = reference.WITHOUT_DRAFT.get(draft, draft)  # a word for a type, or a type, or a model
    is_type = wanted in reference.WITHOUT_DRAFT.values()
    fits = wanted in types if is_type else any(name.startswith("draft-") for name in types)
    if draft != "none" and types and not fits:
        why = f" = {','.join(types)}: contradicts draft={draft}; leave one out"
        yield spec.line(f"server.{SPEC_TYPE}", why)


def _spec_types(resolved: ResolvedOptions) -> list[str]:
    """The ways to draft that the options name."""
    value = resolved.value(SPEC_TYPE)
    listed = value if isinstance(value, list) else [value]
    return ",".join(item for item in listed if isinstance(item, str)).split(",") if value else []


def _prints_only(resolved: ResolvedOptions) -> Iterator[str]:
    """The error of an option with which nothing is served."""
    spec = resolved.spec
    for name in PRINTING:
        if name in resolved.flags and resolved.is_on(name):
            names = resolved.flags[name].names
            key = next((key for key in spec.server if f"--{key}" in names), "extra-args")
            why = f": with --{name} llama-server prints something and ends; leave it out"
            yield spec.line(f"server.{key}", why)


def _options_in_environment(resolved: ResolvedOptions) -> Iterator[str]:
    """The errors of variables in `control.env` that llama-server takes as options: a key, a prefix
    or a context that came so would be in no check, question or count of memory."""
    spec = resolved.spec
    options: dict[str, str] = {}
    for name, flag in resolved.flags.items():
        if named := VARIABLE.search(flag.help):
            options.setdefault(named[1], name.replace("-", "_"))
    for variable in spec.control.env:
        if variable.startswith(OPTIONS_IN_ENVIRONMENT):
            why = "is an option of llama-server, which nothing here would know of"
            instead = f"write server.{options.get(variable, 'NAME')}"
            yield spec.line("control.env", f".{variable}: {why}; {instead}")


def _is_template(resolved: ResolvedOptions, text: str) -> bool:
    """Whether llama-server makes prompts of messages with this template. With Jinja, which is on by
    default, it takes each name but chatml for the template itself, and says nothing."""
    return "{" in text or text == "chatml" or takes_template_names(resolved)


def takes_template_names(resolved: ResolvedOptions) -> bool:
    """Whether llama-server looks up the names of its own templates: without Jinja."""
    flag = resolved.flags.get(JINJA)
    if flag is None or "default: disabled" in flag.help:
        return True  # not known, or an older one, which takes names alone
    given = [*words(resolved.spec.server), *resolved.spec.extra_args]
    last = [word for word in given if word in (f"--{JINJA}", f"--no-{JINJA}")][-1:]
    return last == [f"--no-{JINJA}"]


def _not_whole(path: Path) -> str:
    """The error where a part of a split model is missing; empty where the model is whole."""
    try:
        shards(path)
    except PipelineError as error:
        return error.message
    return ""


def _inputs(resolved: ResolvedOptions) -> Iterator[tuple[str, str]]:
    """Each path that has to exist, with the option that names it."""
    for name, value in resolved.spec.server.items():
        flag = resolved.flags.get(name)
        hint = "FNAME" if name in ("model", "mmproj") else flag.value if flag else ""
        if name in WRITTEN or isinstance(value, bool) or hint not in (*PATHS, SCALED):
            continue
        for item in map(str, value if isinstance(value, list) else [value]):
            for text in item.split(",") if name in LISTS else [item]:
                if hint != SCALED:
                    yield name, text
                elif ":" in text:  # else `values` reports it
                    yield name, text.rpartition(":")[0]


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
    if imatrix and not reference.is_file(Path(imatrix)):
        yield f"{spec.at('model.imatrix')}: {imatrix} is not a file"


def warnings(resolved: ResolvedOptions) -> Iterator[str]:
    """What is allowed, and perhaps not meant."""
    if not resolved.spec.model and not resolved.has(*SOURCES):
        place = resolved.spec.place
        yield f"{place}: names no model, so llama-server routes to the models it finds"
    drafting = next((name for name in DRAFTS[:2] if resolved.text(name)), "")
    if drafting and not resolved.has(SPEC_TYPE):
        why = ": llama-server loads it, and does not use it without spec_type=draft-simple"
        yield resolved.spec.line(f"server.{drafting}", why)
    needy = next((name for name in _spec_types(resolved) if name in WITH_MODEL), "")
    if needy and resolved.spec.model.get("draft", "none") == "none" and not resolved.has(*DRAFTS):
        why = f" = {needy}: no draft model is named, so llama-server does without it"
        yield resolved.spec.line(f"server.{SPEC_TYPE}", why)
    if hosts := resolved.text(RPC):
        why = (
            f" = {hosts}: weights and what is computed of prompts go there unencrypted, and "
            "ggml-rpc-server asks for no key: who reaches it can use and attack it. llama.cpp "
            "calls it a proof of concept, fragile and insecure: only for a private network"
        )
        yield resolved.spec.line(f"server.{RPC}", why)


def _of_model(resolved: ResolvedOptions, model: PreparedModel) -> list[str]:
    """What a prepared model needs: its projector, its endpoint, a batch for a whole text."""
    arguments: list[str] = []
    if model.mmproj and not resolved.has("mmproj", "mmproj-url", "no-mmproj"):
        arguments += ["--mmproj", str(model.mmproj)]
    if model.draft:
        arguments += ["--spec-draft-model", str(model.draft)]
    if model.spec_type and not resolved.has(SPEC_TYPE):
        # without it llama-server loads a draft model, and does not use it
        arguments += ["--spec-type", model.spec_type]
    if not resolved.has("embeddings", "embedding", "reranking", "rerank", "pooling"):
        arguments += endpoint_options(model.pooling)
    if model.fitted and not resolved.has("ctx-size"):
        arguments += ["--ctx-size", str(model.fitted)]
    if model.pooling != "none" and not resolved.has("ubatch-size"):
        ctx_size = resolved.number("ctx-size") or model.fitted or model.ctx_size
        batch = resolved.number("batch-size")
        words = batch_options(model.pooling, ctx_size, batch) if batch or ctx_size else []
        arguments += words[2:] if resolved.has("batch-size") else words
    return arguments


def endpoint_options(pooling: str) -> list[str]:
    """Embedding models and rerankers get their endpoint, as their own metadata asks for it."""
    if pooling == "none":
        return []
    return ["--reranking" if pooling == "rank" else "--embeddings", "--pooling", pooling]


def batch_options(pooling: str, ctx_size: int, batch_size: int | None) -> list[str]:
    """Models that pool read a whole text in one batch, so it is as long as the context."""
    if pooling == "none":
        return ["--batch-size", str(batch_size)] if batch_size else []
    batch = str(batch_size or ctx_size)
    return ["--batch-size", batch, "--ubatch-size", batch]


def _adapters(adapters: Sequence[tuple[PurePath, float]], folder: Path) -> list[str]:
    """The options for LoRA adapters in their order, by which requests number them."""
    if all(scale == 1 for _, scale in adapters):
        files = [_unsplit(path, ",", folder) for path, _ in adapters]
        return ["--lora", ",".join(files)] if files else []
    scaled = [f"{_unsplit(path, ',:', folder)}:{scale:g}" for path, scale in adapters]
    return ["--lora-scaled", ",".join(scaled)]


def _unsplit(path: PurePath, signs: str, folder: Path) -> str:
    """The path without these signs, at which llama-server splits: relative to `folder` where the
    absolute one has some, as behind the drive on Windows. Raises UsageError."""
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
