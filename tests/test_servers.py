"""Many servers from one file, as users start, ask, watch and stop them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from conftest import REPOSITORY, SHEBANG, Doit, Run, free_port, get, post, wait_for

pytestmark = pytest.mark.build
MARKER = "LLAMA_PIPELINE_FLEET"


def toml(tables: dict[str, dict[str, Any]]) -> str:
    """The text of a file; JSON's texts, numbers and lists are TOML's too."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


class Servers:
    """One file of instances on a home of its own; everything is stopped in the end."""

    def __init__(self, doit: Doit, folder: Path) -> None:
        self.doit, self.file = doit, folder / "models ü.toml"
        self.tables: dict[str, dict[str, Any]] = {}

    @property
    def config(self) -> str:
        return f"config={self.file}"

    def write(self, tables: dict[str, dict[str, Any]]) -> None:
        self.tables |= tables
        self.file.write_text(toml(self.tables), encoding="utf-8")

    def chat(self, name: str, gguf: Path, **server: Any) -> int:
        """One more instance of the tiny model; its port."""
        port = free_port()
        self.write(
            {
                f"instance.{name}.model": {"ref": str(gguf)},
                f"instance.{name}.server": {"port": port, "ctx_size": 512, **server},
                f"instance.{name}.control": {
                    "restart_pause": 0.1,
                    "max_restarts": 2,
                    "log_dir": str(self.doit.home / "logs"),
                },
            }
        )
        return port

    def up(self, *words: str, status: int = 0) -> Run:
        return self.doit("up", self.config, *words, status=status, timeout=120)

    def ps(self) -> dict[str, dict[str, Any]]:
        told = self.doit("ps", self.config, "format=json").json()
        return {row["name"]: row for row in told}

    def processes(self) -> list[psutil.Process]:
        """What is left of it, the supervisor too."""
        found = []
        for process in psutil.process_iter():
            try:
                env = process.environ()
                is_ours = MARKER in env and env.get("LLAMA_PIPELINE_HOME") == str(self.doit.home)
            except (psutil.Error, OSError):
                continue
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@pytest.fixture
def servers(doit: Doit, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(doit, tmp_path)
    yield servers
    doit("down", servers.config, status=None)
    assert servers.processes() == []


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.usefixtures("embedder")
def test_servers_behind_one_address(servers: Servers, gguf: Path) -> None:
    """Two chat servers and an embedder, asked with the clients that people use; one is killed,
    one is broken; then nothing is left."""
    import anthropic
    import openai

    ports = [servers.chat(name, gguf, alias="chat") for name in ("first", "second")]
    port, gateway = free_port(), free_port()
    servers.write(
        {
            "instance.embed.model": {"ref": "demo-embed", "quant": "q8_0"},
            "instance.embed.server": {"port": port},
            "gateway": {"enable": True, "port": gateway},
        }
    )
    told = servers.up()
    assert {line.partition(":")[0] for line in told.err.splitlines() if ": ready at" in line} == {
        *("first", "second", "embed", "gateway")
    }
    before = servers.ps()
    assert {row["state"] for row in before.values()} == {"ready"}
    assert before["embed"]["memory"] > 1_000_000

    url = f"http://127.0.0.1:{gateway}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    said: list[Any] = [{"role": "user", "content": "hello there"}]
    whole = client.chat.completions.create(model="chat", messages=said, max_tokens=8)
    assert whole.usage and whole.usage.completion_tokens == 8
    stream = client.chat.completions.create(model="chat", messages=said, max_tokens=8, stream=True)
    assert len(list(stream)) >= 8
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    asked = client.chat.completions.create(
        model="chat", messages=said, max_tokens=8, tools=[tool], tool_choice="auto"
    )
    assert asked.choices[0].message
    vectors = client.embeddings.create(model="embed", input=["one", "two"])
    assert [len(one.embedding) for one in vectors.data] == [384, 384]
    assert {"chat", "embed"} <= {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError, match="chat"):
        client.chat.completions.create(model="chatt", messages=said)
    claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    with claude.messages.stream(model="chat", messages=said, max_tokens=8) as events:
        assert "".join(events.text_stream) is not None
        assert events.get_final_message().usage.output_tokens == 8
    assert claude.messages.count_tokens(model="chat", messages=said).input_tokens > 1
    board = get(f"{url}/dashboard/data")
    assert [x["tokens"] for x in board["requests"] if "chat" in x["path"]] == [8, 8, 8]
    assert {x["instance"] for x in board["requests"] if x["model"] == "embed"} == {"embed"}
    assert all(x["memory"] > 1_000_000 for x in board["instances"]), "of real processes"

    os.kill(before["first"]["pid"], signal.SIGKILL)
    # the other one of this name answers meanwhile
    assert client.chat.completions.create(model="chat", messages=said, max_tokens=2).choices
    wait_for(lambda: servers.ps()["first"]["restarts"] == 1 and answers(ports[0]))
    after = servers.ps()
    for name in ("second", "embed", "gateway"):
        assert after[name]["pid"] == before[name]["pid"], "others are untouched"

    servers.chat("broken", gguf, grammar="root ::= (")
    servers.write({"instance.broken.control": {"restart_pause": 0.1, "max_restarts": 1}})
    wrong = servers.up(status=1)
    assert "broken is failed" in wrong.err and "failed to parse grammar" in wrong.err
    now = servers.ps()
    assert (now["broken"]["state"], now["broken"]["restarts"]) == ("failed", 1)
    assert now["second"]["pid"] == before["second"]["pid"], "what did not change goes on"
    assert get(f"{url}/health")["instances"]["second"]["state"] == "ready"

    stopped = servers.doit("down", servers.config, "format=json").json()
    assert set(stopped) == {"first", "second", "embed", "broken", "gateway"}
    assert servers.processes() == []
    assert not any(answers(one) for one in (*ports, port, gateway))
    assert "nothing is up" in servers.doit("ps").err


def test_a_file_that_is_watched(servers: Servers, gguf: Path, tmp_path: Path) -> None:
    servers.chat("kept", gguf)

    def is_ready(name: str) -> bool:
        return servers.ps().get(name, {}).get("state") == "ready"

    told = tmp_path / "told"
    with (
        told.open("wb") as err,
        servers.doit.start("up", servers.config, "watch=1", stderr=err) as process,
    ):
        wait_for(lambda: is_ready("kept"), 120)
        first = servers.ps()["kept"]["pid"]
        servers.chat("new", gguf)
        wait_for(lambda: is_ready("new"), 120)
        good = servers.file.read_text(encoding="utf-8")
        servers.file.write_text(f"{good}\n[instance.new.server", encoding="utf-8")
        wait_for(lambda: "error:" in told.read_text("utf-8"))
        servers.file.unlink()  # as some editors do before they write
        wait_for(lambda: told.read_text("utf-8").count("has changed") == 3)
        servers.file.write_text(good.replace("512", "256"), encoding="utf-8")
        wait_for(lambda: is_ready("kept") and servers.ps()["kept"]["pid"] != first, 120)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert "no longer watching" in told.read_text("utf-8")
    wait_for(lambda: is_ready("kept") and is_ready("new"))  # the other may still load
    assert "contradict" in servers.up("watch=1", "background=0", status=3).err
    assert "contradict" in servers.up("watch=1", "dry_run=1", status=3).err


def test_a_changed_file_restarts_what_changed(servers: Servers, gguf: Path) -> None:
    servers.chat("kept", gguf)
    servers.chat("changed", gguf)
    told = servers.up()
    assert [step for step in told.steps if step.startswith("resolve")] == []
    first = servers.ps()
    servers.tables["instance.changed.server"]["ctx_size"] = 256
    servers.chat("new", gguf)
    dry = servers.up("dry_run=1", "format=json").json()
    assert {row["name"]: row["change"] for row in dry} == {
        "kept": "keep",
        "changed": "restart",
        "new": "start",
    }
    assert servers.ps().keys() == first.keys(), "dry_run starts nothing"
    servers.up("name=new")
    assert servers.ps()["changed"]["pid"] == first["changed"]["pid"], "it was not named"
    assert servers.ps()["new"]["state"] == "ready"
    assert "did you mean kept?" in servers.up("name=keptt", status=3).err
    servers.up()
    second = servers.ps()
    assert second["kept"]["pid"] == first["kept"]["pid"]
    assert second["changed"]["pid"] != first["changed"]["pid"]
    servers.doit("down", servers.config, "name=kept,new")
    assert {n: row["state"] for n, row in servers.ps().items() if row["state"] == "ready"} == {
        "changed": "ready"
    }
    wrong = servers.doit("down", servers.config, "name=chnged", status=3)
    assert "did you mean changed?" in wrong.err


def test_another_key_in_its_file_restarts_a_server(
    servers: Servers, gguf: Path, tmp_path: Path
) -> None:
    """A server reads its files when it starts: the old key would stay good, and the new one bad."""
    key = tmp_path / "a.key"
    key.write_text("first-key\n")
    port = servers.chat("chat", gguf, api_key_file=str(key))
    servers.up()
    os.utime(key, (0, 0))
    assert "keep" in servers.up("dry_run=1").out, "it is only touched"
    key.write_text("second-key\n")
    assert "restart" in servers.up("dry_run=1").out
    servers.up()
    for secret, status in (("first-key", 401), ("second-key", 200)):
        headers = {"Authorization": f"Bearer {secret}"}
        assert httpx2.get(f"http://127.0.0.1:{port}/slots", headers=headers).status_code == status


def test_logs(servers: Servers, gguf: Path) -> None:
    servers.chat("one", gguf)
    servers.chat("two", gguf)
    servers.up()
    both = servers.doit("logs", servers.config, "lines=5").out
    assert "==> one <==" in both and "==> two <==" in both
    one = servers.doit("logs", "name=one").out
    assert "listening on" in one
    assert "follows one log" in servers.doit("logs", "follow=1", status=3).err
    wrong = servers.doit("logs", servers.config, "name=won", status=3).err
    assert "name=won: there is no such instance" in wrong
    with servers.doit.start("logs", "name=one", "follow=1", "lines=1") as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode in (0, 130)
    assert oct((servers.doit.home / "logs" / "one.log").stat().st_mode & 0o777) == "0o600"
    servers.doit("down", servers.config)
    assert "listening on" in servers.doit("logs", servers.config, "name=one").out, (
        "it is still there"
    )


def test_up_stays_where_it_is_asked_to(servers: Servers, gguf: Path) -> None:
    """background = false: Ctrl-C ends that one, and leaves the others."""
    servers.chat("there", gguf)
    servers.chat("here", gguf)
    servers.tables["instance.here.control"]["background"] = False
    servers.write({})
    with servers.doit.start("up", servers.config) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("waiting for here"):
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert {n: row["state"] for n, row in servers.ps().items()}["there"] == "ready"
    assert servers.ps().get("here", {"state": "stopped"})["state"] == "stopped"


@pytest.mark.parametrize(("status", "told"), [(0, ""), (7, "here is failed: crash: exit status 7")])
def test_up_stays_no_longer_than_its_server(
    servers: Servers, gguf: Path, tmp_path: Path, status: int, told: str
) -> None:
    program, port = stand_in(tmp_path, f"--exit {status} --after 1"), servers.chat("here", gguf)
    servers.tables["instance.here.control"] |= {"background": False, "restart": "never"}
    servers.write({"master": {"llama_cpp_path": str(program)}})
    run = servers.up(status=1 if status else 0)
    assert told in run.err and not answers(port)


def stand_in(folder: Path, words: str = "") -> Path:
    """A llama-server that keeps in `told.json` what it is started with, and serves nothing."""
    (real,) = REPOSITORY.glob("bins/*-cpu/llama-server")
    program, server = folder / "llama-server", Path(__file__).parent / "fakes" / "server.py"
    program.write_text(
        f"""{SHEBANG}
import json, os, subprocess, sys
if "--help" in sys.argv:
    sys.exit(subprocess.call([{str(real)!r}, *sys.argv[1:]]))
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
where = ["--host", host, "--port", port]
with open({str(folder / "told.json")!r}, "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
os.execv(sys.executable, [sys.executable, {str(server)!r}, *where, *{words.split()!r}])
"""
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_all_of_it_in_the_foreground(servers: Servers, gguf: Path, name: str) -> None:
    ports = [servers.chat(one, gguf) for one in ("one", "two")]
    with servers.doit.start("up", servers.config, "background=0") as process:
        wait_for(lambda: all(map(answers, ports)))
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert servers.processes() == [] and not any(map(answers, ports))


def test_a_killed_supervisor_leaves_nothing(servers: Servers, gguf: Path) -> None:
    ports = [servers.chat(one, gguf) for one in ("one", "two")]
    servers.up()
    (state,) = servers.doit.home.glob("run/instances/*/state.json")
    os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
    wait_for(lambda: servers.processes() == [])
    assert not any(map(answers, ports))
    assert {row["state"] for row in servers.ps().values()} == {"lost"}
    servers.up()
    assert {row["state"] for row in servers.ps().values()} == {"ready"}


def test_two_files_at_once(servers: Servers, gguf: Path, tmp_path: Path) -> None:
    servers.chat("one", gguf)
    servers.up()
    (tmp_path / "second").mkdir()
    second = Servers(servers.doit, tmp_path / "second")
    second.chat("two", gguf)
    second.up()
    assert "more than one configuration is up" in servers.doit("down", status=3).err
    assert servers.tables["instance.one.control"]["log_dir"].endswith("logs")
    clash = Servers(servers.doit, tmp_path)
    clash.file = tmp_path / "third.toml"
    clash.chat("one", gguf)
    err = clash.up(status=3).err
    assert "is written by a server of" in err and "is taken by a server of" not in err
    clash.write({"instance.one.server": servers.tables["instance.one.server"]})
    assert "is taken by a server of" in clash.up(status=3).err
    everything = servers.doit("ps", "format=json").json()
    assert {row["name"] for row in everything} == {"one", "two"}
    second.doit("down", second.config)
    assert servers.ps()["one"]["state"] == "ready"


def test_a_model_is_prepared_once(servers: Servers, tiny: Path, converter: Path) -> None:
    for name in ("one", "two"):
        servers.chat(name, tiny, alias=name)
        servers.tables[f"instance.{name}.model"]["quant"] = "q8_0"
    servers.write({})
    plan = servers.doit("plan", servers.config).out
    assert "to do" in plan and "two  http://" not in plan.partition("name")[0]
    told = servers.up()
    assert [step for step in told.steps if step.startswith("convert:")] == ["convert:one"]
    assert [step for step in servers.up().steps if ":" in step] == [], "nothing is made again"


def test_every_mistake_is_told_before_any_work(servers: Servers) -> None:
    servers.write(
        {
            "master": {"enabel": True},
            "instance.control": {"restart": "sometimes"},
            "instance.chat.server": {"ctx_sise": 1, "port": 8080},
            "instance.chat.model": {"ref": "demo-embed", "quant": "q9"},
            "instance.other.server": {"port": 8080, "model": "nowhere.gguf"},
        }
    )
    wrong = servers.doit("up", servers.config, "threads=2", status=3)
    for told in (
        "threads=: is for one server",
        "enabel",
        "enable?",
        "sometimes",
        "ctx_sise",
        "ctx_size?",
        "nowhere.gguf",
        "q9",
    ):
        assert told in wrong.err, wrong.err
    assert not list(servers.doit.home.glob("models/*")), "nothing was made"


def test_a_program_of_ones_own(servers: Servers, built: Path, gguf: Path, tmp_path: Path) -> None:
    """What is named as llama-server gets exactly what is promised."""
    program, port = stand_in(tmp_path), free_port()
    servers.write(
        {
            "master": {"llama_cpp_path": str(program)},
            "instance.control": {"gpu_ids": "1,0", "log_dir": str(tmp_path / "own logs")},
            "instance.server": {"ctx_size": 512},
            "instance.a.server": {
                "port": port,
                "model": str(gguf),
                "flash_attn": "on",
                "no_warmup": True,
                "check_tensors": False,
                "override_kv": ["a.x=int:1", "a.y=int:2"],
                "extra_args": ["--seed", "7"],
            },
        }
    )
    planned = servers.doit("plan", servers.config, "format=json").json()[0]
    servers.up()
    words, env = json.loads((tmp_path / "told.json").read_text())
    assert words == planned["cmd"] and planned["executable"] == str(program)
    assert " ".join(words).count("--override-kv ") == 2 and words[-2:] == ["--seed", "7"]
    assert "--no-warmup" in words and "--check-tensors" not in words
    assert words[words.index("--flash-attn") + 1] == "on"
    assert words[words.index("--ctx-size") + 1] == "512"
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1,0", "PCI_BUS_ID")
    assert planned["env"]["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert (tmp_path / "own logs" / "a.log").exists()


def test_the_environment_names_the_file_and_overrides_it(servers: Servers, gguf: Path) -> None:
    port = servers.chat("chat", gguf)
    servers.doit.env["AUTO_INFER_LLAMA_CPP_CONFIG"] = str(servers.file)
    servers.doit.env["AUTO_INFER_LLAMA_CPP_OVERRIDES"] = json.dumps(
        {"instance": {"chat": {"server": {"ctx_size": 256}, "control": {"gpu_ids": "none"}}}}
    )
    (planned,) = servers.doit("plan", "format=json").json()
    assert planned["cmd"][planned["cmd"].index("--ctx-size") + 1] == "256"
    assert planned["env"]["CUDA_VISIBLE_DEVICES"] == ""
    servers.doit("up")
    assert get(f"http://127.0.0.1:{port}/props")["default_generation_settings"]["n_ctx"] == 256
    assert servers.doit("down").status == 0
    servers.doit.env["AUTO_INFER_LLAMA_CPP_OVERRIDES"] = "{"
    assert "AUTO_INFER_LLAMA_CPP_OVERRIDES" in servers.doit("up", status=3).err


def test_what_is_secret_in_overrides_stays_there(
    servers: Servers, gguf: Path, tmp_path: Path
) -> None:
    program = stand_in(tmp_path)
    servers.chat("chat", gguf)
    servers.write({"master": {"llama_cpp_path": str(program)}})
    secret = "sk-in-the-overrides"
    servers.doit.env["AUTO_INFER_LLAMA_CPP_OVERRIDES"] = json.dumps(
        {"instance": {"chat": {"server": {"api_key": secret}}}}
    )
    servers.up()
    assert secret not in (tmp_path / "told.json").read_text()
    for process in servers.processes():
        assert secret not in str(process.environ()) and secret not in " ".join(process.cmdline())
    assert "a unit cannot hold it" in servers.doit("systemd", servers.config, status=3).err


def test_a_server_that_others_can_reach_gets_a_key(servers: Servers, gguf: Path) -> None:
    port = servers.chat("open", gguf, host="0.0.0.0", api_prefix="/own")
    told = servers.up()
    assert f"at http://127.0.0.1:{port}/own (from other machines: port {port} of" in told.err
    (key,) = servers.doit.home.glob("run/instances/*/keys/open.key")
    assert str(key) in told.err and oct(key.stat().st_mode & 0o777) == "0o600"
    secret = key.read_text().strip()
    with pytest.raises(Exception, match="401"):
        post(f"http://127.0.0.1:{port}/own/v1/chat/completions", {"messages": []})
    for process in servers.processes():
        assert secret not in " ".join(process.cmdline())
    assert secret not in (servers.doit.home / "logs" / "open.log").read_text()
    servers.doit("down", servers.config)
    servers.up()
    assert key.read_text().strip() == secret, "made once"


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    """Options of a server with a certificate that names another host, as behind a real name."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl makes the certificate")
    made = {f"ssl_{what}_file": str(tmp_path / f"ü {what}.pem") for what in ("key", "cert")}
    words = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a.example"]
    files = ["-keyout", made["ssl_key_file"], "-out", made["ssl_cert_file"]]
    subprocess.run([*words, *files], check=True, capture_output=True)
    return made


def test_servers_with_tls(servers: Servers, gguf: Path, certificate: dict[str, str]) -> None:
    """They are watched, listed, passed on and served in the foreground as others are."""
    words = [f"server.{name}={value}" for name, value in certificate.items()]
    try:
        with servers.doit.serving(f"model={gguf}", "ctx_size=512", *words) as url:
            trusting = ssl._create_unverified_context()
            with urllib.request.urlopen(f"{url}/v1/models", context=trusting) as answer:
                assert url.startswith("https://") and answer.status == 200
    except AssertionError as error:
        if "built without SSL support" not in str(error):
            raise
        pytest.skip("llama-server was built without OpenSSL's headers")
    servers.chat("safe", gguf, metrics=True, **certificate)
    servers.tables["instance.safe.control"] |= {"probe_timeout": 5}
    gateway = free_port()
    servers.write({"gateway": {"enable": True, "port": gateway}})
    assert "safe: ready at https://" in servers.up().err
    said = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answered = post(f"http://127.0.0.1:{gateway}/v1/chat/completions", said | {"model": "safe"})
    assert answered["usage"]["completion_tokens"] == 4
    row = servers.ps()["safe"]
    assert (row["state"], row["url"][:8]) == ("ready", "https://")
    assert row["tokens_per_second"] is not None, "its counters are read too"


def test_a_server_behind_the_gateway_wants_its_key(servers: Servers, gguf: Path) -> None:
    """No page can have it work; the gateway, and who reads what `up` prints, can."""
    port, gateway = servers.chat("chat", gguf, alias="one,two"), free_port()
    servers.write({"gateway": {"enable": True, "port": gateway}})
    (line,) = [line for line in servers.up().err.splitlines() if line.startswith("chat: ready")]
    url, _, file = line.removeprefix("chat: ready at ").partition(", with the key in ")
    assert url == f"http://127.0.0.1:{port}"
    said = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    page = {"Origin": "http://evil.example", "Host": "evil.example", "Content-Type": "text/plain"}
    for path, headers in (("/v1/chat/completions", page), ("/slots", page), ("/slots", {})):
        assert httpx2.post(url + path, json=said, headers=headers).status_code == 401
    key = {"Authorization": f"Bearer {Path(file).read_text().strip()}"}
    assert httpx2.get(f"{url}/slots", headers=key).status_code == 200
    asked = f"http://127.0.0.1:{gateway}"
    assert post(f"{asked}/v1/chat/completions", said | {"model": "TWO"})["model"] == "TWO"
    assert get(f"{asked}/upstream/chat/slots")[0]["n_ctx"] == 512
    entries = {entry["id"]: entry for entry in get(f"{asked}/v1/models")["data"]}
    assert entries["two"]["meta"]["n_ctx"] == 512 and entries["two"]["aliases"] == ["chat", "one"]


def test_a_plan_for_a_container_takes_its_files_as_said(servers: Servers) -> None:
    """On a machine that has none of its paths and cards, and no hub."""
    servers.write(
        {
            "master": {"llama_cpp_path": "/opt/mine/llama-server"},
            "instance.chat.control": {"gpu_ids": "6,7"},
            "instance.chat.server": {
                **{"model": "/models/chat.gguf", "mmproj": "/models/mm.gguf", "port": 8081},
                "api_key_file": "/run/secrets/key",
            },
            "instance.hub.model": {"ref": "org/model:Q4_K_M", "imatrix": "/models/imatrix"},
            "instance.local.model": {"ref": "/models/My-Model"},
            "instance.local.server": {"port": 8082},
            "instance.vllm.control": {"engine": "vllm"},
            "instance.vllm.server": {"model": "org/other", "port": 8083},
        }
    )
    words = ("plan", servers.config, "target=container", "offline=1")
    chat, hub, local, vllm = servers.doit(*words, "format=json").json()
    assert chat["cmd"][:4] == ["--model", "/models/chat.gguf", "--mmproj", "/models/mm.gguf"]
    assert chat["executable"] == "/opt/mine/llama-server" and chat["gpu_ids"] == "6,7"
    assert "/run/secrets/key" in chat["cmd"] and chat["log_file"].endswith("/chat.log")
    assert hub["cmd"][:2] == ["--model", "hf:org/model:Q4_K_M"]
    assert local["cmd"][:2] == ["--model", "/models/My-Model"]
    assert vllm["executable"] == "python", "not that of this machine"
    assert "/models/chat.gguf is not a file" in servers.doit(*words[:2], status=3).err
    servers.tables["instance.local.server"] = {"port": 8081}
    servers.write({"instance.hub.model": {"ref": "org"}})
    wrong = servers.doit(*words, status=3).err
    assert "8081 is taken by" in wrong and "instance.hub.model.ref = org" in wrong
    assert (
        "needs config= or profile="
        in servers.doit("plan", "model=demo-embed", "target=container", status=3).err
    )


def test_a_unit_for_systemd(servers: Servers, gguf: Path) -> None:
    servers.chat("chat", gguf)
    unit = servers.doit("systemd", servers.config).out
    assert f"config={servers.file}" in unit and "background=0" in unit
    assert str(servers.doit.home) in unit, "the same home"
    assert " name=chat " in servers.doit("systemd", servers.config, "name=chat").out
    for wrong, why in {
        "watch=1": "watch=1: a service keeps servers up",
        "dry_run=1": "dry_run=1: a service keeps servers up",
        "name=chatt": "did you mean chat?",
    }.items():
        run = servers.doit("systemd", servers.config, wrong, status=3)
        assert why in run.err and not run.out


def test_preparing_checks_and_builds(servers: Servers, tiny: Path, converter: Path) -> None:
    servers.chat("chat", tiny)
    servers.tables["instance.chat.model"]["quant"] = "q8_0"
    servers.write({})
    servers.up("dry_run=1")
    assert not list(servers.doit.home.glob("models/gguf/*")), "dry_run makes nothing"
    servers.doit("prepare", servers.config)
    assert list(servers.doit.home.rglob("*.q8_0.gguf"))
    servers.write({"master": {"enabel": True}})
    assert "enable?" in servers.doit("prepare", servers.config, status=3).err


def test_mistakes_beside_a_wrong_program(servers: Servers, gguf: Path) -> None:
    servers.chat("chat", gguf)
    servers.write({"master": {"llama_cpp_path": str(gguf.parent)}})
    servers.tables["instance.chat.control"]["restart"] = "sometimes"
    servers.write({})
    wrong = servers.doit("plan", servers.config, "server.jinja=1", status=3).err
    for told in ("is a folder", "sometimes", "server.jinja=: is for one server"):
        assert told in wrong


def test_nothing_is_named(bare: Doit) -> None:
    assert "no servers given; pass config=" in bare("up", status=3).err
    assert "config= and model= contradict" in bare("up", "config=x", "model=demo", status=3).err
    assert "no such file" in bare("up", "config=nowhere.toml", status=3).err
    assert "no such file" in bare("down", "config=nowhere.toml", status=3).err
    assert bare("down").status == 0
    assert bare("ps", "format=json").json() == []


@pytest.mark.parametrize("as_a_terminal", [True, False])
def test_llama_servers_own_router(servers: Servers, gguf: Path, as_a_terminal: bool) -> None:
    """One llama-server that starts the others itself, where relative paths mean the same."""
    port = free_port()
    servers.chat("one", gguf)
    shutil.copyfile(gguf, servers.file.with_name("two.gguf"))
    two = {"port": free_port(), "ctx_size": 512, "model": "two.gguf"}
    servers.write({"instance.two.server": two})
    words = ("gateway", servers.config, "engine=router", f"port={port}")
    log = (servers.doit.home / "router.log").open("w")  # a pipe that nobody reads would stop it
    with log, servers.doit.start(*words, stdout=log, stderr=log) as process:
        wait_for(lambda: process.poll() is not None or answers(port))
        url = f"http://127.0.0.1:{port}"
        said = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        answer = wait_for(lambda: attempt(f"{url}/v1/chat/completions", said | {"model": "two"}))
        assert answer["choices"]
        if as_a_terminal:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0
    wait_for(lambda: not answers(port))


def attempt(url: str, body: dict[str, Any]) -> Any:
    """The answer, once the server is there and has loaded."""
    try:
        return post(url, body)
    except OSError:
        return None


def test_the_gateway_in_the_foreground(servers: Servers, gguf: Path) -> None:
    servers.chat("one", gguf)
    servers.up()
    port = free_port()
    with servers.doit.start("gateway", servers.config, f"port={port}") as process:
        wait_for(lambda: answers(port))
        assert get(f"http://127.0.0.1:{port}/health")["instances"]["one"]["state"] == "ready"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    missing = servers.doit("gateway", servers.config, "engine=litellm", status=1)
    assert "litellm.yaml" in missing.err and "no such program" in missing.err
