"""The bill of materials of the image that this runs in: the distribution's packages, Python's, and
llama.cpp by the bill of its package."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from pipeline.bins.package.manifest import MANIFEST
from pipeline.core import sbom
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY
from pipeline.core.process import outcome
from pipeline.core.sbom import Component
from pipeline.core.store.hashing import sha256

from .ray.environment import IMAGES_OWN

FORM = "${db:Status-Status}\t${Package}\t${Version}\t${Architecture}\n"
LOCK = REPOSITORY / "requirements" / "run.txt"


def text(environ: Mapping[str, str]) -> str:
    """The image's bill. Raises PipelineError where the distribution's packages are not known."""
    subject = Component(
        kind="container",
        name=environ.get("SERVICE_NAME") or "llama-pipeline",
        version=environ.get("SERVICE_VERSION", ""),
        notes={"llama-pipeline:requirements-sha256": sha256(LOCK)},
    )
    programs = Path(environ.get("LLAMA_SERVER_BINS_DIR") or os.devnull).parent
    llama_cpp, listed = _llama_cpp(programs)
    return sbom.text(subject, [*_distribution(), *_python(), *llama_cpp], listed)


def _distribution() -> Iterator[Component]:
    """What dpkg has installed."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    status, out, err = outcome(["dpkg-query", "--show", f"--showformat={FORM}"])
    if status:
        raise PipelineError(
            f"dpkg-query ended with {status}: {err.strip()[:300]}",
            "only images of Debian and Ubuntu have a bill of materials",
        )
    name, version = release.get("ID", "debian"), release.get("VERSION_ID", "")
    yield Component(kind="operating-system", name=name, version=version)
    for line in sorted(out.splitlines()):
        state, package, version, machine = line.split("\t")
        if state == "installed":
            distribution = f"{name}-{release['VERSION_ID']}" if "VERSION_ID" in release else name
            purl = f"pkg:deb/{name}/{package}@{quote(version, safe='')}"
            yield Component(
                kind="library",
                name=package,
                version=version,
                purl=f"{purl}?arch={machine}&distro={distribution}",
            )


def _python() -> Iterator[Component]:
    """Python, and the packages of its environment and of Ray's."""
    yield Component(kind="platform", name="Python", version=platform.python_version())
    of_ray = map(str, IMAGES_OWN.glob("lib/*/site-packages"))
    found = {}
    for each in metadata.distributions(path=[*sys.path, *of_ray]):
        name = re.sub(r"[-_.]+", "-", each.name).lower()
        found[name, each.version] = Component(
            kind="library",
            name=name,
            version=each.version,
            purl=f"pkg:pypi/{name}@{quote(each.version, safe='')}",
        )
    yield from (found[key] for key in sorted(found))


def _llama_cpp(programs: Path) -> tuple[list[Component], list[dict[str, object]]]:
    """llama.cpp as a component, or what the bill of its package lists."""
    manifest, bill = programs / MANIFEST, programs / sbom.NAME
    if bill.is_file():
        return [], json.loads(bill.read_text(encoding="utf-8"))["components"]
    if not manifest.is_file():
        return [], []
    commit = str(json.loads(manifest.read_text(encoding="utf-8"))["commit"])
    purl = f"pkg:github/ggml-org/llama.cpp@{commit}"
    return [Component(kind="application", name="llama.cpp", version=commit, purl=purl)], []
