"""The examples of `configs/` that need no card, as they stand, with a tiny model in the place of
each that they name."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, Doit, free_port, get
from fakes import hub

pytestmark = [pytest.mark.build, pytest.mark.slow]
EXAMPLES = ("one-chat", "cpu-only", "two-models-two-gpus", "chat-embed-rerank")


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Path:
    return REPOSITORY / "configs" / f"{request.param}.toml"


@pytest.fixture
def user(doit: Doit, example: Path, gguf: Path, tmp_path: Path) -> Iterator[Doit]:
    """Somebody whose hub has what the example asks for, on ports that are free."""
    told = tomllib.loads(example.read_text(encoding="utf-8"))
    instances = {n: t for n, t in told["instance"].items() if n not in ("control", "server")}
    for table in instances.values():
        if table["model"]["ref"] != "demo-embed":
            folder = tmp_path / "hub" / table["model"]["ref"]
            folder.mkdir(parents=True)
            shutil.copyfile(gguf, folder / f"tiny-{table['model']['quant']}.gguf")
    over = {name: {"server": {"port": free_port(), "ctx_size": 512}} for name in instances}
    with hub.start(tmp_path / "hub") as site:
        doit.env |= {
            "HF_ENDPOINT": site.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            "AUTO_INFER_LLAMA_CPP_OVERRIDES": json.dumps(
                {"instance": over, "gateway": {"port": free_port()}}
            ),
        }
        yield doit
        doit("down", status=None)


@pytest.mark.usefixtures("embedder")
def test_it_runs(user: Doit, example: Path) -> None:
    user("up", f"config={example}")
    rows = user("ps", "format=json").json()
    assert rows and {row["state"] for row in rows} == {"ready"}
    for row in rows:
        assert get(f"{row['url']}/health")["status"] == "ok"
