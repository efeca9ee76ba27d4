"""doit chat as users run it: in a terminal, in scripts, and where there is nobody to talk to."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import select
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Doit, free_port, get, wait_for, with_programs
from fakes import completions as fake
from fakes import hub
from workers import shared

ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\].*?(\x07|\x1b\\)|[=>])")


class Screen:
    """A program in a terminal of its own."""

    def __init__(self, doit: Doit, *words: str) -> None:
        self.end, self.slave = os.openpty()
        self._letters = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self._seen = 0
        # opened by the leader of a session, it becomes its terminal: Ctrl-C is a signal then
        wrapped = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.slave)]
        self.process = subprocess.Popen(
            [*wrapped, *doit.command("chat", *words)],
            env={**doit.env, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
            start_new_session=True,
        )

    def read(self, seconds: float) -> bool:
        """Whether something came."""
        if not select.select([self.end], [], [], seconds)[0]:
            return False
        self.text += self._letters.decode(os.read(self.end, 65536))
        return True

    def until(self, pattern: str, seconds: float = 90) -> str:
        """What came since the last call, up to what matches."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            plain = ESCAPES.sub("", self.text)
            if found := re.compile(pattern).search(plain, self._seen):
                came, self._seen = plain[self._seen : found.end()], found.end()
                return came
            if not self.read(0.1) and self.process.poll() is not None:
                break
        raise AssertionError(f"{pattern!r} did not come:\n{ESCAPES.sub('', self.text)[-3000:]}")

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def ended(self) -> int:
        deadline = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read(0.1)
        return self.process.wait(timeout=1)


@contextlib.contextmanager
def terminal(doit: Doit, *words: str) -> Iterator[Screen]:
    screen = Screen(doit, *words)
    try:
        yield screen
    finally:
        if screen.process.poll() is None:
            screen.process.kill()
            screen.process.wait()
        os.close(screen.end)
        os.close(screen.slave)


def children(screen: Screen) -> list[psutil.Process]:
    """The servers that it has started."""
    found = psutil.Process(screen.process.pid).children(recursive=True)
    return [each for each in found if "llama-server" in " ".join(each.cmdline())]


# Without a model


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[Any]]]:
    with fake.answering() as running:
        yield running


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nobody to talk to; pass model=… (try model=demo), name=… of a running server"),
        (["model=demo"], "nothing to ask: no terminal, no prompt= and nothing in a pipe"),
        (["model=demo", "prompt= "], "prompt= : must be a value"),
        (["model=demo", "url=http://127.0.0.1:1"], "model= and url= contradict each other"),
        (["model=demo", "name=x", "prompt=a"], "model= and name= contradict each other"),
        (["model=demo", "port=8080", "prompt=a"], "port=8080: not a variable of chat"),
        (["model=demo", "host=::1", "prompt=a"], "host=::1: not a variable of chat"),
        (["model=demo", "format=json", "prompt=a"], "format=json: not a variable of chat"),
        (["name=x,y", "prompt=a"], "name=x,y: names more than one"),
        (["url=ftp://a", "prompt=a"], "url=ftp://a: is not an address of a server"),
        (["url=127.0.0.1:99999", "prompt=a"], "url=127.0.0.1:99999: is not an address of a server"),
    ],
)
def test_wrong_usage(bare: Doit, words: list[str], message: str) -> None:
    with bare.start("chat", *words, stdin=subprocess.DEVNULL) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and message in err and not out
    assert not any(bare.home.rglob("*.gguf")), "before any work"


def asked(doit: Doit, *words: str, text: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        doit.command("chat", *words),
        env=doit.env,
        capture_output=True,
        check=False,
        timeout=300,
        **({"stdin": subprocess.DEVNULL} if text is None else {"input": text}),
    )


def test_one_question(bare: Doit, server: tuple[str, list[Any]]) -> None:
    url, requests = server
    done = asked(bare, f"url={url}/v1", "prompt=hello", "system=be brief")
    assert (done.returncode, done.stdout) == (0, b"Hello\n"), done.stderr
    assert requests[-1]["messages"][0] == {"role": "system", "content": "be brief"}
    assert requests[-1]["model"] == "one"

    assert asked(bare, f"url={url}", text=b"hello\n").stdout == b"Hello\n"
    for pasted in (url.removeprefix("http://"), f"{url}/v1/chat/completions/", f"{url}/v1/models"):
        assert asked(bare, f"url={pasted}", "prompt=hello").stdout == b"Hello\n", pasted
    key = bare.home / "key ü"
    key.write_text("secret\n")
    asked(bare, f"url={url}", "prompt=hello", f"api_key_file={key}", text="a ü\n".encode())
    assert requests[-1]["messages"][-1]["content"] == "a ü\n\nhello"
    assert requests[-1]["key"] == "Bearer secret"

    assert asked(bare, f"url={url}", "prompt=hostile").stdout == b"ared]0;title2Jbc\n"
    assert asked(bare, f"url={url}", "prompt=reasons").stdout == b"so\n"


