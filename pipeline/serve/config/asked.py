"""Values that llama-server alone can judge: devices of this machine, and what a file holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.bins import binaries
from pipeline.core.environment import servers
from pipeline.core.text import decoded
from pipeline.models import chat_template
from pipeline.serve import flags
from pipeline.serve.flags import RPC

from . import llama
from .configuration import beside
from .instances import cards
from .messages import shown
from .options import ResolvedOptions, expanded, with_paths, words, wrong_value

DEVICES = {"device", "spec-draft-device", "mmproj-device"}
OF_THE_MACHINE = DEVICES | {"override-tensor", "spec-draft-override-tensor"}
TEMPLATES = {"chat-template", "chat-template-file"}
FILES = {"json-schema-file", "chat-template-file"}


def errors(
    resolved: ResolvedOptions,
    asked: Collection[str],
    program: Path,
    folder: Path,
    environ: Mapping[str, str],
) -> Iterator[str]:
    """What `program` itself refuses of the options `asked`: it reads them, and ends. Relative paths
    start at `folder`. With --rpc there are devices of other machines, which are not asked for."""
    control = resolved.spec.control
    env = {**servers(environ), **cards(control.gpu_ids), **control.env}
    has_rpc = resolved.has(RPC)
    for name, value in expanded(resolved).items():
        flag = resolved.flags.get(name)
        names = flag.plain_names.intersection(asked) if flag else set()
        if not names or (has_rpc and names & OF_THE_MACHINE):
            continue
        if isinstance(value, bool) or wrong_value(name, value, flag):
            continue  # an error of its own
        given = value
        if names & FILES:
            given = with_paths(name, value, lambda text: str(beside(folder, text)))
            if not Path(str(given)).is_file():
                continue
        if names & TEMPLATES:
            why = _of_template(resolved, program, str(given), is_file=bool(names & FILES))
        else:
            why = flags.refusal(program, words({name: given}, resolved.flags), env)
        if why:
            here = f"; {_devices(program, env)}" if names & DEVICES else ""
            text = f" = {shown(value)}: llama-server refuses it: {why}{here}"
            yield resolved.spec.line(f"server.{name}", text)


def _of_template(resolved: ResolvedOptions, program: Path, given: str, *, is_file: bool) -> str:
    """Why it takes no prompts from a chat template; empty where it does, or where the template may
    be the name of one of its own."""
    with suppress(OSError, ValueError):  # an error of its own
        text = decoded(Path(given).read_bytes()) if is_file else given
        if "{" in text and not llama.takes_template_names(resolved):
            return chat_template.refusal(program, resolved.flags, text)
    return ""


def _devices(program: Path, env: Mapping[str, str]) -> str:
    listed = [device.partition(":")[0] for device in binaries.devices(program, env)]
    return f"here it has {', '.join(listed) or 'none'}"
