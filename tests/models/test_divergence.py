"""llama-perplexity's lines are read chunk by chunk, and the text in groups that fit the disk."""

from __future__ import annotations

import math

import pytest

from pipeline.models.divergence import chunk_bytes, group_size, parse, part_of

HEAD = "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence   …"
ROW = "{:4d}    {:9.4f} ±    0.1000    {:10.5f} ±    0.00300    {:10.5f} ±    0.00020    {:6.3f} ±"
ROW += "  0.100 %    {:6.3f} ±  0.100 %"
TOTALS = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  10.000000 ±   0.100000
Mean ln(PPL(Q)/PPL(base))     :   0.020004 ±   0.003000
====== KL divergence statistics ======
Mean    KLD:   0.030001 ±   0.000200
Maximum KLD:   1.0
Same top p: 90.000 ± 0.300 %
"""


def printed(rows: list[tuple[float, float, float]], totals: str = TOTALS) -> str:
    """The means so far, as llama-perplexity prints them after each chunk."""
    lines = [ROW.format(n, 9.9, log, kld, 3.0, top) for n, (log, kld, top) in enumerate(rows, 1)]
    return "\n".join(["0.01 I kl_divergence: 1.72 seconds", HEAD, *lines, totals])


def test_single_chunks_follow_from_the_means_so_far() -> None:
    pieces = parse(printed([(0.01, 0.02, 95.0), (0.02, 0.03, 90.0)]))
    assert [piece.values["kld"] for piece in pieces] == pytest.approx([0.02, 0.040002])
    assert [piece.values["log_ratio"] for piece in pieces] == pytest.approx([0.01, 0.030008])
    assert [piece.values["same_top"] for piece in pieces] == pytest.approx([0.95, 0.85])
    # That of one chunk, of which two give the printed error.
    assert pieces[0].errors["kld"] == pytest.approx(0.0002 * math.sqrt(2))
    assert pieces[0].errors["same_top"] == pytest.approx(0.003 * math.sqrt(2))


@pytest.mark.parametrize("word", ["nan", "-nan", "inf"])
def test_nonsense_is_infinite(word: str) -> None:
    text = printed([(0.01, 0.02, 95.0), (0.02, 0.03, 90.0)]).replace("0.03000 ", f"{word} ")
    assert math.isinf(parse(text.replace("0.030001", word))[1].values["kld"])


def test_where_the_totals_are_missing_the_last_line_counts() -> None:
    pieces = parse(printed([(0.01, 0.02, 95.0), (0.02, 0.03, 90.0)], totals=""))
    assert pieces[1].values["kld"] == pytest.approx(0.04)
    assert pieces[1].errors["kld"] == pytest.approx(0.0002 * math.sqrt(2))
    assert pieces[1].errors["same_top"] == pytest.approx(0.001 * math.sqrt(2))


def test_without_rows_there_is_nothing() -> None:
    assert parse("llama_model_load: error loading model\n") == []


def test_a_group_fits_two_gigabytes() -> None:
    assert chunk_bytes(262_144, 512) == 255 * (262_144 + 4) * 2  # 134 MB
    assert group_size(262_144, 512) == 16
    assert group_size(32_000, 512) == 32
    assert group_size(262_144, 32_768) == 2, "never fewer, since two at least are read"
    for vocabulary in (32_000, 128_256, 262_144):
        assert group_size(vocabulary, 512) * chunk_bytes(vocabulary, 512) <= 2 * 1024**3


def test_a_text_is_cut_at_blanks_and_nothing_is_lost() -> None:
    text = " ".join(f"word{number}" for number in range(1000))
    parts, offset = [], 0
    while part := part_of(text, offset, tokens=100):
        parts.append(part)
        offset += len(part)
    assert "".join(parts) == text
    assert all(500 <= len(part) < 520 for part in parts[:-1])
    assert all(part.startswith(" ") for part in parts[1:])
