"""GitHub's attestations of upstream's releases: which workflow of which repository built a file.

GitHub's own program `gh` checks them. Without it, or where upstream published none, the release's
sha256 still holds; `attestation=required` insists.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pipeline.bins.build_options import AUTO, OFF, REQUIRED
from pipeline.core import log
from pipeline.core.environment import without_credentials
from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome

from .github import UPSTREAM

SECONDS = 120
CREDENTIALS = ("GH_", "GITHUB_")  # its own
# As gh's pkg/cmd/attestation prints it.
NONE = re.compile(r"no attestations found|\bHTTP 404\b", re.IGNORECASE)
REFUSED = re.compile(
    r"verification failed|failed to verify|failed verification|"
    r"(does not|doesn't|not) match|no matching",
    re.IGNORECASE,
)
WITHOUT = "attestation=off takes it without, checked by the release's sha256 alone"


def require(archive: Path, wanted: str, *, offline: bool = False) -> None:
    """Check the attestation of a downloaded file. `wanted`: `auto` reports where it cannot be
    checked, `required` refuses the file then, `off` does not look; else the path of a bundle of
    attestations that must hold. Raises PipelineError."""
    if wanted == OFF:
        return
    bundle = "" if wanted in (AUTO, REQUIRED) else wanted
    gh = shutil.which("gh")
    if gh is None:
        _absent(archive, wanted, "GitHub's program gh is not installed")
    elif offline and not bundle:
        _absent(archive, wanted, "offline=1 forbids asking GitHub")
    else:
        _ask(gh, archive, wanted, bundle)


def argv(gh: str, archive: Path, bundle: str) -> list[str]:
    """The command line of gh."""
    more = ["--bundle", bundle] if bundle else []
    return [gh, "attestation", "verify", str(archive), "--repo", UPSTREAM, *more]


def _ask(gh: str, archive: Path, wanted: str, bundle: str) -> None:
    env = without_credentials(os.environ, keep=CREDENTIALS)
    status, out, err = outcome(argv(gh, archive, bundle), timeout=SECONDS, env=env)
    if status == 0:
        log.info(f"{archive.name}: attested by GitHub as built by {UPSTREAM}")
        return
    answer = f"{out}\n{err}".strip()
    last = answer.splitlines()[-1].strip()[:300] if answer else f"status {status}"
    if NONE.search(answer):
        _absent(archive, wanted, f"{UPSTREAM} has published none of it")
    elif bundle or REFUSED.search(answer):
        raise PipelineError(
            f"{archive.name}: its attestation does not hold: {last}",
            "the file is not what upstream's workflow built, or the attestation is of another file;"
            " it was not used",
        )
    else:
        _absent(archive, wanted, f"gh could not check it: {last}")


def _absent(archive: Path, wanted: str, why: str) -> None:
    """Report that there is no attestation to go by. Raises PipelineError where one is wanted."""
    if wanted != AUTO:
        raise PipelineError(f"{archive.name}: its attestation is not checked: {why}", WITHOUT)
    log.info(f"{archive.name}: its attestation is not checked: {why}")
