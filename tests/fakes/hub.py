"""A Hugging Face hub of local folders: enough of its API for the unmodified huggingface_hub.

    python tests/fakes/hub.py --root DIR [--host ADDRESS]

`DIR/org/name/` holds the files of `main`. Two listeners on 127.0.0.1: the hub, and the "CDN" to
which LFS files are redirected under another host name (`localhost`), as the site does, so that a
token sent too far is seen in the log. With `--host`, for a network of containers, both have that
address. Prints one JSON line with both addresses when ready; ends on SIGTERM or when stdin closes,
so it never outlives the test that started it.

`DIR/org/name/.hub.json`, all keys optional:
  gated       "auto" or "manual": files need the token, model_info does not
  private     true: everything needs the token
  token       the token with access; without this key any token has
  branches    {name: folder}, the folder inside the repository's, under `.hub/`
  tags        {name: branch}
  renamed_to  "org/other": every request is redirected there
  bad         [{"path": ..., "kind": ...}]: see hub_faults.py

Folders are read at every request, so writing a file is a push: `main` gets another commit, and
the commit before it is gone (the site would keep it). `DIR/.hub.json` may hold {"tokens": [...]}:
any other token is refused then, even for public files, as on the site; without it, it is taken for
that of a stranger.

`POST /_control` takes {"faults": [...]} to switch faults on, {"reset": true} to switch them off,
{"clear_log": true}; `GET /_log` lists the requests so far.
"""

import argparse
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

if __package__:
    from .hub_faults import Answer, Faults, blocks
else:  # started as a program: its own folder is on the path, no package is
    from hub_faults import Answer, Faults, blocks

