"""The types that llama-quantize makes, and those in which ggml stores tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from pipeline.core.errors import UsageError, did_you_mean

# `general.file_type` of a GGUF: enum llama_ftype of llama.cpp's llama.h. In llama-quantize's
# own spelling; file names and variables use lower case.
FILE_TYPES = {
    **{40: "Q1_0", 41: "Q2_0", 2: "Q4_0", 3: "Q4_1", 38: "MXFP4_MOE", 8: "Q5_0", 9: "Q5_1"},
    **{19: "IQ2_XXS", 20: "IQ2_XS", 28: "IQ2_S", 29: "IQ2_M", 24: "IQ1_S", 31: "IQ1_M"},
    **{36: "TQ1_0", 37: "TQ2_0", 10: "Q2_K", 21: "Q2_K_S", 23: "IQ3_XXS", 22: "IQ3_XS"},
    **{26: "IQ3_S", 27: "IQ3_M", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 25: "IQ4_NL"},
    **{30: "IQ4_XS", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 7: "Q8_0"},
    **{1: "F16", 32: "BF16", 0: "F32", 39: "NVFP4"},
}
TYPES = tuple(name for name in FILE_TYPES.values() if name != "NVFP4")  # that it makes
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# A quant in the names of files, in any letter case: Q4_K_M, UD-Q4_K_XL, Q4_0_4_4, fp16, q4-k-m, …
# What follows after `_` belongs to it, known or not: Q4_K_P is no Q4_K. But for a quant behind what
# it was made from, f16_q5_k_m.
LABEL = re.compile(
    r"(?<![a-z0-9])(?:ud[-_])?(?:i?q[1-9]|tq\d|mxfp\d|nvfp4|bf16|fp?16|fp?32)"
    r"(?:-(?:k|s|m|l|nl|xs|xxs|xl|[01])(?![a-z0-9.])"
    r"|_(?!(?:imat(?:rix)?|i1|gguf|v\d+)(?![a-z0-9])|(?<=[fp](?:16|32)_)(?:i?q\d|tq\d))[a-z0-9]+)*"
    r"(?![a-z0-9])",
    re.ASCII | re.IGNORECASE,
)
DEFAULT = "Q4_K_M"
AUTO, ALL = "AUTO", "ALL"  # the best that fits; each of them (for plan)
FIT = "FIT"  # the best mix that fits
DECIDED = (AUTO, FIT)  # by the memory of the machine
MIX = re.compile(r"(?P<number>\d{1,6}(?:\.\d{1,3})?)(?P<unit>BPW|MIB|GIB)", re.A)
MIX_UNITS = {"BPW": ("bpw", 0), "MIB": ("MiB", 1 << 20), "GIB": ("GiB", 1 << 30)}

# The converter writes these itself, so that no intermediate file is needed.
DIRECT = ("F32", "F16", "BF16", "Q8_0")
UNQUANTIZED = ("F32", "F16", "BF16")

# llama-quantize refuses to make these without an importance matrix: IQ2_M is made of IQ2_S, and
# IQ3_XS has IQ3_XXS in its attention.
NEED_IMATRIX = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"),
)

# By the name that llama.cpp prints, in lower case: its number, and elements and bytes of a block.
# ggml_type of ggml's ggml.h, sizes of ggml-common.h.
TENSOR_TYPES = {
    **{"f32": (0, 1, 4), "f16": (1, 1, 2), "q4_0": (2, 32, 18), "q4_1": (3, 32, 20)},
    **{"q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34), "q2_k": (10, 256, 84)},
    **{"q3_k": (11, 256, 110), "q4_k": (12, 256, 144), "q5_k": (13, 256, 176)},
    **{"q6_k": (14, 256, 210), "q8_k": (15, 256, 292), "iq2_xxs": (16, 256, 66)},
    **{"iq2_xs": (17, 256, 74), "iq3_xxs": (18, 256, 98), "iq1_s": (19, 256, 50)},
    **{"iq4_nl": (20, 32, 18), "iq3_s": (21, 256, 110), "iq2_s": (22, 256, 82)},
    **{"iq4_xs": (23, 256, 136), "i8": (24, 1, 1), "i16": (25, 1, 2), "i32": (26, 1, 4)},
    **{"i64": (27, 1, 8), "f64": (28, 1, 8), "iq1_m": (29, 256, 56), "bf16": (30, 1, 2)},
    **{"tq1_0": (34, 256, 54), "tq2_0": (35, 256, 66), "mxfp4": (39, 32, 17)},
    **{"nvfp4": (40, 64, 36), "q1_0": (41, 128, 18), "q2_0": (42, 64, 18)},
}
TENSOR_BLOCKS = {number: (block, width) for number, block, width in TENSOR_TYPES.values()}


class Budget(Struct, frozen=True):
    """The size of a mix, as `text` has it: so many bits for each weight, as llama-quantize prints
    them (all tensors, without the metadata), or so many bytes of the file; the other is 0."""

    text: str
    bits: float = 0.0
    bytes: int = 0


def budget(quant: str) -> Budget | None:
    """The size of a mix; None for any other quant."""
    match = MIX.fullmatch(quant)
    if match is None:
        return None
    number, (unit, bytes_) = float(match["number"]), MIX_UNITS[match["unit"]]
    return Budget(match["number"] + unit, 0.0 if bytes_ else number, int(number * bytes_))


def is_mix(quant: str) -> bool:
    """Whether a quant is a mix: of a given size, or of the one that fits."""
    return quant == FIT or budget(quant) is not None


def parse(value: str) -> str:
    """A type of llama-quantize, the size of a mix, or another quant that repositories have, in
    capitals. Raises ValueError for anything else."""
    word = capitals(value.strip())
    if word == FIT:
        return word
    if match := MIX.fullmatch(word):
        number = f"{float(match['number']):.3f}".rstrip("0").rstrip(".")
        return number + match["unit"]
    if word[:1].isdigit():
        raise ValueError(f"a size such as 4.8bpw, 500MiB or 3GiB{_near_size(word)}")
    if word not in TYPES and word not in ALIASES and not LABEL.fullmatch(word):
        near = did_you_mean(word, TYPES)
        raise ValueError(
            f"auto, fit, a size such as 4.8bpw or 3GiB, or a type of llama-quantize"
            f"{near or ': ' + ', '.join(TYPES)}"
        )
    return word


def _near_size(word: str) -> str:
    """`; did you mean 4.8bpw?` where a size is spelled in another way."""
    plain = re.sub(r"\s", "", word).replace(",", ".")
    plain = re.sub(r"(?:BPW|BITS?(?:PERWEIGHT|/WEIGHT)?|B)?$", "BPW", plain, count=1)
    plain = re.sub(r"([MG])I?BPW$", r"\1IB", plain)
    near = budget(plain)
    return f"; did you mean {near.text}?" if near else ""


def capitals(quant: str) -> str:
    """A quant in capitals, with llama-quantize's names of the unquantized types."""
    return quant.upper().replace("FP16", "F16").replace("FP32", "F32")


