"""The fake hub is believed by the real client, and each of its faults does what its name says."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha1, sha256
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fakes import hub
from fakes.hub_faults import KINDS

SMALL = b'{"model_type": "llama"}'
LARGE = bytes(range(256)) * 20  # LFS by its size
GGUF = b"GGUF, small, LFS by its name"
ONE = "org/one"

# The client reads HF_HOME and HF_ENDPOINT when it is imported, hence a process of its own.
CLIENT = """
import json, sys
from dataclasses import asdict
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import get_session

def info(repo, **options):
    found = HfApi().model_info(repo, files_metadata=True, **options)
    names = "id", "sha", "private", "gated"
    return {n: getattr(found, n) for n in names} | {"siblings": [asdict(s) for s in found.siblings]}

def head(repo, path, revision=None, **options):
    return asdict(get_hf_file_metadata(hf_hub_url(repo, path, revision=revision), **options))

def get(repo, path, **options):
    return open(hf_hub_download(repo, path, **options), "rb").read().hex()

def follow(repo, path, token):
    headers = {"authorization": "Bearer " + token}
    return get_session().get(hf_hub_url(repo, path), headers=headers).content.hex()

answers = []
for name, args, options in json.load(sys.stdin):
    try:
        answers.append(globals()[name](*args, **options))
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        answers.append([type(error).__name__, status])
print(json.dumps(answers))
"""


def call(name: str, *args: str, **options: Any) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    return name, args, options


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")

    def repo(name: str, files: dict[str, bytes], **settings: Any) -> None:
        for path, data in {**files, ".hub.json": json.dumps(settings).encode()}.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(data)

    one = {"config.json": SMALL, "large.bin": LARGE, "q4/tiny q4.gguf": GGUF}
    dev = {".hub/dev/config.json": b"{}", ".hub/dev/new.txt": b"new"}
    branches = {"feature/dev": ".hub/dev"}
    repo(ONE, one | dev, branches=branches, tags={"v1": "feature/dev"})
    repo("org/gated", {"config.json": SMALL, "large.bin": LARGE}, gated="manual", token="hf_member")
    repo("org/private", {"large.bin": LARGE}, private=True, token="hf_owner")
    repo("org/old", {}, renamed_to=ONE)
    repo("org/bad", {"a.gguf": GGUF}, bad=[{"path": "a.gguf", "kind": "status500", "times": 1}])
    return root


@pytest.fixture(scope="module")
def program(root: Path) -> Iterator[hub.Running]:
    with hub.start(root) as running:
        yield running


@pytest.fixture
def server(program: hub.Running) -> hub.Running:
    program.control(reset=True, clear_log=True)
    return program


@pytest.fixture
def ask(server: hub.Running, tmp_path: Path) -> Any:
    """Let the real client make the calls, one process for all; an error comes as its class name."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = kept | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }

    def ask(*calls: Any) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            input=json.dumps(calls),
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        answers: list[Any] = json.loads(done.stdout)
        return answers

    return ask


def test_model_info_names_files_with_sizes_and_hashes(ask: Any) -> None:
    found, bare = ask(call("info", ONE), call("info", "org/gated"))
    assert (found["id"], found["private"], found["gated"]) == (ONE, False, False)
    assert len(found["sha"]) == 40
    files = {s["rfilename"]: s for s in found["siblings"]}
    assert sorted(files) == ["config.json", "large.bin", "q4/tiny q4.gguf"]
    assert files["config.json"]["size"] == len(SMALL)
    assert files["config.json"]["lfs"] is None
    assert files["config.json"]["blob_id"] == sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
    for path, data in {"large.bin": LARGE, "q4/tiny q4.gguf": GGUF}.items():
        lfs = files[path]["lfs"]
        assert (lfs["size"], lfs["sha256"]) == (len(data), sha256(data).hexdigest())
        assert lfs["pointer_size"] > 100
    # Gated hides the files, not what is known of them.
    assert bare["gated"] == "manual" and len(bare["siblings"]) == 2


def test_download_and_metadata(ask: Any, server: hub.Running) -> None:
    small, large, gguf, at_hub, at_cdn = ask(
        call("get", ONE, "config.json"),
        call("get", ONE, "large.bin"),
        call("get", ONE, "q4/tiny q4.gguf"),
        call("head", ONE, "config.json"),
        call("head", ONE, "q4/tiny q4.gguf"),
    )
    assert [bytes.fromhex(text) for text in (small, large, gguf)] == [SMALL, LARGE, GGUF]
    assert at_hub["location"] == f"{server.endpoint}/{ONE}/resolve/main/config.json"
    assert at_cdn["location"].startswith(f"{server.cdn}/{ONE}/{at_cdn['commit_hash']}/q4/")
    assert (at_cdn["size"], at_cdn["etag"]) == (len(GGUF), sha256(GGUF).hexdigest())


