"""A hub that means harm, and the commands that ask it: each ends soon, small and with one error.

Each attack of `fakes/hostile.py` × each command, in a process of its own whose memory is limited
and measured. A few run always, all with `-m trust`.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import forked
import pytest
from conftest import Doit
from fakes import hostile
from figures import Figure

pytestmark = pytest.mark.build

MIB = 1024 * 1024
LIMIT = 2048 * MIB  # of addresses, each thread's stack included: an attack that works ends there
MOST_MEMORY = 400 * MIB  # a run against an honest hub takes some 120
MOST_SECONDS = 30.0  # on a busy machine; the bounds below add up to 6
# As the product has them, but for the seconds, which a test cannot wait for.
BOUNDS: dict[str, Any] = {
    "pipeline.models.hub.ASK_TIMEOUT": 1.0,
    "pipeline.models.hub.LONGEST_LOOK_UP": 2.0,
    "pipeline.core.bounded.HEADERS_SECONDS": 1.0,
    "pipeline.core.download.remote.SLOWEST_SECONDS": 0.5,
    "pipeline.core.download.remote.RETRIES": 2,
}
LIST = {"bytes": 16 * MIB, "seconds": 3.0}
RUN = """
import importlib, json, resource, sys
given = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (given["limit"], given["limit"]))
from pipeline.core import bounded, log
from pipeline.models import hub
hub.LIST = bounded.Bound(**given["list"])
for name, value in given["bounds"].items():
    module, _, constant = name.rpartition(".")
    setattr(importlib.import_module(module), constant, value)
if not given["guarded"]:
    log.guard_streams = lambda: None
sys.argv = ["doitw", *given["words"]]
from pipeline.__main__ import main
try:
    main()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak {peak}", file=sys.__stderr__, flush=True)
"""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
COMMANDS = {
    "plan": ("plan", "model=hf:org/model"),
    "prepare": ("prepare", "model=hf:org/model"),
    "lock": ("lock", "model=hf:org/model"),
}
ATTACKS = {**hostile.ON_CLIENTS, **hostile.ON_HUB}
ALWAYS = {("plan", name) for name in ("gzip_bomb", "drip_headers", "many_files", "file_controls")}


class Run:
    """How a command ended."""

    def __init__(
        self,
        doit: Doit,
        words: tuple[str, ...],
        url: str,
        patience: float = MOST_SECONDS,
        **given: Any,
    ) -> None:
        given = {
            **{"limit": LIMIT, "list": LIST, "bounds": BOUNDS, "guarded": True, "words": words},
            **given,
        }
        env = doit.env | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(doit.home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "NO_PROXY": "127.0.0.1",
        }
        began = time.monotonic()
        self.status, self.out, self.err = forked.run(("-c", RUN, json.dumps(given)), env, patience)
        self.seconds = time.monotonic() - began
        peak = re.search(r"^peak (\d+)\n", self.err, re.M)
        self.memory = int(peak[1]) * 1024 if peak else 0

    def problems(self) -> list[str]:
        """What an attack achieved; empty where it failed."""
        said = self.out + self.err
        return [
            *([f"{self.seconds:.0f} s"] if self.seconds > MOST_SECONDS or not self.memory else []),
            *([f"{self.memory / MIB:.0f} MiB"] if self.memory > MOST_MEMORY else []),
            *([f"status {self.status}"] if self.status not in (1, 3) else []),
            *(["a traceback"] if "Traceback" in said or "MemoryError" in said else []),
            *(["control characters"] if CONTROLS.search(said) else []),
            *(["no error with a hint"] if not re.search(r"error: .*\n +hint: ", said) else []),
            *([f"{len(said)} characters"] if len(said) > 20_000 else []),
        ]


@pytest.mark.parametrize(
    ("command", "attack"),
    [
        pytest.param(
            command, attack, marks=() if (command, attack) in ALWAYS else pytest.mark.trust
        )
        for command in COMMANDS
        for attack in (hostile.ON_CLIENTS if command == "lock" else ATTACKS)
    ],
)
def test_an_attack_fails(doit: Doit, figure: Figure, command: str, attack: str) -> None:
    with hostile.start(ATTACKS[attack]) as server:
        run = Run(doit, COMMANDS[command], server.url)
    assert run.problems() == [], f"{run.out}\n{run.err}"
    assert "/api/models/org/model" in "".join(server.paths), "the attack was not met"
    if isinstance(ATTACKS[attack], hostile.Document):
        assert "could not be reached" not in run.err, "the document was not read"
    stored = [path for path in (doit.home / "models").rglob("*") if path.suffix != ".lock"]
    assert not [path for path in stored if path.is_file()], "nothing of it is kept"
    figure("attacks of a hub that failed", 1)


@pytest.mark.trust
@pytest.mark.parametrize("attack", ["gzip_bomb", "files_control"])
def test_what_is_on_disk_is_listed_all_the_same(doit: Doit, attack: str) -> None:
    with hostile.start(ATTACKS[attack]) as server:
        Run(doit, COMMANDS["plan"], server.url)
        listed = Run(doit, ("models",), server.url)
    assert listed.status == 0 and "no model is in" in listed.err


# The harness goes red where a bound is taken out.


@pytest.mark.parametrize(
    ("attack", "without", "seen"),
    [
        ("gzip_bomb", {"list": {"bytes": 1 << 50, "seconds": 1e6}, "limit": 1024 * MIB}, "MiB"),
        ("files_control", {"guarded": False}, "control characters"),
        pytest.param(
            "drip_body", {"list": {"bytes": 1 << 50, "seconds": 1e6}}, " s", marks=pytest.mark.trust
        ),
        pytest.param(
            "million_files",
            {
                "list": {"bytes": 1 << 50, "seconds": 60},
                "bounds": {"pipeline.models.hub.MOST_FILES": 10**9},
            },
            "status",
            marks=pytest.mark.trust,
        ),
    ],
)
def test_without_its_bound_an_attack_is_seen(
    doit: Doit, attack: str, without: dict[str, Any], seen: str
) -> None:
    with hostile.start(ATTACKS[attack]) as server:
        run = Run(doit, COMMANDS["plan"], server.url, patience=12, **without)
    assert any(seen in problem for problem in run.problems()), f"{run.out}\n{run.err}"
