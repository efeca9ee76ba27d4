"""What `model=` means: every form of the interface, and what is no form at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.commands.request import request
from pipeline.core.errors import UsageError
from pipeline.models.reference import parse


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user types in."""
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "repo", "revision", "quant"),
    [
        ("org/model", "org/model", "", ""),
        ("org/model:Q4_K_M", "org/model", "", "Q4_K_M"),
        ("org/model:UD-Q4_K_XL", "org/model", "", "UD-Q4_K_XL"),
        ("org/model@v1.0", "org/model", "v1.0", ""),
        ("org/model@refs/pr/7", "org/model", "refs/pr/7", ""),
        ("org/model:Q8_0@main", "org/model", "main", "Q8_0"),
        ("org/model@main:Q8_0", "org/model", "main", "Q8_0"),
        ("hf:org/model:Q4_K_M@abc123", "org/model", "abc123", "Q4_K_M"),
        ("hf:Org-1/my_model.v2", "Org-1/my_model.v2", "", ""),
        ("hf:org/model.gguf", "org/model.gguf", "", ""),
        ("org/model/", "org/model", "", ""),
        ("org/model:latest", "org/model", "", ""),
        ("hf.co/org/model:latest", "org/model", "", ""),
        ("org/model@v1.0+cu128", "org/model", "v1.0+cu128", ""),
        ("org/model:Q8_0@fix#12", "org/model", "fix#12", "Q8_0"),
        ("org/model@a,b=c%2F&d:Q8_0", "org/model", "a,b=c%2F&d", "Q8_0"),
    ],
)
def test_repositories(text: str, repo: str, revision: str, quant: str) -> None:
    reference = parse(text)
    assert (reference.kind, reference.text) == ("hub", text)
    assert (reference.repo, reference.revision, reference.quant) == (repo, revision, quant)


@pytest.mark.parametrize("text", ["org/model:m-Q4_K_M.gguf", "org/model@v1+x:m-Q4_K_M.GGUF"])
def test_a_file_behind_a_colon_as_ollama_takes_it(text: str) -> None:
    reference = parse(text)
    name = text.rpartition(":")[2]
    assert (reference.repo, reference.filename, reference.quant) == ("org/model", name, "")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("org/model/sub/m.gguf", "write model=org/model filename=sub/m.gguf"),
        ("./org/model/m.gguf", "a reference is demo"),
        ("org/m.gguf", "a reference is demo"),
    ],
)
def test_a_file_of_a_repository_written_as_a_path(here: Path, text: str, hint: str) -> None:
    with pytest.raises(UsageError, match="does not exist") as caught:
        parse(text)
    assert hint in caught.value.hint


def test_space_around_a_reference_is_none_of_it(here: Path) -> None:
    assert parse(" org/model\n").repo == "org/model"
    (here / "a folder ").mkdir()
    assert parse("a folder ").path == here / "a folder "


@pytest.mark.parametrize(
    "revision", ["..", "a/../../datasets", "a b", "v1~2", "a//b", "/a", ".a", "x:y"]
)
def test_what_names_no_revision(revision: str) -> None:
    with pytest.raises(UsageError, match=r"revision=.*is not the name of a branch"):
        request({"model": "org/model", "revision": revision})
    if not set(revision) & set(" :\n"):
        with pytest.raises(UsageError, match="is not the name of a branch"):
            request({"model": f"org/model@{revision}"})