LFS_ABOVE = 1024  # bytes; the site's limit is 10 MB, too much for a test
LFS_SUFFIXES = (".gguf", ".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a revision; `etag` is the sha256 for LFS and git's blob id for the others."""

    disk: Path
    size: int
    sha256: str
    blob_id: str
    pointer_size: int | None

    @property
    def etag(self) -> str:
        return self.blob_id if self.pointer_size is None else self.sha256


Tree = tuple[str, dict[str, File]]  # a commit, and its files by path


@cache
def read_file(disk: Path, size: int, _mtime_ns: int) -> File:
    with disk.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    lfs = size > LFS_ABOVE or disk.name.endswith(LFS_SUFFIXES)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    in_git = pointer.encode() if lfs else disk.read_bytes()
    return File(
        disk=disk,
        size=size,
        sha256=sha256,
        blob_id=hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest(),
        pointer_size=len(in_git) if lfs else None,
    )


def read_tree(folder: Path) -> Tree:
    """What the folder of one branch holds."""
    files = {}
    for disk in sorted(folder.rglob("*")):
        path = disk.relative_to(folder).as_posix()
        if disk.is_file() and path != ".hub.json" and not path.startswith(".hub/"):
            stat = disk.stat()
            files[path] = read_file(disk, stat.st_size, stat.st_mtime_ns)
    listing = "".join(f"{path} {file.sha256}\n" for path, file in files.items())
    return hashlib.sha1(listing.encode()).hexdigest(), files


def read_revision(folder: Path, settings: dict[str, Any], name: str) -> Tree | None:
    """What a branch, a tag or a whole commit id names."""
    branches = {"main": folder}
    branches |= {b: folder / where for b, where in settings.get("branches", {}).items()}
    name = settings.get("tags", {}).get(name, name)
    if name in branches:
        return read_tree(branches[name])
    trees = (read_tree(where) for where in branches.values())
    return next((tree for tree in trees if tree[0] == name), None)


def refusal(
    repo: str, settings: dict[str, Any] | None, token: str | None, at: str
) -> tuple[int, str, str] | None:
    """Status, error code and message for who may not see this, or None."""
    known = settings or {}
    # The CDN asks for no token: on the site its addresses are signed.
    allowed = at == "cdn" or (token is not None and token == known.get("token", token))
    # Private looks the same as missing, as on the site.
    if settings is None or (known.get("private") and not allowed):
        if token is None:
            return 401, "RepoNotFound", "Invalid username or password."
        return 404, "RepoNotFound", "Repository not found"
    if at == "hub" and known.get("gated") and not allowed:
        return 401 if token is None else 403, "GatedRepo", f"Access to {repo} is restricted."
    return None


class Hub:
    """What both listeners share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults = Faults()
        self.log: list[dict[str, Any]] = []
        self.cdn = ""

    def knows(self, token: str | None) -> bool:
        path = self.root / ".hub.json"
        tokens = json.loads(path.read_text()).get("tokens") if path.exists() else None
        return token is None or tokens is None or token in tokens

    def settings(self, repo: str) -> dict[str, Any] | None:
        """What `.hub.json` says, {} without one, None where there is no such repository."""
        folder = self.root / repo
        if folder not in self.root.glob("*/*"):
            return None
        path = folder / ".hub.json"
        settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.faults.declare(repo, settings.get("bad", []))
        return settings


class Listener(ThreadingHTTPServer):
    def __init__(self, hub: Hub, host: str, *, is_cdn: bool) -> None:
        super().__init__((host, 0), Handler)
        self.hub, self.is_cdn = hub, is_cdn

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away in the middle is what some of the tests do.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes; together they cost 40 ms
    server: Listener

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        hub, body = self.server.hub, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.entry: dict[str, Any] = {}
        if self.server.is_cdn or self.path != "/_control":
            return self.send_json(404, {"error": "nothing here"})
        try:
            wish = json.loads(body)
            if wish.get("reset"):
                hub.faults.reset()
            hub.faults.add(wish.get("faults", []))
        except ValueError as error:
            return self.send_json(400, {"error": str(error)})
        if wish.get("clear_log"):
            hub.log.clear()
        return self.send_json(200, {"faults": hub.faults.describe()})

    def do_GET(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        self.entry = {}
        if not self.server.is_cdn and url.path == "/_log":
            return self.send_json(200, hub.log)
        self.entry = {
            "server": "cdn" if self.server.is_cdn else "hub",
            "method": self.command,
            "host": self.headers.get("Host"),
            "path": self.path,
            "range": self.headers.get("Range"),
            "authorization": "Authorization" in self.headers,
            "status": None,
            "sent": 0,
        }
        hub.log.append(self.entry)  # now, so that a download still under way is seen too
        # Split before unquoting: the name of a branch may hold a slash.
        match [unquote(part) for part in url.path.split("/")[1:]]:
            case [org, name, commit, *path] if self.server.is_cdn and path:
                return self.answer("cdn", f"{org}/{name}", commit, "/".join(path))
            case ["api", "models", org, name]:
                return self.answer("api", f"{org}/{name}", "main", "*")
            case ["api", "models", org, name, "revision", revision]:
                return self.answer("api", f"{org}/{name}", revision, "*")
            case [org, name, "resolve", revision, *path] if path:
                return self.answer("hub", f"{org}/{name}", revision, "/".join(path))
        return self.send_json(404, {"error": "nothing here"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, at: str, repo: str, revision: str, path: str) -> None:
        hub = self.server.hub
        settings = hub.settings(repo)
        early = Answer()
        hub.faults.apply("status", at, repo, path, early)
        if early.status != 200:
            return self.send_json(early.status, {"error": "fault"}, early.headers)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if not hub.knows(token):
            return self.fail(401, "", "Invalid credentials in Authorization header")
        if refused := refusal(repo, settings, token, at):
            return self.fail(*refused)
        assert settings is not None
        if renamed := settings.get("renamed_to"):
            # A 307 with a relative address keeps the client, and its token, on this host.
            return self.send_json(307, {}, {"Location": self.path.replace(repo, renamed, 1)})
        tree = read_revision(hub.root / repo, settings, revision)
        if tree is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = tree
        if at == "api":
            return self.send_json(200, self.model_info(repo, settings, tree))
        if path not in files:
            seen_in = {"X-Repo-Commit": commit}  # the client remembers what a commit lacks
            return self.fail(404, "EntryNotFound", "Entry not found", **seen_in)
        return self.send_file(at, repo, commit, path, files[path])

    def state(self, at: str, repo: str, path: str, file: File) -> Answer:
        """What is said of a file, lies included."""
        answer = Answer(size=file.size, etag=file.etag)
        self.server.hub.faults.apply("metadata", at, repo, path, answer)
        return answer

    def model_info(self, repo: str, settings: dict[str, Any], tree: Tree) -> dict[str, Any]:
        commit, files = tree
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in files]
        if parse_qs(urlsplit(self.path).query).get("blobs") == ["true"]:
            for sibling, (path, file) in zip(siblings, files.items(), strict=True):
                said = self.state("api", repo, path, file)
                sibling["size"] = said.stated_size
                sibling["blobId"] = said.etag if file.pointer_size is None else file.blob_id
                if file.pointer_size is not None:
                    sibling["lfs"] = {
                        "sha256": said.etag,
                        "size": said.stated_size,
                        "pointerSize": file.pointer_size,
                    }
        info = {
            "id": repo,
            "sha": commit,
            "private": settings.get("private", False),
            "gated": settings.get("gated", False),
            "siblings": siblings,
        }
        if counts := settings.get("parameters"):  # of its safetensors, by element type
            info["safetensors"] = {"parameters": counts, "total": sum(counts.values())}
        return info

    def send_file(self, at: str, repo: str, commit: str, path: str, file: File) -> None:
        answer = self.state(at, repo, path, file)
        answer.headers |= {"ETag": f'"{answer.etag}"', "Accept-Ranges": "bytes"}
        if at == "hub":
            answer.headers["X-Repo-Commit"] = commit
        if at == "hub" and file.pointer_size is not None:
            answer.headers["X-Linked-Etag"] = f'"{answer.etag}"'
            answer.headers["X-Linked-Size"] = str(answer.stated_size)
            answer.headers["Location"] = f"{self.server.hub.cdn}/{repo}/{commit}/{quote(path)}"
            self.send_json(302, {}, answer.headers)
        elif self.command == "HEAD":
            answer.headers["Content-Length"] = str(answer.stated_size)
            self.send_start(200, answer.headers)
        else:
            self.send_bytes(at, repo, path, file.disk, answer)

    def send_bytes(self, at: str, repo: str, path: str, disk: Path, answer: Answer) -> None:
        self.set_range(answer)
        if answer.status == 206:
            self.server.hub.faults.apply("range", at, repo, path, answer)
        if answer.status == 416:
            answer.headers["Content-Range"] = f"bytes */{answer.size}"
            self.send_json(416, {"error": "range not satisfiable"}, answer.headers)
            return
        self.server.hub.faults.apply("body", at, repo, path, answer)
        answer.headers["Content-Length"] = str(answer.stop - answer.start)
        self.send_start(answer.status, answer.headers)
        with disk.open("rb") as stream:
            for block in blocks(answer, stream):
                self.wfile.write(block)
                self.entry["sent"] += len(block)
        if self.entry["sent"] < answer.stop - answer.start:
            if answer.stall_after == self.entry["sent"]:
                # Silent until the client hangs up, which makes its socket readable.
                select.select([self.connection], [], [])
            self.close_connection = True

    def set_range(self, answer: Answer) -> None:
        """Turn the Range header, one range of it, into 206 or 416; If-Range must agree."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or asked[0] == "bytes=-":
            return
        if self.headers.get("If-Range", answer.headers["ETag"]) != answer.headers["ETag"]:
            return
        first, last = asked.groups()
        if first:
            answer.start = int(first)
            answer.stop = min(int(last) + 1, answer.size) if last else answer.size
        else:
            answer.start = max(answer.size - int(last), 0)
        answer.status = 206 if answer.start < answer.stop else 416
        answer.headers["Content-Range"] = f"bytes {answer.start}-{answer.stop - 1}/{answer.size}"

    def fail(self, status: int, code: str, message: str, **headers: str) -> None:
        headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send_json(status, {"error": message}, headers)

    def send_json(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        known = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.send_start(status, known | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_start(self, status: int, headers: dict[str, str]) -> None:
        self.entry["status"] = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@dataclass(frozen=True, slots=True)
class Running:
    endpoint: str
    cdn: str

    def control(self, **wish: Any) -> list[dict[str, Any]]:
        """Send `faults=[...]`, `reset=True` or `clear_log=True`; the faults that are on then."""
        faults: list[dict[str, Any]] = self._ask("POST", "/_control", wish)["faults"]
        return faults

    def log(self) -> list[dict[str, Any]]:
        """The requests since the start, or since the log was cleared."""
        entries: list[dict[str, Any]] = self._ask("GET", "/_log")
        return entries

    def _ask(self, method: str, path: str, data: Any = None) -> Any:
        connection = HTTPConnection(urlsplit(self.endpoint).netloc, timeout=60)
        try:
            connection.request(method, path, body=json.dumps(data))
            response = connection.getresponse()
            answer = json.load(response)
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(answer["error"])
        return answer


@contextmanager
def start(root: Path) -> Iterator[Running]:
    """Run the hub as a program of its own for the length of a `with`."""
    with running([sys.executable, str(Path(__file__).resolve()), "--root", str(root)]) as hub:
        yield hub


@contextmanager
def running(command: list[str]) -> Iterator[Running]:
    """Run a command that ends in this program for the length of a `with`."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield Running(**json.loads(process.stdout.readline()))
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="a Hugging Face hub of local folders")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    options = parser.parse_args()
    host = options.host
    hub = Hub(options.root.resolve())
    listeners = [Listener(hub, host, is_cdn=False), Listener(hub, host, is_cdn=True)]
    endpoint = f"http://{host}:{listeners[0].server_port}"
    cdn = "localhost" if host == "127.0.0.1" else host
    hub.cdn = f"http://{cdn}:{listeners[1].server_port}"
    for listener in listeners:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
    print(json.dumps({"endpoint": endpoint, "cdn": hub.cdn}), flush=True)
    while os.read(0, 1024):  # not sys.stdin, whose lock a thread could hold when we end
        pass


if __name__ == "__main__":
    main()
