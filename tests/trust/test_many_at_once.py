"""Many processes at once on one home, where locks work, do nothing, or fail."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, Doit, free_port
from crowd import Crowd, Words, seeded
from disks import flock_that
from fakes import llama_tree, releases
from figures import Figure

from pipeline.bins import platform
from pipeline.bins.compile import source
from pipeline.core import paths
from pipeline.core.paths import Home

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
]

PROCESSES = 8
NEW = "b7001"
DEMO: dict[str, Words] = {"demo": ("model=demo",)}
SERVERS = """
[instance.server]
ctx_size = 256
threads = 1

[instance.one.model]
ref = "demo"

[instance.one.server]
port = {port}
"""
Make = Callable[..., Crowd]


@pytest.fixture
def crowd(doit: Doit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a crowd on a home with a cache of its own."""
    shared, own = paths.cache(Home(doit.home)), tmp_path / "cache ü"
    own.mkdir()
    doit("prepare", "model=demo")  # so that its archive is here
    shutil.copytree(shared / "archives", own / "archives", copy_function=os.link)
    for environment in shared.glob("converter-*"):
        if environment.is_dir():
            (own / environment.name).symlink_to(environment)
    doit.env["LLAMA_PIPELINE_CACHE"] = str(own)
    made: list[Crowd] = []

    def make(fails: int | None = None, site: str = "", **more: object) -> Crowd:
        llama_tree.own_sources(doit.home)
        if site:
            doit.env["GITHUB_API_URL"] = site
        if fails is not None:
            library = str(flock_that(fails, tmp_path))
            monkeypatch.setenv("LD_PRELOAD", library)  # for what the crowd forks
            doit.env["LD_PRELOAD"] = library
        file = tmp_path / "servers ü.toml"
        file.write_text(SERVERS.format(port=free_port()), encoding="utf-8")
        made.append(Crowd(doit, config=file, works=fails is None, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()
        doit("down", f"config={each.config}", status=None)
    shutil.rmtree(doit.home, ignore_errors=True)


def test_for_some_seconds(crowd: Make, figure: Figure) -> None:
    here = crowd(models=DEMO)
    report = here.run(seeded(PROCESSES, here.plan), 4)
    assert not report.wrong, "\n\n".join(report.wrong)
    here.settled()
    figure("commands of many processes at once", report.commands)


def offered(site: releases.Site, built: Path, folder: Path) -> list[str]:
    """A release that is as this one; what `upgrade` can go to."""
    tree = llama_tree.make(folder, built / f"{platform.platform_tag()}-cpu")
    llama_tree.with_converter(tree, source.find(Home(REPOSITORY)).folder)
    site.add(NEW, {})
    site.commit(tree, NEW)
    return [NEW, "previous", "pinned"]


@pytest.mark.trust
@pytest.mark.parametrize(
    ("fails", "seconds"),
    [(None, 90), (0, 30), (errno.ENOLCK, 15), (errno.ENOSYS, 15), (errno.EPERM, 15)],
    ids=["locks work", "locks do nothing", "ENOLCK", "ENOSYS", "EPERM"],
)
def test_for_minutes(
    crowd: Make,
    built: Path,
    own_tiny: Path,
    figure: Figure,
    fails: int | None,
    seconds: float,
) -> None:
    models = {q: (f"model={own_tiny}", f"quant={q}") for q in ("q8_0", "q4_0")}
    with releases.start() as site:
        upgrades = offered(site, built, own_tiny.parent / "upstream") if fails is None else []
        here = crowd(fails, models=DEMO | models, upgrades=upgrades, site=site.api)
        report = here.run(seeded(PROCESSES, here.plan), seconds)
    print(sorted(report.ends.items()), report.served, report.hashed)
    print("\n".join(f"{count} {text}" for text, count in report.refused.most_common()))
    assert not report.wrong, "\n\n".join(report.wrong)
    here.settled()
    figure("commands of many processes at once", report.commands)
    figure("servers asked among many processes", report.served)


# Half of them make the file at the same time.
NO_LOCK = f"""
import contextlib, os, pathlib, time
from pipeline.core.store import artifacts

def meet(folder, need):
    place = pathlib.Path(os.environ["LLAMA_PIPELINE_HOME"]).parent / "met"
    place.mkdir(exist_ok=True)
    (place / str(os.getpid())).touch()
    end = time.monotonic() + 60
    while len(list(place.iterdir())) < {PROCESSES // 2} and time.monotonic() < end:
        time.sleep(0.01)

artifacts.only_one = lambda target: contextlib.nullcontext()
artifacts.require_space = meet
"""


def test_without_the_lock_of_a_step_it_is_seen(crowd: Make) -> None:
    here = crowd(models=DEMO, prelude=NO_LOCK)
    here.doit("remove", "model=demo", "yes=1")
    plans = [iter([("prepare", "model=demo")]) for _ in range(PROCESSES)]
    assert here.run(plans, 60).wrong
