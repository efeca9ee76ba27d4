"""Which GGUF is meant, over names as uploaders write them. Nothing here is read or fetched."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import pytest

from pipeline.core.errors import UsageError
from pipeline.models import choice, quants
from pipeline.models.choice import PREFERENCE, Option, label, listing, options, spelling
from pipeline.models.reference import FileFilter
from pipeline.models.resolve import ModelFile

ASKED = "hf:org/model"
BARTOWSKI = (
    *("M-7B-Q2_K.gguf", "M-7B-Q3_K_L.gguf", "M-7B-Q4_K_M.gguf", "M-7B-Q4_K_L.gguf"),
    *("M-7B-Q4_0_4_4.gguf", "M-7B-IQ4_NL.gguf", "M-7B-Q6_K_L.gguf", "M-7B-Q8_0.gguf"),
    *("M-7B-bf16.gguf", "M-7B-imatrix.gguf", "mmproj-M-7B-f16.gguf", "README.md"),
)
UNSLOTH = (
    *("BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf"),
    *("M-Q4_K_M.gguf", "M-UD-Q4_K_XL.gguf", "M-UD-IQ1_S.gguf", "M-Q8_0.gguf"),
    *("Q8_K_XL/M-UD-Q8_K_XL-00001-of-00001.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf"),
    "imatrix_unsloth.gguf_file",
)


def of(names: tuple[str, ...], sizes: dict[str, int] | None = None) -> dict[str, ModelFile]:
    """Files of one size, but for those in `sizes`, which names them by a pattern."""
    all_sizes = dict.fromkeys(names, 4000000000)
    for pattern, size in (sizes or {}).items():
        all_sizes.update({name: size for name in names if fnmatch(name, pattern)})
    return {name: ModelFile(name, size, "s") for name, size in all_sizes.items()}


class Memory:
    """`fits` for a host with `room` bytes, which remembers what it was asked."""

    def __init__(self, room: int = 10**15) -> None:
        self.room = room
        self.asked: list[str] = []

    def __call__(self, option: Option) -> bool:
        self.asked.append(option.label)
        return option.bytes <= self.room


def choose(
    names: tuple[str, ...],
    fits: Callable[[Option], bool] | None = None,
    sizes: dict[str, int] | None = None,
    **filters: str,
) -> tuple[str, str]:
    """The first file's name of what is chosen, and why."""
    option, why = choice.choose(
        options(of(names, sizes)), FileFilter(**filters), ASKED, fits or Memory()
    )
    return option.name, why