def test_a_question_that_fails(bare: Doit, server: tuple[str, list[Any]]) -> None:
    url = server[0]
    done = asked(bare, f"url={url}", "prompt=too long")
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.decode().count("the context is full") == 1
    cut = asked(bare, f"url={url}", "prompt=cut")
    assert cut.returncode == 1 and cut.stdout == b"Hello\n"
    assert b"ended the answer in the middle" in cut.stderr
    assert asked(bare, f"url={url}", "prompt=hello", "name=two").returncode == 3
    nobody = asked(bare, f"url=http://127.0.0.1:{free_port()}", "prompt=hello")
    assert nobody.returncode == 1 and b"nothing answers at" in nobody.stderr
    utf16 = asked(bare, f"url={url}", text="hello".encode("utf-16"))
    assert utf16.returncode == 3 and b"stdin: is UTF-16" in utf16.stderr
    for name in ("prompt", "system"):
        words = {"prompt": "hello", name: os.fsdecode(b"caf\xe9")}
        latin = asked(bare, f"url={url}", *(f"{key}={value}" for key, value in words.items()))
        assert latin.returncode == 3 and f"{name}=: is not UTF-8".encode() in latin.stderr


def test_errors_leave_the_conversation_going(bare: Doit, server: tuple[str, list[Any]]) -> None:
    url, requests = server
    with terminal(bare, f"url={url}") as screen:
        screen.until(">>>")
        os.write(screen.end, b"caf\xe9\r")  # a terminal that is not set to UTF-8
        screen.until("(?s)error: .*>>>")  # the stand-in has no answer to it
        assert requests[-1]["messages"][-1]["content"] == "caf\ufffd"
        screen.type('"""/exit"""\r')  # a question all the same
        screen.until("(?s)error: .*>>>")
        assert requests[-1]["messages"][-1]["content"] == "/exit"
        screen.type("too long\r")
        assert "/reset begins a new conversation" in screen.until("(?s)error: .*>>>")
        screen.type("error inside\r")
        screen.until("(?s)error: .*out of luck.*>>>")
        screen.type("hostile\r")
        screen.until(r"ared\]0;title2Jbc")
        assert "\x1b]0;" not in screen.text and "\x1b[31mred" not in screen.text
        screen.until(">>>")
        screen.type("/sytem x\r")
        screen.until(r"did you mean system\?")
        screen.until(">>>")
        screen.type('"""hel\rlo"""\x7f\x7f\x7f\x03')  # given up half-way
        screen.until("Ctrl-D or /exit leaves")
        screen.until(">>>")
        screen.type("hel\x1alo\r")  # Ctrl-Z, for the shell
        screen.until("Hello")
        screen.until("2 tokens, 7.5 tokens/s")
        screen.until(">>>")
        contents = [message["content"] for message in requests[-1]["messages"]]
        # a question without an answer is not asked again
        assert contents == ["error inside", "Hello", "hostile", "ared]0;title2Jbc", "hello"]
        screen.type("/reset\r")
        screen.until("a new conversation")
        screen.until(">>>")
        screen.type("\x1b[A\x1b[A\r")  # the input before: from the history
        screen.until("Hello")
        screen.until(">>>")
        assert [message["content"] for message in requests[-1]["messages"]] == ["hello"]
        screen.type("\x04")
        assert screen.ended() == 0
    history = bare.home / "run" / "chat" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and "+hello" in history.read_text()


# With a model


