"""Counts what makes code slow to read or expensive to change. `make count` prints the figures.

    python tools/count.py                   the whole package rqtool
    python tools/count.py --list branches   where: branches, lines, tuples, functions, docstrings,
                                            circles, any
    python tools/count.py --json            the same figures as one JSON object

The figures, and the rule behind each:

branches    Places that decide which kind of converter (ADC) they deal with. The files that may
            decide are left out: the converter itself, and the macro file, which checks what a
            user asks for (MAY_DECIDE). Each of these counts once:
              - a comparison (==, !=, in, not in) with the text "ideal", "uniform" or "free";
                a comparison of a teacher is none, a teacher may be "ideal" too;
              - a condition that is `ideal`, `ideal_adc` or `free`, or ends in `.ideal` and so on;
                conditions are those of if, while, assert, conditional expressions and
                comprehensions, and the operands of `and`, `or` and `not`;
              - `is None` or `is not None` on something named tables, thresholds or levels;
              - isinstance() with one of CONVERTER_CLASSES, and a `case` with one of them;
              - a key "ideal", "uniform" or "free" in a dictionary of code, i.e. of functions.
lines       Lines of more than 100 characters.
nodes       Syntax nodes for each line of code: those of the syntax tree without docstrings and
            without Load, Store and Del. A name, a call, an operator and a constant are a node
            each. Lines of code are those on which a token other than a comment stands, without
            those of docstrings; the median is over files with at least ten of them.
tuples      Assignments of a tuple to a tuple of equal length: `a, b = f(x), 3`. A swap, where both
            sides hold the same names, and starred targets are none. `a, b = f(x)` is none.
functions   Functions of more than 40 lines, the docstring left out.
docstrings  Public functions, methods and classes without a docstring: no part of the dotted name
            begins with an underscore, and functions inside functions are not public.
circles     Groups of modules that import each other in a circle, with all imports: in functions
            and under TYPE_CHECKING, too.
any         Annotations that are `Any`: of arguments, results, variables and fields. One that
            holds it, as dict[str, Any] does, is none.
mypy, ruff  Errors of `mypy --strict` and findings of `ruff check`, where they are installed.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_COLUMNS = 100
MOST_LINES = 40
MAY_DECIDE = ("hardware/adc.py", "hardware/converter.py", "hardware/macro.py")
CONVERTER_CLASSES = {"Uniform", "Levels", "Ideal", "UniformState", "LevelState"}
KINDS = {"ideal", "uniform", "free"}
CONDITIONS = {"ideal", "ideal_adc", "free"}
PARTS = {"tables", "thresholds", "levels"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its path inside the package, its dotted name, its text."""

    path: str
    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))


@dataclass(frozen=True)
class Place:
    """Where something was counted, and the text of it."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def sources(package: Path) -> list[Source]:
    """Every Python file under a package folder, in order."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        parts = [package.name, *inside.with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(inside.as_posix(), module, path.read_text(encoding="utf-8")))
    return found


def place(source: Source, node: ast.AST) -> Place:
    return Place(source.path, node.lineno, ast.unparse(node).partition("\n")[0][:90])


# -- branches ------------------------------------------------------------------------------------
def branches(found: list[Source]) -> list[Place]:
    """Every place that decides which kind of converter it deals with."""
    deciding = [s for s in found if s.path not in MAY_DECIDE]
    return [place(source, node) for source in deciding for node in decisions(source)]


def decisions(source: Source) -> Iterator[ast.AST]:
    conditions = {id(c) for node in source.nodes for c in conditions_of(node)}
    for node in source.nodes:
        if (
            compares_kind(node)
            or asks_for_class(node)
            or table_of_kinds(node)
            or (id(node) in conditions and last_name(node) in CONDITIONS)
        ):
            yield node


def conditions_of(node: ast.AST) -> list[ast.expr]:
    """The expressions below a node that are used as true or false."""
    match node:
        case (
            ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test)
        ):
            return [test]
        case ast.BoolOp(values=values):
            return values
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return [operand]
        case ast.comprehension(ifs=ifs):
            return ifs
        case _:
            return []


def compares_kind(node: ast.AST) -> bool:
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    if any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return any(last_name(side) in PARTS for side in sides)
    words = {word for side in sides for word in texts(side)}
    return bool(words & KINDS) and not any(last_name(side) == "teacher" for side in sides)


