"""Upstream's releases and commits over real HTTP: enough of GitHub's API, and the downloads
behind it.

Two listeners: the API, which also redirects each download, and the files, under another host name
(`localhost`), so that a token sent too far is seen in the log. Whoever asks through a proxy finds
both here too.

    with releases.start() as site:
        site.add("b7000", {"llama-b7000-bin-ubuntu-x64.tar.gz": data})
        commit = site.commit(folder, "b7000")
        site.faults["rate_limit"] = {"x-ratelimit-reset": "1790000000"}

Faults, on while they stand in `site.faults`:
  rate_limit    403, with these headers besides
  status        any status, for the API
  body          these bytes for the API's answer
  hang          the API answers after so many seconds
  move          the API redirects to the other host
  cut           a download ends after so many bytes, once
  flip          a byte of a download is another one
  drip          seconds between two blocks of a download
  tarball       these bytes for the archive of a commit
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pipeline.bins.compile import git_tree

BASE = "/repos/ggml-org/llama.cpp/releases"
COMMITS = "/repos/ggml-org/llama.cpp/commits/"
TARBALL = "/repos/ggml-org/llama.cpp/tarball/"
BLOCK = 16 * 1024


@dataclass(kw_only=True)
class Made:
    """A release; `changes` to what the API says of each asset, by name."""

    tag: str
    assets: dict[str, bytes]
    flags: dict[str, Any]
    changes: dict[str, dict[str, Any]]


@dataclass(kw_only=True)
class Commit:
    """A commit with its archive, and the tags and branches that it has."""

    sha: str
    tree: str
    names: tuple[str, ...]
    archive: bytes


def packed(folder: Path, sha: str) -> bytes:
    """The archive of a commit, as GitHub packs it: one folder on top, named after the commit."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", pax_headers={"comment": sha}) as tar:
        tar.add(folder, f"ggml-org-llama.cpp-{sha[:7]}", filter=_without_git)
    return gzip.compress(data.getvalue(), compresslevel=1)


def _without_git(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "/.git/" in member.name else member


@dataclass(kw_only=True)
class Site:
    """What both listeners share. The newest release comes first."""

    releases: list[Made] = field(default_factory=list)
    faults: dict[str, Any] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    log: list[dict[str, str]] = field(default_factory=list)
    token: str = ""  # the only one known, where there is one
    api: str = ""
    files: str = ""

    def add(
        self,
        tag: str,
        assets: dict[str, bytes],
        changes: dict[str, dict[str, Any]] | None = None,
        **flags: Any,
    ) -> None:
        self.releases.insert(0, Made(tag=tag, assets=assets, flags=flags, changes=changes or {}))

    def commit(self, folder: Path, *names: str) -> str:
        """A commit of the files in `folder`; returns its SHA."""
        tree = git_tree.folder_hash(folder)
        sha = hashlib.sha1(f"{tree}{names}".encode()).hexdigest()
        made = Commit(sha=sha, tree=tree, names=names, archive=packed(folder, sha))
        self.commits.append(made)
        return sha

    def told(self, made: Made) -> dict[str, Any]:
        """A release as the API tells it."""
        assets = [
            {
                "name": name,
                "size": len(data),
                "state": "uploaded",
                "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
                "browser_download_url": f"{self.api}/download/{made.tag}/{name}",
                **made.changes.get(name, {}),
            }
            for name, data in made.assets.items()
        ]
        # As upstream's are: see `_first` of pipeline/bins/release/releases.py.
        flags = {"draft": False, "prerelease": True, **made.flags}
        return {"tag_name": made.tag, "assets": assets, **flags}

    def asked(self, where: str) -> list[str]:
        """The paths asked of `api` or `files`."""
        return [entry["path"] for entry in self.log if entry["where"] == where]


class Handler(BaseHTTPRequestHandler):
    site: Site
    where: str

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path  # a proxy is asked for a whole address
        self.site.log.append(
            {
                "where": self.where,
                "path": path,
                "host": self.headers.get("Host", ""),
                "token": self.headers.get("Authorization", ""),
                "range": self.headers.get("Range", ""),
            }
        )
        if path.startswith("/download/"):
            self._download(path)
        elif path.startswith("/tarball/"):
            self._tarball(path.rpartition("/")[2])
        elif self.where == "api" and "move" in self.site.faults:
            self._send(301, b"", Location=self.site.files + self.path)
        else:
            self._api(path)

    def _api(self, path: str) -> None:
        faults, token = self.site.faults, self.headers.get("Authorization")
        time.sleep(faults.get("hang", 0))
        if "rate_limit" in faults:
            self._send(403, b"{}", **faults["rate_limit"])
        elif "status" in faults:
            self._send(faults["status"], b"{}")
        elif token and self.site.token and token != f"Bearer {self.site.token}":
            self._send(401, b'{"message": "Bad credentials"}')
        elif "body" in faults:
            self._send(200, faults["body"])
        elif path.startswith(COMMITS):
            self._commit(unquote(path.removeprefix(COMMITS)))
        elif path.startswith(TARBALL):  # codeload's, in truth
            sha = path.removeprefix(TARBALL)
            self._send(302, b"", Location=f"{self.site.files}/tarball/{sha}")
        elif path == BASE:
            count = int(parse_qs(urlsplit(self.path).query)["per_page"][0])
            self._json([self.site.told(made) for made in self.site.releases[:count]])
        else:
            tag = path.removeprefix(f"{BASE}/tags/")
            found = [made for made in self.site.releases if made.tag == tag]
            if found:
                self._json(self.site.told(found[0]))
            else:
                self._send(404, b'{"message": "Not Found"}')

    def _commit(self, name: str) -> None:
        for made in self.site.commits:
            if name in made.names or made.sha.startswith(name):
                commit = {"tree": {"sha": made.tree}, "committer": {"date": "2026-10-10T09:00:00Z"}}
                self._json({"sha": made.sha, "commit": commit})
                return
        message = {"message": f"No commit found for SHA: {name}"}
        self._send(422, json.dumps(message).encode())

    def _tarball(self, sha: str) -> None:
        """As codeload sends it: without a length, in chunks."""
        data = next(made.archive for made in self.site.commits if made.sha == sha)
        data = self.site.faults.get("tarball", data)
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        cut = self.site.faults.get("cut")
        for at in range(0, len(data[:cut]), BLOCK):
            time.sleep(self.site.faults.get("drip", 0))
            block = data[:cut][at : at + BLOCK]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
        if cut is None:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _download(self, path: str) -> None:
        if self.where == "api":
            self._send(302, b"", Location=self.site.files + path)
            return
        _, _, tag, name = path.split("/")
        data = next(made.assets[name] for made in self.site.releases if made.tag == tag)
        if "flip" in self.site.faults:
            data = bytes([data[0] ^ 1]) + data[1:]
        start, stop, total = 0, len(data), len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, total)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        body = data[start:stop]
        if "cut" in self.site.faults:
            body = body[: self.site.faults.pop("cut")]
            self.close_connection = True
        for at in range(0, len(body), BLOCK):
            time.sleep(self.site.faults.get("drip", 0))
            self.wfile.write(body[at : at + BLOCK])


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to tell of."""


@contextmanager
def start() -> Iterator[Site]:
    """Both listeners, until the end of the block."""
    site = Site()
    servers = []
    for where, host in (("api", "127.0.0.1"), ("files", "localhost")):
        handler = type(where, (Handler,), {"site": site, "where": where})
        server = Server(("127.0.0.1", 0), handler)
        setattr(site, where, f"http://{host}:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    try:
        yield site
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
