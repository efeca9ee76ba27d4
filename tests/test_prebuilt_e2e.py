"""bins=prebuilt as users type it: releases over HTTP, with programs that really serve."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Doit, chat
from fakes import releases

from pipeline.bins import platform
from pipeline.bins.binaries import program_file
from pipeline.bins.release import github

pytestmark = pytest.mark.build
SYSTEM, _, MACHINE = platform.platform_tag().partition("-")
UPSTREAMS = {"linux": "ubuntu", "macos": "macos", "windows": "win"}
WORDS = ("bins=prebuilt", "backend=cpu")


def asset(tag: str) -> str:
    return f"llama-{tag}-bin-{UPSTREAMS[SYSTEM]}-{MACHINE}.tar.gz"


def packed(folder: Path, tag: str, *names: str) -> bytes:
    """Programs as upstream packs them: under a folder that is named after the release."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as tar:
        for name in names:
            tar.add(folder / program_file(name), f"llama-{tag}/{program_file(name)}")
        terms = tarfile.TarInfo(f"llama-{tag}/LICENSE")
        terms.size = 4
        tar.addfile(terms, io.BytesIO(b"MIT\n"))
    return data.getvalue()


@pytest.fixture(scope="module")
def programs(built: Path) -> Path:
    """The folder of the programs that were really compiled for this machine."""
    return built / f"{platform.platform_tag()}-cpu"


@pytest.fixture
def site(programs: Path) -> Iterator[releases.Site]:
    """b7000 and b7001, and a newer one whose files are not there yet."""
    with releases.start() as site:
        for tag in ("b7000", "b7001"):
            site.add(tag, {asset(tag): packed(programs, tag, "llama-server", "llama-quantize")})
        site.add("b7002", {"README.md": b"soon"})
        yield site


@pytest.fixture
def here(site: releases.Site, bare: Doit, tmp_path: Path) -> Doit:
    """doit on an empty home, with the site in GitHub's place and a cache of its own."""
    for name in list(bare.env):
        if name.lower().endswith("_proxy") or name in github.TOKENS:
            del bare.env[name]
    bare.env |= {"GITHUB_API_URL": site.api, "LLAMA_PIPELINE_CACHE": str(tmp_path / "cäche")}
    return bare


def made(doit: Doit) -> set[str]:
    """What is in `bins/`, locks left out."""
    return {path.name for path in (doit.home / "bins").iterdir() if path.suffix != ".lock"}


def states(doit: Doit, *words: str) -> dict[str, Any]:
    told = doit("plan", *words, "format=json").json()
    return {step["name"]: step["state"] for step in told["steps"]}


def test_a_release_is_unpacked_and_serves(here: Doit, site: releases.Site, gguf: Path) -> None:
    words, folder = (*WORDS, "release=b7000"), f"{platform.platform_tag()}-cpu-b7000"
    model = f"model={gguf}"
    assert states(here, model, *words)["build_bins"] == "to do"
    assert site.log == [], "a plan downloads nothing"

    first = here("build_bins", *words)
    assert first.steps == ["build_bins"]
    assert made(here) == {folder}, "no source is fetched, no page is built"
    assert len(site.asked("files")) >= 1

    asked = len(site.log)
    assert here("build_bins", *words).steps == []
    assert states(here, model, *words)["build_bins"] == "up to date"
    with here.serving(model, *words, "ctx_size=512") as url:
        assert chat(url)
    assert len(site.log) == asked, "what is known is not asked again"
    assert made(here) == {folder}


def test_serve_gets_what_it_serves_with(here: Doit, gguf: Path) -> None:
    with here.serving(f"model={gguf}", *WORDS, "release=b7000", "ctx_size=512") as url:
        assert chat(url)
    assert made(here) == {f"{platform.platform_tag()}-cpu-b7000"}


