"""A configuration as a systemd service."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

UNIT = """\
[Unit]
Description=llama-pipeline: {config}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
WorkingDirectory={folder}
{environment}ExecStart={command}
# The supervisor stops its servers itself; whatever is left after the timeout is killed.
KillMode=mixed
# It makes a control group for each server, by which it finds all that the server has started.
Delegate=yes
TimeoutStopSec={timeout:.0f}
Restart=on-failure
RestartSec=5
# What fails again, such as a wrong configuration, is tried less and less often. Older ones than
# systemd 254 do not know these two, say so, and go on.
RestartSteps=8
RestartMaxDelaySec=300

[Install]
WantedBy=default.target
"""


def systemd_unit(
    config: str,
    command: Sequence[str],
    *,
    folder: Path,
    env: Mapping[str, str],
    stop_timeout: float,
) -> str:
    """The text of a user service that runs `command` in `folder`, in the foreground.
    `stop_timeout` is the longest of its servers', in seconds."""
    return UNIT.format(
        config=_plain(config),
        folder=_plain(str(folder)),
        environment="".join(f"Environment={_quoted(f'{x}={y}')}\n" for x, y in env.items()),
        command=" ".join(_quoted(word).replace("$", "$$") for word in command),
        timeout=stop_timeout + 15,
    )


def _plain(text: str) -> str:
    """A value that extends to the end of its line."""
    return " ".join(text.replace("%", "%%").split("\n"))


def _quoted(word: str) -> str:
    """One word of a list, quoted for systemd."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./$-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