def refused(names: tuple[str, ...], **filters: str) -> str:
    """The error; it is one that is told before any work, and nobody asked about the memory."""
    memory = Memory()
    with pytest.raises(UsageError) as caught:
        choose(names, memory, **filters)
    assert ASKED in caught.value.message
    assert not memory.asked
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-8B-Q4_K_M.gguf", "Q4_K_M"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Qwen3-8B-UD_Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Qwen3-8B-ud-iq2_xxs.gguf", "UD-IQ2_XXS"),
        ("Cloud-Q4_K_M.gguf", "Q4_K_M"),
        ("Q4_K_M/Qwen3-235B-A22B-Q4_K_M-00001-of-00003.gguf", "Q4_K_M"),
        ("UD-IQ1_S/DeepSeek-R1-UD-IQ1_S-00002-of-00003.gguf", "UD-IQ1_S"),
        ("DeepSeek-V3-0324.Q3_K_M-00001-of-00010.gguf", "Q3_K_M"),
        ("Q6_K/model-00001-of-00002.gguf", "Q6_K"),
        ("M-Q8_0/deep/model.gguf", "Q8_0"),
        ("Q8_0/model.Q4_K_S.gguf", "Q4_K_S"),
        ("Llama-3-70B.i1-Q4_K_M.gguf", "Q4_K_M"),
        ("Llama-3-70B.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("mistral-7b-instruct-v0.2.Q3_K_S.gguf", "Q3_K_S"),
        ("Mixtral-8x7B-v0.1.Q5_0.gguf", "Q5_0"),
        ("qwen2.5-7b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("qwen2.5-7b-instruct-fp16-00001-of-00004.gguf", "F16"),
        ("qwen2.5-0.5b-instruct-q8_0.gguf", "Q8_0"),
        ("nomic-embed-text-v1.5.f16.gguf", "F16"),
        ("model-fp32.gguf", "F32"),
        ("Qwen3-BF16-00001-of-00002.gguf", "BF16"),
        ("M-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("M-Q4_0_8_8.gguf", "Q4_0_8_8"),
        ("M-Q4_K_L.gguf", "Q4_K_L"),
        ("M-Q6_K_L.gguf", "Q6_K_L"),
        ("M-Q3_K_XL.gguf", "Q3_K_XL"),
        ("M-IQ4_NL.gguf", "IQ4_NL"),
        ("M-IQ4_XS.gguf", "IQ4_XS"),
        ("TriLM_3.9B-TQ1_0.gguf", "TQ1_0"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("gpt-oss-120b-mxfp4-00001-of-00003.gguf", "MXFP4"),
        ("Qwen3-Coder-30B-A3B-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("M-NVFP4.gguf", "NVFP4"),
        ("gemma-3-27b-it-qat-q4_0.gguf", "Q4_0"),
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("ggml-model-Q4_K_M.gguf", "Q4_K_M"),
        ("M-Q5_K_M-imatrix.gguf", "Q5_K_M"),
        ("M-IQ3_M-v2.gguf", "IQ3_M"),
        ("M.f16.Q6_K.gguf", "Q6_K"),
        ("m_f16_q5_k_m.gguf", "Q5_K_M"),
        ("M-BF16_IQ4_XS.gguf", "IQ4_XS"),
        ("M_fp32_Q4_K_P.gguf", "Q4_K_P"),
        ("M_f16_custom.gguf", "F16_CUSTOM"),
        ("M-Q6_K-f16.gguf", "Q6_K_F16"),
        ("M.UD-Q6_K.f16.gguf", "UD-Q6_K_F16"),
        ("M-bf16-f16.gguf", "F16"),
        ("M-q4_0-unquantized-BF16.gguf", "BF16"),
        ("foo.Q4_K_M.GGUF", "Q4_K_M"),
        ("llama2_7b_Q4_K_M.gguf", "Q4_K_M"),
        ("M-Q4_K_P.gguf", "Q4_K_P"),
        ("M-Q8_K_P.gguf", "Q8_K_P"),
        ("M-Q4_K_MX.gguf", "Q4_K_MX"),
        ("M-Q3_HIFI.gguf", "Q3_HIFI"),
        ("M-Q4_K_HIFI.gguf", "Q4_K_HIFI"),
        ("M-UD-Q4_K_P.gguf", "UD-Q4_K_P"),
        ("M-Q4_K_P-00001-of-00002.gguf", "Q4_K_P"),
        ("Q4_K_P/M.gguf", "Q4_K_P"),
        ("M-BF16_P.gguf", "BF16_P"),
        ("M-TQ3_4S.gguf", "TQ3_4S"),
        ("M-MXFP6_E3M2.gguf", "MXFP6_E3M2"),
        ("M-q4-k-m.gguf", "Q4_K_M"),
        ("M-q8-0.gguf", "Q8_0"),
        ("M-ud-q4-k-xl.gguf", "UD-Q4_K_XL"),
        ("M-Q4_K_M_imat.gguf", "Q4_K_M"),
        ("M.Q4_K_M_v2.gguf", "Q4_K_M"),
        ("M-Q4-MTP.gguf", "Q4"),
        ("stories260K.gguf", ""),
        ("ggml-model-i2_s.gguf", ""),
        ("Llama-3.2-1B.gguf", ""),
        ("QwQ-32B.gguf", ""),
        ("M-q4f16_1.gguf", ""),
    ],
)
def test_the_quant_that_a_name_tells(name: str, quant: str) -> None:
    assert label(name) == quant


@pytest.mark.parametrize("quant", quants.TYPES)
def test_every_type_of_llama_quantize_is_told(quant: str) -> None:
    for name in (f"M-7B-{quant}", f"m.{quant.lower()}", f"M-{quant}-00001-of-00002"):
        assert label(f"{name}.gguf") == quant


@pytest.mark.parametrize("quant", ["Q4_0_R8", "IQ2_K_R4", "IQ4_KS", "IQ4_KSS", "IQ2_KT"])
def test_a_quant_of_another_program_is_not_told_as_one_of_ours(quant: str) -> None:
    assert label(f"M-{quant}.gguf") in ("", quant)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Q4_K_M", "q4_k_m"),
        ("UD-Q4_K_XL", "ud_q4_k_xl"),
        ("Q4_K_M", "q4-k-m"),
        ("FP16", "f16"),
        ("fp32", "F32"),
    ],
)
def test_spellings_of_one_quant(one: str, other: str) -> None:
    assert spelling(one) == spelling(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("Q4_K_M", "Q4_K_S"), ("Q4_K_M", "Q4_K"), ("Q4_K_M", "UD-Q4_K_M"), ("F16", "BF16")),
        *(("Q4_0", "Q4_0_4_4"), ("Q4_K_XL", "UD-Q4_K_XL"), ("IQ4_XS", "Q4_XS"), ("Q4", "Q4_0")),
        *(("MXFP4", "NVFP4"), ("IQ2_XS", "IQ2_XXS"), ("Q6_K", "Q6_K_L")),
    ],
)
def test_two_quants_keep_two_spellings(one: str, other: str) -> None:
    assert spelling(one) != spelling(other)


