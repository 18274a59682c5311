"""Progress on stderr: a bar on a terminal, one line per finished stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rqtool.cli.output import on_terminal, say
from rqtool.errors import escaped

Tick = Callable[..., None]


class Lines:
    """One plain line for each finished stage: its name, seconds, and the last thing it said."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Tick]:
        started, said = time.monotonic(), [""]
        with self.shown(name, total) as tick:

            def done(n: int = 1, note: str = "") -> None:
                said[0] = note or said[0]
                tick(n, note)

            yield done
        say(f"{name}: {time.monotonic() - started:.1f} s" + (f", {said[0]}" if said[0] else ""))

    def warn(self, sentence: str) -> None:
        """Say at once what a user should know."""
        say(f"warning: {escaped(sentence)}")

    @contextmanager
    def shown(self, name: str, total: int) -> Iterator[Tick]:
        """What a stage looks like while it runs: nothing."""
        yield lambda n, note: None


class Bars(Lines):
    """The same, with a bar as long as the stage runs."""

    @contextmanager
    def shown(self, name: str, total: int) -> Iterator[Tick]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(name, total=total, note="")
            yield lambda n, note: progress.update(
                task, advance=n, **({"note": note} if note else {})
            )


def make_progress() -> Any:
    """Bars where stderr is a terminal that can show them."""
    return Bars() if on_terminal(sys.stderr) else Lines()
