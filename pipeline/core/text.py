"""Texts as people write them; sizes, counts and tables as people read them."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress

# The longer marks first: UTF-32's begins like UTF-16's.
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

# Colours and other looks; control characters but for line breaks and tabs; marks that reverse the
# order of what is read; Unicode's own line breaks; and halves of letters.
UNPRINTABLE = (
    r"\x1b\[[0-9:;]*m|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f]"
    "|[\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

# The beginning of a dotted key of TOML, whose time Python squares.
MOST_PARTS = 64
LONG_KEY = (
    rf"""(?<![\w.\-"'])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MOST_PARTS}}}"""
)


def is_digits(text: str) -> bool:
    """Whether it is a whole number in the digits 0 to 9: `str.isdecimal` takes those of other
    scripts too, which no other program reads."""
    return text.isascii() and text.isdecimal()


def printable(text: str) -> str:
    """`text` without what a terminal would interpret instead of showing it."""
    return text if text.isascii() and text.isprintable() else re.sub(UNPRINTABLE, "", text)


def encodable(text: str) -> str:
    """`text` from a terminal, whose bytes Python keeps as halves of letters where it cannot read
    them: as UTF-8, with a mark for what is none."""
    with suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8, without the mark (BOM) that an editor put before it. Raises
    ValueError that says what it is instead."""
    for mark, name in OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise ValueError(f"is {name}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("holds zero bytes, as UTF-16 does; save it as UTF-8")
    return text


def repeated(names: Iterable[str]) -> list[str]:
    """The names that come more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def require_short_keys(text: str) -> None:
    """Raise ValueError where a text in TOML has a dotted key of more parts than anything needs."""
    if re.search(LONG_KEY, text):
        raise ValueError(f"has a dotted key of more than {MOST_PARTS} parts")


def byte_count(text: str) -> int:
    """The bytes of a size such as `20GiB` or `1.5 TB`. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text, re.A)
    if not match:
        raise ValueError(text)
    number, unit, is_binary = match.groups()
    return int(float(number) * (1024 if is_binary else 1000) ** (1 + "KMGT".index(unit)))


def size(count: float, digits: int = 1) -> str:
    """Bytes as people read them: `4.9 GB` (powers of 1000, as file sizes are shown)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < (1000 if unit == "B" else 999.95):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.{digits}f} TB"


def sizes(counts: Sequence[float]) -> list[str]:
    """Several sizes, with as many digits as tell them apart, at most 3."""
    for digits in (1, 2):
        texts = [size(count, digits) for count in counts]
        if len({*texts}) == len({*counts}):
            return texts
    return [size(count, 3) for count in counts]


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows in aligned columns, two spaces between them; the last may be of any length."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))] if cells else []
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def plural(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
