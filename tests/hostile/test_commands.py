"""The same through the commands that users type: from a hub and from a folder, before a weight is
moved, and within bounds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import worlds
from canary import watching
from conftest import Doit, Run
from fakes import hub
from routes import ROUTES, Route
from worlds import World

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.usefixtures("converter"),
    pytest.mark.skipif(os.name == "nt", reason="canaries of POSIX"),
]

WEIGHTS = "model.safetensors"
REFUSED = "tokenizer_config.json names org/evil--tok.Evil for AutoTokenizer"


# Of a model, or of where it is looked for. PYTHON… are the user's own settings, for doit too.
OF_MODELS = [route for route in ROUTES if not route.name.startswith("PYTHON")]


@pytest.fixture
def bare_world(tmp_path: Path, tiny: Path) -> Iterator[World]:
    top = tmp_path / "world"
    top.mkdir()
    with watching(top) as canary:
        yield worlds.make(top, tiny, canary)


@pytest.fixture
def world(bare_world: World) -> World:
    bare_world.tokenizer({"AutoTokenizer": ["org/evil--tok.Evil", None]})
    return bare_world


def as_user(doit: Doit, world: World) -> Doit:
    """doit as the user runs it: with their home, their caches and their secrets."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    doit.env = world.environ(doit.env) | {
        "LLAMA_PIPELINE_CACHE": os.environ.get(
            "LLAMA_PIPELINE_CACHE", str(Path(cache, "llama-pipeline"))
        ),
        "LLAMA_PIPELINE_CWD": str(world.cwd),
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    return doit


@pytest.fixture
def user(doit: Doit, world: World) -> Doit:
    return as_user(doit, world)


def refused(run: Run, world: World) -> None:
    assert world.canary.fired(run.out + run.err) == []
    assert run.status == 1
    assert run.err.count("error:") == 1
    assert REFUSED in run.err and "which never runs here" in run.err
    assert "serve the .gguf" in run.err and "Traceback" not in run.err.partition("error:")[0]


@pytest.mark.hostile
@pytest.mark.parametrize("has_cache", [True, False], ids=["cached", "no cache"])
@pytest.mark.parametrize("command", ["plan", "prepare", "lock", "serve"])
def test_from_a_hub_it_is_refused_before_a_weight_is_fetched(
    command: str, has_cache: bool, user: Doit, world: World, tmp_path: Path
) -> None:
    if has_cache:
        world.fill_cache()
    root = tmp_path / "hub"
    (root / "org").mkdir(parents=True)
    world.model.rename(root / "org" / "model")
    size = (root / "org" / "model" / WEIGHTS).stat().st_size
    with hub.start(root) as server:
        user.env |= {"HF_ENDPOINT": server.endpoint, "NO_PROXY": "127.0.0.1,localhost"}
        refused(user(command, "model=org/model", status=None), world)
        sent = sum(entry["sent"] for entry in server.log() if entry["path"].endswith(WEIGHTS))
    assert 0 < sent < size, "its header, and no more"
    assert not list((user.home / "models").rglob(WEIGHTS))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("plan", marks=pytest.mark.hostile),
        "prepare",
        pytest.param("lock", marks=pytest.mark.hostile),
    ],
)
def test_of_a_folder(command: str, user: Doit, world: World) -> None:
    world.fill_cache()
    refused(user(command, f"model={world.model}", status=None), world)
    assert not list((user.home / "models").rglob("*.gguf"))


@pytest.mark.hostile
@pytest.mark.parametrize("route", OF_MODELS, ids=lambda route: route.name)
def test_no_route_is_open_in_any_command(route: Route, doit: Doit, bare_world: World) -> None:
    route.lay(bare_world)
    user = as_user(doit, bare_world)
    for command in ("plan", "prepare", "lock"):
        run = user(command, f"model={bare_world.model}", status=None)
        assert bare_world.canary.fired(run.out + run.err) == []
        assert run.status == 1 and run.err.count("error:") == 1, run.err


@pytest.mark.hostile
def test_a_model_that_does_not_need_its_code_is_converted(
    user: Doit, world: World, tiny: Path
) -> None:
    """Its code is told of, and not run."""
    (world.model / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    world.change("config.json", architectures=["LlamaForCausalLM"])
    world.fill_cache()
    planned = user("plan", f"model={world.model}")
    assert f"warning     {REFUSED}" in planned.out
    made = user("prepare", f"model={world.model}", "quant=q8_0")
    assert world.canary.fired(planned.out + planned.err + made.out + made.err) == []
    assert len(list((user.home / "models").rglob("*.q8_0.gguf"))) == 1


HOSTILE = {
    "layers": {"num_hidden_layers": 10**9},
    "vocabulary": {"vocab_size": 2 * 10**9},
    "narrow": {"vocab_size": 2 * 10**9, "hidden_size": 1},
    "experts": {"num_local_experts": 10**9, "num_experts_per_tok": 2},
    "below the bound": {"num_hidden_layers": 10_000, "hidden_size": 1},
    "words below the bound": {"vocab_size": 4_000_000, "hidden_size": 1},
    "list": {"layer_types": ["full_attention"] * 2_000_000},
}
SECONDS = 180  # the header's run may take 120 and then the conversion begins
MOST_MEMORY = 6 * 1024**3  # 4 GiB are allowed, and four times the weights


@pytest.mark.hostile
@pytest.mark.parametrize("command", ["plan", "prepare"])
@pytest.mark.parametrize("values", HOSTILE.values(), ids=HOSTILE)
def test_a_config_that_asks_for_the_machine_ends_in_time(
    values: dict[str, object], command: str, doit: Doit, own_tiny: Path
) -> None:
    config = own_tiny / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    began, largest = time.monotonic(), 0
    words = (command, f"model={own_tiny}", "quant=q8_0")
    out, err = (doit.home.with_name(f"{name}.txt") for name in ("out", "err"))
    with (
        out.open("w") as told,
        err.open("w") as complained,
        doit.start(*words, stdout=told, stderr=complained) as process,
    ):
        while process.poll() is None:
            largest = max(largest, memory(psutil.Process(process.pid)))
            assert time.monotonic() - began < SECONDS, err.read_text()
            time.sleep(0.05)
    assert largest < MOST_MEMORY
    errors = err.read_text().count("error:")
    assert (process.returncode, errors) in ((0, 0), (1, 1)), err.read_text()


def memory(process: psutil.Process) -> int:
    """Bytes that a process and its children have in memory."""
    total = 0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    return total