@pytest.mark.parametrize(
    "start",
    [
        *("https://huggingface.co/", "http://huggingface.co/", "HTTPS://HuggingFace.co/"),
        *("https://hf.co/", "huggingface.co/", "hf.co/", "www.huggingface.co/", "hf:hf.co/"),
        *("https://hf-mirror.com/", "https://own.hub:8443/", "own.hub:8443/", "hf://"),
        *("git@hf.co:", "ssh://git@huggingface.co/", "https://huggingface.co//"),
        "https://huggingface.co/api/models/",
    ],
)
@pytest.mark.parametrize(
    ("rest", "means"),
    [
        ("org/model", {}),
        ("org/model/", {}),
        ("org/model.git", {}),
        ("org/model:Q4_K_M", {"quant": "Q4_K_M"}),
        ("org/model@v1.0", {"revision": "v1.0"}),
        ("org/model/tree/main", {}),
        ("org/model/tree/v1.0", {"revision": "v1.0"}),
        ("org/model/tree/refs%2Fpr%2F7", {"revision": "refs/pr/7"}),
        ("org/model/tree/main/Q4_K_M", {"pattern": "Q4_K_M/*"}),
        ("org/model/tree/main/Q4%20[i1]", {"pattern": "Q4 [[]i1]/*"}),
        ("org/model/blob/main/m-Q4_K_M.gguf", {"filename": "m-Q4_K_M.gguf"}),
        ("org/model/resolve/main/m.gguf?download=true", {"filename": "m.gguf"}),
        ("org/model/raw/abc/sub/m.gguf", {"filename": "sub/m.gguf", "revision": "abc"}),
        ("org/model/blob/main/a%20b.gguf#L1", {"filename": "a b.gguf"}),
        ("org/model/blob/refs/pr/7/m.gguf", {"filename": "m.gguf", "revision": "refs/pr/7"}),
        ("org/model?show_file_info=sub%2Fm.gguf", {"filename": "sub/m.gguf"}),
        ("org/model?library=transformers", {}),
        ("org/model/discussions/3", {}),
        ("org/model/commit/0123abcd", {"revision": "0123abcd"}),
        ("org/model:m-Q4_K_M.gguf", {"filename": "m-Q4_K_M.gguf"}),
        ("org/model/blob/main/config.json", {"note": "config.json"}),
        ("org/model/blob/main/model.safetensors", {"note": "model.safetensors"}),
    ],
)
def test_a_pasted_address_means_what_it_says(
    start: str, rest: str, means: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://own.hub:8443")
    reference = parse(start + rest)
    assert (reference.kind, reference.repo, reference.text) == ("hub", "org/model", start + rest)
    for name in ("quant", "revision", "filename", "pattern"):
        assert getattr(reference, name) == means.get(name, ""), name
    assert means.get("note", "") in reference.note and bool(reference.note) == ("note" in means)


@pytest.mark.parametrize("endpoint", ["https://art.corp/api/hub", "https://art.corp:8443/api/hub/"])
def test_an_address_of_a_hub_below_a_path(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    for start in (endpoint.rstrip("/"), "art.corp/api/hub"):
        file = parse(f"{start}/org/model:Q8_0/resolve/v1/m.gguf")
        assert (file.repo, file.quant, file.revision, file.filename) == (
            "org/model",
            "Q8_0",
            "v1",
            "m.gguf",
        )
        assert parse(f"{start}/org/model").repo == "org/model"
    with pytest.raises(UsageError, match="names no repository"):
        parse("https://art.corp/api/hub/org")
    # what a hub at the top of a host, or the site itself, means does not change
    assert parse("https://art.corp/api/hubs").repo == "api/hubs"
    assert parse("https://huggingface.co/api/hub").repo == "api/hub"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://huggingface.co/datasets/org/set", "a data set"),
        ("hf.co/spaces/org/app", "a space"),
        ("https://huggingface.co/org", "names no repository"),
        ("https://huggingface.co", "names no repository"),
        ("https://example.com/model.gguf", "not an address of the hub"),
        ("https://ollama.com/library/llama3", "not an address of the hub"),
        ("s3://bucket/model.gguf", "not an address of the hub"),
        ("file:///models/a%20b.gguf", "is the address of a file here"),
        ("оrg/model", "CYRILLIC SMALL LETTER O"),
        ("hf.co/org/mοdel", "GREEK SMALL LETTER OMICRON"),
        ("https://[::1/org/model", "not an address"),
        ("https://huggingface.co/org/model/blob/main/pytorch_model.bin", "is not a GGUF"),
        ("https://huggingface.co/org/model/blob/main/onnx/model.onnx", "is not a GGUF"),
        ("https://huggingface.co/org/model@v1/tree/v2", "not a valid address"),
        ("https://huggingface.co/../model", "not a valid address"),
    ],
)
def test_an_address_of_no_model_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in caught.value.message and text in caught.value.message


def test_a_path_that_looks_like_an_address_wins(here: Path) -> None:
    (here / "hf.co" / "org" / "model").mkdir(parents=True)
    assert parse("hf.co/org/model").kind == "folder"
    assert parse("hf:hf.co/org/model").kind == "hub"


@pytest.mark.parametrize("text", ["models/m.gguf", "./models", "link.gguf"])
def test_a_link_to_what_is_not_there_is_named(here: Path, text: str) -> None:
    for link in ("models", "link.gguf"):
        (here / link).symlink_to(here / "gone" / link)
    with pytest.raises(UsageError, match=r"is a link to .*gone.*, which is not there") as caught:
        parse(text)
    assert text in caught.value.message and "mount the disk" in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="rights as POSIX has them")