def texts(node: ast.AST) -> list[str]:
    """The strings that one side of a comparison holds."""
    held = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    if isinstance(node, ast.Dict):
        held = node.values
    return [e.value for e in held if isinstance(e, ast.Constant) and isinstance(e.value, str)]


def asks_for_class(node: ast.AST) -> bool:
    if isinstance(node, ast.MatchClass):
        return last_name(node.cls) in CONVERTER_CLASSES
    if not (isinstance(node, ast.Call) and last_name(node.func) == "isinstance"):
        return False
    return any(last_name(part) in CONVERTER_CLASSES for part in ast.walk(node.args[1]))


def table_of_kinds(node: ast.AST) -> bool:
    """A dictionary from kinds of converters to something other than text or numbers."""
    if not isinstance(node, ast.Dict):
        return False
    pairs = zip(node.keys, node.values, strict=True)
    return any(
        isinstance(key, ast.Constant) and key.value in KINDS and not isinstance(value, ast.Constant)
        for key, value in pairs
    )


def last_name(node: ast.AST) -> str:
    """`c` for the expressions c, a.c, a["c"] and a.b.c; else nothing."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            return name
        case _:
            return ""


# -- lines and nodes -----------------------------------------------------------------------------
def long_lines(found: list[Source]) -> list[Place]:
    """Lines of more than MOST_COLUMNS characters."""
    return [
        Place(source.path, number, f"{len(line)} characters")
        for source in found
        for number, line in enumerate(source.text.splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]


def documented(node: ast.AST) -> ast.Expr | None:
    """The docstring of a module, class or function as a statement."""
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or not node.body:
        return None
    first = node.body[0]
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return None
    return first if isinstance(first.value.value, str) else None


def density(source: Source) -> tuple[int, int]:
    """(syntax nodes, lines of code) of a file."""
    texts = [text for node in source.nodes if (text := documented(node))]
    left_out = {id(node) for text in texts for node in ast.walk(text)}
    counted = [
        n for n in source.nodes if not isinstance(n, ast.expr_context) and id(n) not in left_out
    ]
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in NO_CODE and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for text in texts:
        lines.difference_update(range(text.lineno, text.end_lineno + 1))
    return len(counted), len(lines)


def nodes_a_line(found: list[Source]) -> tuple[float, float]:
    """(median over the files with at least ten lines of code, all nodes by all lines)."""
    pairs = [density(source) for source in found]
    rates = [nodes / lines for nodes, lines in pairs if lines >= 10]
    lines = sum(lines for _, lines in pairs)
    return statistics.median(rates or [0.0]), sum(n for n, _ in pairs) / max(lines, 1)


# -- assignments, functions, docstrings, annotations ----------------------------------------------
def packed_tuples(found: list[Source]) -> list[Place]:
    """Assignments of a written tuple to a written tuple."""
    return [place(s, node) for s in found for node in s.nodes if packs(node)]


def packs(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    targets = [t for t in node.targets if isinstance(t, ast.Tuple)]
    parts = [e for tuple_ in (*targets, node.value) for e in tuple_.elts]
    if not targets or any(isinstance(e, ast.Starred) for e in parts):
        return False
    left = sorted(ast.unparse(e) for e in targets[0].elts)
    return left != sorted(ast.unparse(e) for e in node.value.elts)


def body_lines(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    text = documented(function)
    about = text.end_lineno - text.lineno + 1 if text else 0
    return function.end_lineno - function.lineno + 1 - about


def long_functions(found: list[Source]) -> list[Place]:
    """Functions of more than MOST_LINES lines."""
    return [
        Place(source.path, node.lineno, f"{node.name}, {body_lines(node)} lines")
        for source in found
        for node in source.nodes
        if isinstance(node, Function) and body_lines(node) > MOST_LINES
    ]


def undocumented(found: list[Source]) -> list[Place]:
    """Public functions, methods and classes without a docstring."""
    places = []
    for source in found:
        if not any(part.startswith("_") for part in source.module.split(".")):
            places += [
                Place(source.path, node.lineno, name)
                for name, node in public(source.tree, "")
                if documented(node) is None
            ]
    return places


def public(owner: ast.Module | ast.ClassDef, above: str) -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, definition) of what is public in a module or a class."""
    for node in owner.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        yield above + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node, f"{above}{node.name}.")


