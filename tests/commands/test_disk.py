"""What is on disk, taken away: with real models, servers and runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Doit, free_port
from disks import disk as small_disk
from disks import locks_that_do_not_work as locks_that_do_not_work
from msgspec.structs import replace

from pipeline.core.store import active, artifacts, receipts

pytestmark = pytest.mark.build
SLUG = "demo__all-MiniLM-L6-v2__b9a0018dff09"
QUANT, BETWEEN = "model.q4_k_m.gguf", "model.f32.gguf"


@pytest.fixture
def disk(demo: Doit, doit: Doit, tmp_path: Path) -> Doit:
    """doit on a home with a copy of its Q4_K_M and what that was made from, and an empty cache."""
    kept, models = demo.home / "models", doit.home / "models"
    made = models / "gguf" / SLUG
    shutil.copytree(kept / "source" / SLUG, models / "source" / SLUG)
    shutil.copytree(kept / "gguf" / SLUG, made, ignore=shutil.ignore_patterns("*.gguf"))
    shutil.copy2(kept / "gguf" / SLUG / QUANT, made)
    for name, entry in receipts.load(made).items():  # it has other quants
        if name != QUANT:
            gone = replace(entry, mtime_ns=None, keep=False) if name == BETWEEN else None
            receipts.change(made / name, gone)
    doit.env["LLAMA_PIPELINE_CACHE"] = str(tmp_path / "cache ü")
    return doit


def models(doit: Doit) -> dict[str, Any]:
    """The rows, by kind and quant."""
    document = doit("models", "format=json").json()
    return {f"{row['kind']} {row['quant']}": row for row in document["models"]}


def bytes_free(before: Path) -> int:
    return artifacts.allocated(before.rglob("*"))


MADE, SOURCE = "model Q4_K_M", "source None"


def test_what_is_listed(disk: Doit) -> None:
    by_hand = disk.home / "models" / "gguf" / "mine" / "own.gguf"
    by_hand.parent.mkdir()
    by_hand.write_bytes(b"GGUF")
    document = disk("models", "format=json").json()
    assert document["unknown"] == [str(by_hand)] and document["unfinished"] == []
    rows = models(disk)
    assert rows.keys() == {MADE, SOURCE}
    row = rows[MADE]
    assert row["name"] == "all-MiniLM-L6-v2" and row["slug"] == SLUG
    assert row["reference"] == "demo-embed" and row["revision"] is None
    (file,) = map(Path, row["files"])
    assert file.stat().st_size == row["bytes"] and row["served_at"] is None
    assert row["frees"] >= row["bytes"]
    text = disk("models").out
    assert "demo-embed" in text and "Q4_K_M" in text and "never" in text


def test_nothing_there(bare: Doit, tmp_path: Path) -> None:
    bare.env["LLAMA_PIPELINE_CACHE"] = str(tmp_path / "cache")
    before = sorted(bare.home.rglob("*"))
    assert bare("models", "format=json").json()["models"] == []
    assert "no model" in bare("models").err
    assert "nothing to remove" in bare("prune").err
    assert sorted(bare.home.rglob("*")) == before
    told = bare("remove", "model=nothing", "yes=1", status=3).err
    assert "model=nothing: is not on disk" in told and "doit models" in told


@pytest.mark.parametrize("task", ["prune", "remove"])
def test_without_a_terminal_nothing_goes_unasked(disk: Doit, task: str) -> None:
    words = [task, *(["model=demo-embed"] if task == "remove" else [])]
    before = sorted(disk.home.rglob("*"))
    told = disk(*words, status=3)
    assert "source" in told.out and "in all" in told.out and "yes=1" in told.err
    assert disk(*words, "dry_run=1").out == told.out
    shown = disk(*words, "format=json", status=3).json()
    assert shown["removed"] is False and shown["bytes"] > 90_000_000
    assert sorted(disk.home.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such terminals")
@pytest.mark.parametrize(("answer", "goes"), [("n\n", False), ("\n", False), ("y\n", True)])
def test_in_a_terminal_it_is_asked(disk: Doit, answer: str, goes: bool) -> None:
    import pty

    ours, theirs = pty.openpty()
    with disk.start("prune", stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.write(ours, answer.encode())
        assert process.wait(60) == 0
    os.close(theirs)
    assert b"[y/N]" in os.read(ours, 100_000)
    os.close(ours)
    assert (SOURCE in models(disk)) is not goes


@pytest.mark.slow
def test_after_prune_nothing_is_made_again(disk: Doit) -> None:
    """The source goes, the GGUF that was made from it stays up to date, without any network."""
    source = disk.home / "models" / "source" / SLUG
    freed = bytes_free(source)
    told = disk("prune", "yes=1", "format=json").json()
    assert told["removed"] and abs(told["bytes"] - freed) < 100_000
    assert not source.exists() and models(disk).keys() == {MADE}
    with disk.serving("model=demo-embed", "offline=1"):
        log = next((disk.home / "logs").glob("*.err")).read_text()
    ran = {line[3:] for line in log.splitlines() if line.startswith(".  ")}
    assert {step for step in ran if not step.startswith("_")} == {"serve"}
    disk("verify", "model=demo-embed")
    assert "nothing to remove" in disk("prune", "yes=1").err


def test_what_is_out_of_date_keeps_its_source(disk: Doit) -> None:
    """It is made again when it is served next."""
    target = disk.home / "models" / "gguf" / SLUG / QUANT
    entry = receipts.load(target.parent)[target.name]
    recipe = {**entry.recipe, "tool": {"commit": "0" * 40, "build": "sha256:0"}}
    receipts.change(target, replace(entry, recipe=recipe))
    assert "nothing to remove" in disk("prune", "yes=1").err
    assert SOURCE in models(disk)


def test_all_of_a_model_goes(disk: Doit) -> None:
    resolved = disk.home / "models" / "resolved"
    disk("remove", "model=all-MiniLM-L6-v2", "yes=1")
    assert models(disk) == {} and not list((disk.home / "models").rglob("*.gguf"))
    assert not (disk.home / "models" / "gguf" / SLUG).exists() and not resolved.exists()
    assert "is not on disk" in disk("remove", f"model={SLUG}", "yes=1", status=3).err


@pytest.mark.slow
def test_after_remove_it_is_made_again(disk: Doit) -> None:
    doit = Doit(disk.home)  # with the cache of all checkouts
    doit("prepare", "model=demo")
    (row,) = [row for row in models(doit).values() if row["reference"] == "demo"]
    assert row["quant"] == "Q4_1" and row["name"] == "SmolLM2-135M-Instruct"
    doit("remove", "model=demo", "yes=1")
    assert models(doit).keys() == {MADE, SOURCE}
    assert "fetch" in doit("prepare", "model=demo", "offline=1").steps
    assert row["slug"] in {row["slug"] for row in models(doit).values()}


def test_one_quant_of_it(disk: Doit) -> None:
    disk("remove", "model=demo-embed", "quant=q4_k_m", "yes=1")
    assert models(disk).keys() == {SOURCE}
    told = disk("remove", "model=demo-embed", "quant=q8_0", "yes=1", status=3)
    assert "model=demo-embed: is not on disk" in told.err
    assert "name a quant" in disk("remove", "model=demo-embed", "quant=auto", status=3).err
    assert "no model given" in disk("remove", status=3).err


def test_the_users_own_are_never_touched(disk: Doit, tmp_path: Path) -> None:
    own = Path(shutil.copy(next((disk.home / "models").rglob("*.gguf")), tmp_path / "own.gguf"))
    told = disk("remove", f"model={own}", "yes=1", status=3).err
    assert "is not on disk" in told and own.exists()
    folder = disk.home / "models" / "gguf" / SLUG
    made = folder / "model.q4_k_m.gguf"
    (folder / "notes.txt").write_text("mine")
    made.write_bytes(made.read_bytes() + b"more")  # somebody changed it
    told = disk("remove", "model=demo-embed", "yes=1").err
    assert "notes.txt: was put there by hand" in told and "model.q4_k_m.gguf: was put" in told
    assert made.exists() and (folder / "notes.txt").exists()
    assert not (disk.home / "models" / "source" / SLUG).exists()


def test_what_is_linked_elsewhere_frees_nothing(disk: Doit, tmp_path: Path) -> None:
    source = disk.home / "models" / "source" / SLUG / "model.safetensors"
    os.link(source, tmp_path / "cached")
    told = disk("prune", "yes=1", "format=json").json()
    (item,) = [item for item in told["items"] if item["kind"] == "source"]
    assert item["bytes"] < 5_000_000 and told["bytes"] < 5_000_000
    assert (tmp_path / "cached").stat().st_size > 90_000_000


@pytest.mark.slow
def test_a_server_in_the_foreground_keeps_its_model(disk: Doit) -> None:
    with disk.serving("model=demo-embed"):
        row = models(disk)[MADE]
        assert row["served_at"] and "serve" in row["running"][0]
        told = disk("remove", "model=demo-embed", "yes=1", status=1).err
        assert "is used by" in told and "nothing was removed" in told
        assert "nothing to remove" in disk("prune", "yes=1").err
    row = models(disk)[MADE]
    assert row["running"] == [] and row["served_at"]
    (record,) = (disk.home / "run" / "served").iterdir()
    assert record.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    disk("remove", "model=demo-embed", "yes=1")
    assert not record.exists()


@pytest.mark.slow
def test_a_killed_server_keeps_nothing(disk: Doit) -> None:
    with disk.serving("model=demo-embed"):
        pass
    record = disk.home / "run" / "active" / "1.json"
    record.write_text('{"command": "serve", "files": null}')
    os.utime(record, (0, 0))  # written before the process of that pid began
    assert models(disk)[MADE]["running"] == []
    disk("remove", "model=demo-embed", "yes=1")
    assert not record.exists()


@pytest.mark.slow
def test_what_is_up_or_configured_is_kept(disk: Doit, tmp_path: Path) -> None:
    config, port = tmp_path / "möre.toml", free_port()
    config.write_text(
        f'[instance.embed.model]\nref = "demo-embed"\n[instance.embed.server]\nport = {port}\n'
    )
    disk("up", f"config={config}")
    try:
        row = models(disk)[MADE]
        assert row["running"] == ["möre.toml: embed"] and row["served_at"]
        assert "möre.toml: embed" in disk("remove", "model=demo-embed", "yes=1", status=1).err
        assert "nothing to remove" in disk("prune", "yes=1").err
    finally:
        disk("down", f"config={config}")
    assert models(disk)[MADE]["running"] == []
    assert "nothing to remove" in disk("prune", f"config={config}", "yes=1").err
    rows = disk("models", f"config={config}", "format=json").json()["models"]
    assert {tuple(row["used_by"]) for row in rows if row["kind"] == "model"} == {
        ("möre.toml: embed",)
    }
    disk.env["AUTO_INFER_LLAMA_CPP_CONFIG"] = str(config)
    assert "möre.toml: embed" in disk("remove", "model=demo-embed", "yes=1", status=1).err
    config.write_text("[instance")
    assert "möre.toml" in disk("models").err
    disk("prune", "yes=1", status=3)
    assert models(disk).keys() == {MADE, SOURCE}


@pytest.mark.parametrize("where", ["control", "master"])
def test_what_a_disabled_instance_names_is_kept(disk: Doit, tmp_path: Path, where: str) -> None:
    config = tmp_path / "off.toml"
    off = {
        "control": "[instance.a.control]\nenabled = false",
        "master": "[master]\nenable = false",
    }
    wrong = '[instance.b.control]\nenabled = false\n[instance.b.model]\nref = "/none.gguf"\n'
    config.write_text(f'{off[where]}\n[instance.a.model]\nref = "demo-embed"\n{wrong}')
    disk.env["AUTO_INFER_LLAMA_CPP_CONFIG"] = str(config)
    assert "off.toml: a" in disk("remove", "model=demo-embed", "yes=1", status=1).err
    assert "nothing to remove" in disk("prune", "yes=1").err
    assert models(disk)[MADE]["used_by"] == ["off.toml: a"]


def test_what_a_lock_file_pins_is_kept(disk: Doit, tmp_path: Path) -> None:
    disk.env["LLAMA_PIPELINE_CWD"] = str(tmp_path)
    disk("lock", "model=demo-embed")
    assert models(disk)[MADE]["used_by"] == ["pipeline.lock"]
    assert "nothing to remove" in disk("prune", "yes=1").err
    assert "pipeline.lock" in disk("remove", "model=demo-embed", "yes=1", status=1).err
    (tmp_path / "pipeline.lock").unlink()
    disk("prune", "yes=1")
    assert models(disk).keys() == {MADE}


def test_while_another_run_prepares_nothing_goes(disk: Doit) -> None:
    code = "import sys, time; from pathlib import Path; from pipeline.core.store import active; "
    code += "active.begin(Path(sys.argv[1])); print('begun', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code, str(disk.home / "run")]
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout and other.stdout.readline()
            told = disk("prune", "yes=1", status=1).err
            assert "another run is under way" in told
            assert "under way" in disk("remove", "model=demo-embed", "yes=1", status=1).err
        finally:
            other.kill()
    disk("remove", "model=demo-embed", "yes=1")


def test_a_run_waits_for_a_removal(disk: Doit) -> None:
    removal = active.removing(disk.home / "run")
    removal.__enter__()
    with disk.start("prepare", "model=demo-embed", "offline=1") as process:
        assert process.stderr is not None
        assert any("removing files; waiting" in line for line in process.stderr)
        assert process.poll() is None
        removal.__exit__(None, None, None)
        assert process.wait(60) == 0


def test_two_at_once(disk: Doit) -> None:
    words = ("remove", "model=demo-embed", "yes=1")
    with disk.start(*words) as first, disk.start(*words) as second:
        told = [run.communicate(timeout=60)[1] for run in (first, second)]
    assert 0 in (first.returncode, second.returncode), told
    assert {first.returncode, second.returncode} <= {0, 3}, told
    assert models(disk) == {}


@pytest.mark.parametrize("at", ["receipts.change", "remove"])
def test_killed_halfway(disk: Doit, at: str) -> None:
    """Killed after the file was renamed, or after its receipt was dropped: it is not a model any
    more, and the next run finishes."""
    target = disk.home / "models" / "gguf" / SLUG / "model.q4_k_m.gguf"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pipeline.core.store import artifacts\n"
        "def end(*words): os._exit(9)\n"
        "target = Path(sys.argv[1])\n"
        "real = artifacts.remove\n"
        "def remove(path):\n    if path.exists(): end()\n"
        "if sys.argv[2] == 'remove':\n    artifacts.remove = remove\n"
        "else:\n    artifacts.receipts.change = end\n"
        "artifacts.take_away(target)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, target, at], cwd=REPOSITORY, check=False)
    assert done.returncode == 9 and not target.exists()
    assert MADE not in models(disk)
    (left,) = disk("models", "format=json").json()["unfinished"]
    assert left["bytes"] > 20_000_000
    assert "quantize" in disk("plan", "model=demo-embed").out
    told = disk("remove", "model=demo-embed", "yes=1", "format=json").json()
    assert {item["kind"] for item in told["items"]} >= {"source", "unfinished"}
    assert models(disk) == {} and not target.parent.exists()


def test_what_a_killed_removal_left_is_removed(disk: Doit) -> None:
    """Receipts that were being written, and then a folder with nothing but receipts in it."""
    folder = disk.home / "models" / "gguf" / SLUG
    (folder / "..state.json.part").touch()
    disk("remove", "model=demo-embed", "yes=1")
    assert not folder.exists()
    folder.mkdir()
    (folder / ".state.json").write_text('{"schema": 1, "artifacts": {}}')
    disk("remove", "model=demo-embed", "yes=1")
    assert not folder.exists()


def test_a_folder_that_a_killed_removal_has_emptied_is_removed_with_the_rest(disk: Doit) -> None:
    folder = disk.home / "models" / "source" / SLUG
    (folder / "1_Pooling" / "config.json").unlink()
    disk("remove", "model=demo-embed", "yes=1")
    assert not folder.exists()


def test_killed_at_any_instant(disk: Doit) -> None:
    for seconds in (0.15, 0.3, 0.45):
        with disk.start("remove", "model=demo-embed", "yes=1") as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        for row in models(disk).values():
            assert all(Path(file).exists() for file in row["files"])
    disk("remove", "model=demo-embed", "yes=1", status=None)
    assert models(disk) == {} and not (disk.home / "models" / "source" / SLUG).exists()


def test_cut_downloads_intermediates_and_old_things(disk: Doit, tmp_path: Path) -> None:
    home, cache = disk.home, tmp_path / "cache ü"
    folder = home / "models" / "gguf" / "org__other__0123456789ab"
    folder.mkdir()
    cut = folder / ".other-Q4_K_M.gguf.part"
    with cut.open("wb") as file:
        file.write(b"x" * 1_000_000)
        file.truncate(50_000_000_000)  # as large as the model will be, with a hole
    cut.with_name(f"{cut.name}.pieces").write_text("{}\n")
    answer = home / "models" / "resolved" / "org__none__0.json"
    answer.parent.mkdir()
    answer.write_text(json.dumps({"slug": "org__none__ba9876543210"}))
    between = home / "models" / "gguf" / SLUG / "model.f16.gguf"
    between.write_bytes(b"y" * 2_000_000)
    made = receipts.stamp(between, {"step": "convert", "outtype": "F16"}, seconds=1, keep=False)
    receipts.change(between, made)
    programs = home / "bins" / "linux-x64-vulkan"
    programs.mkdir()
    (programs / "llama-server").write_bytes(b"z" * 3_000_000)
    recipe = {"step": "build", "source": {"commit": "0" * 40, "tree": "0" * 40}}
    entry = receipts.stamp(programs / "llama-server", recipe, seconds=1)
    receipts.save(programs, {"llama-server": entry})
    upgraded = home / "bins" / ("0" * 12)
    shutil.copytree(programs, upgraded / "linux-x64-cpu")
    page = home / "bins" / ".ui" / f"page-{'0' * 12}"
    page.mkdir(parents=True)
    build, present = (home / "bins" / ".build" / x for x in ("linux-x64-vulkan", "linux-x64-cpu"))
    build.mkdir(parents=True)
    present.mkdir()
    mine = home / "bins" / "my-own"
    mine.mkdir()
    (mine / "llama-server").write_text("mine")
    old, new = home / "logs" / "old.log", home / "logs" / "new.log"
    archive = cache / "archives" / "0" / "old.tar.gz"
    converter = cache / "converter-000000000000" / "environment"
    for path in (old, new, archive, converter):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    for path in (old, archive, converter, converter.parent):
        os.utime(path, (time.time() - 31 * 86400,) * 2)

    told = disk("prune", "yes=1", "format=json").json()
    gone = {Path(path) for item in told["items"] for path in item["paths"]}
    expected = {answer, between, programs, upgraded, page, build, old, archive, cut}
    expected |= {converter.parent}
    assert gone >= expected, expected - gone
    assert 90_000_000 < told["bytes"] < 110_000_000, "a hole takes no space"
    assert not any(path.exists() for path in expected) and not folder.exists()
    assert (
        mine.exists()
        and new.exists()
        and present.exists()
        and (home / "bins" / "linux-x64-cpu").exists()
    )
    assert receipts.load(between.parent)[between.name].mtime_ns is None, "the input stays known"
    assert "nothing to remove" in disk("prune", "yes=1").err
    disk("prune", "yes=1", "older_than=0")
    assert not new.exists() and not present.exists()
    assert disk("prepare", "model=demo-embed", "offline=1").steps == []


def test_read_only(disk: Doit, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "size=200m") as remount:
        home = tmp_path / "small" / "home"
        shutil.copytree(disk.home / "models", home / "models")
        read_only = Doit(home)
        read_only.env["LLAMA_PIPELINE_CACHE"] = str(tmp_path / "cache")
        remount("ro")
        assert models(read_only).keys() == {MADE, SOURCE}
        assert "nothing to remove" in read_only("prune", "dry_run=1").err  # it has no programs
        told = read_only("remove", "model=demo-embed", "yes=1", status=1).err
        assert "Read-only file system" in told
        assert models(read_only).keys() == {MADE, SOURCE}


def test_models_on_a_read_only_disk_are_used_while_none_is_missing(
    disk: Doit, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "small", "size=200m") as remount:
        kept = shutil.copytree(disk.home / "models", tmp_path / "small" / "models")
        shutil.rmtree(disk.home / "models")
        (disk.home / "models").symlink_to(kept, target_is_directory=True)
        remount("ro")
        assert disk("prepare", "model=demo-embed").steps == []
        for words in (
            ("prepare", "quant=q5_1"),
            ("prepare", "force=1"),
            ("quality", "quants=q8_0"),
        ):
            refused = disk(words[0], "model=demo-embed", *words[1:], status=1)
            assert f"{disk.home / 'models'}: cannot be written to: Read-only" in refused.err


@pytest.mark.parametrize("name", ["gguf", f"gguf/{SLUG}"])
def test_a_folder_that_is_a_link_to_another_disk(disk: Doit, tmp_path: Path, name: str) -> None:
    folder, far = disk.home / "models" / name, tmp_path / "far"
    folder.rename(far)
    folder.symlink_to(far, target_is_directory=True)
    assert disk("prepare", "model=demo-embed").steps == []
    assert models(disk).keys() == {MADE, SOURCE}
    file = disk.home / "models" / "gguf" / SLUG / QUANT
    checked = disk("verify", "format=json").json()
    assert {"path": str(file), "problem": ""} in checked
    disk("remove", "model=demo-embed", "yes=1")
    assert not file.exists() and models(disk) == {}


@pytest.mark.usefixtures("locks_that_do_not_work")
def test_where_locks_do_not_work(disk: Doit) -> None:
    disk.env["LD_PRELOAD"] = os.environ["LD_PRELOAD"]
    disk("remove", "model=demo-embed", "yes=1")
    assert models(disk) == {}


def test_wrong_words(bare: Doit) -> None:
    assert "older_than=soon: must be" in bare("prune", "older_than=soon", status=3).err
    assert "did you mean" in bare("prune", "older=3", status=3).err
    told = bare("serve", "model=all-MiniLM-L6-v2", status=3).err  # a name is no reference
    assert "all-MiniLM-L6-v2" in told


def test_recording_is_cheap(disk: Doit) -> None:
    """The record of what was served costs a warm start next to nothing."""
    from pipeline.serve import served
    from pipeline.serve.server import Server

    file = next((disk.home / "models").rglob("*.gguf"))
    server = Server(
        name="x", executable="x", cmd=("--model", str(file)), folder="/", log_file="/x.log"
    )
    start = time.process_time()  # that of others does not count
    for _ in range(20):
        served.record(disk.home / "run", server)
    assert (time.process_time() - start) / 20 < 0.05
    assert served.at(disk.home / "run", file)


def test_a_full_disk(disk: Doit, tmp_path: Path) -> None:
    """It is when people remove things: nothing has to be written first."""
    with small_disk(tmp_path / "small", "size=200m"):
        home = tmp_path / "small" / "home"
        shutil.copytree(disk.home / "models", home / "models")
        full = Doit(home)
        full.env["LLAMA_PIPELINE_CACHE"] = str(tmp_path / "cache")
        with pytest.raises(OSError), (tmp_path / "small" / "filler").open("wb", 0) as filler:
            while True:
                filler.write(b"x" * 4096)
        full("remove", "model=demo-embed", "yes=1")
        assert models(full) == {}
