"""Fenced blocks of Markdown files, so that tests can run what the documents show.

python     a script, or a session with >>> whose output is compared; the blocks of one file share their names
console    lines with "$ " are commands, the lines below each are its output
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block; `line` is the number of its first line in the file."""

    path: Path
    line: int
    language: str
    text: str


def blocks(path: Path, language: str) -> list[Block]:
    """The blocks of a file in that language, in order."""
    text = path.read_text(encoding="utf-8")
    found = [
        Block(path, text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in FENCE.finditer(text)
    ]
    return [block for block in found if block.language == language]


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Runs a python block among `names`, which it may add to; fails where the output of a session
    differs."""
    if ">>>" not in block.text:
        exec(compile("\n" * (block.line - 1) + block.text, str(block.path), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(
        block.text, {}, block.path.name, str(block.path), block.line - 1
    )
    test.globs = names
    report: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert not failed, "".join(report)


def commands(block: Block) -> list[tuple[str, str]]:
    """The (command, output) pairs of a console block.

    >>> commands(Block(Path("a.md"), 1, "console", "$ echo a\\na\\n$ true\\n"))
    [('echo a', 'a\\n'), ('true', '')]
    """
    pairs = [part.partition("\n") for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]]
    return [(command, output) for command, _, output in pairs]
