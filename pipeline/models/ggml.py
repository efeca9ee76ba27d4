"""The types that tensors are stored in: ggml_type of ggml's ggml.h, sizes of ggml-common.h."""

from __future__ import annotations

# By number: elements in a block, bytes of a block.
BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)},
    **{15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18)},
    **{21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4)},
    **{27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66)},
    **{39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)},
}

# By the name that llama.cpp prints, in lower case.
NUMBERS = {
    **{"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10},
    **{"q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "q8_k": 15, "iq2_xxs": 16, "iq2_xs": 17},
    **{"iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23, "i8": 24},
    **{"i16": 25, "i32": 26, "i64": 27, "f64": 28, "iq1_m": 29, "bf16": 30, "tq1_0": 34},
    **{"tq2_0": 35, "mxfp4": 39, "nvfp4": 40, "q1_0": 41, "q2_0": 42},
}


def row_bytes(kind: int, elements: int) -> int:
    """Bytes of `elements` of a type; 0 where the type is newer than this table."""
    block, width = BLOCKS.get(kind, (1, 0))
    return -(-elements // block) * width
