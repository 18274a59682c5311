"""What a user should know at once, and find again in the result: sentences that each name the way
out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Alarms:
    """Warnings of one job, in order. `progress.warn(sentence)` is told each at once, where the
    progress has that method."""

    def __init__(self, progress: Any = None) -> None:
        self._tell = getattr(progress, "warn", lambda sentence: None)
        self.sentences: list[str] = []

    def say(self, sentence: str) -> None:
        """Add a sentence; one that was said before is not said again."""
        if sentence not in self.sentences:
            self.sentences.append(sentence)
            self._tell(sentence)

    def say_all(self, sentences: Iterable[str]) -> None:
        """Add each of them."""
        for sentence in sentences:
            self.say(sentence)
