"""GitHub's attestations, with a stand-in for its program gh, which prints what gh prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.bins.release import attestation
from pipeline.commands.request import request
from pipeline.core.errors import PipelineError, UsageError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
NONE = "✗ Loading attestations from GitHub API failed\n\nError: HTTP 404: Not Found"
NONE_OF_BUNDLE = "✗ No attestations found for subject sha256:0123"
OTHER = '✗ Sigstore verification failed\n\nError: verifying with issuer "sigstore.dev"'
POLICY = "✗ Policy verification failed\n\nError: expected SourceRepositoryURI to be x"
LOGIN = "To get started with GitHub CLI, please run:  gh auth login"
OLD = 'unknown command "attestation" for "gh"'


Gh = Callable[..., Path]


@pytest.fixture
def gh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gh:
    """Make a gh that prints `text`, ends with `status`, and notes how it was called."""
    folder = tmp_path / "bin ü"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("GH_TOKEN", "of gh")
    monkeypatch.setenv("HF_TOKEN", "of the hub")

    def make(status: int, text: str = "") -> Path:
        (folder / "said").write_text(text)
        (folder / "gh").write_text(
            '#!/bin/sh\nhere=$(dirname "$0")\n'
            'printf "%s\\n" "$@" "$GH_TOKEN" "$HF_TOKEN" >"$here/asked"\n'
            f'cat "$here/said" >&2\nexit {status}\n'
        )
        (folder / "gh").chmod(0o755)
        return folder / "asked"

    return make


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "llama b7.zip"
    path.write_bytes(b"PK")
    return path


def test_one_that_holds(gh: Gh, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = gh(0)
    attestation.require(archive, "auto")
    assert "attested by GitHub as built by ggml-org/llama.cpp" in capsys.readouterr().err
    words = ["attestation", "verify", str(archive), "--repo", "ggml-org/llama.cpp"]
    assert asked.read_text().split("\n")[:-1] == [*words, "of gh", ""], "gh's own token alone"
    attestation.require(archive, "/a/bundle.jsonl", offline=True)
    assert "--bundle\n/a/bundle.jsonl\n" in asked.read_text()


@pytest.mark.parametrize(
    "text", [OTHER, POLICY, f"Loaded digest for file:///srv/404/a.zip\n{OTHER}"]
)
@pytest.mark.parametrize("wanted", ["auto", "required", "/a/bundle.jsonl"])
def test_one_that_does_not_hold_is_refused(gh: Gh, archive: Path, text: str, wanted: str) -> None:
    gh(1, text)
    with pytest.raises(PipelineError, match="its attestation does not hold: Error: ") as caught:
        attestation.require(archive, wanted)
    assert "it was not used" in caught.value.hint
    attestation.require(archive, "off")


ABSENT = [
    (1, NONE, "ggml-org/llama.cpp has published none of it"),
    (1, NONE_OF_BUNDLE, "ggml-org/llama.cpp has published none of it"),
    (4, LOGIN, "gh could not check it: To get started"),
    (1, OLD, "gh could not check it: unknown command"),
    (1, "", "gh could not check it: status 1"),
]


@pytest.mark.parametrize(("status", "text", "said"), ABSENT)
def test_none_to_be_had_is_said_or_refused(
    gh: Gh, archive: Path, capsys: pytest.CaptureFixture[str], status: int, text: str, said: str
) -> None:
    gh(status, text)
    attestation.require(archive, "auto")
    assert f"its attestation is not checked: {said}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(PipelineError, match="attestation=off") as caught:
        attestation.require(archive, "required")
    assert said in str(caught.value) or "has published none" in str(caught.value)


def test_without_gh_or_network(
    gh: Gh, archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = gh(0)
    attestation.require(archive, "auto", offline=True)
    assert "offline=1 forbids asking GitHub" in capsys.readouterr().err
    assert not asked.exists()
    monkeypatch.setenv("PATH", "")
    attestation.require(archive, "auto")
    assert "GitHub's program gh is not installed" in capsys.readouterr().err
    for wanted in ("required", "/a/bundle.jsonl"):
        with pytest.raises(PipelineError, match="gh is not installed"):
            attestation.require(archive, wanted)
    attestation.require(archive, "off")


def test_the_variable(tmp_path: Path) -> None:
    def asked(value: str) -> str:
        return request({"bins": "prebuilt", "attestation": value}).bins.attestation

    assert (asked("Required"), asked("off"), asked("auto")) == ("required", "off", "auto")
    (tmp_path / "b.jsonl").touch()
    assert asked(str(tmp_path / "b.jsonl")) == str(tmp_path / "b.jsonl")
    with pytest.raises(UsageError, match="is not a file"):
        asked("requird")
    with pytest.raises(UsageError, match="is for bins=prebuilt"):
        request({"bins": "build", "attestation": "off"})
