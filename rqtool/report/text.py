"""Tables and pairs as plain text: nothing wraps where the output is a file, nothing is wider than
the terminal where it is one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rqtool.errors import escaped

MIN_VALUE = 16  # characters that a value of a pair gets at least


def number(x: float | None) -> str:
    """A figure with two decimals, or a dash for none.

    >>> number(92.099999), number(None)
    ('92.10', '-')
    """
    return "-" if x is None else f"{x:.2f}"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], width: int | None = None) -> str:
    """Aligned columns, figures to the right; where that is wider than `width`, each row becomes a
    paragraph.

    >>> print(table(["layer", "rows"], [["conv1", 9], ["fc", 576]]))
    layer  rows
    conv1     9
    fc      576
    >>> print(table(["layer", "rows"], [["conv1", 9], ["fc", 576]], width=8))
    layer  conv1
    rows   9
    <BLANKLINE>
    layer  fc
    rows   576
    """
    cells = [[escaped(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells)]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        return "\n\n".join(pairs(list(zip(headers, row)), width) for row in cells)
    words = [i == 0 or any(row[i][:1].isalpha() for row in cells) for i in range(len(headers))]
    lines = (
        [cell.ljust(n) if left else cell.rjust(n) for cell, n, left in zip(row, widths, words)]
        for row in [list(headers), *cells]
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def pairs(items: Sequence[tuple[str, Any]], width: int | None = None) -> str:
    """Names and values in two columns; long values go on below themselves.

    >>> print(pairs([("macro", "9 wordlines, 8 I/O"), ("file", "a.rq")], width=20))
    macro  9 wordlines, 8
           I/O
    file   a.rq
    """
    shown = [(escaped(name), escaped(value)) for name, value in items]
    indent = max(len(name) for name, _ in shown) + 2
    return "\n".join(_pair(name, value, indent, width) for name, value in shown)


def _pair(name: str, value: str, indent: int, width: int | None) -> str:
    room = len(value) if width is None else max(MIN_VALUE, width - indent)
    lines = textwrap.wrap(value, max(1, room), break_on_hyphens=False) or [""]
    return (name.ljust(indent) + f"\n{' ' * indent}".join(lines)).rstrip()


def paragraphs(*parts: str) -> str:
    """The parts that are not empty, a blank line between them."""
    return "\n\n".join(part for part in parts if part)
