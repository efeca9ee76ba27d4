"""An answer in the terminal: what is printed is final, and nothing is lost."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.chat.reply import Block, Reply, blocks

TEXT = """# Title

Two lines <b>of</b>
a *paragraph*, a [link](http://example.com/a)

1. one

2. two

```py
x = 1

y = 2
```

last"""


def shown(*pieces: tuple[str, str], width: int = 60, height: int = 20) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height)
    with Reply(console) as reply:
        for text, reasoning in pieces:
            reply.add(text, reasoning)
    assert reply.text == "".join(text for text, _ in pieces).lstrip("\n")
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n"))


def test_the_answer_looks_the_same_however_it_arrives() -> None:
    at_once, letters = shown((TEXT, "")), shown(*((letter, "") for letter in TEXT))
    assert at_once == letters
    assert "Two lines <b>of</b>\na paragraph, a link (http://example.com/a)\n" in letters
    assert "x = 1\n\n" in letters and letters.endswith("\n\nlast\n")


@pytest.mark.parametrize(
    ("text", "open_part"),
    [
        ("one", "one"),
        ("one\n\ntwo", "two"),
        ("```\na\n\nb", "```\na\n\nb"),
        ("1. a\n\n2. b\n", "1. a\n\n2. b\n"),
        ("a\n\n| x |\n|---|\n| 1 |", "| x |\n|---|\n| 1 |"),
        ("a\n\n\n", "a\n\n\n"),
    ],
)
def test_only_the_last_block_may_change(text: str, open_part: str) -> None:
    assert blocks(text)[-1] == open_part and "".join(blocks(text)) == text


def test_reasoning_comes_before_the_answer() -> None:
    assert shown(("", "hm, "), ("", "well"), ("\n\nyes", "")) == "hm, well\n\nyes\n"
    assert shown(("", "hm")) == "hm\n"


def test_reasoning_between_two_parts_of_an_answer_is_shown_there() -> None:
    assert shown(("", "hm"), ("one", ""), ("", "we"), ("", "ll"), ("\n\ntwo", "")) == (
        "hm\n\none\n\nwell\n\ntwo\n"
    )
    assert shown(("a\n\nb", ""), ("", "hm")) == "a\n\nb\n\nhm\n"


def test_a_block_that_is_longer_than_the_screen_shows_its_end() -> None:
    out = io.StringIO()
    console = Console(file=out, width=40, height=10)
    text = "```\n" + "\n".join(f"line {n}" for n in range(100))
    console.print(Block(text, open=True), end="")
    assert "line 99" in out.getvalue() and "line 50" not in out.getvalue()
    assert len(out.getvalue().splitlines()) < 10
    assert "line 50" in shown((text, ""), height=10)