def any_annotations(found: list[Source]) -> list[Place]:
    """Annotations that are Any and nothing else."""
    return [
        place(source, annotation)
        for source in found
        for node in source.nodes
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(annotation, ast.Name) and annotation.id == "Any"
    ]


# -- imports -------------------------------------------------------------------------------------
def imports(source: Source, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere."""
    found = set()
    for node in source.nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = absolute(source, node)
            deeper = [f"{base}.{alias.name}" for alias in node.names]
            found.update(name if name in modules else base for name in deeper)
    return found & modules - {source.module}


def absolute(source: Source, node: ast.ImportFrom) -> str:
    """The dotted name that `from ... import` starts from; dots count from the own package."""
    if not node.level:
        return node.module or ""
    package = source.path.endswith("__init__.py")
    parts = source.module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def circles(found: list[Source]) -> list[Place]:
    """Groups of modules each of which reaches all others of its group."""
    modules = {source.module: source for source in found}
    needs = {name: imports(source, set(modules)) for name, source in modules.items()}
    reached = {name: reach(name, needs) for name in needs}
    groups = {frozenset(m for m in reached[n] if n in reached[m]) for n in needs if n in reached[n]}
    return [
        Place(modules[min(g)].path, 1, " <-> ".join(sorted(g))) for g in sorted(groups, key=min)
    ]


def reach(name: str, needs: dict[str, set[str]]) -> set[str]:
    """All modules that an import of `name` leads to; itself, where there is a circle."""
    found: set[str] = set()
    waiting = list(needs[name])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting.extend(needs[module])
    return found


# -- other tools ---------------------------------------------------------------------------------
def findings(tool: str, arguments: list[str], mark: str) -> int | None:
    """How many lines of a tool's output hold `mark`; None where the tool is not installed."""
    if find_spec(tool) is None:
        return None
    command = [sys.executable, "-m", tool, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode not in (0, 1):
        sys.exit(f"{tool} stopped: {ran.stderr.strip() or ran.stdout.strip()}")
    return sum(mark in line for line in ran.stdout.splitlines())


LISTS: dict[str, tuple[str, Callable[[list[Source]], list[Place]]]] = {
    "branches": ("branches on the kind of converter", branches),
    "lines": (f"lines over {MOST_COLUMNS} characters", long_lines),
    "tuples": ("assignments that pack a tuple", packed_tuples),
    "functions": (f"functions over {MOST_LINES} lines", long_functions),
    "docstrings": ("public names without a docstring", undocumented),
    "circles": ("import circles, TYPE_CHECKING included", circles),
    "any": ("annotations that are Any", any_annotations),
}


def figures(found: list[Source]) -> dict[str, float]:
    """All figures that need no other tool, by their names in LISTS, and nodes a line."""
    median, overall = nodes_a_line(found)
    counts = {name: len(places(found)) for name, (_, places) in LISTS.items()}
    return {**counts, "nodes_median": round(median, 2), "nodes_overall": round(overall, 2)}


def tool_figures() -> dict[str, int | None]:
    """Errors of mypy and findings of ruff."""
    return {
        "mypy": findings("mypy", ["--strict", "rqtool"], ": error:"),
        "ruff": findings("ruff", ["check", "--output-format", "concise", "rqtool"], ".py:"),
    }


def table(counted: dict[str, float], tools: dict[str, int | None]) -> str:
    """One line for each figure."""
    rows = {about: counted[name] for name, (about, _) in LISTS.items()}
    rows["syntax nodes a line of code, median over files"] = counted["nodes_median"]
    rows["syntax nodes a line of code, overall"] = counted["nodes_overall"]
    shown = {about: str(value) for about, value in rows.items()}
    shown["errors of mypy --strict"] = told(tools["mypy"])
    shown["findings of ruff check"] = told(tools["ruff"])
    width = max(map(len, shown))
    return "\n".join(f"{about:{width}}  {value:>6}" for about, value in shown.items())


def told(count: int | None) -> str:
    return "not installed" if count is None else str(count)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what makes rqtool's code slow to read.")
    parser.add_argument("--list", choices=LISTS, help="print the places behind one figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    found = sources(ROOT / "rqtool")
    if given.list:
        print("\n".join(map(str, LISTS[given.list][1](found))))
        return
    counted = figures(found)
    tools = tool_figures()
    print(json.dumps({**counted, **tools}) if given.json else table(counted, tools))


if __name__ == "__main__":
    main()
