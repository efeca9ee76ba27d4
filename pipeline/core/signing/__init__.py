"""Signatures of files and model folders by a key of the user's, with OpenSSF's model-signing.

It runs in an environment of its own, which all checkouts share: it brings 35 other packages. In
the sandbox it has no network, so nothing is sent to Sigstore's services.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.core import environment, log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.packages import PackageFolder
from pipeline.core.paths import Home
from pipeline.core.process import outcome, run
from pipeline.core.sandbox import Sandbox
from pipeline.core.statement import SIGNATURE
from pipeline.core.store.locks import mark_used
from pipeline.core.store.publish import disk_errors, publish_beside

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DRIVER = Path(__file__).with_name("model_signing_driver.py")
OF_FOLDER = "model.sig"  # in the folder; model-signing's own name for it
DOWNLOAD_BYTES, INSTALLED_BYTES = 15_000_000, 75_000_000
MEMORY = 2 * 1024**3
SLOWEST = 20_000_000  # bytes that the slowest machine hashes in a second
KEY_HINT = (
    "an unencrypted key for one of NIST's curves as PEM: "
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
    "openssl ec -in key.pem -pubout -out key.pub"
)


def signature_of(target: Path) -> Path:
    """Where the signature of a file or folder is, unless another place is named."""
    return target / OF_FOLDER if target.is_dir() else target.with_name(target.name + SIGNATURE)


def sign(targets: Sequence[Path], key: Path, home: Home, *, offline: bool = False) -> list[Path]:
    """Sign files and folders with a private key; returns the signatures. One that is right already
    stays as it is. Raises PipelineError."""
    signatures = [signature_of(target) for target in targets]
    top = make(home, offline=offline)
    with tempfile.TemporaryDirectory() as scratch:
        made = [Path(scratch, str(number)) for number in range(len(targets))]
        rows = zip(targets, signatures, made, strict=True)
        words = ["sign", str(key), scratch, *(json.dumps([*map(str, row)]) for row in rows)]
        problems = _run(top, words, [*targets, *signatures, key], [Path(scratch)])
        for target, path, new in zip(targets, signatures, made, strict=True):
            if why := problems[str(target)]:
                raise PipelineError(f"{target}: cannot be signed: {why}")
            if new.exists():
                with disk_errors(path.parent):
                    publish_beside(path, new.read_bytes())
            log.info(f"{'signed' if new.exists() else 'signed already'}: {path}")
    return signatures


def verify(
    signatures: Mapping[Path, Path], public_key: Path, home: Home, *, offline: bool = False
) -> dict[Path, str]:
    """What is wrong with each file or folder, by its signature; empty: nothing. Raises
    PipelineError where that cannot be found out."""
    present = {target: path for target, path in signatures.items() if path.is_file()}
    problems = {}
    if present:
        top = make(home, offline=offline)
        words = [json.dumps([str(target), str(path)]) for target, path in present.items()]
        read = [public_key, *present, *present.values()]
        answers = _run(top, ["verify", str(public_key), "", *words], read, [])
        problems = {target: answers[str(target)] for target in present}
    return {
        target: problems.get(target, f"has no signature: there is no {path}")
        for target, path in signatures.items()
    }


def _run(
    top: Path, words: Sequence[str], read: Iterable[Path], write: Sequence[Path]
) -> dict[str, str]:
    """Run model-signing; returns what is wrong with each target. Raises PipelineError."""
    python, read = Path(sys.executable), [*read]
    files = [file for path in read for file in (path, *path.rglob("*")) if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    # A folder in a Hugging Face cache has links to the files of its repository.
    sandbox = Sandbox(
        programs=[python],
        read=[top, DRIVER, *read, *{file.resolve() for file in files}],
        write=write,
        memory=MEMORY,
    )
    status, out, err = outcome(
        [python, "-I", "-S", "-B", DRIVER, top, *words],
        timeout=120 + total / SLOWEST,
        env=environment.tools(os.environ),
        sandbox=sandbox,
    )
    try:
        answers = {str(target): str(why) for target, why in json.loads(out).items()}
    except (ValueError, AttributeError):
        last = (err.strip().splitlines() or [f"status {status}"])[-1]
        raise PipelineError(
            f"model-signing ended with status {status}: {last[:300]}",
            f"remove {top}, and run the same command again: it is installed anew",
        ) from None
    if why := answers.get("key"):
        action, key = words[:2]
        name = "key" if action == "sign" else "public_key"
        raise UsageError(f"{name}={key}: cannot be used: {why}", KEY_HINT)
    return answers


def folder(home: Home) -> PackageFolder:
    """The folder with model-signing."""
    return PackageFolder(
        home=home,
        title="model-signing",
        name="signing",
        requirements=REQUIREMENTS,
        depends={
            "step": "signing",
            "python": sys.implementation.cache_tag,
            "platform": sys.platform,
        },
        stamp="signing",
        download=DOWNLOAD_BYTES,
        installed=INSTALLED_BYTES,
    )


def make(home: Home, *, offline: bool = False) -> Path:
    """Install model-signing, unless it is there already; its folder. Raises PipelineError."""
    target, log_file = folder(home), home.logs / "signing.log"

    def compile_all(made: Path) -> None:  # in the sandbox it cannot write what Python has compiled
        run([sys.executable, "-I", "-m", "compileall", "-q", made], log=log_file)

    if target.is_current():
        mark_used(target.path)
    else:
        target.make(log_file, compile_all, offline=offline)
    return target.path
