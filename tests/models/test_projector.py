"""Which projector belongs to a model: by metadata first, then by what is nearest and best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.models import kinds, projector
from pipeline.models.choice import Option
from pipeline.models.gguf import Header
from pipeline.models.resolve import ModelFile

REPO = "org/model"


def header(values: Mapping[str, Any]) -> Header:
    """A header with these values; the rest of it does not matter here."""
    return Header(tensors=1, size=100, data=0, values=values)


def model(width: int = 2560, architecture: str = "gemma3") -> Header:
    return header(
        {
            "general.architecture": architecture,
            "general.type": "model",
            f"{architecture}.embedding_length": width,
        }
    )


def mmproj(width: int = 2560, **more: Any) -> Header:
    """As convert_hf_to_gguf.py --mmproj writes it."""
    values = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.vision.projection_dim": width,
    }
    return header({**values, **more})


@dataclass
class Shelf:
    """A repository as `pair` sees it, which remembers whose headers were read."""

    headers: Mapping[str, Header]
    read: list[str] = field(default_factory=list)

    def read_header(self, files: Sequence[ModelFile]) -> Header:
        self.read.append(files[0].name)
        return self.headers[files[0].name]

    def pair(self, asked: str = "", name: str = "M-Q4_K_M.gguf") -> tuple[str, str]:
        """The name of the projector that `name` gets, empty for none; and why."""
        files = {name: ModelFile(name, 1, "s") for name in self.headers}
        option = Option(label="", files=(files[name],))
        chosen, why = projector.pair(files, option, asked, REPO, self.read_header)
        return chosen.name if chosen else "", why


def shelf(*names: str, name: str = "M-Q4_K_M.gguf") -> Shelf:
    """A model, and projectors that fit it."""
    return Shelf({name: model(), **{name: mmproj() for name in names}})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"general.architecture": "clip"}, True),
        ({"general.architecture": "clip", "general.type": "clip-vision"}, True),
        ({"general.architecture": "any", "general.type": "mmproj"}, True),
        ({"general.architecture": "llama", "general.type": "model"}, False),
        ({"general.architecture": "llama", "general.type": "adapter"}, False),
        ({"general.architecture": "CLIP"}, False),
        ({"general.name": "mmproj"}, False),
        ({}, False),
    ],
)
def test_a_projector_by_its_own_word(values: dict[str, Any], expected: bool) -> None:
    assert kinds.is_projector(header(values)) is expected


@pytest.mark.parametrize(
    ("its", "fits"),
    [
        ({"clip.vision.projection_dim": 2560}, True),
        ({"clip.audio.projection_dim": 2560}, True),
        ({"clip.projection_dim": 2560}, True),
        ({"clip.vision.projection_dim": 1024, "clip.audio.projection_dim": 2560}, True),
        ({"clip.vision.projection_dim": 3840}, False),
        ({"clip.vision.projection_dim": "2560"}, False),
        ({"clip.vision.embedding_length": 2560}, False),
        ({"clip.text.projection_dim": 2560}, False),
        ({}, False),
    ],
)
def test_the_width_decides(its: dict[str, Any], fits: bool) -> None:
    projector_header = header({"general.architecture": "clip", **its})
    assert projector.fits(projector_header, model()) is fits


def test_the_width_of_the_models_own_architecture() -> None:
    assert projector.fits(mmproj(4096), model(4096, "qwen2vl"))
    values = {"general.architecture": "qwen2vl", "gemma3.embedding_length": 4096}
    assert not projector.fits(mmproj(4096), header(values))


def test_two_that_say_no_width_do_not_fit() -> None:
    assert not projector.fits(mmproj(0), model(0))
    assert not projector.fits(
        header({"general.type": "mmproj"}), header({"general.architecture": "llama"})
    )


def test_a_model_of_the_right_width_is_no_projector() -> None:
    assert not projector.fits(header({"clip.vision.projection_dim": 2560}), model())


def test_none_where_there_is_none() -> None:
    only = shelf()
    assert only.pair() == ("", "")
    assert only.pair("none") == ("", "")
    assert not only.read, "not a header is read"


@pytest.mark.parametrize(
    "name",
    [
        *("mmproj-F16.gguf", "mmproj-model-f16.gguf", "M.mmproj-Q8_0.gguf", "sub/MMPROJ.GGUF"),
        *("M-vision-projector.gguf", "mmproj.gguf"),
    ],
)
def test_the_only_one_that_fits(name: str) -> None:
    chosen, why = shelf(name).pair()
    assert chosen == name
    assert name in why
    assert why.startswith("; ")


@pytest.mark.parametrize("name", ["mmproj/model-f16.gguf", "mmproj-F16.safetensors", "mmproj.txt"])
def test_what_no_name_tells_to_be_a_projector(name: str) -> None:
    assert shelf(name).pair() == ("", "")


def test_left_out_as_asked() -> None:
    both = shelf("mmproj-F16.gguf")
    chosen, why = both.pair("none")
    assert not chosen
    assert "without its projector" in why
    assert not both.read


@pytest.mark.parametrize(
    "other",
    [mmproj(3840), model(), header({}), header({"general.type": "imatrix"})],
    ids=["another width", "a model", "nothing said", "an imatrix"],
)
def test_one_that_does_not_fit_is_left_out_and_said(other: Header) -> None:
    both = Shelf({"M-Q4_K_M.gguf": model(), "mmproj-F16.gguf": other})
    chosen, why = both.pair()
    assert not chosen
    assert "fits" in why
    assert "mmproj-F16.gguf" in why


@pytest.mark.parametrize(
    "width", [0, 768], ids=["MiniCPM-V, GLM-Edge: not said", "LLaVA 1.5: CLIP's own width"]
)
def test_a_projector_of_the_older_converters(width: int) -> None:
    """llama.cpp compares the width of its last tensor; this key is 0 or another's there."""
    its = mmproj(width, **{"clip.has_llava_projector": True, "clip.projector_type": "mlp"})
    its = replace(its, widths=[1024, 4096])
    both = Shelf({"M-Q4_K_M.gguf": model(4096, "llama"), "mmproj-model-f16.gguf": its})
    assert both.pair()[0] == "mmproj-model-f16.gguf"


