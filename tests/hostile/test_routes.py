"""No code of a model ever runs: each route, with the converter as it is used and without a
defence. A route that fires without proves that the test would see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import worlds
from canary import WORD, watching
from msgspec.structs import replace
from routes import ROUTES, SMOKE, Route
from twins import skeleton_of
from unguarded import Defences, convert_with
from worlds import World

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import chain, convert, foreign_code, resolve
from pipeline.models.convert import Conversion
from pipeline.models.quants import QuantRequest
from pipeline.models.resolve import ModelFile

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="canaries of POSIX"),
]


@pytest.fixture
def world(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    top = tmp_path / "world"
    top.mkdir()
    with watching(top) as canary:
        yield worlds.make(top, tiny, canary)


def conversion(world: World, script: Path) -> Conversion:
    """Of the model, as a folder of the user's is resolved."""
    home = Home(world.top / "home")
    resolved = resolve.folder(world.model, home, frozenset())
    made = chain.chain(resolved, QuantRequest(quant="F16"), home, script, {}).conversion
    assert made
    return made


@pytest.fixture
def user(world: World, converter: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Become the user, once all is laid out."""

    def become() -> None:
        environ = world.environ(os.environ)
        for name in {*os.environ} - {*environ}:
            monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(converter.parents[2]))
        monkeypatch.chdir(world.cwd)

    return become


def refusal(do: Callable[[], object]) -> str:
    """What is said of a model that needs its code."""
    with pytest.raises(PipelineError) as refused:
        do()
    return str(refused.value)


def stays_silent(route: Route, world: World, told: str) -> None:
    assert world.canary.fired(told) == []
    if route.names:
        file, name = route.names
        assert f"{file} names {name.format(top=world.top)} for" in told
        assert "which never runs here" in told


@pytest.mark.hostile
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_no_route_leads_to_a_models_code(
    route: Route, world: World, user: Callable[[], None], script: Path
) -> None:
    route.lay(world)
    user()
    told = refusal(lambda: convert.make(conversion(world, script), Home(world.top / "home")))
    stays_silent(route, world, told)


@pytest.mark.hostile
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_which_routes_there_are_without_defences(
    route: Route, world: World, converter: Path, script: Path
) -> None:
    route.lay(world)
    told = convert_with(Defences(), world, converter, script)
    assert bool(world.canary.fired(told)) == route.fires_without, told


@pytest.mark.parametrize("name", SMOKE)
def test_some_routes_are_closed_and_were_open(
    name: str, world: World, user: Callable[[], None], converter: Path, script: Path
) -> None:
    """The two tests above, for the routes that were found first, and before the weights."""
    (route,) = (route for route in ROUTES if route.name == name)
    route.lay(world)
    user()
    made, target = conversion(world, script), world.top / "home" / "s.gguf"
    stays_silent(route, world, refusal(lambda: skeleton_of(made, converter, target)))
    assert world.canary.fired(convert_with(Defences(), world, converter, script))


@pytest.mark.parametrize("step", ["skeleton", "conversion"])
def test_code_that_ran_all_the_same_could_do_nothing(
    step: str,
    world: World,
    user: Callable[[], None],
    converter: Path,
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were it laid out for the converter: both of its runs are in the sandbox."""
    (route,) = (route for route in ROUTES if route.name == "own folder")
    route.lay(world)
    user()
    monkeypatch.setattr(foreign_code, "without", lambda name, data: data)
    made, home = conversion(world, script), world.top / "home"
    files = (
        *made.resolved.files,
        ModelFile("tok.py", (world.model / "tok.py").stat().st_size, "0"),
    )
    made = replace(made, resolved=replace(made.resolved, files=files))
    if step == "skeleton":
        told = refusal(lambda: skeleton_of(made, converter, home / "s.gguf"))
    else:
        told = refusal(lambda: convert.make(made, Home(home)))
    assert WORD in told, "it ran"
    assert world.canary.effects() == []


OWN = Defences(own_environment=True)
STAGED, BOXED = Defences(staged=True), Defences(sandboxed=True)
ONLY_UNSTAGED = Defences(own_environment=True, sandboxed=True)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("name", "defences", "fires", "has_effects"),
    [
        ("slow class", STAGED, False, False),
        ("slow class", OWN, False, False),
        ("slow class", BOXED, False, False),
        ("absolute path", STAGED, False, False),
        ("absolute path", OWN, True, True),  # no cache is asked
        ("absolute path", BOXED, False, False),
        ("own folder", STAGED, False, False),
        ("own folder", OWN, True, True),
        ("own folder", ONLY_UNSTAGED, True, False),  # it runs, and can do nothing
        ("PYTHONPATH", STAGED, True, True),  # it is not a file of the model's
        ("PYTHONPATH", OWN, False, False),
        ("PYTHONPATH", BOXED, False, False),
        ("XDG_CACHE_HOME", OWN, False, False),
        ("XDG_CACHE_HOME", STAGED, False, False),
    ],
)
def test_each_defence_alone(
    name: str,
    defences: Defences,
    fires: bool,
    has_effects: bool,
    world: World,
    converter: Path,
    script: Path,
) -> None:
    (route,) = (route for route in ROUTES if route.name == name)
    route.lay(world)
    told = convert_with(defences, world, converter, script)
    assert bool(world.canary.fired(told)) == fires, told
    assert bool(world.canary.effects()) == has_effects, told
