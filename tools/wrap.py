"""Wraps what `ruff format` leaves alone: docstrings, comments and strings beyond 100 columns.

    python tools/wrap.py rqtool tests        changes the files, and lists the long lines that stay
    python tools/wrap.py --check rqtool      changes nothing; ends with 1 where it would

Run it between two runs of `ruff format`, as `make format` does. Prose is filled anew from the
first long line of a paragraph on. Doctests, tables, lists and indented lines stay as they are. A
long string is cut at a space into two on one line, which ruff then puts below each other. No file
is changed unless its syntax tree stays the same, but for blanks in docstrings.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable
from pathlib import Path

COLUMNS = 100
PIECE = 72  # characters of one piece of a string; ruff joins pieces that fit on a line
Quoted = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PLAIN = re.compile(r"(?![-*|>+.#]|\d+[.)] )\S")  # how a line of prose may begin
TABLE = re.compile(r"\S {2,}\S")
RULER = re.compile(r"# ?-- .* -{3,}$")
PRAGMA = re.compile(r"#(!|\s*(fmt|type|noqa|pragma|pyright|ruff|mypy)\b)")
STRING = re.compile(r"([rbfuRBFU]{0,2})(\"\"\"|'''|\"|')(.*)\2", re.DOTALL)


# -- prose ---------------------------------------------------------------------------------------
def prose(line: str, indent: str) -> bool:
    """Whether a line is running text at this indentation."""
    if not line.startswith(indent):
        return False
    text = line[len(indent) :]
    return PLAIN.match(text) is not None and TABLE.search(text) is None


def filled(lines: list[str], indent: str, lead: str = "", tail: int = 0) -> list[str]:
    """Lines of a docstring or a comment, filled from each long one to the end of its paragraph.

    lead: what stands before the text of every line, as "# "; tail: columns to keep free at the end
    of the last line, for quotes.
    """
    done: list[str] = []
    waiting = list(lines)
    start = indent + lead
    example = False
    while waiting:
        line = waiting.pop(0)
        text = line[len(start) :]
        example = text.startswith(">>>") or (example and bool(text.strip()))
        room = COLUMNS - (0 if waiting else tail)
        if len(line) <= room or example or not prose(line, start):
            done.append(line)
            continue
        paragraph = [text]
        while waiting and prose(waiting[0], start) and not RULER.match(waiting[0].strip()):
            paragraph.append(waiting.pop(0)[len(start) :])
        options = {"break_long_words": False, "break_on_hyphens": False}
        width = COLUMNS - len(start)
        made = textwrap.wrap(" ".join(paragraph), width, **options)
        done += [start + part for part in made]
    return done


def docstrings(text: str) -> str:
    """The source with its docstrings filled."""
    lines = text.splitlines()
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, Quoted) and n.body]
    for node in sorted(nodes, key=lambda n: -n.body[0].lineno):
        first = node.body[0]
        if isinstance(first, ast.Expr) and is_text(first.value):
            top, end = first.lineno - 1, first.end_lineno
            if any(len(line) > COLUMNS for line in lines[top:end]):
                lines[top:end] = docstring(lines[top:end])
    return "\n".join(lines) + "\n"


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def docstring(lines: list[str]) -> list[str]:
    """The lines of one docstring, quotes included; one without plain triple quotes stays."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    opening = re.match(r'[rR]?"""', lines[0].strip())
    if opening is None or not lines[-1].endswith('"""'):
        return lines
    quotes = opening[0]
    inner = [indent + lines[0].strip()[len(quotes) :], *lines[1:]]
    inner[-1] = inner[-1][:-3]
    closed = inner[-1].strip() == "" and len(inner) > 1  # the quotes have a line of their own
    inner = inner[:-1] if closed else inner
    made = first_line(inner, indent, len(quotes), 0 if closed else 3)
    made[0] = indent + quotes + made[0][len(indent) :]
    if closed or len(made[-1]) + 3 > COLUMNS:
        return [*made, indent + '"""']
    return [*made[:-1], made[-1] + '"""']


def first_line(lines: list[str], indent: str, opening: int, closing: int) -> list[str]:
    """`filled` for a docstring, whose first line is shorter by the quotes before it."""
    room = COLUMNS - opening - (closing if len(lines) == 1 else 0)
    if len(lines[0]) <= room or not prose(lines[0], indent):
        return [lines[0], *filled(lines[1:], indent, tail=closing)]
    held = "\0" * opening  # stands for the quotes while the paragraph is filled
    made = filled([indent + held + lines[0][len(indent) :], *lines[1:]], indent, tail=closing)
    made[0] = made[0].replace(held, "", 1)
    return made


# -- comments ------------------------------------------------------------------------------------
def comments(text: str) -> str:
    """The source with the comments filled that have lines of their own."""
    lines = text.splitlines()
    alone = {
        token.start[0] - 1: token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
        and not lines[token.start[0] - 1][: token.start[1]].strip()
    }
    made: list[str] = []
    number = 0
    while number < len(lines):
        block = [number]
        while block[-1] + 1 in alone and number in alone and alike(lines, number, block[-1] + 1):
            block.append(block[-1] + 1)
        held = lines[number : block[-1] + 1]
        made += comment(held) if number in alone else held
        number = block[-1] + 1
    return "\n".join(made) + "\n"


