"""What the variables of the command line add up to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.bins.binaries import program_file
from pipeline.bins.build_options import AUTO, BACKENDS, OFF, REQUIRED, SYSTEM, BuildOptions
from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import absolute
from pipeline.core.process import shown
from pipeline.core.variables import fill, read, variables
from pipeline.deploy.ray.options import RayVariables
from pipeline.models import hub_access, quants
from pipeline.models.quants import QuantRequest, require_makeable
from pipeline.models.reference import (
    NO_PROJECTOR,
    WITHOUT_DRAFT,
    FileFilter,
    Reference,
    exists,
    is_file,
    missing,
    split_scale,
)
from pipeline.serve.config import synonyms
from pipeline.serve.keys import wrong_file
from pipeline.serve.server import LLAMA_CPP

from . import named_model
from .servers_request import ServersRequest, servers_request
from .variables import (
    MODEL_NAMES,
    SERVER,
    TABLE,
    AddressVariables,
    ChatVariables,
    CompareVariables,
    ModelVariables,
    PackageVariables,
    ProvenanceVariables,
    QualityVariables,
    RunVariables,
    ServerVariables,
    ServingVariables,
    TuneVariables,
    UpgradeVariables,
)

ADAPTER = (
    "an adapter is a path of a .gguf or of a folder with adapter_config.json, without a comma, or "
    "org/repository; a scale is a number behind a colon: style.gguf:0.5"
)
FILES = ("pkg", "key", "public_key", "signature", "provenance")  # variables that name one each
COMPILED = ("cuda_architectures", "cuda_toolkit", "portable", "jobs", "ui")  # of builds alone


class Request(
    RunVariables,
    AddressVariables,
    ServerVariables,
    ServingVariables,
    ChatVariables,
    UpgradeVariables,
    QualityVariables,
    TuneVariables,
    CompareVariables,
    PackageVariables,
    ProvenanceVariables,
):
    """What the command line asks for, checked as far as it can be without looking inside."""

    reference: Reference | None = None
    named: str = ""  # the model, as it was typed
    typed: Mapping[str, str] = {}  # the variables of the model, as they were typed
    file_filter: FileFilter = FileFilter()
    mmproj: Path | None = None  # a projector of the user's own
    draft: Request | None = None  # of the model that drafts for it
    spec_type: str = ""  # llama-server's, where it drafts without another model
    adapters: tuple[Request, ...] = ()  # each with its scale
    scale: float | None = None  # of an adapter; None: it is a model
    wanted: QuantRequest = QuantRequest()
    sample_text: Path | None = None  # the user's own, to measure quality on
    server: Mapping[str, str] = {}  # other options of llama-server, as `server.NAME` says
    bins: BuildOptions = BuildOptions()
    out: str = ""  # where a statement is written; - is stdout
    anew: bool = False  # measure again what `tune` has kept
    measures: bool = False  # `quality` or `compare` was typed, which measure without a limit
    servers: ServersRequest = ServersRequest()
    ray: RayVariables = RayVariables()

    @property
    def json(self) -> bool:
        return self.format == "json"

    @property
    def has_limit(self) -> bool:
        """Whether a quant is published only if it is good enough."""
        return self.max_kld is not None or self.min_cosine is not None

    @property
    def has_options(self) -> bool:
        """Whether llama-server may refuse what was typed for it."""
        return bool(self.server or self.device)

    @property
    def again(self) -> bool:
        """Whether force=1 means llama.cpp's own steps: with a model it means the model's."""
        return self.force and self.reference is None

    def command(self, task: str) -> str:
        """The command line that runs `task` for the same model."""
        return doitw(shown([task, *(f"{name}={value}" for name, value in self.typed.items())]))

    @property
    def model_words(self) -> dict[str, str]:
        """The variables that name its model: the key of its entry in pipeline.lock."""
        reference, files, imatrix = self.reference, self.file_filter, self.wanted.imatrix
        values = {
            "model" if self.scale is None else "lora": (
                (reference.repo or reference.text) if reference else ""
            ),
            "revision": reference.revision if reference else "",
            "quant": files.quant.lower(),
            "filename": files.filename,
            "pattern": files.pattern,
            "mmproj": self.mmproj.name if self.mmproj else files.mmproj,
            "imatrix": imatrix.name if imatrix else "",
        }
        return {name: value for name, value in values.items() if value}


def request(words: Mapping[str, str], *, by_name: bool = False) -> Request:
    """Read the variables. `by_name`: model= need not be a reference, but may be a name that
    `models` prints. Raises UsageError that names every error at once."""
    server = {n.removeprefix(SERVER): v for n, v in words.items() if n.startswith(SERVER)}
    rest = {name: value for name, value in words.items() if not name.startswith(SERVER)}
    values = read(rest, TABLE, elsewhere)
    _check_server(server, rest)
    model, run = fill(ModelVariables, values), fill(RunVariables, values)
    key_file = _key_file(fill(ServerVariables, values).api_key_file)
    backend, device = _backend_and_device(values)
    _check_contradictions(values, run)
    named = next(filter(None, (getattr(model, name) for name in MODEL_NAMES)), "")
    reference, model = named_model.read(model, by_name=by_name)
    wanted = _wanted(reference, model, run)
    mmproj, projector = named_model.projector(reference, model.mmproj)
    draft, spec_type = _draft(reference, model.draft, rest)
    return fill(
        Request,
        values,
        reference=reference,
        named=named,
        typed={name: words[name] for name in variables(ModelVariables) if name in words},
        file_filter=FileFilter(
            quant=model.quant, filename=model.filename, pattern=model.pattern, mmproj=projector
        ),
        mmproj=mmproj,
        draft=draft,
        spec_type=spec_type,
        adapters=_adapters(reference, model.lora, rest),
        wanted=wanted,
        sample_text=_file("text", str(values.get("text", ""))),
        device=device,
        api_key_file=str(key_file) if key_file else "",
        server=server,
        bins=_build_options(values, backend),
        offline=run.offline or hub_access.is_offline(),
        into=absolute(str(values["into"])) if "into" in values else None,
        **{name: _file(name, str(values[name])) for name in FILES if name in values},
        out=str(values.get("out", "")),
        servers=servers_request(values, os.environ),
        ray=fill(RayVariables, values),
    )


def _backend_and_device(values: Mapping[str, object]) -> tuple[str, str | None]:
    """`backend=` and llama-server's `device=`, which may name a backend, too."""
    backend, device = str(values.get("backend", AUTO)), fill(ServerVariables, values).device
    word = device.lower() if device else AUTO
    if word == AUTO or word not in BACKENDS:
        return backend, device
    if backend not in (AUTO, word):
        raise UsageError(f"device={word} and backend={backend} contradict each other")
    return word, None


