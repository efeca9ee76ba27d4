"""The types that llama-quantize knows, and what the pipeline must know about them."""

from __future__ import annotations

import re

from pipeline.core.errors import did_you_mean

# In llama-quantize's own spelling; file names and variables use lower case.
TYPES = (
    *("Q1_0", "Q2_0", "Q4_0", "Q4_1", "MXFP4_MOE", "Q5_0", "Q5_1"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"),
    *("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K_M", "Q3_K_L"),
    *("IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
    *("F16", "BF16", "F32"),
)
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# As uploaders write a quant into names, in any letter case: Q4_K_M, UD-Q4_K_XL, Q4_0_4_4, fp16, …
LABEL = re.compile(
    r"(?<![a-z0-9])(?:ud[-_])?(?:i?q[1-8]|tq[12]|mxfp4|nvfp4|bf16|fp?16|fp?32)"
    r"(?:_(?:k|ks|kss|kl|kt|s|m|l|xl|xxl|xs|xxs|nl|moe|r\d+|\d))*(?![a-z0-9])",
    re.IGNORECASE,
)
AUTO, ALL = "AUTO", "ALL"  # the best that fits; each of them (for plan)

# The converter writes these itself, so that no intermediate file is needed.
DIRECT = ("F32", "F16", "BF16", "Q8_0")
UNQUANTIZED = ("F32", "F16", "BF16")

# llama-quantize refuses to make these without an importance matrix: IQ2_M is made of IQ2_S, and
# IQ3_XS has IQ3_XXS in its attention.
NEED_IMATRIX = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"),
)

# `general.file_type` of a GGUF: enum llama_ftype in llama.cpp's include/llama.h.
FILE_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K"},
    **{11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S"},
    **{17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS"},
    **{23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S"},
    **{29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0"},
    **{38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0"},
}


def parse(value: str) -> str:
    """A type of llama-quantize, or a quant as repositories name them, in capitals.

    Raises ValueError for anything else.
    """
    word = value.strip().upper().replace("FP16", "F16").replace("FP32", "F32")
    if word not in TYPES and word not in ALIASES and not LABEL.fullmatch(word):
        near = did_you_mean(word, TYPES)
        raise ValueError(f"auto, or a type of llama-quantize{near or ': ' + ', '.join(TYPES)}")
    return word


def canonical(word: str) -> str:
    """llama-quantize's own name where `word` is another name of one of its types."""
    return ALIASES.get(word, word)
