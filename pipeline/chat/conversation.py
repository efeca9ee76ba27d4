"""What was said so far."""

from __future__ import annotations

from .completions import Message


class Conversation:
    """Questions and answers in turn, after what the model was told first."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """What a server is sent."""
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def ask(self, question: str) -> None:
        self.turns.append(Message("user", question))

    def take(self, answer: str) -> None:
        """Keep the answer, or what came of it; without any, the question goes too."""
        if answer.strip():
            self.turns.append(Message("assistant", answer))
        else:
            self.take_back()

    def take_back(self) -> str:
        """Forget the last question, with its answer; empty where there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn.role == "user":
                return turn.content
        return ""

    def reset(self) -> None:
        self.turns.clear()
