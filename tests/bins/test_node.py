"""Node.js out of its package: the real one."""

from __future__ import annotations

import json
import os
from pathlib import Path

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
