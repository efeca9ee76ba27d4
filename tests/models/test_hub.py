"""The hub and its files over real HTTP, with the real client, bad behaviour included."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forked
import httpx2
import pytest
from fakes import hub as fake

from pipeline.core.download import Location, read_range
from pipeline.core.errors import PipelineError

# The client reads its settings when it is imported, hence a process of its own.
CLIENT = """
import json, sys
from msgspec.structs import replace
from pathlib import Path
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import fetch, hub, repository, safetensors
from pipeline.models.choice import FileFilter
from pipeline.models.reference import parse

home, text, revision, filename, quant, wanted, offline = json.loads(sys.argv[1])
reference = parse("hf:" + text)
if revision:
    reference = replace(reference, revision=revision)
try:
    listing = hub.ask(reference)

    def readable(file):
        return hub.readable(listing.repo, listing.commit, file)

    def head(file):
        return safetensors.head(readable(file))

    resolved = repository.resolve(
        listing, FileFilter(quant=quant, filename=filename, mmproj="none"), text, Home(Path(home)),
        fits=lambda option: True, read=lambda file: readable(file).get(0, file.size),
        read_header=None, read_head=head,
    )
    if wanted:
        fetch.fetch(resolved, offline=offline)
    print(json.dumps({
        "kind": resolved.kind, "folder": str(resolved.folder), "slug": resolved.slug,
        "precision": resolved.precision, "why": resolved.why,
        "source": resolved.source, "files": [[f.name, f.size, f.sha256] for f in resolved.files],
    }))