def test_the_latest_is_the_newest_with_programs(
    here: Doit, site: releases.Site, programs: Path
) -> None:
    words = (*WORDS, "release=latest")
    here("build_bins", *words)
    assert made(here) == {f"{platform.platform_tag()}-cpu-b7001"}

    site.add("b7003", {asset("b7003"): packed(programs, "b7003", "llama-server")})
    asked = len(site.log)
    assert here("build_bins", *words).steps == []
    assert len(site.log) == asked, "the latest stays the one that it was"

    again = here("build_bins", *words, "refresh=1")
    assert again.steps == ["build_bins"] and "b7003" in again.err
    assert f"{platform.platform_tag()}-cpu-b7003" in made(here)
    assert here("build_bins", *words).steps == []


def test_offline_before_it_was_asked_for(here: Doit, site: releases.Site) -> None:
    words = (*WORDS, "release=b7000")
    wrong = here("build_bins", *words, "offline=1", status=1)
    assert wrong.err.count("error: ") == 1 and "Traceback" not in wrong.err
    assert "offline=1 forbids" in wrong.err and "hint: run once without offline=1" in wrong.err
    assert site.log == []
    here("build_bins", *words)
    assert here("build_bins", *words, "offline=1").steps == []


def test_a_rate_limit_says_so(here: Doit, site: releases.Site) -> None:
    site.faults["rate_limit"] = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1790000000"}
    wrong = here("build_bins", *WORDS, "release=latest", status=1)
    assert wrong.err.count("error: ") == 1 and "Traceback" not in wrong.err
    assert "allows no more requests" in wrong.err and "GITHUB_TOKEN" in wrong.err
    assert made(here) == set()


def test_no_such_release(here: Doit) -> None:
    wrong = here("build_bins", *WORDS, "release=b6999", status=3)
    assert "llama.cpp has no such release" in wrong.err and "Traceback" not in wrong.err


def test_it_is_packed_for_others_and_installed(here: Doit) -> None:
    run = here("package", *WORDS, "release=b7000")
    paths = [Path(line) for line in run.out.splitlines()]
    assert [path.name for path in paths] == [
        f"llama-cpp-b7000-{platform.platform_tag()}-cpu-native{end}" for end in (".tar.gz", ".zip")
    ]
    assert ".source" not in made(here) and ".ui" not in made(here)
    with tarfile.open(paths[0]) as tar:
        file = tar.extractfile("manifest.json")
        assert file is not None and json.load(file)["commit"] == "b7000"
        assert "LICENSE" in tar.getnames()
    here("install_package", f"pkg={paths[0]}")
    assert "package" in made(here)


def test_a_recipe_is_one_word(here: Doit, site: releases.Site) -> None:
    words = (*WORDS, "release=b7000")
    here("build_bins", *words)
    word = here("recipe", *words).out.strip()
    assert word.startswith(f"{platform.platform_tag()}-cpu-b7000-") and len(word.split()) == 1
    assert here("recipe", *words).out.strip() == word
    assert ".source" not in made(here)


def test_an_upgrade_takes_the_tags_release(
    here: Doit, site: releases.Site, gguf: Path, tmp_path: Path
) -> None:
    here("build_bins", *WORDS, "release=b7000")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "CMakeLists.txt").touch()
    commit = site.commit(tmp_path / "tree", "b7001", "master")
    told = here("upgrade", *WORDS, "to=b7001", "yes=1")
    assert "active: llama.cpp b7001" in told.err
    assert f"{platform.platform_tag()}-cpu-b7001" in made(here)
    asked = len(site.log)
    assert here("build_bins", *WORDS).steps == []
    with here.serving(f"model={gguf}", *WORDS, "ctx_size=512") as url:
        assert chat(url)
        assert here.summary["backend"].startswith("cpu")
    assert len(site.log) == asked
    there = here("upgrade", *WORDS, f"to={commit[:8]}", "yes=1")
    assert "already active" in there.err
    other = site.commit(tmp_path, "nothing")
    assert "needs a release's tag" in here("upgrade", *WORDS, f"to={other}", status=3).err
