"""`instances = "models"`: what a file means whose instances are the models on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from fakes.raw_gguf import TEXT, UINT32, number, raw, text, whole
from gateway_tools import instance

from pipeline.commands.servers import stored_instances
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.serve.config.toml_form import load
from pipeline.serve.supervisor import state
from pipeline.serve.supervisor.state import DesiredState, Folder


def store(home: Home, slug: str, *names: str) -> None:
    folder = home.models / "gguf" / slug
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF")
        receipts.change(folder / name, receipts.stamp(folder / name, {"step": "fetch"}, seconds=1))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "hôme")
    store(home, "org__small__0123456789ab", "small.Q4_K_M.gguf", "small.Q8_0.gguf", "mmproj-x.gguf")
    store(home, "org__large__ba9876543210", "large.Q8_0-00001-of-00002.gguf")
    store(home, "org__large__ba9876543210", "large.Q8_0-00002-of-00002.gguf")
    return home


def test_an_instance_for_each_model(home: Home, tmp_path: Path) -> None:
    at = state.folder(home, "x")
    found = stored_instances(home, at, {})
    assert sorted(found) == ["large", "small-Q4_K_M", "small-Q8_0"], "a projector is not a model"
    assert found["large"]["model"]["ref"].endswith("large.Q8_0-00001-of-00002.gguf")
    ports = [each["server"]["port"] for each in found.values()]
    assert len({*ports}) == 3 and min(ports) > 9000

    file = tmp_path / "all.toml"
    file.write_text(
        '[master]\ninstances = "models"\n[gateway]\nenable = true\n'
        "[instance.server]\nthreads = 1\n"
        '[instance.large.control]\npinned = true\n[instance.own.server]\nmodel = "/m.gguf"\n'
    )
    loaded = load(file, stored=lambda written: stored_instances(home, at, written))
    assert not loaded.errors
    specs = {spec.name: spec for spec in loaded.specs}
    assert specs.keys() == {"large", "small-Q4_K_M", "small-Q8_0", "own"}
    assert specs["large"].control.start == "demand" and specs["large"].control.pinned
    assert specs["small-Q8_0"].server["threads"] == 1
    assert specs["own"].control.start == "boot"


def test_a_model_that_sees_has_its_projector(home: Home, tmp_path: Path) -> None:
    """As it has where its repository is served, and the one that fits."""
    slug = "org__sees__0123456789ab"
    folder = home.models / "gguf" / slug
    store(home, slug, "sees-Q8_0.gguf", "mmproj-a.gguf", "mmproj-b.gguf")
    architecture, width = "general.architecture", "clip.vision.projection_dim"
    for name, pairs in {
        "sees-Q8_0.gguf": ((architecture, TEXT, text("llama")), ("llama.embedding_length", 64)),
        "mmproj-a.gguf": ((architecture, TEXT, text("clip")), (width, 32)),
        "mmproj-b.gguf": ((architecture, TEXT, text("clip")), (width, 64)),
    }.items():
        (first, (key, wide)) = pairs
        (folder / name).write_bytes(whole(raw(first, (key, UINT32, number(wide)))))
        receipts.change(folder / name, receipts.stamp(folder / name, {"step": "fetch"}, seconds=1))
    at = state.folder(home, "x")

    def table(more: str) -> Mapping[str, str]:
        file = tmp_path / "all.toml"
        file.write_text('[master]\ninstances = "models"\n' + more)
        loaded = load(file, stored=lambda written: stored_instances(home, at, written))
        assert not loaded.errors
        return next(spec.model for spec in loaded.specs if spec.name == "sees")

    assert table("")["mmproj"] == str(folder / "mmproj-b.gguf")
    assert table('[instance.sees.model]\nmmproj = "none"\n')["mmproj"] == "none"
    other = table('[instance.sees.model]\nref = "org/other"\n')
    assert "mmproj" not in other, "which is that of another model"


def test_a_name_that_no_instance_can_have(tmp_path: Path) -> None:
    """Such a model has one that begins like it, and the same one each time."""
    home, long = Home(tmp_path / "home"), "a-model-" + "of-long-name-" * 5
    store(home, f"org__{long}__0123456789ab", "m-Q8_0.gguf", "m-Q4_0.gguf")
    store(home, "org__Gateway__0123456789ab", "g-Q8_0.gguf")
    file = tmp_path / "all.toml"
    file.write_text('[master]\ninstances = "models"\n')
    at = state.folder(home, "x")
    loaded = load(file, stored=lambda written: stored_instances(home, at, written))
    assert not loaded.errors
    names = sorted(spec.name for spec in loaded.specs)
    assert len(names) == 3 and names == sorted(stored_instances(home, at, {}))
    gateway, *others = names
    assert gateway.startswith("Gateway-")
    assert {name[:55] for name in others} == {long[:55]} and {*map(len, others)} == {64}


def test_ports_that_are_kept_and_ports_that_are_avoided(home: Home) -> None:
    at = state.folder(home, "x")
    at.path.mkdir(parents=True)
    state.write_wanted(at, DesiredState(config="x", instances=(instance("large", 12345),)))
    written = {"gateway": {"port": 9001}, "instance": {"own": {"server": {"port": 9002}}}}
    found = stored_instances(home, at, written)
    assert found["large"]["server"]["port"] == 12345
    others = {found[name]["server"]["port"] for name in ("small-Q4_K_M", "small-Q8_0")}
    assert others.isdisjoint({9001, 9002, 12345})


@pytest.mark.parametrize(
    "server", [{"port": 9001}, {"port": "9001"}, {"extra_args": ["--port", "9001"]}]
)
def test_a_port_of_the_file_is_its_own_however_it_is_written(
    home: Home, server: dict[str, object]
) -> None:
    at = state.folder(home, "x")
    at.path.mkdir(parents=True)
    state.write_wanted(at, DesiredState(config="x", instances=(instance("large", 9001),)))
    found = stored_instances(home, at, {"instance": {"own": {"server": server}}})
    assert 9001 not in {each["server"]["port"] for each in found.values()}


def test_without_any_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model is on disk"):
        stored_instances(Home(tmp_path), Folder(tmp_path), {})


def test_without_any_model_where_clients_pull_them(tmp_path: Path) -> None:
    file = tmp_path / "none yet.toml"
    text = '[master]\ninstances = "models"\n[gateway]\nenable = true\n'
    file.write_text(text + "pull = true\n")
    at = Folder(tmp_path)

    def loaded() -> tuple[object, ...]:
        return load(
            file, stored=lambda written: stored_instances(Home(tmp_path), at, written)
        ).specs

    assert loaded() == ()
    file.write_text(text)
    with pytest.raises(UsageError, match="no model is on disk"):
        loaded()