def canonical(word: str) -> str:
    """llama-quantize's own name where `word` is another name of one of its types."""
    return ALIASES.get(word, word)


def row_bytes(kind: int, elements: int) -> int:
    """Bytes of `elements` of a tensor type; 0 where the type is newer than this table."""
    block, width = TENSOR_BLOCKS.get(kind, (1, 0))
    return -(-elements // block) * width


class QuantRequest(Struct, frozen=True, kw_only=True):
    """How a model is to be quantized; an empty `quant` means the default."""

    quant: str = ""
    keep_f16: bool = False
    imatrix: Path | None = None
    types: Mapping[str, str] | None = None  # those of a mix, by tensor, that a lock file pins


def require_makeable(requested: QuantRequest) -> None:
    """Raise UsageError where llama-quantize cannot make what is requested."""
    is_known = requested.quant in ("", *TYPES, AUTO, ALL) or is_mix(requested.quant)
    if not is_known:
        raise UsageError(
            f"quant={requested.quant.lower()}: llama-quantize has no such type"
            f"{did_you_mean(requested.quant, TYPES)}",
            "such names are for GGUF files that a repository already has",
        )
    if requested.quant in NEED_IMATRIX and not requested.imatrix:
        raise UsageError(
            f"quant={requested.quant.lower()}: needs an importance matrix",
            "pass imatrix=PATH, or use a type that needs none, such as q4_k_m",
        )