def test_the_preferred_quants_are_labels_each_once() -> None:
    assert len(set(PREFERENCE)) == len(PREFERENCE)
    for quant in PREFERENCE:  # else a file of it could never be preferred
        assert label(f"M-{quant}.gguf") == quant


def test_the_models_among_the_files_of_a_repository() -> None:
    by_name = {option.name: option for option in options(of(BARTOWSKI))}
    assert list(by_name) == sorted(n for n in BARTOWSKI if n[:2] == "M-" and "imatrix" not in n)
    assert all(not option.missing and len(option.files) == 1 for option in by_name.values())
    assert by_name["M-7B-Q6_K_L.gguf"].label == "Q6_K_L"


def test_parts_in_folders_are_one_model() -> None:
    by_label = {option.label: option for option in options(of(UNSLOTH))}
    assert set(by_label) == {"BF16", "Q4_K_M", "UD-Q4_K_XL", "UD-IQ1_S", "Q8_0", "UD-Q8_K_XL"}
    assert [file.name for file in by_label["BF16"].files] == list(UNSLOTH[:2])
    assert by_label["BF16"].bytes == 8_000_000_000
    assert len(by_label["UD-Q8_K_XL"].files) == 1


@pytest.mark.parametrize(
    "name",
    [
        *("imatrix.gguf", "M-imatrix.gguf", "M.imatrix.gguf", "imatrix.dat", "imatrix_v2.GGUF"),
        *("mmproj-F16.gguf", "mmproj-model-f16.gguf", "M-mmproj-Q8_0.gguf", "M.mmproj-f16.gguf"),
        *("sub/mmproj-BF16.gguf", "ggml-vocab-llama-bpe.gguf", "M-Q4_K_M.gguf.part1of2"),
        *("M-Q4_K_M.bin", "imatrix_unsloth.gguf_file", "config.json"),
    ],
)
def test_what_is_no_model(name: str) -> None:
    assert not options(of((name,)))
    assert choose((name, "M.gguf")) == ("M.gguf", "it is the only one")


def test_the_parts_come_in_order_whatever_the_listing_has() -> None:
    names = tuple(f"Q8_0/M-Q8_0-{n:05d}-of-00012.gguf" for n in range(1, 13))
    (option,) = options(of(names[::-1]))
    assert tuple(file.name for file in option.files) == names
    assert not option.missing


