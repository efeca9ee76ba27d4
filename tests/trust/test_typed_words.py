"""The whole command line: whatever is typed, a mistake is a message and never a traceback."""

from __future__ import annotations

import pytest
from conftest import Doit
from figures import Figure
from hostile_input import ODD_TEXTS
from seeds import dice

ODD = [text.encode("utf-8", "replace").decode().replace("\0", "") for text in ODD_TEXTS]
TYPED = (
    *(["plan", "model=~nobody-here/x"], ["serve", "--model"], ["info"], ["-x"], ["=", "plan"]),
    *(["plan", "model=https://["], ["plan", "model=demo", "port=٣٣٣٣٣"], ["plan", "profile=../x"]),
)


def require_message(bare: Doit, words: list[str]) -> None:
    run = bare(*words, status=None)
    assert run.status in (0, 1, 3), (words, run)
    assert "Traceback" not in run.out + run.err, (words, run)
    assert run.status == 0 or run.err.strip(), words


def test_a_mistake_is_a_message(bare: Doit) -> None:
    for words in TYPED:
        require_message(bare, words)


@pytest.mark.trust
def test_any_words_are_a_message_at_most(bare: Doit, figure: Figure) -> None:
    chance, times = dice(), 30
    for _ in range(times):
        name = chance.choice(
            ["model=", "config=", "profile=", "quant=", "--ctx-size=", "lora=", ""]
        )
        words = ["plan", name + chance.choice(ODD), chance.choice(ODD)]
        require_message(bare, [word for word in words if word])
    figure("command lines typed wrong", times)


def test_a_traceback_is_noticed(bare: Doit) -> None:
    """Or the tests above would show nothing."""
    with pytest.raises(AssertionError):
        require_message(Broken(bare.home), ["list"])


class Broken(Doit):
    """Started with words that end in a traceback."""

    def command(self, *words: str) -> list[str]:
        return [super().command()[0], "-c", "raise KeyError(1)"]
