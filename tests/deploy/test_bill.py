"""The bill of materials of an image: here of this machine, if it is a Debian."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from bills import invalid

from pipeline.core import sbom
from pipeline.core.errors import PipelineError
from pipeline.core.sbom import Component
from pipeline.deploy import bill
from pipeline.deploy.__main__ import main

debian = pytest.mark.skipif(not shutil.which("dpkg-query"), reason="images are Debian's")


@debian
def test_what_dpkg_and_python_have_installed(tmp_path: Path) -> None:
    listed = Component(kind="file", name="bin/llama-server", hashes={"sha256": "a" * 64})
    programs = tmp_path / "llama cpp" / "bin"
    programs.mkdir(parents=True)
    subject = Component(kind="application", name="llama-cpp")
    (programs.parent / sbom.NAME).write_text(sbom.text(subject, [listed]))
    environ = {"SERVICE_NAME": "under test", "LLAMA_SERVER_BINS_DIR": str(programs)}
    data = json.loads(bill.text(environ))
    assert invalid(data) == []
    assert data["metadata"]["component"]["name"] == "under test"
    found = {each["name"]: each for each in data["components"]}
    version = subprocess.run(
        ["dpkg-query", "-W", "-f=${Version}", "dpkg"], capture_output=True, text=True, check=True
    ).stdout
    assert found["dpkg"]["version"] == version
    assert found["dpkg"]["purl"].startswith("pkg:deb/debian/dpkg@")
    assert found["msgspec"]["purl"].startswith("pkg:pypi/msgspec@")
    assert found["bin/llama-server"]["hashes"][0]["content"] == "a" * 64
    assert bill.text(environ) == bill.text(environ)


@debian
def test_a_package_without_a_bill_is_named_by_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"commit": "0123"}))
    monkeypatch.setenv("LLAMA_SERVER_BINS_DIR", str(tmp_path / "bin"))
    assert main(["sbom"]) == 0
    data = json.loads(capsys.readouterr().out)
    (found,) = [each for each in data["components"] if each["name"] == "llama.cpp"]
    assert found["purl"] == "pkg:github/ggml-org/llama.cpp@0123" and invalid(data) == []


def test_elsewhere_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PipelineError, match="dpkg-query"):
        bill.text({})
