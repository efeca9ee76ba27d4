"""Which steps have something to do, from receipts and stamps that a real home would hold."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.receipts import Status
from pipeline.models import chain, quants
from pipeline.models.chain import Chain, Needs
from pipeline.models.quants import QuantRequest
from pipeline.models.resolve import ModelFile, Resolved

TOOL = {"commit": "c1", "build": "b1"}
NEWER = {"commit": "c2", "build": "b2"}
SOURCE = {"commit": "c1", "tree": "t1"}


@dataclass(frozen=True)
class World:
    """A home with a model in it; the steps are played by `artifacts.make`, no tool is run."""

    home: Home
    resolved: Resolved

    def chain(self, quant: str = "", source: dict[str, str] = SOURCE, **wanted: Any) -> Chain:
        return chain.chain(
            self.resolved,
            QuantRequest(quant=quant, **wanted),
            self.home,
            Path("convert.py"),
            source,
        )

    def needs(self, steps: Chain, tool: dict[str, str] | None = TOOL) -> Needs:
        return chain.needs(steps, self.home, tool)

    def fetch(self) -> None:
        for file in self.resolved.files:
            target = self.resolved.folder / file.name
            make(target, self.resolved.fetch_recipe(file), b"x" * file.size)

    def convert(self, steps: Chain) -> None:
        assert steps.conversion
        make(
            steps.conversion.target,
            steps.conversion.recipe,
            repr(steps.conversion.recipe).encode(),
            keep=steps.conversion.keep,
        )

    def quantize(self, steps: Chain, tool: dict[str, str] = TOOL) -> None:
        """Quantize; the intermediate is discarded as the step itself would do it."""
        assert steps.quantization
        digest = steps.quantization.input_identity(self.home)
        assert digest is not None
        recipe = steps.quantization.recipe(self.home, tool, digest)
        make(steps.final, recipe, repr(recipe).encode())
        if chain.leftover(steps) and steps.conversion:
            artifacts.discard(steps.conversion.target)

    def settle(self, steps: Chain) -> bool:
        """What the steps do first with files that were copied; is the served one current then?"""
        while moved := chain.moved(steps, self.home, TOOL):
            receipts.revalidate(moved)
        return chain.final_status(steps, self.home, TOOL) is Status.CURRENT

    def everything(self, steps: Chain) -> None:
        self.fetch()
        self.convert(steps)
        if steps.quantization:
            self.quantize(steps)


def make(target: Path, recipe: receipts.Recipe, data: bytes, *, keep: bool = True) -> None:
    def maker(made: Path) -> None:
        made.write_bytes(data)

    artifacts.make(target, recipe, maker, keep=keep)


def touch(path: Path) -> None:
    """As a copy does: same bytes, another time."""
    os.utime(path, ns=(1, 1))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A safetensors model of the hub, not fetched yet."""
    home = Home(tmp_path)
    resolved = Resolved(
        kind="safetensors",
        name="model",
        slug="org__model__c0ffee",
        folder=home.models / "source" / "org__model__c0ffee",
        local=False,
        source={"type": "hf", "ref": "org/model", "revision": "c0ffee"},
        files=(ModelFile("config.json", 3, "", "blob"), ModelFile("model.safetensors", 9, "s1")),
        precision="BF16",
    )
    return World(home, resolved)


def ended(needs: Needs) -> tuple[bool, bool, bool]:
    """Which of fetch, convert and quantize have something to do."""
    return bool(needs.fetch), bool(needs.convert), bool(needs.quantize)


def test_nothing_made(world: World) -> None:
    steps = world.chain()
    assert steps.final == world.home.models / "gguf" / "org__model__c0ffee" / "model.q4_k_m.gguf"
    assert steps.conversion
    assert steps.conversion.target.name == "model.bf16.gguf"
    for tool in (TOOL, None):
        needs = world.needs(steps, tool)
        assert needs.fetch == "config.json is missing"
        assert (needs.convert, needs.quantize) == ("missing", "missing")


def test_each_step_done_leaves_the_rest(world: World) -> None:
    steps = world.chain()
    world.fetch()
    assert ended(world.needs(steps)) == (False, True, True)
    world.convert(steps)
    assert ended(world.needs(steps)) == (False, False, True)
    world.quantize(steps)
    assert world.needs(steps) == Needs()
    assert chain.final_status(steps, world.home, TOOL) is Status.CURRENT


