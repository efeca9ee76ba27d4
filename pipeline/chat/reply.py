"""An answer in the terminal while it arrives: Markdown, with what is not finished yet redrawn."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from itertools import pairwise

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import SegmentLines
from rich.text import Text

# HTML is shown as it is: rich would leave it out.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
PER_SECOND = 8


def markdown(text: str) -> Markdown:
    """Markdown that keeps line breaks, and shows the addresses of links."""
    made = Markdown("", hyperlinks=False, justify="default", code_theme="ansi_dark")
    made.parsed = PARSER.parse(text)
    for token in made.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return made


def blocks(text: str) -> list[str]:
    """The top-level blocks of Markdown, which together are `text`. Further text can change the last
    one alone."""
    tokens = PARSER.parse(text)
    begins = [x.map[0] for x in tokens if x.level == 0 and x.nesting >= 0 and x.map]
    lines = StringIO(text, newline="\n").readlines()
    cuts = [0, *begins[1:], len(lines)]
    return ["".join(lines[begin:end]) for begin, end in pairwise(cuts)]


class Block:
    """A block of Markdown without empty lines around it; of one that is `open` only as much of its
    end as fits the screen, which is what can be redrawn."""

    def __init__(self, text: str, *, open: bool = False) -> None:
        self.text = text
        self.open = open

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(markdown(self.text), options.update(height=None), pad=False)
        for end in (0, -1):
            while lines and not "".join(segment.text for segment in lines[end]).strip():
                lines.pop(end)
        if self.open:
            lines = lines[-max(1, console.height - 2) :]
        yield SegmentLines(lines, new_lines=True)


class Reply:
    """Shows the pieces of an answer; `text` is all of it so far."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.text = ""
        self._open = ""  # what is redrawn
        self._live: Live | None = None
        self._status = console.status("")
        self._reasons = False
        self._has_block = False

    def __enter__(self) -> Reply:
        self._status.start()
        return self

    def add(self, text: str, reasoning: str) -> None:
        if reasoning:
            self._status.stop()
            if self._live:  # it goes on thinking
                self._finish()
                self.console.print()
            self._reasons = True
            self.console.print(Text(reasoning, "dim"), end="", soft_wrap=True)
        if not self.text:
            text = text.lstrip("\n")
        if not text:
            return
        self.text += text
        self._open += text
        if self._live is None:
            self._begin()
        if "\n" in text:
            *done, self._open = blocks(self._open)
            self._print(done)
        if self._live:
            self._live.update(Block(self._open, open=True))

    def _begin(self) -> None:
        self._status.stop()
        if self._reasons:
            self.console.print("\n")
            self._reasons = self._has_block = False
        self._live = Live(
            console=self.console,
            refresh_per_second=PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def _print(self, done: Sequence[str]) -> None:
        for block in done:
            if self._has_block:
                self.console.print()
            self._has_block = True
            self.console.print(Block(block), end="")

    def _finish(self) -> None:
        """Print what is not finished as it is."""
        if self._live:
            self._live.stop()
            self._live = None
        if self._open.strip():
            self._print(blocks(self._open))
        self._open = ""

    def __exit__(self, *error: object) -> None:
        self._status.stop()
        if self._reasons:
            self.console.print()
        self._finish()
