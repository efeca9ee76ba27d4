"""The image: what is in it, what is not, and that it runs with nothing to write to."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from bills import invalid
from conftest import REPOSITORY, free_port
from engines import Buildah, Docker
from images import Machine
from supervisor_tools import stand_in

from pipeline.bins import binaries
from pipeline.core.pins import pins
from pipeline.serve import health

DOCKER = REPOSITORY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
linux = pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux")


def tool(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """One of the environment's programs."""
    program = shutil.which(name, path=Path(sys.executable).parent)
    assert program, f"{name} is in requirements/test.txt"
    return subprocess.run([program, *words], capture_output=True, text=True, cwd=REPOSITORY)


def test_hadolint_finds_nothing() -> None:
    done = tool("hadolint", "docker/Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_is_one() -> None:
    done = tool(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_fits_the_project() -> None:
    commits = set(re.findall(r"LLAMA_CPP_COMMIT=([0-9a-f]{40})", DOCKERFILE))
    assert commits == {pins().llama_cpp_commit}
    assert f"LLAMA_SERVER_BINS_DIR={binaries.IMAGES_OWN}" in DOCKERFILE
    defaults = re.findall(r"(?:ARG BINS=|\$\{BINS:-)(\w+)", DOCKERFILE)
    assert defaults == ["build", "build"], "buildah 1.28 needs the second one"


def compose() -> Any:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["llama", "llama-cpu"])
def test_the_services(name: str) -> None:
    service = compose()["services"][name]
    assert service["ports"] == ["${LLAMACPP_HOST_PORT:-11980}:8080"]
    assert service["environment"] == {"PUBLISHED_PORTS": "8080"}
    assert service["env_file"] == ["${STACK_ENV:-stack.env}", "${SERVICE_ENV:-service.env}"]
    assert service["volumes"][0] == "${LLM_CACHE_DIR:-models}:/models:${LLM_CACHE_MODE:-rw}"
    assert ("deploy" in service) == (name == "llama")
    assert service["profiles"] == (["cpu"] if name == "llama-cpu" else ["gpu"])
    assert service["build"]["target"] == "runtime"


def test_what_all_services_are_told() -> None:
    """Servers and the gateway listen for others, and ask for the key."""
    lines = (DOCKER / "stack.env").read_text(encoding="utf-8").splitlines()
    told = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    listens = {"host": told["LLAMACPP_HOST_OVERRIDE"]}
    listens["api_key_file"] = told["LLAMACPP_API_KEY_FILE_OVERRIDE"]
    assert listens["host"] == "0.0.0.0"
    for name in ("AUTO_INFER_LLAMA_CPP_OVERRIDES", "AUTO_INFER_VLLM_OVERRIDES"):
        over = json.loads(told[name].strip("'"))
        assert over == {"instance": {"server": listens}, "gateway": listens}


def test_every_variable_of_the_compose_file_is_explained() -> None:
    """In one of the two files, or on the page."""
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    told = "".join(
        file.read_text(encoding="utf-8")
        for file in (*DOCKER.glob("*.env"), REPOSITORY / "docs" / "container.md")
    )
    names = sorted({*re.findall(r"\$\{(\w+)", text)})
    assert [name for name in names if name not in told] == []


@linux
@pytest.mark.build
@pytest.mark.slow
@pytest.mark.xdist_group("images")
class TestBuilt:
    def test_what_it_says_of_itself(self, engine: Docker | Buildah, image: str) -> None:
        told = engine.config(image)
        assert told["User"] == "10001:10001"
        assert told["Labels"]["llama.cpp.commit"] == pins().llama_cpp_commit
        assert told["Labels"]["org.opencontainers.image.title"] == "under test"
        assert told["Labels"]["org.opencontainers.image.version"] == "1.2"
        assert told["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
        assert told["Entrypoint"][0] == "tini"
        assert {"SERVICE_NAME=under test", "SERVICE_VERSION=1.2"} <= {*told["Env"]}

    def test_no_compiler_and_no_tool_of_one(self, in_image: Machine) -> None:
        names = ("cc", "gcc", "g++", "c++", "ld", "as", "make", "cmake", "ninja", "nvcc")
        folders = ("/usr/bin", "/usr/local/bin", "/opt/llama-pipeline/.venv/bin")
        paths = [f"{folder}/{name}" for folder in folders for name in names]
        look = 'for path; do [ ! -e "$path" ] || echo "$path"; done'
        paths += ["/opt/llama-pipeline/tests", "/bin/sh"]
        assert in_image("sh", "-c", look, "sh", *paths).out == "/bin/sh\n"

    def test_its_bill_of_materials(self, in_image: Machine) -> None:
        data = json.loads(in_image("cat", "/opt/llama-pipeline/bom.json").out)
        assert invalid(data) == []
        found = {each["name"]: each for each in data["components"]}
        assert {"dpkg", "tini", "msgspec", "llama.cpp", "bin/llama-server"} <= found.keys()
        assert "cmake" not in found, "it was uninstalled"
        subject = data["metadata"]["component"]
        assert (subject["name"], subject["version"]) == ("under test", "1.2")

    def test_tasks_that_ask_for_tools_that_are_not_there(self, in_image: Machine) -> None:
        told = json.loads(in_image("doit", "doctor", "format=json").out)
        assert "cmake" not in told["tools"]
        assert in_image("doit", "recipe").out
        in_image("doit", "prune")  # which asks for the recipe of Ray's environment, too

    def test_logs_go_to_the_temporary_folder(self, in_image: Machine) -> None:
        file = in_image.folder / "logs.toml"
        file.write_text(f'[instance.chat.server]\nmodel = "{in_image.folder}/tiny.gguf"\n')
        assert " /tmp/chat.log" in in_image("doit", "plan", f"config={file}").out

    def test_a_read_only_root_and_models(self, in_image: Machine) -> None:
        """As process 1, which a signal ends only because tini passes it on."""
        port = free_port()
        file = in_image.folder / "profiles-read-only.yaml"
        told = f"model_root: /models, hf_filename: tiny.gguf, port: {port}, ctx_size: 256"
        file.write_text(f"profiles:\n  tiny:\n    llamacpp: {{{told}}}\n", encoding="utf-8")
        named = {"LLM_PROFILE_NAME": "tiny", "LLM_PROFILES_CONFIG_PATH": f"/models/{file.name}"}
        with in_image.running(read_only=True, **named) as running:
            running.until("ready in")
            assert health.is_ready(stand_in(file.parent, "tiny", port=port))
            began = time.monotonic()
            running.signal()
            assert running.end(30) == 0, running.err
            assert time.monotonic() - began < 10
        assert "log       /tmp/tiny.log" in running.out
