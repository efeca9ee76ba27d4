"""Every variable of the command line, and what they add up to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.bins.build_options import BACKENDS, BuildOptions
from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute
from pipeline.core.variables import Variable, choice, flag, integer, read, text
from pipeline.deploy.kubernetes.options import TABLE as KUBERNETES
from pipeline.models import hub_settings, projector, quants
from pipeline.models.chain import QuantRequest, require_makeable
from pipeline.models.choice import FileFilter
from pipeline.models.reference import Reference, existing, parse
from pipeline.serve import sandbox
from pipeline.serve.launch import Settings

from . import bins_variables, many
from .many import Many

SERVER = "server."
MODEL_NAMES = ("model", "hf_model", "gguf_path", "safetensors_dir")


def gpu_layers(value: str) -> str:
    """llama-server's own: a number, auto or all."""
    word = value.strip().lower()
    if word not in ("auto", "all") and not word.isdecimal():
        raise ValueError("a whole number, auto or all")
    return word


def quant(value: str) -> str:
    """A quant, or auto, or all."""
    word = value.strip().upper()
    return word if word in (quants.AUTO, quants.ALL) else quants.parse(value)


TABLE = (
    *(Variable(name, text) for name in MODEL_NAMES),
    Variable("quant", quant),
    Variable("revision", text),
    Variable("filename", text),
    Variable("pattern", text),
    Variable("mmproj", text),
    Variable("imatrix", text),
    *bins_variables.TABLE,
    Variable("host", text),
    Variable("port", integer(1, 65535)),
    Variable("threads", integer(1, 4096)),
    Variable("gpu_layers", gpu_layers),
    Variable("parallel", integer(1, 4096)),
    Variable("batch_size", integer(1, 1 << 24)),
    Variable("ctx_size", integer(1, 1 << 30)),
    Variable("device", text),
    Variable("alias", text),
    Variable("api_key_file", text),
    Variable("sandbox", choice(*sandbox.MODES)),
    Variable("ready_timeout", integer(1, 86400)),
    Variable("stop_timeout", integer(0, 3600)),
    Variable("keep_f16", flag),
    Variable("force", flag),
    Variable("refresh", flag),
    Variable("frozen", flag),
    Variable("offline", flag),
    Variable("format", choice("text", "json")),
    *many.TABLE,
    *KUBERNETES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for, checked as far as it can be without looking inside."""

    reference: Reference | None = None
    wish: FileFilter = field(default_factory=FileFilter)
    mmproj: Path | None = None  # a projector of the user's own
    wanted: QuantRequest = field(default_factory=QuantRequest)
    settings: Settings = field(default_factory=Settings)
    bins: BuildOptions = field(default_factory=BuildOptions)
    sandbox: str = sandbox.AUTO
    ready_timeout: int = 600  # seconds
    stop_timeout: int = 10  # seconds
    force: bool = False
    refresh: bool = False
    frozen: bool = False
    offline: bool = False
    json: bool = False
    pkg: Path | None = None  # an archive to install
    into: Path | None = None  # and where
    many: Many = field(default_factory=Many)

    @property
    def again(self) -> bool:
        """`force=1` without a model means llama.cpp's own steps, with one the model's."""
        return self.force and self.reference is None

    @property
    def asked(self) -> dict[str, str]:
        """What it says of its model: under this pipeline.lock keeps it."""
        reference, wish, imatrix = self.reference, self.wish, self.wanted.imatrix
        said = {
            "model": (reference.repo or reference.text) if reference else "",
            "revision": reference.revision if reference else "",
            "quant": wish.quant.lower(),
            "filename": wish.filename,
            "pattern": wish.pattern,
            "mmproj": self.mmproj.name if self.mmproj else wish.mmproj,
            "imatrix": imatrix.name if imatrix else "",
        }
        return {name: value for name, value in said.items() if value}


def request(given: Mapping[str, str]) -> Request:
    """Read the variables. Raises UsageError that names every mistake at once."""
    server = {n.removeprefix(SERVER): v for n, v in given.items() if n.startswith(SERVER)}
    rest = {name: value for name, value in given.items() if not name.startswith(SERVER)}
    values = read(rest, TABLE)

    def number(name: str) -> int | None:
        value = values.get(name)
        return value if isinstance(value, int) else None

    def word(name: str, default: str = "") -> str:
        return str(values.get(name, default))

    def file(name: str) -> Path | None:
        if name not in values:
            return None
        path = absolute(word(name))
        if not path.is_file():
            raise UsageError(f"{name}={word(name)}: {path} is no file")
        return path

    for name in server:
        if name.replace("-", "_") == "api_key":
            raise UsageError(
                f"{SERVER}{name}: would stand in the list of processes",
                "write the key into a file: api_key_file=PATH",
            )
        own = name.replace("-", "_")
        if own in rest or own in ("model", "host", "port", "ctx_size", "alias"):
            raise UsageError(f"{SERVER}{name}: is a variable of its own", f"write {own}=…")
    backend, device = word("backend", "auto"), word("device") or None
    if device and device.lower() in BACKENDS and device.lower() != "auto":
        device = device.lower()
        if backend not in ("auto", device):
            raise UsageError(f"device={device} and backend={backend} contradict each other")
        backend, device = device, None
    default = Settings()
    if values.get("refresh") and hub_settings.is_offline():
        raise UsageError("refresh=1 and HF_HUB_OFFLINE contradict each other")
    contradictions = (("refresh", "offline"), ("refresh", "frozen"), ("filename", "pattern"))
    for one, other in contradictions:
        if values.get(one) and values.get(other):
            raise UsageError(f"{one}= and {other}= contradict each other", "leave one out")
    reference = _reference(values)
    if reference and reference.kind == "hub":
        hub_settings.check_environment()
    asked = _quant(reference, word("quant"))
    if asked == quants.ALL and values.get("frozen"):
        raise UsageError("quant=all and frozen=1 contradict each other", "leave one out")
    wanted = QuantRequest(
        quant=quants.canonical(asked),
        keep_f16=bool(values.get("keep_f16", False)),
        imatrix=file("imatrix"),
    )
    if reference and reference.kind in ("demo", "folder"):
        require_makeable(wanted)
    mmproj, named = _mmproj(reference, word("mmproj"))
    return Request(
        reference=reference,
        wish=FileFilter(
            quant=asked, filename=word("filename"), pattern=word("pattern"), mmproj=named
        ),
        mmproj=mmproj,
        wanted=wanted,
        settings=Settings(
            host=word("host", default.host),
            port=number("port") or default.port,
            ctx_size=number("ctx_size"),
            threads=number("threads"),
            gpu_layers=word("gpu_layers") or None,
            parallel=number("parallel"),
            batch_size=number("batch_size"),
            device=device,
            alias=word("alias") or None,
            api_key_file=file("api_key_file"),
            server=server,
        ),
        bins=bins_variables.read(values, backend),
        sandbox=word("sandbox", sandbox.AUTO),
        ready_timeout=number("ready_timeout") or 600,
        stop_timeout=10 if (seconds := number("stop_timeout")) is None else seconds,
        force=bool(values.get("force", False)),
        refresh=bool(values.get("refresh", False)),
        frozen=bool(values.get("frozen", False)),
        offline=bool(values.get("offline", False)) or hub_settings.is_offline(),
        json=word("format", "text") == "json",
        pkg=file("pkg"),
        into=absolute(word("into")) if "into" in values else None,
        many=many.many(values, os.environ, MODEL_NAMES),
    )


def _reference(values: Mapping[str, object]) -> Reference | None:
    named = [name for name in MODEL_NAMES if name in values]
    if not named:
        return None
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} all name a model", "give one of them")
    given = str(values[named[0]])
    if named[0] in ("gguf_path", "safetensors_dir"):
        path = absolute(given)
        if not path.exists():
            raise UsageError(f"{named[0]}={given}: {path} does not exist")
        reference = existing(given, path)
        if (reference.kind == "folder") != (named[0] == "safetensors_dir"):
            raise UsageError(f"{named[0]}={given}: {path} is a {reference.kind}")
    else:
        unsaid = named[0] == "hf_model" and not given.startswith("hf:")
        reference = parse(f"hf:{given}" if unsaid else given)
    if "revision" in values:
        if reference.kind != "hub":
            raise UsageError("revision: is for Hugging Face repositories only")
        if reference.revision and reference.revision != values["revision"]:
            raise UsageError(
                f"revision={values['revision']} and @{reference.revision} contradict each other"
            )
        reference = replace(reference, revision=str(values["revision"]))
    for name in ("filename", "pattern"):
        if name in values and reference.kind != "hub":
            raise UsageError(f"{name}: is for Hugging Face repositories only")
    return reference


def _mmproj(reference: Reference | None, given: str) -> tuple[Path | None, str]:
    """`mmproj=` as a file of the user's own, or as what it means inside a repository."""
    if given.lower() in ("", projector.NONE):
        return None, given.lower()
    path = absolute(given)
    if path.is_file():
        return path, projector.NONE
    if reference is None or reference.kind != "hub" or path.suffix.lower() != ".gguf":
        raise UsageError(f"mmproj={given}: {path} is no file", "a path of a .gguf, or none")
    return None, given


def _quant(reference: Reference | None, asked: str) -> str:
    """The quant asked for, once: as `quant=` or in the reference."""
    if reference is None or not reference.quant:
        return asked
    try:
        named = quants.parse(reference.quant)
    except ValueError:
        named = reference.quant.upper()  # a repository's own name, such as UD-Q4_K_XL
    if asked and quants.canonical(asked) != quants.canonical(named):
        raise UsageError(f"quant={asked.lower()} and :{reference.quant} contradict each other")
    return named