def _check_contradictions(values: Mapping[str, object], run: RunVariables) -> None:
    if run.refresh and hub_access.is_offline():
        raise UsageError("refresh=1 and HF_HUB_OFFLINE contradict each other")
    for name, other in (("refresh", "offline"), ("refresh", "frozen"), ("filename", "pattern")):
        if values.get(name) and values.get(other):
            raise UsageError(f"{name}= and {other}= contradict each other", "leave one out")


def _wanted(reference: Reference | None, model: ModelVariables, run: RunVariables) -> QuantRequest:
    """What is made of the model. Raises UsageError where that cannot be made."""
    if model.quant == quants.ALL and run.frozen:
        raise UsageError("quant=all and frozen=1 contradict each other", "leave one out")
    wanted = QuantRequest(
        quant=quants.canonical(model.quant),
        keep_f16=model.keep_f16,
        imatrix=_file("imatrix", model.imatrix),
    )
    if reference and reference.is_safetensors:
        require_makeable(wanted)
    return wanted


def elsewhere(name: str) -> str:
    """The variable for what other programs call `name`: empty where none is known."""
    name = name.replace("_", "-")
    known = {each.name for each in TABLE}
    key = synonyms.KEYS.get(name, "")
    if (own := "model" if key == "ref" else key) in known:  # files say ref
        return own
    option = (synonyms.option(name, LLAMA_CPP) or "").replace("-", "_")
    return option if option in known else f"{SERVER}{option}" if option else ""


def _check_server(server: Mapping[str, str], rest: Mapping[str, str]) -> None:
    """Raise UsageError where an option of the server has a variable of its own."""
    for name in server:
        own = name.replace("-", "_")
        if own == "api_key":
            raise UsageError(
                f"{SERVER}{name}: would be visible in the process list",
                "write the key into a file: api_key_file=PATH",
            )
        if own in rest or own in ("model", "host", "port", "ctx_size", "alias"):
            raise UsageError(f"{SERVER}{name}: is a variable of its own", f"write {own}=…")


