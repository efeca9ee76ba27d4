"""Parsers of variables, beside those that all variables share. Each takes a text and raises
ValueError with what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable

from pipeline.core.variables import text
from pipeline.models import quants
from pipeline.serve.config.values import DECIMAL, read


def quant(value: str) -> str:
    """A quant, or auto, fit or all."""
    word = value.strip().upper()
    return word if word in (quants.AUTO, quants.ALL) else quants.parse(value)


def server_number(name: str) -> Callable[[str], int]:
    """The number of an option of llama-server: what a file may say, units included."""

    def parse(value: str) -> int:
        return int(read(name, None, value.strip()))

    return parse


def number(low: float, high: float, example: float) -> Callable[[str], float]:
    """A number above `low`, and at most `high`; `example` is a usual one."""

    def parse(value: str) -> float:
        if DECIMAL.fullmatch(value.strip()) and low < float(value) <= high:
            return float(value)
        raise ValueError(f"a number above {low:g}, at most {high:g}, such as {example:g}")

    return parse


def uri(value: str) -> str:
    """An address, or another URI."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+", value.strip()):
        raise ValueError("a URI, such as https://ci.example/llama-pipeline")
    return value.strip()


def gpu_layers(value: str) -> str:
    """llama-server's own, in any letter case: a number, auto or all."""
    return str(read("gpu-layers", None, value.strip().lower()))


def duration(low: int, high: int) -> Callable[[str], int]:
    """Seconds, or minutes behind an `m`: `90`, `90s`, `5m`."""

    def parse(value: str) -> int:
        number = re.fullmatch(r"(\d{1,9})\s*(s|m)?", value.strip().lower(), re.ASCII)
        seconds = int(number[1]) * (60 if number[2] == "m" else 1) if number else low - 1
        if not low <= seconds <= high:
            raise ValueError(f"seconds from {low} to {high}, or minutes: 90, 5m")
        return seconds

    return parse


def names(value: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(filter(None, map(str.strip, text(value).split(","))))


def listed(parse: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """Values with commas between them."""
    return lambda value: tuple(map(parse, names(value)))
