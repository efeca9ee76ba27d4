"""The texts that llama.cpp's tree brings are prose, the same everywhere, and share no document."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.bins.compile import source
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store.hashing import sha256
from pipeline.models import texts
from pipeline.models.texts import Use
from pipeline.report import quality_similarity as similarity

# Another text gives other figures: a change here is a change of every figure.
DIGESTS: dict[Use, str] = {
    "calibration": "68cfe26648aa0821c8ebe29cd4d98989357c19304c2a7846e40346fc44a50734",
    "test": "4febc20dba5ae2c397266f78d077e7a3b95f044c785423339af5df02dab17062",
}
LEAST_LETTERS = {"calibration": 150_000, "test": 400_000}


@pytest.fixture
def tree(built: Path, tmp_path: Path) -> Path:
    """A copy of the documents, and of nothing else of the pinned tree."""
    pinned = source.pinned(Home(REPOSITORY)).folder
    for documents in pins().llama_cpp_texts.values():
        for name in documents:
            (tmp_path / "tree ü" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pinned / name, tmp_path / "tree ü" / name)
    return tmp_path / "tree ü"


@pytest.mark.build
@pytest.mark.parametrize("use", DIGESTS)
def test_a_text_is_the_same_on_every_machine(tree: Path, tmp_path: Path, use: Use) -> None:
    home = Home(tmp_path / "hôme")
    file = texts.save(tree, use, home)
    before = file.stat()
    assert sha256(file) == DIGESTS[use]
    assert len(file.read_text(encoding="utf-8")) > LEAST_LETTERS[use]
    again = texts.save(tree, use, home)
    assert again.stat().st_mtime_ns == before.st_mtime_ns, "it is written once"
    file.write_text("cut sho", encoding="utf-8")
    assert sha256(texts.save(tree, use, home)) == DIGESTS[use], "a damaged file is replaced"


@pytest.mark.build
def test_git_on_windows_gives_the_same_text(tree: Path) -> None:
    expected = texts.read(tree, "calibration")
    for name in pins().llama_cpp_texts["calibration"]:
        data = (tree / name).read_bytes()
        (tree / name).write_bytes(data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert texts.read(tree, "calibration") == expected


@pytest.mark.build
def test_what_is_tuned_on_one_text_is_not_measured_on_the_same(tree: Path) -> None:
    calibration, test = pins().llama_cpp_texts.values()
    assert not calibration.keys() & test.keys()
    one, other = (set(texts.read(tree, use).split("\n\n")) for use in DIGESTS)
    assert len(one & other) < 0.01 * min(len(one), len(other)), "hardly a paragraph is in both"


@pytest.mark.build
def test_a_changed_or_missing_document_is_refused(tree: Path) -> None:
    name = next(iter(pins().llama_cpp_texts["test"]))
    (tree / name).write_text("Other words.", encoding="utf-8")
    with pytest.raises(PipelineError, match="is not the pinned document") as error:
        texts.read(tree, "test")
    assert name in error.value.message and "text=PATH" in error.value.hint
    (tree / name).unlink()
    with pytest.raises(PipelineError, match="cannot be read"):
        texts.read(tree, "test")


MARKDOWN = """# A title

| a table | of figures | and more | words | than | a | heading | has | in | it | really |

A paragraph of several words that goes on
over two lines, as prose does, until its end.

```sh
for file in *; do echo "$file" > "$(mktemp -d)/x"; [[ -e $file ]] && (( i += 1 )); done; a=b c=d
```

- short item
"""


def test_prose_is_kept_and_code_is_not() -> None:
    paragraph = (
        "A paragraph of several words that goes on over two lines, as prose does, until its end."
    )
    assert texts.prose(MARKDOWN) == [paragraph]
    code = f"/*\n{paragraph}\n*/\nint number_of_things = 1;\n/* short */"
    assert texts.prose(code, is_code=True) == [paragraph]


@pytest.mark.parametrize(
    "paragraph",
    [
        "春天的早晨，阳光洒在小镇的石板路上。人们推开窗户，互相问候，孩子们背着书包走向学校，远处传来火车的汽笛声。",
        "春の朝、小さな町の石畳に日差しが降り注いでいた。人々は窓を開け、互いに挨拶を交わし、子供たちは学校へ向かった。",
        "सुबह की धूप छोटे शहर की गलियों पर पड़ रही थी। लोग खिड़कियाँ खोलकर एक दूसरे को नमस्ते कह रहे थे।",
        "เช้าวันหนึ่งในฤดูใบไม้ผลิแสงแดดส่องลงบนถนนหินของเมืองเล็กๆผู้คนเปิดหน้าต่างทักทายกัน",
    ],
    ids=["Chinese", "Japanese", "Hindi", "Thai"],
)
def test_prose_is_known_in_scripts_without_blanks_or_with_other_vowels(paragraph: str) -> None:
    assert texts.prose(f"# 标题\n\n{paragraph}\n\n| 一 | 1 |") == [paragraph]
    long = similarity.passages(paragraph * 20)[0]
    assert 200 < len(long) <= 600 and len(long.encode()) <= similarity.BYTES