@pytest.fixture(scope="module")
def smol(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Doit:
    """doit on a home with the model that talks. For reading only."""

    def make(folder: Path) -> None:
        with_programs(built, folder / "hôme")("fetch", "model=demo")

    return Doit(shared(tmp_path_factory, "smol", make) / "hôme")


@pytest.mark.build
@pytest.mark.slow
def test_a_running_server(smol: Doit) -> None:
    """It answers without end until its context is full."""
    options = ("ctx_size=256", "parallel=1", "server.ignore_eos=true", "server.temp=0", "threads=1")
    with smol.serving("model=demo", *options) as url, terminal(smol, f"url={url}") as screen:
        assert "a context of 256 tokens" in screen.until(">>>")

        def is_busy() -> bool:
            return any(slot["is_processing"] for slot in get(f"{url}/slots"))

        screen.type(f"Tell me a long story. {'Please. ' * 60}\r")
        wait_for(is_busy)
        screen.until(r"[a-z] [a-z]")
        screen.type("\x03")  # ends the answer, at the server too
        screen.until("interrupted")
        screen.until(">>>")
        wait_for(lambda: not is_busy())
        screen.type("And then?\r")
        screen.until("the answer was cut: the context of 256 tokens is full", 300)
        screen.until(">>>")
        screen.type("More\r")
        assert "the context is full: the conversation takes" in screen.until("(?s)error: .*>>>")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.ended() == 128 + signal.SIGTERM


@pytest.mark.build
@pytest.mark.slow
def test_a_model_is_served_for_the_conversation_alone(smol: Doit) -> None:
    words = ("model=demo", "ctx_size=512", "threads=1", "server.predict=8", "server.temp=0")
    done = asked(smol, *words, "prompt=Say hello.")
    assert done.returncode == 0 and len(done.stdout.split()) > 1, done.stderr
    assert not list((smol.home / "logs").glob("chat-*"))
    with terminal(smol, *words) as screen:
        screen.until(">>>")
        (server,) = children(screen)
        screen.type("Say hello.\r")
        screen.until(r"8 tokens, [\d.]+ tokens/s")
        screen.until(">>>")
        screen.type("/exit\r")
        assert screen.ended() == 0 and not server.is_running()
    for end in (signal.SIGHUP, signal.SIGKILL):
        with terminal(smol, *words) as screen:
            screen.until(">>>")
            (server,) = children(screen)
            screen.process.send_signal(end)
            assert screen.ended() == (128 + end if end != signal.SIGKILL else -end)
            wait_for(lambda server=server: not server.is_running())
    with terminal(smol, *words) as screen:  # the server ends under us
        screen.until(">>>")
        children(screen)[0].kill()
        screen.type("Say hello.\r")
        screen.until("the server ended after it was ready, killed by SIGKILL")
        assert screen.ended() == 1


@pytest.mark.build
@pytest.mark.slow
def test_models_that_cannot_talk(smol: Doit, gguf: Path, demo: Doit, tmp_path: Path) -> None:
    base = tmp_path / "base ü.gguf"
    data = gguf.read_bytes()
    base.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.xhat_template"))
    done = asked(smol, f"model={base}", "prompt=hello")
    assert done.returncode == 3 and b"has no chat template" in done.stderr
    done = asked(
        smol, f"model={base}", "server.chat_template=chatml", "server.predict=4", "prompt=a"
    )
    assert done.returncode == 0, done.stderr
    done = asked(demo, "model=demo-embed", "prompt=hello")
    assert done.returncode == 3 and b"is an embedding model (bert)" in done.stderr


@pytest.mark.build
@pytest.mark.slow
def test_an_instance_of_a_file(smol: Doit, gguf: Path, tmp_path: Path) -> None:
    """Its key is known from the file."""
    key, file = tmp_path / "key ü", tmp_path / "servers.toml"
    key.write_text("secret\n")
    options = {"model": str(gguf), "ctx_size": 256, "n_predict": 4, "temp": 0}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    first = [f"port = {free_port()}", f"api_key_file = {json.dumps(str(key))}"]
    second = [f"port = {free_port()}", "embeddings = true"]
    text = ["[instance.one.server]", *lines, *first, "[instance.two.server]", *lines, *second]
    file.write_text("\n".join(text), encoding="utf-8")
    named = f"config={file}"
    down = asked(smol, named, "name=one", "prompt=hello")
    assert down.returncode == 1 and b"nothing is up" in down.stderr
    smol("up", named)
    try:
        for words in ((named,), ("name=one",), (named, "name=one")):
            done = asked(smol, *words, "prompt=hello")
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
        done = asked(smol, "name=two", "prompt=hello")
        assert done.returncode == 3 and b"is for embedding, it writes no answers" in done.stderr
        done = asked(smol, "name=three", "prompt=hello")
        assert done.returncode == 3 and b"there is no such instance" in done.stderr
        smol("down", named, "name=one")
        done = asked(smol, "name=one", "prompt=hello")
        assert done.returncode == 3 and b"there is no such instance" in done.stderr
    finally:
        smol("down", named)


@pytest.mark.build
@pytest.mark.slow
def test_a_model_that_cannot_talk_is_not_downloaded(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    """Its header is read where it lies."""
    folder = tmp_path / "hub" / "org" / "base-GGUF"
    folder.mkdir(parents=True)
    data = gguf.read_bytes()
    (folder / "base-Q8_0.gguf").write_bytes(
        data.replace(b"tokenizer.chat_template", b"tokenizer.xhat_template")
    )
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {"HF_ENDPOINT": server.endpoint, "NO_PROXY": "127.0.0.1"}
        done = asked(doit, "model=org/base-GGUF", "prompt=hello")
    assert done.returncode == 3 and b"has no chat template" in done.stderr, done.stderr
    assert not list((doit.home / "models").rglob("*.gguf"))