def test_the_one_of_the_right_width_among_several() -> None:
    """As in a repository with two sizes of a model."""
    both = Shelf(
        {
            "m-4b-Q4_K_M.gguf": model(2560),
            "m-12b-Q4_K_M.gguf": model(3840),
            "mmproj-a-f16.gguf": mmproj(3840),
            "mmproj-b-f16.gguf": mmproj(2560),
            "mmproj-m-4b-f16.gguf": model(2560),
        }
    )
    assert both.pair(name="m-4b-Q4_K_M.gguf")[0] == "mmproj-b-f16.gguf"
    assert both.pair(name="m-12b-Q4_K_M.gguf")[0] == "mmproj-a-f16.gguf"


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0", "BF16", "F32"])
@pytest.mark.parametrize(
    "name", ["mmproj-{}", "mmproj-M-{}", "M-mmproj-{}", "M.mmproj-{}", "mmproj-model-{}"]
)
def test_the_precision_that_every_backend_has_comes_first(name: str, quant: str) -> None:
    left = ["Q8_0", "F32", "BF16", "F16"]
    while left:
        names = [f"{name.format(quant)}.gguf" for quant in left]
        chosen, _ = shelf(*names, name=f"M-{quant}.gguf").pair(name=f"M-{quant}.gguf")
        assert chosen == names[-1]
        left.pop()


def test_a_precision_as_names_have_it() -> None:
    assert shelf("mmproj-q8_0.gguf", "mmproj-fp16.gguf").pair()[0] == "mmproj-fp16.gguf"
    assert shelf("mmproj-Q8_0.gguf", "mmproj-Q4_K_M.gguf").pair()[0] == "mmproj-Q8_0.gguf"
    assert shelf("mmproj-Q8_0.gguf", "mmproj.gguf").pair()[0] == "mmproj-Q8_0.gguf"


