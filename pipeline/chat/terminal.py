"""A conversation in the terminal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from pipeline.core import log
from pipeline.core.errors import PipelineError, did_you_mean
from pipeline.core.process import private
from pipeline.core.text import encodable, printable
from pipeline.serve.stopping import handled

from .completions import ChatServer, ContextFull, Conversation, Ending, answer
from .reply import Reply

QUOTES = '"""'
PROMPT, MORE = ">>> ", "... "
HELP = """\
/help             this list
/system TEXT      tell the model TEXT before the conversation; alone shows it, /system none drops it
/regen            answer the last question again
/undo             take the last question back, with its answer
/reset            forget the conversation
/exit             leave; so does Ctrl-D
Ctrl-C            ends an answer; empties the line
Alt-Enter         begins a new line; so does \\ at the end of one, or text between \"\"\" and \"\"\"
Up                an earlier input"""
ALIASES = {
    "?": "help",
    "clear": "reset",
    "bye": "exit",
    "quit": "exit",
}  # as other programs name them


class SavedHistory(FileHistory):
    """Inputs in a file; a disk that is full loses them, and nothing else."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def history(file: Path) -> History:
    """The inputs of all conversations, in a file that only this user can read; those of this
    conversation alone where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(file, "ab", opener=private):
            pass
    except OSError:
        return InMemoryHistory()
    return SavedHistory(str(file))


def is_unfinished(text: str) -> bool:
    """Whether more lines are to come: quotes are open, or a backslash ends the last line."""
    if text.lstrip().startswith(QUOTES):
        return text.count(QUOTES) == 1
    return text.endswith("\\")


def unquoted(text: str) -> str:
    """What was typed, without the quotes around it or backslashes at the ends of lines."""
    bare = encodable(text).strip()
    if bare.startswith(QUOTES):
        return bare.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return bare.replace("\\\n", "\n")


def keys() -> KeyBindings:
    """Enter sends what is finished, Alt-Enter begins a line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def leave(number: int) -> None:
    """SIGTERM and a closed terminal end the program, Ctrl-C only an answer."""
    raise SystemExit(128 + number)


class Terminal:
    """Questions are read, answers shown, until the user leaves. `require_running` raises
    PipelineError where no more answers can come."""

    def __init__(
        self, server: ChatServer, system: str, saved: Path, require_running: Callable[[], None]
    ) -> None:
        self.server = server
        self.conversation = Conversation(system)
        self.console = Console(file=log.unfiltered(sys.stdout), highlight=False)
        self.require_running = require_running
        self.commands: Mapping[str, Callable[[str], None]] = {
            "help": lambda text: self.note(HELP),
            "system": self.set_system,
            "regen": lambda text: self.regenerate(),
            "undo": lambda text: self.undo(),
            "reset": lambda text: self.reset(),
        }
        words = [f"/{name}" for name in (*self.commands, "exit")]
        self.session: PromptSession[str] = PromptSession(
            history=history(saved),
            key_bindings=keys(),
            multiline=True,
            prompt_continuation=MORE,
            completer=WordCompleter(words, sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=False,
            enable_suspend=True,
        )

    def run(self) -> None:
        """Raises PipelineError where the server is gone."""
        size = f", a context of {self.server.context:,} tokens" if self.server.context else ""
        self.note(f"{self.server.model}{size}. /help lists the commands, Ctrl-D leaves.")
        with handled(leave, "SIGTERM", "SIGHUP"):
            while True:
                try:
                    text = self.session.prompt(PROMPT)
                    if not self.handle(text):
                        return
                except EOFError:
                    return
                except KeyboardInterrupt:
                    self.note("Ctrl-D or /exit leaves.")
                except PipelineError as error:
                    self.require_running()
                    self.console.print(Text(printable(f"error: {error}"), "red"))

    def handle(self, text: str) -> bool:
        """Run a command or ask a question; returns whether to go on."""
        line = unquoted(text)
        word, _, rest = line.partition(" ")
        is_quoted = text.lstrip().startswith(QUOTES)
        if is_quoted or not (word.startswith("/") and (word[1:].isalpha() or word == "/?")):
            if line:
                self.ask(line)
            return True
        name = ALIASES.get(word[1:], word[1:])
        if name == "exit":
            return False
        if name not in self.commands:
            near = did_you_mean(name, [*self.commands, "exit"])
            raise PipelineError(f"{word}: there is no such command{near}", "/help lists them")
        self.commands[name](rest.strip())
        return True

    def ask(self, question: str) -> None:
        """Show the answer to a question as it comes. Ctrl-C ends it; what has come is kept."""
        self.conversation.ask(question)
        reply, ending = Reply(self.console), Ending()
        try:
            with reply:
                ending = asyncio.run(answer(self.server, self.conversation.messages, reply.add))
        except KeyboardInterrupt:
            ending = Ending(cut="interrupted")
        except ContextFull as error:
            error.hint = f"/reset begins a new conversation; or use {error.hint}"
            raise
        finally:
            self.conversation.take(reply.text)
        if ending.speed:
            self.note(f"{ending.tokens:,} tokens, {ending.speed:.1f} tokens/s")
        if ending.cut:
            self.note(ending.cut)
        if ending.is_full:
            self.note(f"/reset begins a new conversation; or use {self.server.larger}")
        self.console.print()

    def set_system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "none" else text
        self.note(f"system: {self.conversation.system or 'none'}")

    def regenerate(self) -> None:
        question = self.conversation.take_back()
        if not question:
            raise PipelineError("there is no question yet")
        self.ask(question)

    def undo(self) -> None:
        question = self.conversation.take_back()
        self.note(f"taken back: {question}" if question else "there is no question yet")

    def reset(self) -> None:
        self.conversation.turns.clear()
        self.note("a new conversation")

    def note(self, text: str) -> None:
        self.console.print(Text(printable(text), "dim"))


def converse(
    server: ChatServer, system: str, saved: Path, require_running: Callable[[], None]
) -> None:
    """Talk until the user leaves; inputs are kept in the file `saved`. Raises PipelineError."""
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # no question to the terminal at the start
    Terminal(server, system, saved, require_running).run()
