"""A gateway of servers that a file lists: they run elsewhere, and nothing here starts them."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import httpx2
import pytest
from conftest import Doit, free_port, wait_for
from gateway_tools import NO_TLS, Site, reached, stop

KEY, INNER = "of-clients", "of-the-server"


class Remote(Site):
    """Gateways on one file of servers, whose stand-ins come and go at fixed addresses."""

    def __init__(self, path: Path, doit: Doit) -> None:
        super().__init__(path)
        self.doit = doit
        self.file = path / "servers ü.toml"
        self.text = '[gateway]\nhost = "127.0.0.1"\n'

    def server(self, name: str, *lines: str, host: str = "127.0.0.1") -> None:
        """A server in the file, of which nothing runs."""
        self.add(name)
        port = self.instances[name].port
        table = [
            f"[servers.{json.dumps(name, ensure_ascii=False)}]",
            f'url = "http://{host}:{port}"',
        ]
        self.text += "\n".join([*table, *lines, ""])

    def listen(self, name: str = "gateway", port: int = 0) -> str:
        """The address of a gateway that was started."""
        self.file.write_text(self.text, encoding="utf-8")
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        words = self.doit.command("gateway", f"servers={self.file}", f"port={self.port}")
        env = {**os.environ, **self.doit.env}
        with (self.path / f"{name}.out").open("ab") as out:
            process = forked.start(words[1:], out.fileno(), out.fileno(), env)
        self.processes[name] = process

        def up() -> bool:
            assert process.poll() is None, self.output(name)
            return reached(f"{self.url}/health")

        wait_for(up)
        return self.url

    def later(self, ask: Callable[[], httpx2.Response]) -> Callable[[], httpx2.Response]:
        """Ask beside the test; call what is returned for the answer."""
        answers: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
        thread.start()

        def answer() -> httpx2.Response:
            thread.join(60)
            return answers[0]

        return answer

    def state(self, name: str) -> str:
        return str(self.get("/health").json()["instances"][name]["state"])

    def requests(self, name: str, url: str = "") -> int:
        path = f"{url or self.url}/scaling/{name}"
        answer = httpx2.get(path, verify=NO_TLS, headers={"authorization": f"Bearer {KEY}"})
        return int(answer.raise_for_status().json()["requests"])


@pytest.fixture
def remote(bare: Doit, tmp_path: Path) -> Iterator[Remote]:
    one = Remote(tmp_path, bare)
    try:
        yield one
    finally:
        one.close()


def test_names_aliases_patterns_and_kinds(remote: Remote) -> None:
    remote.text += '[gateway.models]\n"claude-*" = "small"\n'
    remote.server("big ü", 'aliases = ["large"]', host="localhost")
    remote.server("little", 'aliases = ["small"]')
    remote.server("search", 'kind = "embedding"')
    for name in ("big ü", "little", "search"):
        remote.run(name)
    remote.listen()
    wait_for(lambda: {remote.state(name) for name in ("big ü", "little", "search")} == {"ready"})
    for model, name in (("large", "big ü"), ("BIG Ü", "big ü"), ("claude-x", "little")):
        assert remote.chat(model).json()["name"] == name
    assert remote.post("/v1/embeddings", {"input": "x"}).json()["name"] == "search"
    assert remote.requests("big ü") == 0
    refused = remote.chat("litle")
    assert refused.status_code == 404 and "did you mean little?" in refused.text
    listed = {each["id"] for each in remote.get("/v1/models").json()["data"]}
    assert listed == {"big ü", "large", "little", "small", "search"}
    tags = {each["name"] for each in remote.get("/api/tags").json()["models"]}
    assert tags == listed, "Ollama's API lists them"
    rows = remote.get("/dashboard/data").json()["instances"]
    assert {row["name"]: row["state"] for row in rows} == dict.fromkeys(
        ("big ü", "little", "search"), "ready"
    )
    assert remote.get("/dashboard/log?name=little").status_code == 404


def test_a_request_is_held_until_the_server_answers(remote: Remote) -> None:
    """It counts meanwhile, and in flight; then the server goes, and the next one waits again."""
    remote.server("chat", 'start = "demand"', "ready_timeout = 60")
    remote.listen()
    wait_for(lambda: remote.state("chat") == "asleep")
    assert remote.requests("chat") == 0
    answer = remote.later(lambda: remote.chat("chat"))
    wait_for(lambda: remote.requests("chat") == 1)
    remote.run("chat", "--slow", 1)
    assert remote.requests("chat") == 1
    assert answer().json()["name"] == "chat"
    assert remote.requests("chat") == 0
    remote.kill("chat")
    wait_for(lambda: remote.state("chat") == "asleep")
    answer = remote.later(lambda: remote.chat("chat"))
    wait_for(lambda: remote.requests("chat") == 1)
    remote.run("chat")
    assert answer().status_code == 200


def test_a_client_that_gives_up_counts_no_more(remote: Remote) -> None:
    remote.server("chat", 'start = "demand"')
    remote.listen()
    body = json.dumps({"model": "chat", "messages": []}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    )
    with socket.create_connection(("127.0.0.1", remote.port)) as client:
        client.sendall(head.encode() + b"\r\n" + body)
        wait_for(lambda: remote.requests("chat") == 1)
    wait_for(lambda: remote.requests("chat") == 0, 10)


def test_one_that_stays_away_ends_the_wait(remote: Remote) -> None:
    remote.text += "hold_timeout = 1\n"
    remote.server("chat")
    remote.listen()
    refused = remote.chat("chat")
    assert refused.status_code == 503 and "no server became ready within 1 s" in refused.text
    assert "cannot be reached" in refused.text


def test_two_gateways_on_one_file(remote: Remote) -> None:
    """Each answers for both, and for itself where it is asked for that."""
    ports = [free_port(), free_port()]
    peers = [f"http://localhost:{port}" for port in ports]
    remote.text += f"peers = {json.dumps(peers)}\n"
    remote.server("chat", 'start = "demand"')
    first, second = remote.listen("first", ports[0]), remote.listen("second", ports[1])
    wait_for(lambda: remote.state("chat") == "asleep")
    answer = remote.later(lambda: remote.chat("chat"))  # through the second
    wait_for(lambda: remote.requests("chat", second) == 1)
    assert remote.requests("chat", first) == 1
    assert remote.requests("chat?only=1", first) == 0
    remote.run("chat")
    assert answer().status_code == 200
    remote.kill("second")
    assert remote.requests("chat", first) == 0, "one that is gone has no requests"
    remote.url = first
    assert remote.chat("chat").status_code == 200


def test_keys(remote: Remote) -> None:
    """Clients have one, the server has another; relative paths start at the file."""
    (remote.path / "clients").write_text(f"{KEY}\n")
    (remote.path / "inner").write_text(INNER)
    remote.text += 'api_key_file = "clients"\n'
    remote.server("chat", 'api_key_file = "inner"', 'start = "demand"')
    remote.run("chat")
    remote.listen()
    assert remote.chat("chat").status_code == 401
    assert remote.get("/scaling/chat").status_code == 401
    assert remote.requests("chat") == 0
    body = {"model": "chat", "messages": []}
    headers = {"authorization": f"Bearer {KEY}"}
    assert remote.post("/v1/chat/completions", body, headers=headers).status_code == 200
    (request,) = remote.events("chat", "request")
    assert request["headers"]["authorization"] == f"Bearer {INNER}"


def test_loading_and_unloading_are_somebody_elses(remote: Remote) -> None:
    """An order to load counts as a request, so that an autoscaler sees it."""
    remote.server("chat", 'start = "demand"')
    remote.listen()
    wait_for(lambda: remote.state("chat") == "asleep")
    assert remote.post("/models/load", {"model": "chat"}).status_code == 200
    assert remote.requests("chat") == 1
    remote.run("chat")
    wait_for(lambda: remote.state("chat") == "ready")
    refused = remote.post("/models/unload", {"model": "chat"})
    assert refused.status_code == 400 and "runs elsewhere" in refused.text
    assert remote.get("/dashboard/data").json()["unloads"] is False, "its page has no button"
    assert not (remote.path / "usage").exists(), "there is no supervisor to tell"


def test_an_answer_under_way_ends_before_the_gateway(remote: Remote) -> None:
    remote.text += "stop_timeout = 30\n"
    remote.server("chat")
    remote.run("chat")
    remote.listen()
    answer = remote.later(lambda: remote.chat("chat", slow=2))
    wait_for(lambda: remote.requests("chat") == 1)
    assert stop(remote.processes["gateway"]) == 0  # type: ignore[arg-type]
    assert answer().json()["name"] == "chat"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[gateway]\nprot = 1\n[servers]\n", "unknown field `prot`"),
        ('[servers.a]\nurl = "https://a"\n', "servers.a.url = https://a: must be such as"),
        ('[servers.a]\nurl = "http://a:port"\n', "servers.a.url = http://a:port: "),
        ('[servers.a]\nurl = "http://a..b"\n', "servers.a.url = http://a..b: "),
        ('[servers.a]\nurl = "http://a"\nport = 1\n', "unknown field `port`"),
        ('[gateway]\npeers = ["https://a"]\n[servers]\n', "gateway.peers: https://a: must be"),
        ("[gateway]\npull = true\n[servers]\n", "gateway.pull"),
        ("[gateway\n", "servers.toml: "),
        ('[gateway]\nhost = "0.0.0.0"\n[servers]\n', "there is no API key"),
        (None, "No such file"),
    ],
)
def test_wrong_files(bare: Doit, tmp_path: Path, text: str | None, line: str) -> None:
    file = tmp_path / "servers.toml"
    if text is not None:
        file.write_text(text)
    run = bare("gateway", f"servers={file}", status=3)
    assert line in run.out + run.err
    assert "contradict" in bare("gateway", f"servers={file}", "config=x", status=3).err
