"""What an installed vLLM says of its own options. It is slow to ask: each version is asked once."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.process import capture, outcome
from pipeline.serve import flags
from pipeline.serve.flags import Flag

from . import vllm

VERSION = "from importlib.metadata import version; print('vllm', version('vllm'))"
VERSION_SECONDS, HELP_SECONDS = 60, 300  # Pixi may have to solve first, and vLLM imports torch
# `  --name VALUE, -n VALUE` or `  --name, --no-name` of argparse's help, up to the description.
LINE = re.compile(r"^ {2,4}(-.*?)(?: {2,}|$)")
NAME = re.compile(r"(?:^|, )(-{1,2}[A-Za-z][\w.-]*)")


class VllmOptions(Struct, frozen=True, kw_only=True):
    """A version of vLLM, and the options of its server."""

    version: str
    flags: Mapping[str, Flag]


def listed(words: Sequence[str], module: str, cache: Path) -> VllmOptions | None:
    """The options of the vLLM that `words` run Python with; None where there is none that tells."""
    status, out, _ = outcome([*words, "-c", VERSION], timeout=VERSION_SECONDS)
    match = re.search(r"^vllm (\S+)$", out, re.M) if status == 0 else None
    if match is None:
        return None
    version = match[1]
    if version == vllm.version():
        return VllmOptions(version=version, flags=vllm.flags())
    known = cache / f"vllm-{re.sub(r'[^A-Za-z0-9.+-]', '_', version)}.json"
    options = flags.stored(known)
    if options is None:
        text = capture([*words, "-m", module, "--help=all"], timeout=HELP_SECONDS)
        options = parse(text or "")
        if "served-model-name" not in options:
            return None
        with contextlib.suppress(OSError):  # asked again next time
            flags.store(known, options)
    return VllmOptions(version=version, flags=options | vllm.OURS)


def parse(text: str) -> dict[str, Flag]:
    """Every long name without its dashes, in argparse's help."""
    options: dict[str, Flag] = {}
    for line in text.splitlines():
        if match := LINE.match(line):
            names = tuple(NAME.findall(match[1]))
            value = re.match(r"-{1,2}[\w.-]+ (.+?)(?:, -|$)", match[1])
            for name in names:
                if name.startswith("--"):
                    options[name[2:]] = Flag(name, value[1] if value else "", names)
    return {name: _with_kind(name, flag) for name, flag in options.items()}


def _with_kind(name: str, flag: Flag) -> Flag:
    """argparse shows choices, but not what is a number: that is as in the version listed here."""
    listed = vllm.flags().get(name, flag)
    is_number = flag.value and not flag.choices and listed.value in vllm.NUMBERS
    return replace(flag, value=listed.value) if is_number else flag