def test_a_path_that_may_not_be_looked_at_is_not_said_to_be_missing(here: Path) -> None:
    file, user = here / "kept" / "m.gguf", os.geteuid()
    file.parent.mkdir()
    file.touch()
    file.parent.chmod(0)
    try:
        if user == 0:  # who may look anywhere
            os.seteuid(65534)
        with pytest.raises(UsageError, match="cannot be looked at: Permission denied"):
            parse(str(file))
    finally:
        os.seteuid(user)
        file.parent.chmod(0o700)


def test_a_path_too_long_to_exist_does_not(here: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        parse(f"./{'a' * 5000}.gguf")


def test_the_demo_is_the_demo_even_beside_a_folder_of_its_name(here: Path) -> None:
    (here / "demo").mkdir()
    assert parse("demo").kind == "demo"
    assert parse("./demo").path == here / "demo"


def test_paths_start_where_the_user_types(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = here / "sub" / "A model.GGUF", here / "folder"
    file.parent.mkdir()
    file.touch()
    folder.mkdir()
    for text in ("sub/A model.GGUF", "./sub/A model.GGUF", str(file)):
        assert (parse(text).kind, parse(text).path) == ("gguf", file)
    for text in ("folder", "./folder/", str(folder)):
        assert (parse(text).kind, parse(text).path) == ("folder", folder)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    assert parse("~/folder").path == folder


def test_a_path_wins_over_a_repository_and_that_is_said(here: Path) -> None:
    (here / "org" / "model").mkdir(parents=True)
    reference = parse("org/model")
    assert (reference.kind, reference.path) == ("folder", here / "org" / "model")
    assert str(here / "org" / "model") in reference.note
    assert parse("hf:org/model").kind == "hub"
    assert parse("./org/model").note == ""  # no repository could be called that


@pytest.mark.parametrize(
    "text",
    [
        *("org/model.gguf", "./org/model", "../org/model", "/org/model", "~/nothing/here"),
        *(r"C:\models\m.gguf", "C:/models/m.gguf", r"org\model", "a/b/c", "m.gguf"),
        *("org/m.safetensors", "org/M.GGUF"),
    ],
)
def test_paths_that_do_not_exist_are_said_to_be_missing(text: str) -> None:
    with pytest.raises(UsageError, match="does not exist") as caught:
        parse(text)
    assert "org/model:QUANT" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        *("model", "hf:", "hf:model", "hf:a/b/c", "org/model:", "org/model@", "or g/model"),
        *("org/model:Q4@main:Q8", "hf:./model", "hf:../model", "hf:org/..", "hf:org/."),
        *("org/model;rm", "http://host/org/model"),
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize("text", ["x" * 300, "org/" + "x" * 5000, "~nobody-here/model"])
def test_impossible_paths_are_errors_and_no_crash(text: str) -> None:
    try:
        assert parse(text).kind == "hub"
    except UsageError as error:
        assert text in str(error)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "gguf"])
def test_other_files_are_refused_with_what_to_give(here: Path, name: str) -> None:
    (here / name).touch()
    with pytest.raises(UsageError, match=r"neither a \.gguf file nor a folder") as caught:
        parse(f"./{name}")
    assert "config.json" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
@pytest.mark.parametrize("name", ["m.gguf", "model"])
def test_a_pipe_is_not_waited_for(here: Path, name: str) -> None:
    os.mkfifo(here / name)
    with pytest.raises(UsageError, match="is a pipe, a socket or a device, not a file"):
        parse(f"./{name}")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("m.gguf.part1of2", b"GGUF", ["is a piece of a GGUF", "cat "]),
        ("m.gguf-split-b", b"", ["is a piece of a GGUF", "cat "]),
        ("sha256-0123", b"GGUF\3\0\0\0", ["a GGUF by its content", ".gguf"]),
        ("pytorch_model.bin", b"\x80\2}q\0.", ["pickled", "runs code"]),
        ("m.bin", b"tjgg" + bytes(40), ["GGJT"]),
        ("m.gguf.gz", b"\x1f\x8b\x08", ["compressed", "unpack"]),
        ("m.onnx", b"\x08\x08\x12\x07pytorch", ["ONNX"]),
        ("config.json", b"{}", ["JSON"]),
    ],
)
def test_another_file_is_named_for_what_it_is(
    here: Path, name: str, data: bytes, says: list[str]
) -> None:
    (here / name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        parse(f"./{name}")
    for words in says:
        assert words in str(caught.value)
