"""Node.js out of its package: the real one."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread

import pytest

from pipeline.bins.compile import node
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PipelineError, match=r"Node\.js \S+ is not in .* offline=1 forbids"):
        node.make(Home(tmp_path), offline=True)


@pytest.mark.skipif(os.name == "nt", reason="Unix")
def test_it_builds_a_project_where_no_other_node_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "mein häus")
    node.make(home)  # in the cache of all checkouts
    node.make(home, offline=True)
    monkeypatch.setenv("PATH", "/bin")
    project = tmp_path / "project"
    project.mkdir()
    write = "fs.writeFileSync('made', process.version)"
    scripts = {"build": "npm run second", "second": f'node -e "{write}"'}
    package = {"name": "project", "version": "1.0.0", "scripts": scripts}
    (project / "package.json").write_text(json.dumps(package))
    lock = {"name": "project", "version": "1.0.0", "lockfileVersion": 3, "packages": {"": package}}
    (project / "package-lock.json").write_text(json.dumps(lock))
    work = node.Project(project, node.packaged(home), tmp_path / "log")
    work.install(offline=True)
    work.build({})
    assert (project / "made").read_text() == f"v{node.version()}"


@contextmanager
def https(folder: Path) -> Iterator[tuple[str, Path]]:
    """A server with a certificate of its own, as behind a company's proxy: URL and certificate."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl makes the certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)]
    subprocess.run([*words, "-out", str(certificate)], check=True, capture_output=True)
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"https://127.0.0.1:{server.server_port}", certificate
        finally:
            server.shutdown()


@pytest.mark.skipif(os.name == "nt", reason="Unix")
def test_it_trusts_whom_the_system_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node.js has a list of its own, which knows no proxy of a company."""
    home = Home(tmp_path)
    node.make(home)
    packaged = node.packaged(home)
    with https(tmp_path) as (url, certificate):
        command = [packaged.path, "-e", f"fetch('{url}')"]
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        assert subprocess.run(command, env=node.environment(packaged), check=False).returncode
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        subprocess.run(command, env=node.environment(packaged), check=True)
