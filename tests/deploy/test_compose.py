"""docker/compose.yaml on Docker's own engine: clients on this machine, the key, stops, starts."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY, free_port, get, wait_for
from engines import Docker

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux"),
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.xdist_group("images"),
]
SERVICE = "llama-cpu"
FILES = ("stack.env", "service.env")
# A check each 30 s is for servers that run for weeks.
OFTEN = f"services: {{{SERVICE}: {{healthcheck: {{interval: 1s}}}}}}"


@dataclass(frozen=True)
class Stack:
    """A project of Compose's with copies of both files."""

    docker: Docker
    project: str
    folder: Path
    port: int
    key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, *words: str, check: bool = True) -> str:
        files = [REPOSITORY / "docker" / "compose.yaml", self.folder / "often.yaml"]
        where = [x for file in files for x in ("--file", str(file))]
        where += [x for name in FILES for x in ("--env-file", str(self.folder / name))]
        return self.docker("compose", "--project-name", self.project, *where, *words, check=check)

    @property
    def container(self) -> str:
        return f"{self.project}-{SERVICE}-1"

    def answers(self) -> bool:
        try:
            return bool(get(f"{self.url}/health"))
        except OSError:
            return False


@pytest.fixture
def stack(docker: Docker, image: str, shared: Path, tmp_path: Path) -> Iterator[Stack]:
    """With a folder of models whose name has a space and an umlaut, and a key."""
    folder, port, key = tmp_path / "stäck of mine", free_port(), uuid.uuid4().hex
    config = folder / "config"
    config.mkdir(parents=True)
    (config / "llm_profiles.yaml").write_text(
        "profiles: {tiny: {llamacpp: {model_root: /models, hf_filename: tiny.gguf}}}\n"
    )
    (folder / "often.yaml").write_text(OFTEN)
    (folder / "key").write_text(key)
    (folder / "key").chmod(0o644)
    version = f"test-{uuid.uuid4().hex[:8]}"
    docker("tag", image, f"llama-pipeline:{version}-cpu")
    mine = {
        "COMPOSE_PROFILES": "cpu",
        "STACK_ENV": str(folder / "stack.env"),
        "SERVICE_ENV": str(folder / "service.env"),
        "SERVICE_VERSION": version,
        "LLM_CACHE_DIR": str(shared),
        "LLM_CACHE_MODE": "ro",
        "LLM_CONFIG_DIR": str(config),
        "LLM_API_KEY_FILE": str(folder / "key"),
        "LLM_PROFILE_NAME": "tiny",
        "LLAMACPP_HOST_PORT": str(port),
    }
    for name in FILES:
        lines = (REPOSITORY / "docker" / name).read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.partition("=")[0] not in mine]
        given = [f"{key}={value}" for key, value in mine.items()] if name == FILES[0] else []
        (folder / name).write_text("\n".join([*kept, *given, ""]), encoding="utf-8")
    made = Stack(docker, f"test-{version}", folder, port, key)
    try:
        yield made
    finally:
        made("down", "--volumes", "--timeout", "1", check=False)
        docker("rmi", f"llama-pipeline:{version}-cpu", check=False)


def test_a_service_from_up_to_down(stack: Stack) -> None:
    stack("up", "--detach", "--wait")  # healthy, or it fails
    assert stack.answers()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{stack.url}/v1/models")
    ask = urllib.request.Request(f"{stack.url}/v1/completions", b'{"prompt": "a", "max_tokens": 2}')
    ask.add_header("Authorization", f"Bearer {stack.key}")
    with urllib.request.urlopen(ask, timeout=60) as answer:
        assert json.load(answer)["choices"]
    assert "ready in" in stack("logs", SERVICE)

    # As when the whole machine stops and starts: it ends without a failure, and is up again.
    stack("exec", SERVICE, "sh", "-c", "kill 1")
    restarts = ("inspect", "--format", "{{.RestartCount}}", stack.container)
    wait_for(lambda: stack.docker(*restarts) == "1" and stack.answers(), 60)

    began = time.monotonic()
    stack("stop")
    assert time.monotonic() - began < 10
    (told,) = json.loads(stack.docker("inspect", stack.container))
    assert told["State"]["ExitCode"] == 0, (
        "it ended by itself: what is killed after 10 s has another status"
    )
    assert told["HostConfig"]["ReadonlyRootfs"] and told["HostConfig"]["CapDrop"] == ["ALL"]
    stack("down", "--volumes")
    assert stack.docker("ps", "--all", "--quiet", "--filter", f"name={stack.project}") == ""


def test_memory_has_the_limit_of_the_container(docker: Docker, image: str, shared: Path) -> None:
    """More than that is killed, whatever the machine has."""
    words = ("--rm", "--memory=400m", f"--volume={shared}:/models:ro", image)
    told = docker("run", *words, "doit", "plan", "model=/models/tiny.gguf", "format=json")
    assert 0 < json.loads(told)["memory"]["available_bytes"] < 400 * 2**20
