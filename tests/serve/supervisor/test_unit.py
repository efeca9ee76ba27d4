"""The unit, as systemd itself reads it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.serve.supervisor.unit import systemd_unit


def unit(folder: Path, *more: str) -> str:
    return systemd_unit(
        "/srv/100 %/c.toml",
        [sys.executable, "-m", "doit", "up", *more],
        folder=folder,
        env={"LLAMA_PIPELINE_HOME": str(folder), "QUOTED": 'a "b" \\ $c'},
        stop_timeout=20,
    )


def test_what_it_says(tmp_path: Path) -> None:
    told = unit(tmp_path / "mein häus", "config=/a b/100%.toml", "price=$5")
    assert "Description=llama-pipeline: /srv/100 %%/c.toml\n" in told
    assert f"WorkingDirectory={tmp_path}/mein häus\n" in told
    assert f'Environment="LLAMA_PIPELINE_HOME={tmp_path}/mein häus"\n' in told
    assert 'Environment="QUOTED=a \\"b\\" \\\\ $c"\n' in told
    assert ' -m doit up "config=/a b/100%%.toml" price=$$5\n' in told
    assert "TimeoutStopSec=35\n" in told and "KillMode=mixed\n" in told
    assert "Delegate=yes\n" in told
    assert "Restart=on-failure\nRestartSec=5\n" in told
    assert "RestartMaxDelaySec=300\n" in told  # a wrong configuration is not tried every 5 s


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd")
def test_systemd_understands_it(tmp_path: Path) -> None:
    folder = tmp_path / "mein häus"
    folder.mkdir()
    path = tmp_path / "llama.service"
    path.write_text(unit(folder, "config=/a b/100%.toml", "price=$5"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True
    )
    unknown = "Unknown key 'Restart"  # to those before version 254
    wrong = [x for x in done.stderr.splitlines() if path.name in x and unknown not in x]
    assert not wrong, done.stderr