@pytest.mark.parametrize(
    ("name", "nearest", "other"),
    [
        ("a/M-Q4_K_M.gguf", "a/mmproj-Q8_0.gguf", "b/mmproj-F16.gguf"),
        ("a/M-Q4_K_M.gguf", "a/mmproj-Q8_0.gguf", "mmproj-F16.gguf"),
        ("M-Q4_K_M.gguf", "mmproj-Q8_0.gguf", "a/mmproj-F16.gguf"),
        ("M-Q4_K_M.gguf", "mmproj-Q8_0.gguf", "M-old/mmproj-F16.gguf"),
        ("a/M-Q4_K_M.gguf", "mmproj-Q8_0.gguf", "a-b/mmproj-F16.gguf"),
        ("Q4_K_M/M-00001-of-00002.gguf", "mmproj-Q8_0.gguf", "Q4_K_S/mmproj-F16.gguf"),
        ("gemma-4b-Q4_K_M.gguf", "mmproj-gemma-4b-Q8_0.gguf", "mmproj-gemma-12b-f16.gguf"),
        ("gemma-4b-Q4_K_M.gguf", "mmproj-gemma-4b.gguf", "mmproj-other-f16.gguf"),
        ("Gemma-4b-Q4_K_M.gguf", "gemma-4b-mmproj-Q8_0.gguf", "qwen-mmproj-f16.gguf"),
    ],
)
def test_the_nearest_by_folder_and_then_by_name(name: str, nearest: str, other: str) -> None:
    for names in ((nearest, other), (other, nearest)):
        assert shelf(*names, name=name).pair(name=name)[0] == nearest


def test_of_two_alike_the_first_by_name() -> None:
    names = ("mmproj-x-F16.gguf", "mmproj-y-F16.gguf")
    assert shelf(*names).pair()[0] == shelf(*names[::-1]).pair()[0] == names[0]


def test_one_by_its_name() -> None:
    both = shelf("mmproj-F16.gguf", "sub/mmproj-Q8_0.gguf", "vision.gguf")
    for asked in ("mmproj-F16.gguf", "sub/mmproj-Q8_0.gguf", "vision.gguf"):
        assert both.pair(asked)[0] == asked
    assert both.pair("mmproj-Q8_0.gguf")[0] == "sub/mmproj-Q8_0.gguf"
    assert "mmproj-F16.gguf" not in both.read[-2:], "the others are not looked at"


def test_the_whole_name_comes_before_the_last_part_of_one() -> None:
    both = shelf("mmproj-F16.gguf", "sub/mmproj-F16.gguf")
    assert both.pair("mmproj-F16.gguf")[0] == "mmproj-F16.gguf"
    assert both.pair("sub/mmproj-F16.gguf")[0] == "sub/mmproj-F16.gguf"


@pytest.mark.parametrize("asked", ["mmproj-BF16.gguf", "F16.gguf", "MMPROJ-F16.gguf", "None"])
def test_a_name_that_is_not_there(asked: str) -> None:
    with pytest.raises(UsageError, match=f"mmproj={asked}: .*no files of that name") as caught:
        shelf("mmproj-F16.gguf").pair(asked)
    assert "mmproj-F16.gguf" in caught.value.message
    assert REPO in caught.value.message
    assert caught.value.hint


def test_a_name_that_several_have() -> None:
    with pytest.raises(UsageError, match="has 2 files of that name") as caught:
        shelf("a/mmproj-F16.gguf", "b/mmproj-F16.gguf").pair("mmproj-F16.gguf")
    assert "a/mmproj-F16.gguf, b/mmproj-F16.gguf" in caught.value.message


def test_none_are_there_to_be_named() -> None:
    with pytest.raises(UsageError, match="its projectors: none"):
        shelf().pair("mmproj-F16.gguf")


@pytest.mark.parametrize(
    ("other", "said"), [(mmproj(3840), "does not fit this model"), (model(), "is not a projector")]
)
def test_a_named_one_that_does_not_fit_is_refused(other: Header, said: str) -> None:
    both = Shelf({"M-Q4_K_M.gguf": model(), "mmproj-a.gguf": other, "mmproj-b.gguf": mmproj()})
    with pytest.raises(UsageError, match=f"mmproj=mmproj-a.gguf: {said}") as caught:
        both.pair("mmproj-a.gguf")
    assert "none" in caught.value.hint


def test_the_model_is_not_its_own_projector() -> None:
    with pytest.raises(UsageError, match="is not a projector"):
        shelf("mmproj-F16.gguf").pair("M-Q4_K_M.gguf")


def test_a_projector_of_the_users_own() -> None:
    projector.require(mmproj(), model(), "/x/y.gguf")
    with pytest.raises(PipelineError, match=r"mmproj=/x/y.gguf: does not fit this model"):
        projector.require(mmproj(3840), model(), "/x/y.gguf")
    with pytest.raises(PipelineError, match=r"mmproj=/x/y.gguf: is not a projector"):
        projector.require(model(), model(), "/x/y.gguf")
