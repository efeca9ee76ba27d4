"""What a container's variables name to be started. Nothing here has an effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute, one_path
from pipeline.serve.config import named
from pipeline.serve.server import LLAMA_CPP, VLLM

GET_PACKAGE, PACKAGE = "AUTO_INFER_LLAMA_CPP_GET_PKG_ON_BOOT", "AUTO_INFER_LLAMA_CPP_PKG_PATH"
ON_BOOT = {LLAMA_CPP: "AUTO_INFER_LLAMA_CPP_ON_BOOT", VLLM: "AUTO_INFER_VLLM_ON_BOOT"}
# Each switch, with the variable that names its file.
FILES = {GET_PACKAGE: PACKAGE, **{ON_BOOT[x]: variable for x, variable in named.CONFIGS.items()}}
YES, NO = ("1", "true"), ("", "0", "false")


class BootSource(Struct, frozen=True, kw_only=True):
    """Servers to start: arguments of `up` or `serve`, and their name in `state.folder`."""

    words: tuple[str, ...]
    name: str
    is_profile: bool = False


class Boot(Struct, frozen=True, kw_only=True):
    """What to do: install, start, run a command."""

    package: str = ""  # an archive of llama.cpp's programs
    sources: tuple[BootSource, ...] = ()
    command: tuple[str, ...] = ()


def boot(environ: Mapping[str, str], command: Sequence[str] = ()) -> Boot:
    """What the environment names. Raises UsageError with every error."""
    errors: list[str] = []
    files = {
        switch: _text(environ, variable)
        for switch, variable in FILES.items()
        if _is_on(environ, switch, errors)
    }
    for switch, file in files.items():
        if not file:
            errors.append(f"{switch} is set, but {FILES[switch]} names no file")
    sources = [source(environ, engine) for engine, switch in ON_BOOT.items() if files.get(switch)]
    if len({item.name for item in sources}) < len(sources):
        names = " and ".join(named.CONFIGS.values())
        errors.append(f"{names} name the same file: start it once; control.engine mixes engines")
    if command and not command[0]:
        errors.append("the command's first word is empty: it names no program")
    if errors:
        raise UsageError("\n".join(errors), "docs/container.md lists the variables")
    if profile := _text(environ, named.PROFILE):
        name = named.of_profile(profile, environ)
        sources.append(BootSource(words=(f"profile={profile}",), name=name, is_profile=True))
    package = files.get(GET_PACKAGE)
    return Boot(
        package=str(absolute(package)) if package else "",
        sources=tuple(sources),
        command=tuple(command),
    )


def source(environ: Mapping[str, str], engine: str) -> BootSource:
    """The servers of the file that the environment names for `engine`. Raises UsageError."""
    variable = named.CONFIGS[engine]
    if not (text := _text(environ, variable)):
        raise UsageError(f"{variable} names no file", "set it to the path of a TOML file")
    file = str(one_path(text))
    engines = ("engine=vllm",) if engine == VLLM else ()
    return BootSource(words=(f"config={file}", *engines), name=file)


def _is_on(environ: Mapping[str, str], name: str, errors: list[str]) -> bool:
    value = _text(environ, name).lower()
    if value not in (*YES, *NO):
        errors.append(f"{name}={value}: must be 1 or true, or 0 or false")
    return value in YES


def _text(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip()