def test_parts_that_are_missing_are_named() -> None:
    names = tuple(f"Q8_0/M-Q8_0-{n:05d}-of-00004.gguf" for n in (2, 4))
    (option,) = options(of(names))
    assert tuple(file.name for file in option.files) == names
    assert option.missing == ("Q8_0/M-Q8_0-00001-of-00004.gguf", "Q8_0/M-Q8_0-00003-of-00004.gguf")


@pytest.mark.parametrize(
    "other",
    ["a/M-00001-of-00003.gguf", "b/M-00002-of-00002.gguf", "a/m-00002-of-00002.gguf"],
)
def test_parts_of_other_models_complete_nothing(other: str) -> None:
    several = options(of(("a/M-00001-of-00002.gguf", other)))
    assert len(several) == 2
    assert all(option.missing for option in several)


@pytest.mark.parametrize("name", ["M-00000-of-00002.gguf", "M-00003-of-00002.gguf"])
def test_a_part_beyond_the_count_belongs_to_no_model(name: str) -> None:
    names = ("M-00001-of-00002.gguf", "M-00002-of-00002.gguf")
    (option,) = options(of((*names, name)))
    assert tuple(file.name for file in option.files) == names


@pytest.mark.parametrize("name", ["M-00001-of-00000.gguf", "M-1-of-2.gguf"])
def test_what_only_looks_like_a_part_is_a_whole_file(name: str) -> None:
    (option,) = options(of((name,)))
    assert (option.name, option.missing) == (name, ())


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        *(("Q4_K_M", "M-Q4_K_M.gguf"), ("q8_0", "M-Q8_0.gguf"), ("UD-Q4_K_XL", UNSLOTH[3])),
        *(("ud_iq1_s", "M-UD-IQ1_S.gguf"), ("bf16", UNSLOTH[0]), ("UD-Q8_K_XL", UNSLOTH[6])),
    ],
)
def test_the_quant_asked_for_in_any_spelling(quant: str, name: str) -> None:
    memory = Memory(room=0)  # not even asked: what was asked for is taken
    chosen, why = choose(UNSLOTH, memory, quant=quant)
    assert chosen == name
    assert "was asked for" in why
    assert not memory.asked


@pytest.mark.parametrize(
    ("asked", "taken"), [("Q4_K", "Q4_K_M"), ("q5_k", "Q5_K_M"), ("Q3_K", "Q3_K_M")]
)
def test_another_name_of_the_same_type(asked: str, taken: str) -> None:
    both = (f"M-{taken}.gguf", f"M-{asked.upper()}.gguf")
    assert choose((both[0], "M-Q8_0.gguf"), quant=asked)[0] == both[0]
    assert choose(both, quant=asked)[0] == both[1], "the name itself comes first"


@pytest.mark.parametrize(
    ("quant", "names"),
    [
        ("Q4_K_M", ("M-Q4_K_S.gguf", "M-UD-Q4_K_M.gguf", "M-Q4_K_L.gguf", "M-Q4_K.gguf")),
        ("Q4_0", ("M-Q4_0_4_4.gguf", "M-Q4_1.gguf", "M-IQ4_NL.gguf")),
        ("Q6_K", ("M-Q6_K_L.gguf", "M-UD-Q6_K_XL.gguf")),
        ("F16", ("M-BF16.gguf", "M-F32.gguf")),
        ("Q4", ("M-Q4_0.gguf", "M-Q4_K_M.gguf")),
        ("Q4_K_XL", ("M-UD-Q4_K_XL.gguf",)),
        ("UD-Q4_K_M", ("M-Q4_K_M.gguf",)),
        ("MXFP4", ("M-NVFP4.gguf", "M-MXFP4_MOE.gguf")),
        ("Q4_K", ("M-Q4_K_P.gguf", "M-Q4_K_MX.gguf", "M-Q6_K.gguf")),
        ("Q4_K_M", ("M-Q4_K_P.gguf", "M-Q4_K_M_P.gguf")),
        ("Q4_K_P", ("M-Q4_K_M.gguf", "M-Q4_K.gguf")),
        ("Q8_0", ("M-Q8_K_P.gguf", "M-Q8_0_P.gguf")),
        ("Q8_0", ("M.gguf",)),
        ("COMPACT", ("M-Balanced.gguf", "M-Compact.gguf")),
    ],
)
def test_a_quant_is_never_replaced_by_another(quant: str, names: tuple[str, ...]) -> None:
    error = refused(names, quant=quant)
    assert f"no GGUF with the quant {quant}" in error
    hint = error.partition("hint:")[2]
    assert ("quant=" if any(map(label, names)) else "filename=") in hint, "of what is listed"
    for name in names:
        (line,) = [line for line in error.splitlines() if line.endswith(f" {name}")]
        assert line.split()[:3] == [label(name) or "?", "4.0", "GB"]


