"""Ray's own Python environment: Ray with Serve, and what the pipeline itself needs."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from pipeline.core import environment, paths, python_environment
from pipeline.core.errors import UsageError
from pipeline.core.paths import REPOSITORY, Home
from pipeline.core.process import private
from pipeline.core.python_environment import INTO, WITH_HASHES, PythonEnvironment

REQUIREMENTS = REPOSITORY / "requirements" / "ray.txt"
IMAGES_OWN = REPOSITORY / ".ray"  # the environment that docker/Dockerfile makes
DOWNLOAD_BYTES = 160_000_000
INSTALLED_BYTES = 700_000_000
# A node that is cut off closes no connection. Ray's own defaults give it up after 65 s, and let it
# run until the kernel ends its connection to the head, a quarter of an hour.
CUT_OFF = {
    "RAY_health_check_period_ms": "3000",  # of which the head misses five
    "RAY_health_check_timeout_ms": "3000",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
COMMAND = ("-m", "ray.scripts.scripts")  # `ray`: its script names the Python that it was made with


def version() -> str:
    """The version of Ray that is pinned."""
    found = re.search(r"^ray(?:\[.*?\])?==(\S+)", REQUIREMENTS.read_text(encoding="utf-8"), re.M)
    if not found:
        raise ValueError(f"{REQUIREMENTS}: pins no ray")
    return found[1]


def installed(home: Home) -> PythonEnvironment:
    """The environment, whether or not it is there."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    return PythonEnvironment(
        home=home,
        name="ray",
        title="Ray",
        recipe=python_environment.recipe("ray", digest),
        packages=lambda: python_environment.required(REQUIREMENTS),
        pip_calls=_pip_calls,
        download_bytes=DOWNLOAD_BYTES,
        installed_bytes=INSTALLED_BYTES,
    )


def _pip_calls(python: Path) -> list[list[str]]:
    return [["--python", str(python), *INTO, *WITH_HASHES, str(REQUIREMENTS)]]


def token_file(environ: Mapping[str, str]) -> Path:
    """The file with the token of Ray's clusters, where Ray looks for it. Raises UsageError."""
    named = environ.get("RAY_AUTH_TOKEN_PATH", "").strip()
    return paths.absolute(named) if named else Path.home() / ".ray" / "auth_token"


def token(environ: Mapping[str, str]) -> str:
    """The token that Ray would send to a cluster; empty for none. Raises UsageError."""
    if environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return ""
    if named := environ.get("RAY_AUTH_TOKEN", "").strip():
        return named
    file = token_file(environ)
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: no token can be read from it: {error}") from None


def make_token(file: Path) -> bool:
    """Have a token in a file that only this user may read; whether it was made. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with open(file, "x", encoding="ascii", opener=private) as made:
            made.write(secrets.token_hex(32))
    except FileExistsError:
        return False
    return True


def with_token(file: Path) -> dict[str, str]:
    """The variables of a node whose cluster wants the token in a file: whoever has none can run
    nothing on it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


def variables(environ: Mapping[str, str], home: Home) -> dict[str, str]:
    """The variables of a node: the user's own with the token of the hub, where the pipeline is
    found, and its home. Nothing is reported to Ray's makers."""
    return {
        **CUT_OFF,
        **environment.without_credentials(environ, keep=("HF_", "RAY_")),
        "LLAMA_PIPELINE_CACHE": str(paths.cache(home)),
        "LLAMA_PIPELINE_HOME": str(home.root),
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