def test_the_served_file_alone_is_enough(world: World) -> None:
    steps = world.chain()
    world.everything(steps)
    shutil.rmtree(world.resolved.folder)
    assert not steps.conversion.target.exists()  # type: ignore[union-attr]
    assert world.needs(steps) == Needs()


def test_a_fetched_file_that_changed(world: World) -> None:
    steps = world.chain()
    world.fetch()
    (world.resolved.folder / "config.json").write_bytes(b"other")
    assert world.needs(steps).fetch == "config.json is made differently"


def test_served_file_deleted_and_intermediate_kept(world: World) -> None:
    steps = world.chain(keep_f16=True)
    world.everything(steps)
    assert world.needs(steps) == Needs()
    shutil.rmtree(world.resolved.folder)
    steps.final.unlink()
    assert world.needs(steps) == Needs(quantize="missing")


def test_served_file_deleted_and_intermediate_discarded(world: World) -> None:
    steps = world.chain()
    world.everything(steps)
    steps.final.unlink()
    assert world.needs(steps) == Needs(convert="missing", quantize="missing")


def test_another_quant_from_the_intermediate_that_was_kept(world: World) -> None:
    world.everything(world.chain(keep_f16=True))
    assert world.needs(world.chain("Q8_0")).convert == "missing"  # direct: a file of its own
    other = world.chain("Q5_K_M")
    assert ended(world.needs(other)) == (False, False, True)
    world.quantize(other)
    assert other.conversion
    assert other.conversion.target.exists()  # kept once is kept
    assert world.needs(other) == world.needs(world.chain()) == Needs()


def test_copied_files_are_hashed_once_and_not_made_again(world: World) -> None:
    steps = world.chain()
    world.everything(steps)
    touch(steps.final)
    assert chain.final_status(steps, world.home, TOOL) is Status.MOVED
    assert world.needs(steps).quantize == "copied or restored"
    assert chain.moved(steps, world.home, TOOL) == steps.final
    assert world.settle(steps)
    assert world.needs(steps) == Needs()
    assert chain.moved(steps, world.home, TOOL) is None


def test_copied_and_changed_files_are_not_settled(world: World) -> None:
    steps = world.chain()
    world.everything(steps)
    steps.final.write_bytes(b"!" * steps.final.stat().st_size)
    assert not world.settle(steps)
    assert ended(world.needs(steps)) == (False, True, True)