def test_a_quant_with_tensors_in_16_bits_is_neither() -> None:
    names = ("M-Q6_K.gguf", "M-Q6_K-f16.gguf", "M-f16.gguf")
    for quant, name in (("q6_k", names[0]), ("q6_k_f16", names[1]), ("f16", names[2])):
        assert choose(names, quant=quants.parse(quant))[0] == name


def test_two_models_of_the_quant_asked_for() -> None:
    names = ("M-Q4_K_M.gguf", "sub/m.q4_k_m.gguf", "M-Q8_0.gguf", "M-MTP-Q4_K_M.gguf")
    error = refused(names, quant="Q4_K_M")
    assert "3 GGUF models match Q4_K_M" in error
    assert all(name in error for name in names if "Q8_0" not in name)
    assert names[2] not in error
    assert choose(names, quant="Q4_K_M", pattern="sub/*")[0] == names[1]
    assert choose(names, quant="Q4_K_M", filename=names[0])[0] == names[0]


def test_parts_are_missing_of_the_one_asked_for() -> None:
    names = ("Q8_0/M-Q8_0-00001-of-00003.gguf", "M-Q4_K_M.gguf")
    for filters in ({"quant": "Q8_0"}, {"filename": names[0]}, {"pattern": "*Q8_0*"}):
        error = refused(names, **filters)
        assert "lacks 2 of the 3 parts" in error
        assert "Q8_0/M-Q8_0-00002-of-00003.gguf, Q8_0/M-Q8_0-00003-of-00003.gguf" in error
    assert "lacks 2 of the 3 parts" in refused(names[:1])


def test_an_incomplete_model_is_not_chosen() -> None:
    names = ("M-Q4_K_M-00001-of-00002.gguf", "M-Q8_0.gguf")
    for quant in ("", quants.AUTO):
        assert choose(names, quant=quant)[0] == names[1]


def test_the_only_one_is_taken_whether_it_fits_or_not() -> None:
    for name in ("M.gguf", "M-Q8_0.gguf", "sub/M-F16-00001-of-00001.gguf"):
        for quant in ("", quants.AUTO):
            memory = Memory(room=0)
            assert choose((name,), memory, quant=quant) == (name, "it is the only one")
            assert not memory.asked


@pytest.mark.parametrize("first", range(len(PREFERENCE)))
def test_the_order_of_preference(first: int) -> None:
    names = tuple(f"M-{quant}.gguf" for quant in reversed(PREFERENCE[first:]))
    memory = Memory()
    chosen, why = choose((*names, "M-F32.gguf", "M-Q3_K_XL.gguf"), memory)
    assert label(chosen) == PREFERENCE[first]
    assert "no quant was asked for" in why
    assert memory.asked == [PREFERENCE[first]], "no header is read for the others"


def test_the_first_preferred_that_fits() -> None:
    sizes = {"*Q5_K_M*": 5_000, "*Q8_0*": 8_000, "*Q4_K_M*": 4_000, "*Q2_K*": 2_000}
    names = tuple(f"M-{quant}.gguf" for quant in ("Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"))
    memory = Memory(room=3_000)
    chosen, why = choose(names, memory, sizes)
    assert chosen == "M-Q2_K.gguf"
    assert "Q4_K_M does not fit" in why
    assert memory.asked[0] == "Q4_K_M"
    assert memory.asked[-1] == "Q2_K"


