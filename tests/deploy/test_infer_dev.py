"""The development image: what PeiDocker makes of the project, and both images at work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dev_images
import pytest
import yaml
from conftest import REPOSITORY, chat, free_port, get, wait_for
from dev_images import Running
from engines import Buildah, Docker

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux"),
    pytest.mark.xdist_group("infer-dev"),
]
INFER_DEV = REPOSITORY / "docker" / "infer-dev"
SCRIPTS = sorted(path.name for path in INFER_DEV.glob("*.sh"))
COMMANDS = ("get-llama-cpp-pkg.sh", "install-llama-cpp-pkg.sh")
COMMANDS += ("check-and-run-llama-cpp.sh", "check-and-run-vllm.sh")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout; in it, a stand-in for Pixi's archive."""
    made = dev_images.checkout(tmp_path_factory.mktemp("infer-dev") / "checkout")
    return dev_images.with_stand_in_for_pixi(made)


def configured(folder: Path, source: Path, **settings: str) -> tuple[Path, Any]:
    """The project of PeiDocker, and the compose file that it wrote."""
    made = dev_images.project(folder, source, **settings)
    return made, yaml.safe_load((made / "docker-compose.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_pei_docker_writes_valid_compose(source: Path, tmp_path: Path, device: str) -> None:
    folder, compose = configured(tmp_path / "pröject", source, INFER_DEV_DEVICE=device)
    assert dev_images.schema_errors(folder / "docker-compose.yml") == ""
    service = compose["services"]["stage-2"]
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    assert [one["driver"] for one in devices] == (["nvidia"] if device == "gpu" else [])
    filled = dev_images.filled_in(service, INFER_DEV_WORKSPACE="/home/me/work")
    assert filled["ports"] == ["127.0.0.1:2222:22", "127.0.0.1:11980:8080"]
    assert filled["volumes"] == [
        *("app:/hard/volume/app", "data:/hard/volume/data"),
        *("/home/me/work:/hard/volume/workspace", "./models:/models"),
    ]


def test_a_wrong_compose_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "docker-compose.yml"
    file.write_text("services: {llama: {volums: []}}\n")
    assert "volums" in dev_images.schema_errors(file)


def test_app_and_data_may_stay_in_the_image(source: Path, tmp_path: Path) -> None:
    settings = {"INFER_DEV_APP": "image", "INFER_DEV_DATA": "image"}
    folder, compose = configured(tmp_path / "project", source, **settings)
    volumes = compose["services"]["stage-2"]["volumes"]
    inside = [one.rpartition(":")[2] for one in volumes]
    assert inside == ["/hard/volume/workspace", "/models"]
    assert dev_images.schema_errors(folder / "docker-compose.yml") == ""


def test_what_is_generated_calls_our_scripts(source: Path, tmp_path: Path) -> None:
    folder, compose = configured(tmp_path / "project", source, INFER_DEV_UID="1234")
    stage = folder / "installation" / "stage-2"
    generated = {
        path.stem: path.read_text(encoding="utf-8")
        for path in (stage / "generated").glob("_custom-*.sh")
    }
    called = {
        name: re.findall(r"/(\.\./)?stage-2/(llama-pipeline/\S+\.sh)\"? ?(\d*)", text)
        for name, text in generated.items()
    }
    for found in called.values():
        assert all((stage / path).is_file() for _, path, _ in found)
    ours = {name: [(Path(p).name, word) for _, p, word in found] for name, found in called.items()}
    assert ours == {
        "_custom-on-build": [("pei-build.sh", "1234")],
        "_custom-on-every-run": [("prepare.sh", "")],
        "_custom-on-entry": [("start.sh", "")],
        "_custom-on-first-run": [],
        "_custom-on-user-login": [],
    }
    before = folder / "installation" / "stage-1"
    (tools,) = re.findall(
        r"stage-1/(\S+\.sh)\"? 1", (before / "generated" / "_custom-on-build.sh").read_text("utf-8")
    )
    assert (before / tools).is_file() and (before / tools).with_name("tools").is_dir()
    assert "docker/entrypoint" in (INFER_DEV / "start.sh").read_text(encoding="utf-8")
    # No user of PeiDocker's: each would get a password, and a key that the build prints.
    args = compose["services"]["stage-1"]["build"]["args"]
    assert {args[name] for name in args if name.startswith("SSH_USER")} == {""}
    assert args["ROOT_PASSWORD"] == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_posix_shell(script: str) -> None:
    subprocess.run(["sh", "-n", INFER_DEV / script], check=True)


def test_every_tool_is_pinned_and_no_host_is_named() -> None:
    tools = INFER_DEV / "tools"
    wanted = (tools / "requirements.in").read_text().split()
    locked = (tools / "requirements.txt").read_text()
    assert re.findall(r"^(\S+==\S+) \\\n +--hash=sha256:", locked, re.M) == wanted
    packages = json.loads((tools / "package-lock.json").read_text())["packages"]
    assert packages.pop("")["optionalDependencies"] == {
        name.removeprefix("node_modules/"): one["version"] for name, one in packages.items()
    }
    assert all(one["integrity"].startswith("sha512-") for one in packages.values())
    assert not any("resolved" in one for one in packages.values())
    agents = json.loads((tools / "agents" / "package-lock.json").read_text())["packages"]
    assert agents.pop("")["dependencies"].keys() == {"@anthropic-ai/claude-code", "@openai/codex"}
    assert all(one["integrity"].startswith("sha512-") for one in agents.values())
    assert not any("resolved" in one for one in agents.values())
    assert re.fullmatch(
        r"([0-9a-f]{64}  pixi-(aarch64|x86_64)-unknown-linux-musl\.tar\.gz\n){2}",
        (tools / "pixi.sha256").read_text(),
    )


@dataclass(frozen=True)
class Image:
    """An image, where its volumes belong, and what compose gives it: no command means its own."""

    engine: Docker | Buildah
    name: str
    volumes: str
    environ: dict[str, str]
    command: str = ""


@pytest.fixture(scope="module")
def by_docker(
    engine: Docker | Buildah, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Image:
    name = dev_images.by_docker(engine, source, tmp_path_factory.mktemp("by-docker"))
    return Image(engine, name, "/soft", {})


@pytest.fixture(scope="module")
def by_pei_docker(
    engine: Docker | Buildah, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Image:
    folder = tmp_path_factory.mktemp("pei") / "project"
    name, service = dev_images.by_pei_docker(engine, source, folder)
    environ = dev_images.filled_in(service["environment"])
    return Image(engine, name, "/hard/volume", environ, service["command"])


def volumes(folder: Path, image: Image) -> dict[Path, str]:
    """Folders of the host, and where a container has them."""
    made = {folder / name: f"{image.volumes}/{name}" for name in ("app", "data", "workspace")}
    for one in made:
        one.mkdir(parents=True)
    return made


def started(
    image: Image, folder: Path, mounts: dict[Path, str], environ: dict[str, str]
) -> AbstractContextManager[Running]:
    """A container of it."""
    environ = {**image.environ, **environ}
    return dev_images.running(
        image.engine, image.name, folder, free_port(), mounts, image.command, **environ
    )


@pytest.fixture(params=["docker", "pei_docker"])
def image(request: pytest.FixtureRequest) -> Image:
    made: Image = request.getfixturevalue(f"by_{request.param}")
    return made


@pytest.fixture
def package(built: Path, tmp_path: Path) -> Path:
    """Somebody's package of llama.cpp: a README, and the programs of this machine."""
    (programs,) = {path.parent for path in built.glob("linux-*-cpu/llama-server")}
    readme = tmp_path / "README"
    readme.write_text("llama.cpp\n")
    archive = tmp_path / "package" / "llama-cpp.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(readme, "README")
        for file in sorted(programs.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                tar.add(file, f"bin/{file.name}")
    return archive


@pytest.mark.slow
def test_people_log_in_with_a_key_alone(image: Image, tmp_path: Path) -> None:
    host = tmp_path / "host"
    mounts = volumes(host, image)
    kept = host / "workspace" / "mine"
    kept.write_text("not a program\n")
    kept.chmod(0o640)
    with started(image, tmp_path, mounts, {"GREETING": "two words"}) as it:
        status, said = it.ssh(
            "pixi --version; uv --version; node --version; npm --version; bun --version;"
            "python3 -c 'import sys; print(sys.version_info >= (3, 11))'; doit list -q | head -1;"
            "id -un; echo $GREETING $LLAMA_PIPELINE_HOME; touch /soft/app/new /soft/data/new;"
            f"ls {' '.join(f'/soft/app/llama-cpp/{one}' for one in COMMANDS)}; which {COMMANDS[0]}"
        )
        assert status == 0, said
        lines = said.splitlines()
        versions = [(INFER_DEV / "tools" / "pixi.version").read_text().strip(), "0.13", "v24", "11"]
        assert all(one in line for one, line in zip(versions, lines, strict=False)), said
        assert lines[4].startswith("1.") and lines[5] == "True"
        assert lines[6].strip() == "build_bins" and lines[7] == "dev"
        assert lines[8] == "two words /soft/data/llama-pipeline"
        status, said = it.ssh("claude --version && codex --version")
        assert status == 0 and "Claude Code" in said, said
        assert it.ssh("true", user="root")[0] == 255
        status, said = it.ssh("true", key=False)
        assert status == 255 and "(publickey)" in said, "no way in but by key is offered"
    assert kept.stat().st_mode & 0o777 == 0o640, "the workspace is the host's"


@pytest.mark.slow
@pytest.mark.build
def test_the_entry_point_starts_servers(
    image: Image, package: Path, gguf: Path, tmp_path: Path
) -> None:
    """The package is installed at boot, its server answers, SIGTERM ends all in time; the next
    container has the archive in its volume."""
    host, port = tmp_path / "host", free_port()
    mounts = volumes(host, image) | {gguf.parent: "/models"}
    (host / "workspace" / "servers.toml").write_text(
        f'[instance.chat.server]\nmodel = "/models/{gguf.name}"\nport = {port}\n'
    )
    environ = {
        "AUTO_INFER_LLAMA_CPP_GET_PKG_ON_BOOT": "true",
        "AUTO_INFER_LLAMA_CPP_PKG_PATH": f"/package/{package.name}",
        "AUTO_INFER_LLAMA_CPP_ON_BOOT": "1",
        "AUTO_INFER_LLAMA_CPP_CONFIG": "/soft/workspace/servers.toml",
    }
    for number, shown in enumerate(({package.parent: "/package"}, {})):
        folder = tmp_path / f"run {number}"
        folder.mkdir()
        with started(image, folder, mounts | shown, environ) as it:
            wait_for(lambda it=it: ready(it, port), 120)
            assert chat(f"http://127.0.0.1:{port}")
            status, said = it.ssh("doit ps config=$AUTO_INFER_LLAMA_CPP_CONFIG")
            assert status == 0 and "chat" in said, said
            status, said = it.ssh("/soft/app/llama-cpp/check-and-run-vllm.sh")
            assert status == 3 and "AUTO_INFER_VLLM_CONFIG" in said, said
            it.stop(30)
        with pytest.raises(OSError, match="refused"):
            get(f"http://127.0.0.1:{port}/health")
    assert "does not exist; using" in it.log.read_text(), "the kept archive was taken"
    assert (host / "app" / "llama-cpp" / "bin" / "llama-server").is_file()


@pytest.mark.slow
def test_a_wrong_configuration_lets_people_in_and_says_so(image: Image, tmp_path: Path) -> None:
    mounts = volumes(tmp_path / "host", image)
    wrong = {"AUTO_INFER_LLAMA_CPP_ON_BOOT": "1", "AUTO_INFER_LLAMA_CPP_CONFIG": "/gone.toml"}
    with started(image, tmp_path, mounts, wrong) as it:
        wait_for(lambda: (tmp_path / "host").exists() and "error: " in it.log.read_text(), 120)
        for _ in range(2):
            status, said = it.ssh("echo in")
            assert status == 0 and "in" in said
            assert "The start of this container failed" in said and "config=/gone.toml" in said


def ready(it: Running, port: int) -> bool:
    """Whether the server answers; the test fails where the container has ended."""
    assert it.process.poll() is None, it.log.read_text()
    try:
        return bool(get(f"http://127.0.0.1:{port}/health"))
    except OSError:
        return False