def test_a_moved_intermediate_decides_only_while_the_served_file_is_not_current(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = world.chain(keep_f16=True)
    assert chain.moved(steps, world.home, TOOL) is None  # nothing is there
    world.everything(steps)
    assert steps.conversion
    between = steps.conversion.target
    touch(between)
    assert chain.moved(steps, world.home, TOOL) is None
    assert chain.moved(steps, world.home, None) == between  # what made the other cannot be told
    touch(steps.final)
    assert chain.moved(steps, world.home, TOOL) == steps.final
    assert world.settle(steps)
    assert receipts.status(between) is Status.MOVED  # a large file that nobody has to hash

    steps.final.unlink()
    shutil.rmtree(world.resolved.folder)
    assert chain.moved(steps, world.home, TOOL) == between
    newer = world.chain(keep_f16=True, source={"commit": "c2", "tree": "t2"})
    assert chain.moved(newer, world.home, TOOL) is None  # it is made again whatever it holds
    assert world.needs(steps).convert == "copied or restored"
    capsys.readouterr()
    assert not world.settle(steps)
    assert capsys.readouterr().err.count("rehashing to verify") == 1
    assert world.needs(steps) == Needs(quantize="missing")


def test_a_moved_intermediate_that_changed_is_converted_again(world: World) -> None:
    steps = world.chain(keep_f16=True)
    world.everything(steps)
    assert steps.conversion
    for file in (steps.conversion.target, steps.final):
        file.write_bytes(b"!" * file.stat().st_size)
    assert not world.settle(steps)
    assert chain.moved(steps, world.home, TOOL) is None
    assert world.needs(steps) == Needs(convert="made differently", quantize="made differently")


@pytest.mark.parametrize("keeping", [{"keep_f16": True}, {"quant": "BF16"}])
def test_an_intermediate_wanted_for_keeps_is_marked(world: World, keeping: dict[str, Any]) -> None:
    passing, kept = world.chain(), world.chain(**keeping)
    assert passing.conversion
    assert kept.conversion
    assert kept.conversion.target == passing.conversion.target
    assert not chain.needs_keep_mark(kept)  # nothing is there
    world.fetch()
    world.convert(passing)
    assert chain.needs_keep_mark(kept)
    assert not chain.needs_keep_mark(passing)
    artifacts.keep(kept.conversion.target)
    assert not chain.needs_keep_mark(kept)
    world.quantize(passing)
    assert kept.conversion.target.exists()
    assert world.needs(kept) == world.needs(passing) == Needs()


def test_what_was_discarded_is_not_unmarked(world: World) -> None:
    world.everything(world.chain())
    assert not chain.needs_keep_mark(world.chain(keep_f16=True))
    assert not chain.needs_keep_mark(world.chain("BF16"))


def test_a_home_copied_as_a_whole_settles(world: World, tmp_path: Path) -> None:
    world.everything(world.chain())
    copied = World(
        Home(tmp_path / "copy"),
        replace(world.resolved, folder=tmp_path / "copy" / "models" / "source" / "m"),
    )
    shutil.copytree(world.home.models, copied.home.models, copy_function=shutil.copyfile)
    assert copied.settle(copied.chain())
    assert copied.needs(copied.chain()) == Needs()


def test_a_changed_input_makes_everything_again(world: World) -> None:
    world.everything(world.chain())
    files = (world.resolved.files[0], replace(world.resolved.files[1], sha256="s2"))
    changed = World(world.home, replace(world.resolved, files=files))
    needs = changed.needs(changed.chain())
    assert needs.fetch == "model.safetensors is made differently"
    assert needs.quantize == "made differently"
    assert needs.convert
    assert not changed.settle(changed.chain())


def test_a_changed_tool_quantizes_again(world: World) -> None:
    kept = world.chain(keep_f16=True)
    world.everything(kept)
    assert world.needs(kept, NEWER) == Needs(quantize="made differently")
    world.quantize(kept, NEWER)
    assert world.needs(kept, NEWER) == Needs()
    assert world.needs(kept, None).quantize  # not built: what made it cannot be told


def test_a_changed_converter_converts_again(world: World) -> None:
    world.everything(world.chain(keep_f16=True))
    newer = world.chain(keep_f16=True, source={"commit": "c2", "tree": "t2"})
    assert world.needs(newer) == Needs(convert="made differently", quantize="made differently")


def test_a_converter_with_the_same_result_quantizes_nothing_again(world: World) -> None:
    """The recipe of the served file names its input by sha256."""
    world.everything(world.chain(keep_f16=True))
    newer = world.chain(keep_f16=True, source={"commit": "c2", "tree": "t2"})
    assert newer.conversion
    make(
        newer.conversion.target,
        newer.conversion.recipe,
        newer.conversion.target.read_bytes(),
    )
    assert world.needs(newer) == Needs()


def test_an_importance_matrix_is_part_of_the_recipe(world: World, tmp_path: Path) -> None:
    world.everything(world.chain(keep_f16=True))
    matrix = tmp_path / "imatrix.gguf"
    matrix.write_bytes(b"matrix")
    steps = world.chain(keep_f16=True, imatrix=matrix)
    assert world.needs(steps) == Needs(quantize="made differently")
    world.quantize(steps)
    assert world.needs(steps) == Needs()
    matrix.write_bytes(b"another matrix")
    assert world.needs(steps) == Needs(quantize="made differently")


def test_an_intermediate_left_over_by_a_cut_run_is_something_to_do(world: World) -> None:
    steps = world.chain()
    world.fetch()
    world.convert(steps)
    assert steps.quantization
    known = steps.quantization.input_identity(world.home)
    assert known
    recipe = steps.quantization.recipe(world.home, TOOL, known)
    make(steps.final, recipe, b"final")  # and killed before the intermediate was discarded
    assert chain.leftover(steps)
    assert world.needs(steps) == Needs(quantize="an intermediate file is left over")
    assert not chain.leftover(world.chain(keep_f16=True))


@pytest.mark.parametrize("quant", quants.DIRECT)
def test_types_that_the_converter_writes_itself(world: World, quant: str) -> None:
    steps = world.chain(quant)
    assert steps.quantization is None
    assert steps.conversion
    assert steps.conversion.keep
    assert steps.final.name == f"model.{quant.lower()}.gguf"
    assert ended(world.needs(steps)) == (True, True, False)
    world.everything(steps)
    assert world.needs(steps) == Needs()
    shutil.rmtree(world.resolved.folder)
    assert world.needs(steps) == Needs()
    touch(steps.final)
    assert world.needs(steps).convert == "copied or restored"
    assert world.settle(steps)
    assert world.needs(steps) == Needs()


@pytest.mark.parametrize("quant", quants.DIRECT)
def test_no_file_between_can_be_kept_where_there_is_none(world: World, quant: str) -> None:
    with pytest.raises(UsageError, match=f"keep_f16: not used for quant={quant.lower()}"):
        world.chain(quant, keep_f16=True)
    gguf = a_gguf(world, quant, local=True)
    for taken in (gguf, a_gguf(world, "BF16", local=False)):
        with pytest.raises(UsageError, match="keep_f16: not used: the GGUF is served as it is"):
            taken.chain(quant, keep_f16=True)


def test_a_type_nobody_can_make_is_refused(world: World) -> None:
    """`org/model:UD-Q4_K_XL` is a repository's own name; here there is nothing but safetensors."""
    with pytest.raises(UsageError):
        world.chain("UD-Q4_K_XL")


def a_gguf(world: World, precision: str, *, local: bool) -> World:
    folder = world.home.root / "elsewhere" if local else world.home.models / "gguf" / "m"
    folder.mkdir(parents=True)
    if local:
        (folder / "m.gguf").write_bytes(b"GGUF of the user")
    resolved = replace(
        world.resolved,
        kind="gguf",
        folder=folder,
        local=local,
        source={"type": "file"} if local else world.resolved.source,
        files=(ModelFile("m.gguf", 16, "s1"),),
        precision=precision,
    )
    return World(world.home, resolved)


def test_a_gguf_of_the_hub_is_fetched_and_no_more(world: World) -> None:
    hub = a_gguf(world, "BF16", local=False)
    steps = hub.chain("Q4_K_M")
    assert (steps.conversion, steps.quantization) == (None, None)
    assert hub.needs(steps) == Needs(fetch="m.gguf is missing")
    hub.fetch()
    assert hub.needs(steps, None) == Needs()
    assert chain.final_status(steps, hub.home, None) is Status.CURRENT


@pytest.mark.parametrize(("precision", "quant"), [("Q4_K_M", ""), ("Q8_0", "Q8_0"), ("", "")])
def test_a_gguf_of_the_user_is_served_in_place(world: World, precision: str, quant: str) -> None:
    local = a_gguf(world, precision, local=True)
    steps = local.chain(quant)
    assert steps.final == local.resolved.folder / "m.gguf"
    assert steps.resolved.local
    assert local.needs(steps, None) == Needs()


@pytest.mark.parametrize("precision", quants.UNQUANTIZED)
def test_an_unquantized_gguf_of_the_user_is_quantized(world: World, precision: str) -> None:
    local = a_gguf(world, precision, local=True)
    steps = local.chain("Q5_K_M")
    assert steps.final.name == "model.q5_k_m.gguf"
    assert local.resolved.folder not in steps.final.parents
    assert local.needs(steps) == Needs(quantize="missing")
    source = local.resolved.folder / "m.gguf"
    assert steps.quantization
    assert steps.quantization.input_identity(local.home) is None  # deciding hashes nothing
    known = steps.quantization.input_identity(local.home, hashing=True)
    assert known == f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"
    assert steps.quantization.input_identity(local.home) == known
    local.quantize(steps)
    assert local.needs(steps) == Needs()
    source.write_bytes(b"GGUF changed!")
    assert local.needs(steps) == Needs(quantize="made differently")


@pytest.mark.parametrize("precision", ["Q8_0", "Q4_K_M", ""])
def test_quantizing_twice_is_refused(world: World, precision: str) -> None:
    with pytest.raises(UsageError, match="quantizing it again") as caught:
        a_gguf(world, precision, local=True).chain("Q5_K_M")
    assert (precision or "unknown type") in str(caught.value)
    assert "leave quant out" in caught.value.hint


def test_no_mix_that_fits_is_made_of_what_is_quantized(world: World) -> None:
    quantized = World(world.home, replace(world.resolved, precision="FP8"))
    with pytest.raises(UsageError, match=r"quant=fit: .* is FP8: a mix is made of an unquantized"):
        quantized.chain("FIT")