def test_none_preferred_fits_but_another_does() -> None:
    names = ("M-Q4_K_M.gguf", "M-UD-IQ1_S.gguf", "M-IQ2_XXS.gguf")
    sizes = {"*Q4_K_M*": 4_000, "*IQ2_XXS*": 2_000, "*IQ1_S*": 1_000}
    assert choose(names, Memory(room=2_500), sizes)[0] == names[2]
    chosen, why = choose(names, Memory(room=1), sizes)
    assert chosen == names[1]
    assert "none fits" in why


def test_auto_takes_the_largest_that_fits() -> None:
    names = tuple(f"M-{quant}.gguf" for quant in ("Q2_K", "Q4_K_M", "Q6_K", "Q8_0"))
    sizes = {f"*Q{n}*": n * 1_000 for n in (2, 4, 6, 8)}
    for room, quant in ((9_000, "Q8_0"), (7_000, "Q6_K"), (5_000, "Q4_K_M"), (2_000, "Q2_K")):
        memory = Memory(room)
        chosen, why = choose(names, memory, sizes, quant=quants.AUTO)
        assert label(chosen) == quant
        assert "the best that fits" in why
        assert memory.asked[-1] == quant, "what is smaller is not asked about"
    chosen, why = choose(names, Memory(room=1), sizes, quant=quants.AUTO)
    assert chosen == "M-Q2_K.gguf"
    assert "none fits" in why


def test_auto_counts_all_parts() -> None:
    names = (*(f"M-Q8_0-{n:05d}-of-00002.gguf" for n in (1, 2)), "M-Q4_K_M.gguf")
    sizes = {"*Q8_0*": 3_000, "*Q4_K_M*": 4_000}
    assert choose(names, Memory(6_000), sizes, quant=quants.AUTO)[0] == names[0]
    assert choose(names, Memory(5_999), sizes, quant=quants.AUTO)[0] == names[2]


def test_auto_within_a_pattern() -> None:
    assert choose(UNSLOTH, quant=quants.AUTO, pattern="*UD-IQ*")[0] == "M-UD-IQ1_S.gguf"


def test_auto_and_an_imatrix_beside_the_models() -> None:
    assert label(choose(BARTOWSKI, sizes={"*Q8_0*": 10**10}, quant=quants.AUTO)[0]) == "Q8_0"


def test_auto_does_not_guess_between_two_of_a_quant() -> None:
    names = ("a-Q8_0.gguf", "b-Q8_0.gguf")
    for quant in ("", quants.AUTO):
        with pytest.raises(UsageError, match="several models match") as caught:
            choose(names, quant=quant)
        assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("quant", ["", quants.AUTO])
def test_names_that_tell_no_quant_are_not_guessed_among(quant: str) -> None:
    names = ("large.gguf", "small.gguf")
    error = refused(names, quant=quant)
    assert "several models match" in error
    assert "filename=" in error
    assert all(f"?               4.0 GB  {name}" in error for name in names)


@pytest.mark.parametrize("quant", ["", quants.AUTO])
def test_a_draft_model_is_not_taken_for_the_model(quant: str) -> None:
    names = ("M-70B-Q8_0.gguf", "M-70B-draft-0.6B-Q4_K_M.gguf")
    with pytest.raises(UsageError):
        choose(names, Memory(5_000), {"*Q8_0*": 8_000, "*draft*": 400}, quant=quant)


@pytest.mark.parametrize("name", ["Q4_K_M/M.gguf", "M.gguf"])
def test_a_file_by_its_name(name: str) -> None:
    memory = Memory(room=0)
    names = ("Q4_K_M/M.gguf", "M-Q8_0.gguf")
    assert choose(names, memory, filename=name) == (names[0], "it was named")
    assert not memory.asked