def test_revisions(ask: Any) -> None:
    main, branch, tag = ask(
        *(call("info", ONE, revision=name) for name in ("main", "feature/dev", "v1"))
    )
    assert tag == branch and main["sha"] != branch["sha"]
    assert [s["rfilename"] for s in branch["siblings"]] == ["config.json", "new.txt"]
    commit, new, old, gone = ask(
        call("info", ONE, revision=branch["sha"]),
        call("get", ONE, "config.json", revision="feature/dev"),
        call("head", ONE, "config.json", revision=main["sha"]),
        call("get", ONE, "large.bin", revision="v1"),
    )
    assert commit["sha"] == branch["sha"]
    assert bytes.fromhex(new) == b"{}"
    assert old["commit_hash"] == main["sha"]
    assert gone == ["RemoteEntryNotFoundError", 404]  # a subclass of EntryNotFoundError


def test_renamed_repository(ask: Any) -> None:
    found, data = ask(call("info", "org/old"), call("get", "org/old", "large.bin"))
    assert found["id"] == ONE
    assert bytes.fromhex(data) == LARGE


def test_what_is_refused(ask: Any) -> None:
    cases = [
        (call("info", "org/none"), ["RepositoryNotFoundError", 401]),
        (call("info", "org/none", token="hf_x"), ["RepositoryNotFoundError", 404]),
        (call("info", "org/private"), ["RepositoryNotFoundError", 401]),
        (call("info", "org/private", token="hf_x"), ["RepositoryNotFoundError", 404]),
        (call("get", "org/private", "large.bin"), ["RepositoryNotFoundError", 401]),
        (call("head", "org/gated", "config.json"), ["GatedRepoError", 401]),
        (call("get", "org/gated", "large.bin", token="hf_x"), ["GatedRepoError", 403]),
        (call("info", ONE, revision="nope"), ["RevisionNotFoundError", 404]),
        (call("get", ONE, "config.json", revision="nope"), ["RevisionNotFoundError", 404]),
        (call("get", ONE, "none.gguf"), ["RemoteEntryNotFoundError", 404]),
    ]
    assert ask(*(c for c, _ in cases)) == [expected for _, expected in cases]


def test_the_token_stays_at_the_hub(ask: Any, server: hub.Running) -> None:
    info, member, owner, followed = ask(
        call("info", "org/private", token="hf_owner"),
        call("get", "org/gated", "large.bin", token="hf_member"),
        call("get", "org/private", "large.bin", token="hf_owner"),
        call("follow", "org/private", "large.bin", "hf_owner"),
    )
    assert info["private"] is True
    assert [bytes.fromhex(text) for text in (member, owner, followed)] == [LARGE] * 3
    # Without org/: a list the client fetches for itself, once a day for each HF_HOME.
    at_hub = [e for e in server.log() if e["server"] == "hub" and "/org/" in e["path"]]
    at_cdn = [entry for entry in server.log() if entry["server"] == "cdn"]
    assert all(entry["authorization"] for entry in at_hub)
    # hf_hub_download drops the header itself after its HEAD, and never GETs the hub's address;
    # a plain GET that follows the redirect loses it in httpx2, which compares origins.
    assert [entry["method"] for entry in at_hub] == ["GET", "HEAD", "HEAD", "GET"]
    assert len(at_cdn) == 3
    assert not any(entry["authorization"] for entry in at_cdn)
    assert {entry["host"] for entry in at_cdn} == {urlsplit(server.cdn).netloc}
    assert {entry["sent"] for entry in at_cdn} == {len(LARGE)}


def test_the_client_starts_again_after_a_cut(ask: Any, server: hub.Running) -> None:
    server.control(faults=[{"path": "large.bin", "kind": "cut", "after": 1000, "times": 1}])
    (data,) = ask(call("get", ONE, "large.bin"))
    assert bytes.fromhex(data) == LARGE
    asked = [(e["range"], e["sent"]) for e in server.log() if e["server"] == "cdn"]
    # Its chunks are 10 MB: the bytes of a chunk that did not fill are lost to the client.
    assert asked == [(None, 1000), (None, len(LARGE))]