def _file(name: str, value: str, hint: str = "") -> Path | None:
    if not value:
        return None
    path = absolute(value)
    if exists(path) and path.is_dir():
        hint = hint or "it is a folder; name the file in it"
    elif "://" in value:
        hint = hint or "it is an address; download it, and name the file"
    if not is_file(path):
        raise missing(name, value, path, hint, why="is not a file")
    return path


def _key_file(value: str) -> Path | None:
    path = _file("api_key_file", value)
    if path and (why := wrong_file(path)):
        raise UsageError(f"api_key_file={value}: {why}")
    return path


def _build_options(values: Mapping[str, object], backend: str) -> BuildOptions:
    """Which programs are wanted. Raises UsageError where that contradicts itself."""
    options = fill(BuildOptions, values)
    compiled = [name for name in COMPILED if name in values]
    for name in ("cuda_architectures", "cuda_toolkit"):
        if name in compiled and backend not in (AUTO, "cuda"):
            raise UsageError(f"{name}= and backend={backend} contradict each other")
    if compiled and options.source != "build":
        raise UsageError(
            f"{compiled[0]}: is for what is compiled, not for bins={options.source}", "leave it out"
        )
    for name in ("release", "attestation"):
        if name in values and options.source != "prebuilt":
            raise UsageError(f"{name}: is for bins=prebuilt", f"add it, or leave {name} out")
    attestation = options.attestation
    if attestation not in (AUTO, REQUIRED, OFF):
        attestation = str(
            _file("attestation", attestation, f"{AUTO}, {REQUIRED}, {OFF}, or a bundle's path")
        )
    toolkit = options.toolkit
    if toolkit not in (AUTO, SYSTEM):
        toolkit = str(absolute(toolkit))
        if not (Path(toolkit) / "bin" / program_file("nvcc")).is_file():
            raise UsageError(
                f"cuda_toolkit={options.toolkit}: there is no bin/nvcc in it",
                "auto, system, or the folder of a CUDA toolkit",
            )
    backend = "cuda" if options.architectures else backend
    return options.replace(backend=backend, toolkit=toolkit, attestation=attestation)


def _draft(
    reference: Reference | None, value: str, words: Mapping[str, str]
) -> tuple[Request | None, str]:
    """What `draft=` names: another model, made with the same programs, or a way without a model."""
    if value and reference is None:
        raise UsageError("draft: is for a model", "pass model=… too")
    word = value.strip().lower()
    if word in WITHOUT_DRAFT or word in ("", "none"):
        return None, WITHOUT_DRAFT.get(word, "")
    known = f"or one of {', '.join(WITHOUT_DRAFT)}"
    try:
        return _beside("draft", value, words), ""
    except UsageError as error:
        raise UsageError(error.message, f"{error.hint}; {known}" if error.hint else known) from None


def _adapters(
    reference: Reference | None, values: Sequence[str], words: Mapping[str, str]
) -> tuple[Request, ...]:
    """The adapters that `lora=` names. Raises UsageError."""
    if values and reference is None:
        raise UsageError("lora: is for a model", "pass model=… too")
    adapters = []
    for value in values if [*values] != ["none"] else ():
        text, scale = split_scale(value)
        if text != value and exists(absolute(value)):
            raise UsageError(
                f"lora={value}: is a path that exists, or {text} with the scale {scale:g}",
                f"name the scale too: lora={value}:1",
            )
        try:
            named = _beside("lora", text, words)
        except UsageError as error:
            raise UsageError(error.message, ADAPTER) from None
        if named.reference and named.reference.kind == "demo":
            raise UsageError(f"lora={text}: is a model", ADAPTER)
        adapters.append(named.replace(scale=scale))
    return tuple(adapters)


def _beside(name: str, value: str, words: Mapping[str, str]) -> Request:
    """What the variable `name` asks for beside the model: made as that one, with the same
    programs. Raises UsageError."""
    shared = {x.name for each in (BuildOptions, RunVariables) for x in variables(each).values()}
    kept = {name: words[name] for name in words.keys() & shared}
    try:
        return request({**kept, "model": value, "mmproj": NO_PROJECTOR})
    except UsageError as error:
        raise UsageError(f"{name}={error.message.removeprefix('model=')}", error.hint) from None
