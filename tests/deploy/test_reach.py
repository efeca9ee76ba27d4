"""Which of a container's servers clients can find."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from pipeline.deploy.boot import BootSource
from pipeline.deploy.health import resting, unpublished, unreachable
from pipeline.serve.server import GATEWAY, LLAMA_CPP, Server
from pipeline.serve.supervisor.state import (
    DesiredState,
    Folder,
    ServerStatus,
    State,
    write_state,
    write_wanted,
)


def at(port: int, *, host: str = "0.0.0.0", engine: str = LLAMA_CPP) -> Server:
    return Server(
        name=f"{engine} {port}",
        engine=engine,
        executable="",
        cmd=(),
        folder="",
        log_file="",
        host=host,
        port=port,
    )


def ports(*servers: Server) -> list[int]:
    return [one.port for one in unpublished(servers, ["8080"])]


def test_ports_that_are_not_published() -> None:
    assert ports(at(8080)) == []
    assert ports(at(8080), at(8081)) == [8081]
    assert ports(at(8080), at(8081, host="127.0.0.1")) == [], "it is meant to stay inside"
    assert ports(at(8080), at(8081), at(9000, engine=GATEWAY)) == [8081, 9000]
    assert ports(at(8080, engine=GATEWAY), at(8081), at(8082)) == [], "it leads to both"
    inside = at(8080, engine=GATEWAY, host="127.0.0.1")
    assert ports(inside, at(8081)) == [8081], "nobody finds the gateway either"


def test_what_is_said_of_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "profiles.yaml"
    file.write_text("profiles:\n  tiny:\n    llamacpp: {gguf_path: /x.gguf, port: 9999}\n")
    environ = {"LLM_PROFILE_NAME": "tiny", "LLM_PROFILES_CONFIG_PATH": str(file)}
    profile = BootSource(words=("profile=tiny",), name=f"{file}#tiny", is_profile=True)
    inside = "http://127.0.0.1:9999: reachable from this container only"
    assert unreachable([], profile, environ).startswith(inside)
    environ |= {"LLAMACPP_HOST_OVERRIDE": "0.0.0.0"}
    assert unreachable([], profile, environ) == "", "nobody said what is published"
    environ |= {"PUBLISHED_PORTS": "8080, 9000"}
    elsewhere = "tiny on 9999: not published, only 8080, 9000 is"
    assert unreachable([], profile, environ).startswith(elsewhere)
    assert unreachable([], profile, environ | {"PUBLISHED_PORTS": "9999"}) == ""
    for wrong in ("8080/tcp", "٨٠٨٠"):
        assert unreachable([], profile, environ | {"PUBLISHED_PORTS": wrong}).startswith(
            f"PUBLISHED_PORTS={wrong}: must be ports"
        )
    assert unreachable([], None, environ) == ""


def test_who_need_not_answer(tmp_path: Path) -> None:
    """A model that nobody asks for makes no container sick; one that cannot be loaded does."""
    states = {"ready": "ready", "asleep": "asleep", "loading": "loading", "failed": "failed"}
    on_demand = [replace(at(1), name=name, start="demand") for name in states]
    booted = [replace(at(1), name=f"boot {name}") for name in states]
    statuses = [
        ServerStatus(name=prefix + name, state=state)
        for name, state in states.items()
        for prefix in ("", "boot ")
    ]
    folder = Folder(tmp_path)
    write_wanted(folder, DesiredState(config="x", instances=(*on_demand, *booted)))
    write_state(folder, State(pid=1, started=1.0, asked=1, instances=tuple(statuses)))
    assert resting(folder) == {"ready", "asleep", "loading", "boot asleep"}
