"""Certificates and keys of servers that speak TLS themselves, with openssl's files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from config_tools import checked

OPENSSL = shutil.which("openssl") or ""
pytestmark = pytest.mark.skipif(not OPENSSL, reason="openssl makes the certificates")
SERVER = "[instance.chat.server]\nmodel = '/m'\n"
VLLM = "[instance.chat.control]\nengine = 'vllm'\n[instance.chat.server]\nmodel = 'org/x'\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two certificates with their keys, a key with a passphrase, and what is none of these."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("own", "other"):
        words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}.example"]
        _openssl(folder, *words, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    _openssl(
        folder,
        *["pkey", "-in", "own.key", "-aes128", "-passout", "pass:abcd", "-out", "locked.key"],
    )
    texts = {name: (folder / name).read_text() for name in ("own.key", "own.pem", "other.pem")}
    (folder / "both.pem").write_text(texts["own.key"] + texts["own.pem"])
    (folder / "chain.pem").write_text(texts["own.pem"] + texts["other.pem"])
    (folder / "reversed.pem").write_text(texts["other.pem"] + texts["own.pem"])
    (folder / "junk.pem").write_text("junk\n")
    return folder


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run([OPENSSL, *words], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("certificate", "key", "why"),
    [
        ("own.pem", "own.key", ""),
        ("chain.pem", "own.key", ""),
        ("both.pem", "both.pem", ""),
        ("own.pem", "other.key", "other.key is the key of another certificate"),
        ("reversed.pem", "own.key", "own.key is the key of another certificate"),
        ("own.pem", "locked.key", "locked.key has a passphrase"),
        ("junk.pem", "own.key", "are not a certificate and its private key"),
        ("own.pem", "junk.pem", "are not a certificate and its private key"),
        ("own.key", "own.pem", "are not a certificate and its private key"),
    ],
)
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_a_certificate_and_its_key(
    files: Path, tmp_path: Path, engine: str, certificate: str, key: str, why: str
) -> None:
    """llama-server would say that it could not bind its port."""
    names = ("ssl_cert_file", "ssl_key_file")
    names = ("ssl_certfile", "ssl_keyfile") if engine == "vllm" else names
    pair = zip(names, (certificate, key), strict=True)
    text = "\n".join(f"{name} = '{files / file}'" for name, file in pair)
    start = VLLM if engine == "vllm" else SERVER.replace("/m", str(tmp_path / "models.toml"))
    found = [line for line in checked(tmp_path, f"{start}{text}\n") if "ssl" in line]
    assert len(found) == bool(why), found
    assert not why or (why in found[0] and f"server.{names[0]} = " in found[0])