except PipelineError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""
GGUF = b"GGUF" + bytes(range(256)) * 40
HEAD = json.dumps({"w": {"dtype": "BF16", "shape": [1000], "data_offsets": [0, 2000]}}).encode()
WEIGHTS = len(HEAD).to_bytes(8, "little") + HEAD + bytes(2000)
# Parameters by element type as the hub tells them, and the precision that follows; without them
# the weights' own header is read.
PRECISIONS = [
    (None, "BF16"),
    ({"F32": 10}, "F32"),
    ({"F32": 10, "F16": 1000}, "F16"),
    ({"BF16": 1000, "F32": 10}, "BF16"),
    ({"F8_E4M3": 1000, "F32": 10}, "BF16"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fake.Running]:
    root = tmp_path_factory.mktemp("hub")

    def repo(name: str, files: dict[str, bytes], **settings: Any) -> None:
        for path, data in {**files, ".hub.json": json.dumps(settings).encode()}.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(data)

    repo(
        "org/gguf",
        {
            "m-Q4_K_M.gguf": GGUF,
            "m-Q8_0.gguf": GGUF * 2,
            "README.md": b"x",
            ".hub/dev/d.gguf": GGUF,
        },
        branches={"dev": ".hub/dev"},
    )
    config = b'{"architectures": ["LlamaForCausalLM"]}'
    safe = {"config.json": config, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
    code = {"modeling.py": b"evil", "pytorch_model.bin": b"pickle", "README.md": b"x"}
    repo("org/safe", {**safe, **code, "1_Pooling/config.json": b"{}", "onnx/model.onnx": b"x"})
    split = {f"m-{n:05d}-of-00002.gguf": GGUF * n for n in (1, 2)}
    repo("org/split", {**split, "mmproj-m-F16.gguf": GGUF})
    repo("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    for number in range(len(FAULTS)):
        repo(f"org/fault-{number}", {"m-Q4_K_M.gguf": GGUF})
    repo("org/gated", {"m-Q4_K_M.gguf": GGUF}, gated="manual", token="hf_member")
    repo("org/private", {"m-Q4_K_M.gguf": GGUF}, private=True, token="hf_member")
    repo("org/receipts", {**safe, ".state.json": b'{"schema": 1, "artifacts": {}}'})
    for number, (said, _) in enumerate(PRECISIONS):
        repo(f"org/precision-{number}", safe, parameters=said)
    with fake.start(root) as running:
        yield running


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(server: fake.Running, tmp_path: Path) -> Ask:
    """Resolve, and with `fetch` download, in a process of its own."""
    server.control(reset=True, clear_log=True)

    def ask(
        text: str,
        *,
        revision: str = "",
        filename: str = "",
        quant: str = "",
        fetch: bool = False,
        offline: bool = False,
        **more: str,
    ) -> dict[str, Any]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment = {
            **kept,
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }
        told = [str(tmp_path / "home"), text, revision, filename, quant, fetch, offline]
        status, out, err = forked.run(("-c", CLIENT, json.dumps(told)), environment, 120)
        assert status == 0, err
        answer: dict[str, Any] = json.loads(out)
        return answer

    return ask


def test_a_gguf_is_chosen_fetched_and_recorded(ask: Ask, server: fake.Running) -> None:
    from pipeline.core.store import receipts

    digest = hashlib.sha256(GGUF).hexdigest()
    answer = ask("org/gguf", fetch=True)
    assert answer["kind"] == "gguf"
    assert answer["files"] == [["m-Q4_K_M.gguf", len(GGUF), digest]]
    assert len(answer["source"]["revision"]) == 40
    assert answer["slug"] == f"org__gguf__{answer['source']['revision'][:12]}"
    folder = Path(answer["folder"])
    assert (folder / "m-Q4_K_M.gguf").read_bytes() == GGUF
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [
        *(".state.json", "m-Q4_K_M.gguf")
    ]
    entry = receipts.load(folder)["m-Q4_K_M.gguf"]
    assert entry.sha256 == digest
    assert entry.recipe["file"] == f"sha256:{digest}"
    assert entry.source == {"type": "hf", "ref": "org/gguf", **answer["source"]}
    server.control(clear_log=True)
    assert ask("org/gguf", fetch=True) == answer
    assert [line["path"] for line in server.log() if "resolve" in line["path"]] == []


@pytest.mark.parametrize("number", range(len(PRECISIONS)))
def test_the_precision_that_the_hub_tells(ask: Ask, number: int) -> None:
    answer = ask(f"org/precision-{number}")
    assert (answer["kind"], answer["precision"]) == ("safetensors", PRECISIONS[number][1])


def test_quant_filename_and_revision_choose(ask: Ask) -> None:
    assert ask("org/gguf")["files"][0][0] == "m-Q4_K_M.gguf"
    assert ask("org/gguf", quant="Q8_0")["files"][0][0] == "m-Q8_0.gguf"
    answer = ask("org/gguf", filename="d.gguf", revision="dev")
    assert answer["files"][0][0] == "d.gguf"
    assert ask("org/gguf@dev")["files"] == answer["files"]
    assert "d.gguf" in ask("org/gguf@dev", quant="Q8_0")["error"]


def test_all_parts_are_fetched(ask: Ask) -> None:
    answer = ask("org/split", filename="m-00001-of-00002.gguf", fetch=True)
    assert [name for name, *_ in answer["files"]] == [
        *("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    ]
    for number, (name, *_) in enumerate(answer["files"], start=1):
        assert (Path(answer["folder"]) / name).read_bytes() == GGUF * number


def test_offline_nothing_is_fetched_and_what_is_here_will_do(
    ask: Ask, server: fake.Running
) -> None:
    message = ask("org/gguf", fetch=True, offline=True)["error"]
    assert "1 file missing, and offline=1" in message
    assert "m-Q4_K_M.gguf" in message
    file = Path(ask("org/gguf", fetch=True)["folder"]) / "m-Q4_K_M.gguf"
    os.utime(file, ns=(1, 1))  # copied: hashed, not fetched
    server.control(clear_log=True)
    assert "error" not in ask("org/gguf", fetch=True, offline=True)
    assert [line["path"] for line in server.log() if "resolve" in line["path"]] == []


def test_safetensors_come_without_code_and_pickles(ask: Ask) -> None:
    answer = ask("org/safe", fetch=True)
    assert answer["kind"] == "safetensors"
    names = [name for name, *_ in answer["files"]]
    assert names == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    folder = Path(answer["folder"])
    on_disk = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert on_disk == set(names)


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("org/none", {}, "org/none: there is no such repository, or it is private"),
        ("org/private", {}, "for a private one set HF_TOKEN"),
        ("org/gguf@v9", {}, "org/gguf: has no revision 'v9'"),
        ("org/pickled", {}, "has only pickled weights (pytorch_model.bin)"),
        ("org/gguf", {"filename": "x.gguf"}, "m-Q8_0.gguf"),
        ("org/gguf", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids asking"),
        ("org/gguf", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "check the network and http://127"),
    ],
)
def test_each_error_has_a_message_of_its_own(
    ask: Ask, text: str, more: dict[str, str], said: str
) -> None:
    message = ask(text, **more).get("error", "no error")
    assert said in message
    assert "hf_" not in message.lower().replace("hf_token", "").replace("hf_hub_offline", "")


@pytest.mark.parametrize("repo", ["org/safe", "org/gguf"])
def test_a_mirror_may_have_etags_of_its_own(ask: Ask, server: fake.Running, repo: str) -> None:
    of_all = {"kind": "own_etag", "path": "*", "repo": repo}
    server.control(faults=[{**of_all, "at": at} for at in ("hub", "cdn")])
    answer = ask(repo, fetch=True)
    assert "error" not in answer
    folder = Path(answer["folder"])
    for name, size, sha256 in answer["files"]:
        data = (folder / name).read_bytes()
        assert len(data) == size and sha256 in ("", hashlib.sha256(data).hexdigest())


# What a lasting fault ends in: a part of the error, or "" where the bytes arrive all the same.
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "slow", "bytes_per_second": 20_000}, ""),
    ({"kind": "stall", "after": 0}, "no data in time"),
    ({"kind": "cut", "after": 0}, "the connection ended early"),
    ({"kind": "cut", "after": 4000}, ""),  # each answer brings some
    ({"kind": "status416", "at": "cdn"}, "answered 416"),
    ({"kind": "ignore_range"}, ""),
    ({"kind": "wrong_content_range"}, "another range than the requested one"),
    ({"kind": "etag_changes"}, "when it was resolved"),
    ({"kind": "etag_changes", "at": "cdn"}, ""),  # started over, and then it is the right sha256
    ({"kind": "flip_byte"}, f"expected {hashlib.sha256(GGUF).hexdigest()}, got "),
    ({"kind": "wrong_size", "at": "api"}, "bytes in the hub's list"),
    ({"kind": "wrong_size", "at": "hub"}, "when it is requested"),
    ({"kind": "status429", "retry_after": 1, "times": 3, "at": "cdn"}, ""),
    ({"kind": "status429", "retry_after": 0, "at": "cdn"}, "answered 429"),
    ({"kind": "status500", "at": "cdn"}, "answered 500"),
    ({"kind": "status500", "at": "cdn", "times": 2}, ""),
]


@pytest.mark.slow
def test_under_every_fault_the_right_bytes_are_published_or_none(
    ask: Ask, server: fake.Running
) -> None:
    # Number 8 changes between two requests, which with one piece it takes a cut to make.
    faults = [
        {**fault, "path": "*.gguf", "repo": f"org/fault-{number}"}
        for number, (fault, _) in enumerate(FAULTS)
    ]
    faults.append({"kind": "cut", "after": 3000, "repo": "org/fault-8", "path": "*.gguf"})
    server.control(faults=faults)

    def one(number: int, **more: Any) -> dict[str, Any]:
        asked = f"org/fault-{number}"
        return ask(asked, fetch=True, HF_HUB_DOWNLOAD_TIMEOUT="1", **more)

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        answers = list(pool.map(one, range(len(FAULTS))))
    server.control(reset=True)
    folders = [Path(ask(f"org/fault-{n}")["folder"]) for n in range(len(FAULTS))]
    for (fault, said), answer, folder in zip(FAULTS, answers, folders, strict=True):
        file = folder / "m-Q4_K_M.gguf"
        if said:
            assert said in answer.get("error", "no error"), (fault, answer)
            assert not file.exists(), fault
            assert not (folder / ".state.json").exists(), fault
        else:
            assert file.read_bytes() == GGUF, (fault, answer)
    with ThreadPoolExecutor(4) as pool:  # a later run recovers by itself
        answers = list(pool.map(one, range(len(FAULTS))))
    for (fault, _), answer, folder in zip(FAULTS, answers, folders, strict=True):
        assert "error" not in answer, (fault, answer)
        assert (folder / "m-Q4_K_M.gguf").read_bytes() == GGUF
        assert [path.name for path in folder.iterdir() if ".part" in path.name] in (
            [],
            [".m-Q4_K_M.gguf.part.lock"],
        )


def test_a_hub_in_trouble_is_an_error(ask: Ask, server: fake.Running) -> None:
    server.control(faults=[{"kind": "status500", "at": "api"}])
    message = ask("org/gguf")["error"]
    assert "the hub could not be reached" in message
    assert server.endpoint in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SSL_CERT_FILE", "/gone.pem", "SSL_CERT_FILE=/gone.pem: No such file"),
        ("SSL_CERT_FILE", "/", "SSL_CERT_FILE=/: Is a directory"),
        ("SSL_CERT_FILE", __file__, f"SSL_CERT_FILE={__file__}: holds no certificate"),
        ("SSL_CERT_DIR", "/gone:/away", "SSL_CERT_DIR=/gone:/away: there is no such folder"),
        ("ALL_PROXY", "socks5://127.0.0.1:1", "ALL_PROXY: a SOCKS proxy needs"),
        ("all_proxy", "socks5h://me:secret@127.0.0.1:1", f"env -u all_proxy {sys.executable} -m"),
        ("https_proxy", "socks4://127.0.0.1:1", "https_proxy: is not the address of a proxy"),
        ("HTTP_PROXY", "http://me:secret@host:port", "HTTP_PROXY: is not the address of a proxy"),
        ("HTTP_PROXY", "http://127.0.0.1:9", "requests go through the proxy in HTTP_PROXY"),
    ],
)
def test_a_variable_with_which_nothing_is_reached_is_named(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    for certificates in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(certificates, raising=False)
    message = ask("org/gguf", **{"NO_PROXY": "", name: value})["error"]
    assert said in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfhf_member\n",  # as an editor of Windows saves it
        "hf_member\n".encode("utf-16"),  # as its shell does
        "hf_member\u2019".encode(),
    ],
)
def test_a_token_file_that_holds_no_token_is_named(ask: Ask, tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(data)
    message = ask("org/gguf", HF_TOKEN_PATH=str(file))["error"]
    assert f"{file}: holds letters that no token has" in message and "hf auth login" in message
    assert "hf_member" not in message and "HF_ENDPOINT" not in message
    message = ask("org/gguf", HF_TOKEN_PATH=str(file), HUGGING_FACE_HUB_TOKEN="hf_\u2019")["error"]
    assert "HUGGING_FACE_HUB_TOKEN: holds letters that no token has" in message
    assert "error" not in ask("org/gguf", HF_TOKEN_PATH=str(file), HF_TOKEN="hf_member")


def test_a_token_that_cannot_be_read_is_named(ask: Ask, tmp_path: Path) -> None:
    message = ask("org/gguf", HF_TOKEN_PATH=str(tmp_path))["error"]
    assert f"{tmp_path}: Is a directory" in message and "HF_TOKEN_PATH" in message


def test_a_proxy_with_a_certificate_of_its_own_is_told_how_to_trust(
    ask: Ask, tmp_path: Path
) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    subprocess.run(
        ["openssl", "req", "-x509", *words, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    with proxy(200, certificate=(certificate, key)) as url:
        url = url.replace("http:", "https:")
        message = ask("org/gguf", HF_ENDPOINT=url, REQUESTS_CA_BUNDLE=certificate)["error"]
        assert "SSL_CERT_FILE=FILE (REQUESTS_CA_BUNDLE is not read)" in message
        message = ask("org/gguf", HF_ENDPOINT=url, SSL_CERT_FILE=certificate)["error"]
        assert "does not answer as a hub does" in message, "the page itself came"


class Page(BaseHTTPRequestHandler):
    """A login page, or a proxy's error, in the place of everything."""

    def do_GET(self) -> None:
        status, kind, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def proxy(
    status: int,
    kind: str = "text/html; charset=utf-8",
    certificate: tuple[str, str] | None = None,
    body: bytes = b"<html>log in</html>" * 1000,
) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        page.answer = status, kind, body  # type: ignore[attr-defined]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            page.socket = context.wrap_socket(page.socket, server_side=True)
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{page.server_port}"
        page.shutdown()


@pytest.mark.parametrize("status", [200, 401, 403, 404, 407])
def test_a_proxy_that_answers_with_a_page_is_named(ask: Ask, status: int) -> None:
    with proxy(status) as url:
        message = ask("org/gguf", HTTP_PROXY=url, NO_PROXY="")["error"]
    assert "requests go through the proxy in HTTP_PROXY" in message


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"x"', b"{}", b"{"])
def test_json_that_no_hub_answers(ask: Ask, body: bytes) -> None:
    with proxy(200, "application/json", body=body) as url:
        assert "does not answer as a hub does" in ask("org/gguf", HF_ENDPOINT=url)["error"]


def test_a_page_in_the_place_of_a_file_is_no_download() -> None:
    with proxy(200) as url, httpx2.Client() as client:
        with pytest.raises(PipelineError, match="sends a web page in its place"):
            read_range(client, "m.gguf", lambda: Location(url=url), 0, 9, timeout=5)
        assert read_range(client, "a.html", lambda: Location(url=url), 0, 6, timeout=5) == b"<html>"


def test_a_gated_model_names_the_page_and_the_token(ask: Ask, server: fake.Running) -> None:
    message = ask("org/gated", fetch=True).get("error", "no error")
    assert "accept" in message
    assert f"{server.endpoint}/org/gated" in message
    assert "HF_TOKEN" in message


def test_a_token_opens_gated_and_private_models(ask: Ask, server: fake.Running) -> None:
    for repo in ("org/gated", "org/private"):
        answer = ask(repo, fetch=True, HF_TOKEN="hf_member")
        assert (Path(answer["folder"]) / "m-Q4_K_M.gguf").read_bytes() == GGUF
    assert not any(line["authorization"] for line in server.log() if line["server"] == "cdn")


@pytest.mark.parametrize("text", ["org/a..b", "org/--x", "org/x.git", "o" * 100 + "/model"])
def test_names_that_the_client_itself_refuses(ask: Ask, text: str) -> None:
    assert text in ask(text)["error"]


def test_a_repository_cannot_bring_receipts_of_its_own(ask: Ask) -> None:
    answer = ask("org/receipts", fetch=True)
    if "error" not in answer:
        assert ".state.json" not in [name for name, *_ in answer["files"]]
    else:
        assert ".state.json" in answer["error"]
