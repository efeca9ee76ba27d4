"""Models of the hub: the choice as pure functions, the rest over real HTTP with the real client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from fakes import hub as fake

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import hub
from pipeline.models.hub import choose, require_safe
from pipeline.models.reference import parse
from pipeline.models.resolve import File

# The client reads its settings when it is imported, hence a process of its own.
CLIENT = """
import json, sys
from pathlib import Path
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import hub
from pipeline.models.reference import parse

home, text, revision, filename, quant, fetch, offline = json.load(sys.stdin)
try:
    from dataclasses import replace
    reference = parse("hf:" + text)
    if revision:
        reference = replace(reference, revision=revision)
    found = hub.resolve(reference, filename, quant, Home(Path(home)))
    if fetch:
        hub.fetch(found, offline=offline)
    print(json.dumps({
        "kind": found.kind, "folder": str(found.folder), "slug": found.slug,
        "precision": found.precision,
        "source": found.source, "files": [[f.name, f.size, f.sha256] for f in found.files],
    }))
except PipelineError as error:
    print(json.dumps({"error": str(error)}))
"""
LISTING = (
    *("m-F16.gguf", "m-BF16.gguf", "m-Q4_K_S.gguf", "m-Q4_K_M.gguf", "m-Q4_K.gguf", "m-Q8_0.gguf"),
    *("m-UD-Q4_K_XL.gguf", "m-IQ4_XS.gguf", "m-IQ2_XXS.gguf", "sub/m.Q5_K_M.gguf"),
)


def pick(quant: str = "", filename: str = "", names: tuple[str, ...] = LISTING) -> str:
    files = {name: File(name, 4_000_000_000, "s") for name in names}
    return choose(list(names), files, filename, quant, "org/model")


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        *(("", "m-Q4_K_M.gguf"), ("Q4_K_M", "m-Q4_K_M.gguf"), ("q8_0", "m-Q8_0.gguf")),
        *(("F16", "m-F16.gguf"), ("BF16", "m-BF16.gguf"), ("Q4_K", "m-Q4_K.gguf")),
        *(("UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"), ("IQ4_XS", "m-IQ4_XS.gguf")),
        ("Q5_K_M", "sub/m.Q5_K_M.gguf"),
    ],
)
def test_the_file_of_a_quant(quant: str, name: str) -> None:
    assert pick(quant) == name


def test_a_file_by_its_name() -> None:
    assert pick("Q8_0", "sub/m.Q5_K_M.gguf") == "sub/m.Q5_K_M.gguf"


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"quant": "Q6_K"}, "no GGUF files match Q6_K"),
        ({"quant": "Q4"}, "no GGUF files match Q4"),
        ({"filename": "none.gguf"}, "no GGUF files match none.gguf"),
        ({"names": ("a-Q4_K_M.gguf", "b.q4_k_m.gguf")}, "2 GGUF files match Q4_K_M, the default"),
        ({"names": ("a.gguf", "b.gguf")}, "no GGUF files match Q4_K_M, the default"),
        ({"quant": "Q8_0", "names": ("a.gguf",)}, "no GGUF files match Q8_0"),
        ({"names": ("mmproj-a-Q4_K_M.gguf",)}, "no GGUF files match Q4_K_M, the default"),
    ],
)
def test_no_file_is_guessed_and_all_are_listed(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(PipelineError) as caught:
        pick(**wish)
    assert said in str(caught.value)
    for name in wish.get("names", LISTING):
        assert f"  {name}  4.0 GB" in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("a.gguf",),
        ("a-Q8_0.gguf",),
        ("a.gguf", "mmproj-a-F16.gguf"),
        ("sub/a-00001-of-00002.gguf", "sub/a-00002-of-00002.gguf"),
    ],
)
def test_the_only_model_needs_no_quant(names: tuple[str, ...]) -> None:
    assert pick(names=names) == names[0]


def test_later_parts_and_projectors_are_no_choice() -> None:
    names = (
        *("a-Q4_K_M-00002-of-00002.gguf", "a-Q4_K_M-00001-of-00002.gguf"),
        *("mmproj-a-Q4_K_M.gguf", "sub/mmproj-a-Q4_K_M.gguf", "a-Q8_0.gguf"),
    )
    assert pick(names=names) == pick("Q4_K_M", names=names) == names[1]


def listed(*names: str) -> dict[str, File]:
    return {name: File(name, 1, "s") for name in names}


def test_all_parts_of_a_model() -> None:
    assert hub.parts("sub/a.gguf", listed("sub/a.gguf", "b.gguf")) == ["sub/a.gguf"]
    names = [f"sub/a-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    others = ["sub/a-00001-of-00002.gguf", "a-00002-of-00003.gguf", "sub/b.gguf"]
    for asked in names:  # whichever of them `filename` names
        assert hub.parts(asked, listed(*others, *reversed(names))) == names


def test_a_part_that_the_repository_lacks() -> None:
    names = [f"sub/a-{n:05d}-of-00003.gguf" for n in (1, 3)]
    with pytest.raises(PipelineError, match="lacks parts") as caught:
        hub.parts(names[0], listed(*names, "a-00002-of-00003.gguf"))
    assert "sub/a-00002-of-00003.gguf" in str(caught.value)
    assert names[1] not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a.gguf", "sub/dir/a b.gguf", "ü.json", "a..b", "1_Pooling/c.json"]
)
def test_safe_names(name: str) -> None:
    require_safe(name, "org/model")


@pytest.mark.parametrize(
    "name",
    [
        *("../a", "a/../b", "/etc/passwd", "a//b", "./a", "a/.", "", "a\\..\\b", "C:/a", "C:a"),
        *(" a", "a ", "a./b", "a /b", "dir/..", "..", "a:stream"),
        *("a\0b", "a\nb", "a\x1b[2Jb"),  # no file system takes the first, no terminal the last
        *(".state.json", "sub/.state.json", ".config.json.part"),  # the pipeline's own names
    ],
)
def test_unsafe_names(name: str) -> None:
    with pytest.raises(PipelineError, match="not safe"):
        require_safe(name, "org/model")


GGUF = b"GGUF" + bytes(range(256)) * 40
WEIGHTS = b"weights" * 400
# Parameters by element type as the hub tells them, and the precision that follows.
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
    safe = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
    code = {"modeling.py": b"evil", "pytorch_model.bin": b"pickle", "README.md": b"x"}
    repo("org/safe", {**safe, **code, "1_Pooling/config.json": b"{}", "onnx/model.onnx": b"x"})
    split = {f"m-{n:05d}-of-00002.gguf": GGUF * n for n in (1, 2)}
    repo("org/split", {**split, "mmproj-m-F16.gguf": GGUF})
    repo("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
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
            "PYTHONPATH": str(REPOSITORY),
            **more,
        }
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            input=json.dumps(
                [str(tmp_path / "home"), text, revision, filename, quant, fetch, offline]
            ),
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return ask


def test_a_gguf_is_chosen_fetched_and_recorded(ask: Ask, server: fake.Running) -> None:
    from pipeline.core import receipts

    digest = hashlib.sha256(GGUF).hexdigest()
    found = ask("org/gguf", fetch=True)
    assert found["kind"] == "gguf"
    assert found["files"] == [["m-Q4_K_M.gguf", len(GGUF), digest]]
    assert len(found["source"]["revision"]) == 40
    assert found["slug"] == f"org__gguf__{found['source']['revision'][:12]}"
    folder = Path(found["folder"])
    assert (folder / "m-Q4_K_M.gguf").read_bytes() == GGUF
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [
        *(".state.json", "m-Q4_K_M.gguf")
    ]
    entry = receipts.load(folder)["m-Q4_K_M.gguf"]
    assert entry.sha256 == digest
    assert entry.recipe["file"] == f"sha256:{digest}"
    assert entry.source == {"type": "hf", "ref": "org/gguf", **found["source"]}
    server.control(clear_log=True)
    assert ask("org/gguf", fetch=True) == found
    assert [line["path"] for line in server.log() if "resolve" in line["path"]] == []


@pytest.mark.parametrize("number", range(len(PRECISIONS)))
def test_the_precision_that_the_hub_tells(ask: Ask, number: int) -> None:
    found = ask(f"org/precision-{number}")
    assert (found["kind"], found["precision"]) == ("safetensors", PRECISIONS[number][1])


def test_quant_filename_and_revision_choose(ask: Ask) -> None:
    assert ask("org/gguf")["files"][0][0] == "m-Q4_K_M.gguf"
    assert ask("org/gguf", quant="Q8_0")["files"][0][0] == "m-Q8_0.gguf"
    found = ask("org/gguf", filename="d.gguf", revision="dev")
    assert found["files"][0][0] == "d.gguf"
    assert ask("org/gguf@dev")["files"] == found["files"]
    assert "d.gguf" in ask("org/gguf@dev", quant="Q8_0")["error"]


def test_all_parts_are_fetched(ask: Ask) -> None:
    found = ask("org/split", filename="m-00001-of-00002.gguf", fetch=True)
    assert [name for name, *_ in found["files"]] == [
        *("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    ]
    for number, (name, *_) in enumerate(found["files"], start=1):
        assert (Path(found["folder"]) / name).read_bytes() == GGUF * number


def test_offline_nothing_is_fetched_and_what_is_here_will_do(
    ask: Ask, server: fake.Running
) -> None:
    message = ask("org/gguf", fetch=True, offline=True)["error"]
    assert "m-Q4_K_M.gguf is not here, and offline=1 forbids to fetch it" in message
    file = Path(ask("org/gguf", fetch=True)["folder"]) / "m-Q4_K_M.gguf"
    os.utime(file, ns=(1, 1))  # copied: hashed, not fetched
    server.control(clear_log=True)
    assert "error" not in ask("org/gguf", fetch=True, offline=True)
    assert [line["path"] for line in server.log() if "resolve" in line["path"]] == []


def test_safetensors_come_without_code_and_pickles(ask: Ask) -> None:
    found = ask("org/safe", fetch=True)
    assert found["kind"] == "safetensors"
    names = [name for name, *_ in found["files"]]
    assert names == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    folder = Path(found["folder"])
    on_disk = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert on_disk == set(names)


def test_a_flipped_byte_is_refused_and_nothing_published(ask: Ask, server: fake.Running) -> None:
    server.control(faults=[{"kind": "flip_byte", "path": "*.gguf"}])
    message = ask("org/gguf", fetch=True)["error"]
    assert "m-Q4_K_M.gguf: sha256 is" in message
    assert hashlib.sha256(GGUF).hexdigest() in message
    server.control(reset=True)
    folder = Path(ask("org/gguf")["folder"])
    assert [path.name for path in folder.rglob("*") if path.suffix != ".lock"] == []
    ask("org/gguf", fetch=True)
    assert (folder / "m-Q4_K_M.gguf").read_bytes() == GGUF


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("org/none", {}, "org/none: there is no such repository, or it is private"),
        ("org/private", {}, "for a private one set HF_TOKEN"),
        ("org/gguf@v9", {}, "org/gguf: has no revision 'v9'"),
        ("org/pickled", {}, "pickled weights are not used"),
        ("org/gguf", {"filename": "x.gguf"}, "m-Q8_0.gguf"),
        ("org/gguf", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to ask"),
        ("org/gguf", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "check the network and http://127"),
    ],
)
def test_each_error_has_a_message_of_its_own(
    ask: Ask, text: str, more: dict[str, str], said: str
) -> None:
    message = ask(text, **more).get("error", "no error")
    assert said in message
    assert "hf_" not in message.lower().replace("hf_token", "").replace("hf_hub_offline", "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "status500"])
def test_a_download_that_fails_is_an_error_and_leaves_nothing(
    ask: Ask, server: fake.Running, kind: str
) -> None:
    folder = Path(ask("org/gguf")["folder"])
    server.control(faults=[{"kind": kind, "at": "cdn"}])
    message = ask("org/gguf", fetch=True)["error"]
    assert "m-Q4_K_M.gguf: could not be downloaded" in message
    assert [path.name for path in folder.rglob("*") if path.suffix != ".lock"] == []


def test_a_hub_in_trouble_is_an_error(ask: Ask, server: fake.Running) -> None:
    server.control(faults=[{"kind": "status500", "at": "api"}])
    message = ask("org/gguf")["error"]
    assert "the hub could not be asked" in message
    assert server.endpoint in message


def test_a_gated_model_names_the_page_and_the_token(ask: Ask, server: fake.Running) -> None:
    message = ask("org/gated", fetch=True).get("error", "no error")
    assert "accept" in message
    assert f"{server.endpoint}/org/gated" in message
    assert "HF_TOKEN" in message


def test_a_token_opens_gated_and_private_models(ask: Ask, server: fake.Running) -> None:
    for repo in ("org/gated", "org/private"):
        found = ask(repo, fetch=True, HF_TOKEN="hf_member")
        assert (Path(found["folder"]) / "m-Q4_K_M.gguf").read_bytes() == GGUF
    assert not any(line["authorization"] for line in server.log() if line["server"] == "cdn")


@pytest.mark.parametrize("text", ["org/a..b", "org/--x", "org/x.git", "o" * 100 + "/model"])
def test_names_that_the_client_itself_refuses(ask: Ask, text: str) -> None:
    assert text in ask(text)["error"]


def test_a_repository_cannot_bring_receipts_of_its_own(ask: Ask) -> None:
    found = ask("org/receipts", fetch=True)
    if "error" not in found:
        assert ".state.json" not in [name for name, *_ in found["files"]]
    else:
        assert ".state.json" in found["error"]