def alike(lines: list[str], one: int, other: int) -> bool:
    """Whether two comments begin in one column and are both running text."""
    same = indentation(lines[one]) == indentation(lines[other])
    return same and not any(special(lines[n]) for n in (one, other))


def indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def special(line: str) -> bool:
    return bool(PRAGMA.match(line.strip()) or RULER.match(line.strip()))


def comment(lines: list[str]) -> list[str]:
    """The lines of one comment; rulers are cut, pragmas stay."""
    if RULER.match(lines[0].strip()):
        short = lines[0].rstrip("-")
        return [short + "-" * max(3, COLUMNS - len(short))] if len(lines[0]) > COLUMNS else lines
    if PRAGMA.match(lines[0].strip()):
        return lines
    return filled(lines, indentation(lines[0]), "# ")


# -- strings -------------------------------------------------------------------------------------
def strings(text: str) -> str:
    """The source with long strings of one line cut in two, where they reach beyond the columns."""
    lines = text.splitlines()
    quoted = documented_lines(text)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    for token in sorted(tokens, key=lambda t: t.start, reverse=True):
        (row, column), (end_row, end) = token.start, token.end
        one_line = token.type == tokenize.STRING and row == end_row and row not in quoted
        if one_line and len(lines[row - 1]) > COLUMNS and end - column > PIECE // 2:
            line = lines[row - 1]
            lines[row - 1] = line[:column] + cut(token.string, COLUMNS - column) + line[end:]
    return "\n".join(lines) + "\n"


def documented_lines(text: str) -> set[int]:
    """The numbers of all lines of docstrings and of other strings that are statements."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and is_text(node.value):
            found.update(range(node.lineno, node.end_lineno + 1))
    return found


def cut(literal: str, room: int) -> str:
    """Two or more literals of the same string, each cut behind a space outside of braces.

    >>> cut('f"one {two + 3} four"', 16)
    '"one " f"{two + 3} " "four"'
    """
    prefix, quote, body = STRING.fullmatch(literal).groups()
    size = max(12, min(room, PIECE) - len(prefix) - 2 * len(quote) - 2)
    places = [0]
    for place in spaces(body, "f" in prefix.lower()):
        if (place - places[-1] > size and len(places) > 1) or place - places[0] > size:
            break
        places.append(place)
    place = places[-1]
    if not 0 < place < len(body):
        return literal
    head, rest = prefix + quote + body[:place] + quote, prefix + quote + body[place:] + quote
    head, rest = (plain(part, prefix, quote) for part in (head, rest))
    return f"{head} {cut(rest, room) if len(rest) > size else rest}"


def plain(literal: str, prefix: str, quote: str) -> str:
    """An f-string without a brace as an ordinary string."""
    bare = "f" in prefix.lower() and not set("{}") & set(literal)
    return prefix.lower().replace("f", "") + literal[len(prefix) :] if bare else literal


def spaces(body: str, braces: bool) -> Iterable[int]:
    """The places behind each space of a string that is not inside braces."""
    depth = 0
    for place, sign in enumerate(body):
        if braces and sign in "{}":
            depth += 1 if sign == "{" else -1
        if sign == " " and depth == 0 and body[place - 1 : place] != "\\":
            yield place + 1


# -- files ---------------------------------------------------------------------------------------
def meaning(text: str) -> str:
    """The syntax tree as text; blanks in docstrings are one."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, Quoted) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and is_text(first.value):
                first.value.value = " ".join(first.value.value.split())
    return ast.dump(tree)


def wrapped(text: str) -> str:
    """The source with all of it wrapped; the source itself where that would change its meaning."""
    for step in (docstrings, comments, strings):
        made = step(text)
        if meaning(made) == meaning(text):
            text = made
    return text


def long_lines(path: Path, text: str) -> list[str]:
    numbered = enumerate(text.splitlines(), 1)
    return [f"{path}:{n}: {len(line)} columns" for n, line in numbered if len(line) > COLUMNS]


def main() -> int:
    parser = argparse.ArgumentParser(description="Wrap docstrings, comments and long strings.")
    parser.add_argument("paths", nargs="+", type=Path, help="files and folders")
    parser.add_argument("--check", action="store_true", help="change nothing")
    given = parser.parse_args()
    changed = 0
    for path in [p for top in given.paths for p in (sorted(top.rglob("*.py")) or [top])]:
        old = path.read_text(encoding="utf-8")
        new = wrapped(old) if any(len(line) > COLUMNS for line in old.splitlines()) else old
        changed += new != old
        if new != old and not given.check:
            path.write_text(new, encoding="utf-8")
        print("".join(f"{line}\n" for line in long_lines(path, new)), end="")
    print(f"{changed} files {'would be' if given.check else 'were'} changed", file=sys.stderr)
    return int(given.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
