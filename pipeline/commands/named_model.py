"""Which model the variables of the command line name, and which of its files."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from msgspec.structs import replace

from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute
from pipeline.models import hub_access, quants
from pipeline.models.reference import (
    NO_PROJECTOR,
    PROJECTOR,
    SCHEME,
    Reference,
    existing,
    exists,
    is_file,
    missing,
    parse,
    require_revision,
)

from .variables import MODEL_NAMES, ModelVariables


def read(
    model: ModelVariables, *, by_name: bool = False
) -> tuple[Reference | None, ModelVariables]:
    """The model that is named, and its variables with what its reference says of them: which file,
    and which quant. `by_name`: it may be a name that `models` prints, of which nothing is known
    here. Raises UsageError."""
    try:
        reference = _reference(model)
    except UsageError:
        if not (by_name and model.model):
            raise
        reference = None
    if reference is None:
        return None, model
    if reference.kind == "hub":
        hub_access.check_environment()
    return reference, _with_address(reference, model).replace(quant=_quant(reference, model.quant))


def _reference(model: ModelVariables) -> Reference | None:
    named = [name for name in MODEL_NAMES if getattr(model, name)]
    if not named:
        return None
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} all name a model", "give one of them")
    variable, value = named[0], str(getattr(model, named[0]))
    if variable in ("gguf_path", "safetensors_dir"):
        reference = _own(variable, value)
    else:
        is_bare = variable == "hf_model" and not value.startswith("hf:")
        reference = parse(f"hf:{value}" if is_bare else value)
    if model.revision:
        if reference.kind != "hub":
            raise UsageError("revision: is for Hugging Face repositories only")
        if reference.revision and reference.revision != model.revision:
            raise UsageError(
                f"revision={model.revision} and @{reference.revision} contradict each other"
            )
        reference = replace(reference, revision=model.revision)
    if reference.revision:
        source = f"revision={model.revision}" if model.revision else f"model={reference.text}"
        require_revision(reference.revision, source)
    for name in ("filename", "pattern"):
        if getattr(model, name) and reference.kind != "hub":
            raise UsageError(f"{name}: is for Hugging Face repositories only")
    return reference


def _own(variable: str, value: str) -> Reference:
    """The file or folder that `variable` names. Raises UsageError."""
    if SCHEME.match(value):
        raise UsageError(f"{variable}={value}: is an address", f"write model={value}")
    path = absolute(value)
    if not exists(path):
        raise missing(variable, value, path)
    reference = existing(value, path)
    if (reference.kind == "folder") != (variable == "safetensors_dir"):
        raise UsageError(f"{variable}={value}: {path} is a {reference.kind}")
    return reference


def _with_address(reference: Reference, model: ModelVariables) -> ModelVariables:
    """The variables of a model, with the file that an address names."""
    if not (reference.filename or reference.pattern):
        return model
    for name in ("filename", "pattern"):
        if getattr(model, name):
            raise UsageError(f"{name}= and the address contradict each other", "leave one out")
    if PROJECTOR.search(reference.filename):
        raise UsageError(
            f"model={reference.text}: is a projector, by its name, not a model",
            f"pass model={reference.repo} mmproj={PurePosixPath(reference.filename).name}",
        )
    return model.replace(filename=reference.filename, pattern=reference.pattern)


def projector(reference: Reference | None, value: str) -> tuple[Path | None, str]:
    """`mmproj=` as a file of the user's own, or as what it means inside a repository."""
    if value.lower() in ("", NO_PROJECTOR):
        return None, value.lower()
    path = absolute(value)
    if is_file(path):
        return path, NO_PROJECTOR
    if reference is None or reference.kind != "hub" or path.suffix.lower() != ".gguf":
        hint = "a path of a .gguf, or none"
        raise missing("mmproj", value, path, hint, why="is not a file")
    return None, value


def _quant(reference: Reference, value: str) -> str:
    """The requested quant: of `quant=`, or of the reference."""
    if not reference.quant:
        return value
    try:
        named = quants.parse(reference.quant)
    except ValueError:
        named = reference.quant.upper()  # a repository's own name, such as UD-Q4_K_XL
    if value and quants.canonical(value) != quants.canonical(named):
        raise UsageError(f"quant={value.lower()} and :{reference.quant} contradict each other")
    return named