class Reply:
    """One request without following redirects, read to its end."""

    def __init__(self, base: str, path: str, method: str = "GET", **headers: str) -> None:
        with closing(HTTPConnection(urlsplit(base).netloc, timeout=60)) as connection:
            connection.request(method, path, headers=headers)
            response: HTTPResponse = connection.getresponse()
            self.status, self.headers = response.status, response.headers
            self.whole = True
            try:
                self.body = response.read()
            except IncompleteRead as error:
                self.body, self.whole = error.partial, False


@pytest.fixture
def address(server: hub.Running) -> str:
    """The path of large.bin at the second host."""
    reply = Reply(server.endpoint, f"/{ONE}/resolve/main/large.bin", "HEAD")
    assert reply.status == 302
    return urlsplit(reply.headers["Location"]).path


def on(server: hub.Running, kind: str, **options: Any) -> None:
    server.control(faults=[{"repo": ONE, "path": "large.bin", "kind": kind, **options}])


@pytest.mark.parametrize(
    ("asked", "status", "said", "body"),
    [
        ("bytes=100-199", 206, "bytes 100-199/5120", LARGE[100:200]),
        ("bytes=5000-", 206, "bytes 5000-5119/5120", LARGE[5000:]),
        ("bytes=5000-9999", 206, "bytes 5000-5119/5120", LARGE[5000:]),
        ("bytes=-20", 206, "bytes 5100-5119/5120", LARGE[-20:]),
        ("lines=1-2", 200, None, LARGE),
        ("bytes=5120-", 416, "bytes */5120", None),
    ],
)
def test_ranges(
    server: hub.Running, address: str, asked: str, status: int, said: str | None, body: bytes | None
) -> None:
    reply = Reply(server.cdn, address, Range=asked)
    assert (reply.status, reply.headers["Content-Range"]) == (status, said)
    assert body is None or reply.body == body
    assert server.log()[-1]["range"] == asked


def test_a_range_of_another_etag_gives_the_whole_file(server: hub.Running, address: str) -> None:
    etag = Reply(server.cdn, address, "HEAD").headers["ETag"]
    assert Reply(server.cdn, address, **{"Range": "bytes=1-2", "If-Range": etag}).status == 206
    other = Reply(server.cdn, address, **{"Range": "bytes=1-2", "If-Range": '"other"'})
    assert (other.status, other.body) == (200, LARGE)


def test_slow(server: hub.Running, address: str) -> None:
    on(server, "slow", bytes_per_second=20_000)
    started = time.monotonic()
    assert Reply(server.cdn, address).body == LARGE
    assert time.monotonic() - started >= len(LARGE) / 20_000


def test_stall(server: hub.Running, address: str) -> None:
    on(server, "stall", after=1000)
    host, port = urlsplit(server.cdn).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"GET {address} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        received = b""
        while len(received.partition(b"\r\n\r\n")[2]) < 1000:
            received += connection.recv(65536)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):  # open and silent, not closed
            connection.recv(1)
    assert received.partition(b"\r\n\r\n")[2] == LARGE[:1000]
    assert server.log()[-1]["sent"] == 1000


def test_cut_as_often_as_its_budget(server: hub.Running, address: str) -> None:
    on(server, "cut", after=1000, times=2)
    assert Reply(server.cdn, address, "HEAD").whole  # no bytes, so no chance to cut
    first, second, third = (Reply(server.cdn, address, Range="bytes=20-") for _ in range(3))
    assert (first.whole, first.body) == (False, LARGE[20:1020])
    assert (second.whole, second.body) == (False, LARGE[20:1020])
    assert (third.whole, third.body) == (True, LARGE[20:])


def test_status416(server: hub.Running, address: str) -> None:
    on(server, "status416")
    reply = Reply(server.cdn, address, Range="bytes=1-")
    assert (reply.status, reply.headers["Content-Range"]) == (416, "bytes */5120")
    assert Reply(server.cdn, address).status == 200


def test_ignore_range(server: hub.Running, address: str) -> None:
    on(server, "ignore_range")
    reply = Reply(server.cdn, address, Range="bytes=1000-")
    assert (reply.status, reply.headers["Content-Range"], reply.body) == (200, None, LARGE)


def test_wrong_content_range(server: hub.Running, address: str) -> None:
    on(server, "wrong_content_range", shift=-10)
    reply = Reply(server.cdn, address, Range="bytes=1000-1999")
    assert (reply.status, reply.headers["Content-Range"]) == (206, "bytes 990-1989/5120")
    assert reply.body == LARGE[1000:2000]


