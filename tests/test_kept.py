"""What the tests keep from run to run is what would be made."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

import kept
import pytest
from conftest import with_programs
from msgspec.structs import replace
from twins import conversion

from pipeline.core.paths import Home

pytestmark = pytest.mark.build


def test_a_page_that_was_kept_needs_no_npm(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (built / ".ui" / "page").exists():
        pytest.skip("the page takes Node.js")
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "cäche")
    homes = [with_programs(built, tmp_path / name) for name in ("one", "two")]
    kept.build_with_page(homes[0])
    place = homes[1].home / "bins" / ".ui"
    shutil.rmtree(place)
    homes[1].env["PATH"] = str(tmp_path)  # no npm, and no compiler either
    kept.build_with_page(homes[1])
    assert homes[1]("build_ui").steps == []
    names = ["index.html", "sw.js"]
    assert (
        filecmp.cmpfiles(built / ".ui" / "page", place / "page", names, shallow=False)[0] == names
    )


def test_a_conversion_is_made_once(
    converter: Path, script: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "cäche")
    homes = [Home(tmp_path / name) for name in ("one", "two", "three")]
    first, second, third = (conversion(tiny, "F16", home, script) for home in homes)
    kept.converted(first, homes[0])
    monkeypatch.setattr(kept.convert, "make", lambda *_: pytest.fail("it was made again"))
    kept.converted(second, homes[1])
    assert second.target.read_bytes() == first.target.read_bytes()
    monkeypatch.setattr(kept.convert, "make", lambda made, home: made.target.write_bytes(b"new"))
    third = replace(third, resolved=replace(third.resolved, name="another"))
    third.target.parent.mkdir(parents=True)
    kept.converted(third, homes[2])
    assert third.target.read_bytes() == b"new", "what is converted otherwise is made"


def test_the_ones_that_were_used_last_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "a").write_text("a")
    folder = tmp_path / "cäche" / "pages"
    for number in range(kept.MOST + 2):
        kept.keep(made, folder / str(number))
        (made / "a").write_text(f"a{number}")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "3", "4"]
    kept.keep(made, folder / "2")
    assert (folder / "2" / "a").read_text() == "a4", "in the place of what was there"
