"""What a container's variables name to be started. Nothing here has an effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute
from pipeline.serve.config import named
from pipeline.serve.server import LLAMA_CPP, VLLM

GET_PACKAGE, PACKAGE = "AUTO_INFER_LLAMA_CPP_GET_PKG_ON_BOOT", "AUTO_INFER_LLAMA_CPP_PKG_PATH"
ON_BOOT = {LLAMA_CPP: "AUTO_INFER_LLAMA_CPP_ON_BOOT", VLLM: "AUTO_INFER_VLLM_ON_BOOT"}
YES, NO = ("1", "true"), ("", "0", "false")


class BootSource(Struct, frozen=True, kw_only=True):
    """Servers to start: the arguments of `up` or `serve`, and the name of their folder (see
    `state.folder`)."""

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
    switches = {name: _is_on(environ, name, errors) for name in (GET_PACKAGE, *ON_BOOT.values())}
    files = {ON_BOOT[engine]: variable for engine, variable in named.CONFIGS.items()}
    for switch, variable in {GET_PACKAGE: PACKAGE, **files}.items():
        if switches[switch] and not _text(environ, variable):
            errors.append(f"{switch} is set, but {variable} names no file")
    sources = [
        source(environ, engine)
        for engine in named.CONFIGS
        if switches[ON_BOOT[engine]] and _text(environ, named.CONFIGS[engine])
    ]
    if len({item.name for item in sources}) < len(sources):
        names = " and ".join(named.CONFIGS.values())
        errors.append(f"{names} name the same file: start it once; control.engine mixes engines")
    if command and not command[0]:
        errors.append("the command's first word is empty: it names no program")
    if errors:
        raise UsageError("\n".join(errors), "docs/container.md lists the variables")
    return Boot(
        package=str(absolute(_text(environ, PACKAGE))) if switches[GET_PACKAGE] else "",
        sources=(*sources, *_profile(environ)),
        command=tuple(command),
    )


def source(environ: Mapping[str, str], engine: str) -> BootSource:
    """The servers of the file that the environment names for `engine`. Raises UsageError."""
    variable = named.CONFIGS[engine]
    if not (text := _text(environ, variable)):
        raise UsageError(f"{variable} names no file", "set it to the path of a TOML file")
    file = named.of_file(text)
    engines = ("engine=vllm",) if engine == VLLM else ()
    return BootSource(words=(f"config={file}", *engines), name=file)


def _profile(environ: Mapping[str, str]) -> tuple[BootSource, ...]:
    profile = _text(environ, named.PROFILE)
    if not profile:
        return ()
    name = named.of_profile(profile, environ)
    return (BootSource(words=(f"profile={profile}",), name=name, is_profile=True),)


def _is_on(environ: Mapping[str, str], name: str, errors: list[str]) -> bool:
    value = _text(environ, name).lower()
    if value not in (*YES, *NO):
        errors.append(f"{name}={value}: must be 1 or true, or 0 or false")
    return value in YES


def _text(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip()