def test_own_etag(server: hub.Running) -> None:
    on(server, "own_etag", at="hub")
    path = f"/{ONE}/resolve/main/large.bin"
    first, second = (Reply(server.endpoint, path, "HEAD").headers["X-Linked-Etag"] for _ in "ab")
    assert first == second != f'"{sha256(LARGE).hexdigest()}"'
    assert len(first) == len('""') + 40


def test_etag_changes(server: hub.Running) -> None:
    on(server, "etag_changes", at="hub")
    path = f"/{ONE}/resolve/main/large.bin"
    replies = [Reply(server.endpoint, path, "HEAD") for _ in range(3)]
    first, second, third = (reply.headers["X-Linked-Etag"] for reply in replies)
    assert first == f'"{sha256(LARGE).hexdigest()}"'
    assert second == third != first
    assert len(second) == len(first)


def test_flip_byte(server: hub.Running, address: str) -> None:
    on(server, "flip_byte")
    middle = len(LARGE) // 2
    body = Reply(server.cdn, address).body
    assert [i for i in range(len(LARGE)) if body[i] != LARGE[i]] == [middle]
    # The damage is in the file, not in the answer: a range sees it at the same place.
    tail = Reply(server.cdn, address, Range=f"bytes={middle}-").body
    assert tail == body[middle:]


def test_wrong_size(server: hub.Running, address: str) -> None:
    on(server, "wrong_size", by=-7)
    info = json.loads(Reply(server.endpoint, f"/api/models/{ONE}?blobs=true").body)
    sizes = {s["rfilename"]: s["size"] for s in info["siblings"]}
    assert (sizes["large.bin"], sizes["config.json"]) == (len(LARGE) - 7, len(SMALL))
    reply = Reply(server.endpoint, f"/{ONE}/resolve/main/large.bin", "HEAD")
    assert reply.headers["X-Linked-Size"] == str(len(LARGE) - 7)
    assert Reply(server.cdn, address).body == LARGE


def test_status429_for_the_first_requests(server: hub.Running) -> None:
    path = f"/{ONE}/resolve/main/large.bin"
    on(server, "status429", retry_after=3, times=2)
    replies = [Reply(server.endpoint, path) for _ in range(3)]
    assert [reply.status for reply in replies] == [429, 429, 302]
    assert replies[0].headers["Retry-After"] == "3"


def test_status500_for_the_first_requests(server: hub.Running) -> None:
    path = f"/{ONE}/resolve/main/large.bin"
    on(server, "status500", times=1)
    assert [Reply(server.endpoint, path).status for _ in range(2)] == [500, 302]


def test_model_info_fails_only_for_a_fault_of_every_file(server: hub.Running) -> None:
    info = f"/api/models/{ONE}"
    on(server, "status500")
    assert Reply(server.endpoint, info).status == 200
    server.control(faults=[{"kind": "status500", "at": "api", "times": 1}])
    assert [Reply(server.endpoint, info).status for _ in range(2)] == [500, 200]


def test_faults_of_the_file_start_again_after_reset(server: hub.Running) -> None:
    path = "/org/bad/resolve/main/a.gguf"
    assert [Reply(server.endpoint, path).status for _ in range(2)] == [500, 302]
    server.control(reset=True)
    assert Reply(server.endpoint, path).status == 500


def test_unknown_fault_or_option_is_refused(server: hub.Running) -> None:
    for entry in ({"kind": "slwo"}, {"kind": "cut", "afetr": 1}, {"kind": "cut", "at": "moon"}):
        with pytest.raises(ValueError, match=r"slwo|afetr|moon"):
            server.control(faults=[entry])
    assert server.control() == []


def test_every_fault_has_its_test() -> None:
    tested = " ".join(name for name in globals() if name.startswith("test_"))
    assert [kind for kind in KINDS if kind not in tested] == []


def test_a_push_is_a_new_commit(server: hub.Running, root: Path) -> None:
    pushed = root / "org" / "pushed"
    pushed.mkdir(exist_ok=True)
    commits = []
    for data in (b"one", b"two, longer"):
        (pushed / "a.txt").write_bytes(data)
        reply = Reply(server.endpoint, "/org/pushed/resolve/main/a.txt")
        assert reply.body == data
        commits.append(reply.headers["X-Repo-Commit"])
    assert commits[0] != commits[1]


def test_program_ends_when_stdin_closes_and_on_sigterm(root: Path) -> None:
    command = [sys.executable, hub.__file__, "--root", str(root)]
    for stop in (lambda p: p.stdin.close(), lambda p: p.terminate()):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout and process.stdout.readline().startswith(b'{"endpoint"')
                stop(process)
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()