def test_the_whole_name_comes_before_the_last_part_of_one() -> None:
    names = ("M.gguf", "sub/M.gguf")
    for name in names:
        assert choose(names, filename=name)[0] == name
    error = refused(("a/M.gguf", "b/M.gguf", "c.gguf"), filename="M.gguf")
    assert "2 GGUF models match M.gguf" in error
    assert "c.gguf" not in error


@pytest.mark.parametrize("name", UNSLOTH[:2])
def test_any_part_names_the_model(name: str) -> None:
    assert choose(UNSLOTH, filename=name)[0] == UNSLOTH[0]


@pytest.mark.parametrize(
    "name",
    [
        "mmproj-F16.gguf",
        "none.gguf",
        "m-q4_k_m.gguf",
        "README.md",
        "BF16",
        "*Q8_0*",
        "/M-Q8_0.gguf",
    ],
)
def test_a_file_that_is_no_model_here(name: str) -> None:
    error = refused((*UNSLOTH, "README.md"), filename=name)
    assert f"no GGUF matches filename={name}" in error
    assert error.count(".gguf") - name.count(".gguf") == 6, "every model there is, in one line each"
    assert f"BF16            8.0 GB  {UNSLOTH[0]} and 1 part" in error


def test_a_name_and_a_quant_that_contradict_each_other() -> None:
    error = refused(UNSLOTH, filename="M-Q4_K_M.gguf", quant="Q8_0")
    assert "no GGUF with the quant Q8_0" in error
    assert choose(UNSLOTH, filename="M-Q4_K_M.gguf", quant="q4_k_m")[0] == "M-Q4_K_M.gguf"


def test_a_name_that_tells_no_quant_contradicts_none() -> None:
    assert choose(("M.gguf", "N.gguf"), filename="M.gguf", quant="Q8_0") == (
        "M.gguf",
        "it was asked for",
    )


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *(("*Q8_0*", "M-Q8_0.gguf"), ("*q8_0.GGUF", "M-Q8_0.gguf"), ("M-UD-Q4*", UNSLOTH[3])),
        *(("BF16/*", UNSLOTH[0]), ("M-BF16-*", UNSLOTH[0]), ("?-Q4_K_[MS].gguf", UNSLOTH[2])),
    ],
)
def test_a_pattern(pattern: str, name: str) -> None:
    assert choose(UNSLOTH, Memory(room=0), pattern=pattern) == (name, "it was named")


def test_several_match_a_pattern() -> None:
    assert choose(UNSLOTH, pattern="M-*")[0] == "M-Q4_K_M.gguf"  # as with no pattern
    assert choose(UNSLOTH, pattern="M-*", quant="Q8_0")[0] == "M-Q8_0.gguf"
    error = refused(UNSLOTH, pattern="M-UD*", quant="Q8_0")
    assert "M-UD-IQ1_S.gguf" in error
    assert "M-Q8_0.gguf" not in error, "the pattern was meant"


@pytest.mark.parametrize("pattern", ["Q8_0", "mmproj*", "*.safetensors", "BF16", "[!a-z]"])
def test_a_pattern_that_matches_no_model(pattern: str) -> None:
    error = refused(UNSLOTH, pattern=pattern)
    assert f"no GGUF matches pattern={pattern}" in error
    assert all(f" {quant} " in error for quant in ("BF16", "UD-IQ1_S", "Q8_0", "UD-Q8_K_XL"))


def test_the_list_is_by_size() -> None:
    sizes = {"*Q8_0*": 8_100_000_000, "*Q2_K*": 999, "M.gguf": 1_500_000}
    several = options(of(("M-Q8_0.gguf", "M.gguf", "M-Q2_K.gguf"), sizes))
    assert [line.split() for line in listing(several).splitlines()] == [
        ["Q2_K", "999", "B", "M-Q2_K.gguf"],
        ["?", "1.5", "MB", "M.gguf"],
        ["Q8_0", "8.1", "GB", "M-Q8_0.gguf"],
    ]
