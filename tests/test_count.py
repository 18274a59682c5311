"""What `make count` counts, on small sources; the package itself is only read, no figure of it is
fixed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def count() -> ModuleType:
    """tools/count.py as a module."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import count

    sys.path.remove(str(REPOSITORY / "tools"))
    return count


@pytest.fixture
def package(tmp_path: Path, count: ModuleType):
    """package(name=text, ...) is the sources of a package `p` with these files; `_` stands for a
    slash."""

    def made(**files: str) -> list:
        for name, text in files.items():
            path = tmp_path / "p" / f"{name.replace('_', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return count.sources(tmp_path / "p")

    return made


@pytest.mark.parametrize(
    "line",
    [
        'x = 1 if macro.levels == "free" else 2',
        'x = spec["kind"] != "uniform"',
        'x = kind in ("real", "ideal")',
        'x = op.adc == {"kind": "ideal"}',
        "if macro.ideal: pass",
        "assert not ideal_adc",
        "x = [a for a in b if a.ideal]",
        "x = y and macro.ideal",
        "x = 1 if spec.tables is None else 2",
        "x = thresholds is not None",
        "x = isinstance(adc, Levels)",
        "x = isinstance(adc, (int, converter.Ideal))",
        'x = {"ideal": f, "free": g}[kind]',
        "match adc:\n    case Uniform(): pass",
    ],
)
def test_one_decision_is_one_branch(count, package, line):
    assert len(count.branches(package(a=line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        'x = "ideal"',
        'x = recipe.teacher == "ideal"',
        'x = teacher in ("float", "ideal")',
        "x = macro.ideal",
        "x = isinstance(adc, Converter)",
        "x = weights is None",
        'x = {"ideal": "no quantization"}',
        "if recipe.ideal_epochs: pass",
        "# if macro.ideal",
    ],
)
def test_what_decides_nothing_is_no_branch(count, package, line):
    assert count.branches(package(a=line)) == []


def test_the_files_of_the_converter_may_decide(count, package):
    found = package(
        hardware_adc="if m.ideal: pass",
        hardware_converter="if m.ideal: pass",
        a="\nif m.ideal: pass",
    )
    assert [str(place) for place in count.branches(found)] == ["a.py:2: m.ideal"]


def test_a_decision_with_two_conditions_is_two_branches(count, package):
    assert len(count.branches(package(a='x = macro.ideal or macro.levels == "free"'))) == 2


def test_lines_are_counted_in_characters(count, package):
    found = package(a="x = 1\n" + "#" * 100 + "\n" + "#" * 101 + "\n" + "é" * 101)
    assert [(p.line, p.text) for p in count.long_lines(found)] == [
        (3, "101 characters"),
        (4, "101 characters"),
    ]


def test_nodes_are_those_of_the_code(count, package):
    """x = 1 is the assignment, the name and the constant; the module is one, a docstring none."""
    (one,) = package(a="x = 1\n")
    assert count.density(one) == (4, 1)
    (two,) = package(
        a='"""Words,\nand more."""\n\n# a comment\nx = 1\n\ny = (\n    x + 2  # here, too\n)\n'
    )
    assert count.density(two) == (4 + 6, 4)


def test_the_median_leaves_small_files_out(count, package):
    found = package(
        a="x = 1\n" * 10, b="x = f(1, 2)\n" * 10, c="x = f(1, 2, 3)\n" * 10, d="x = 1\n"
    )
    median, overall = count.nodes_a_line(found)
    assert median == 6.1 and overall == (31 + 61 + 71 + 4) / 31


def test_tuples_that_are_written_on_both_sides(count, package):
    lines = ["a, b = 1, 2", "self.a, b = f(x), y", "(a, b), c = d, e"]
    none = ["a, b = b, a", "a, b = f(x)", "a = 1, 2", "a, *b = 1, 2", "a = b = 1"]
    assert [p.line for p in count.packed_tuples(package(a="\n".join(lines + none)))] == [1, 2, 3]


def test_long_functions_without_their_docstrings(count, package):
    def function(name: str, lines: int) -> str:
        return f'def {name}():\n    """Words.\n\n    More.\n    """\n' + "    x = 1\n" * (lines - 1)

    found = package(a=function("fits", 40) + function("long", 41))
    assert [p.text for p in count.long_functions(found)] == ["long, 41 lines"]


def test_public_names_without_a_docstring(count, package):
    text = (
        'def f(): pass\ndef _g(): pass\ndef h():\n    "Words."\n    def '
        'inside(): pass\nclass A:\n    "Words."\n    def m(self): pass\n    '
        "def __len__(self): pass\n"
    )
    assert [p.text for p in count.undocumented(package(a=text, _b=text))] == ["f", "A.m"]


def test_annotations_that_are_any(count, package):
    text = "def f(a: Any, *b: Any, c: dict[str, Any] = {}, d: int = 0) -> Any: pass\nx: Any = 1\n"
    assert len(count.any_annotations(package(a=text))) == 4


def test_circles_through_functions_and_type_checking(count, package):
    files = {
        "a": "from p import b\n",
        "b": "def f():\n    from p.c import x\n",
        "c": "if TYPE_CHECKING:\n    import p.a\n",
        "d": "import p.a\n",
        "e_x": "from .y import z\n",
        "e_y": "from . import x\n",
    }
    found = [p.text for p in count.circles(package(__init__="", e___init__="", **files))]
    assert found == ["p.a <-> p.b <-> p.c", "p.e.x <-> p.e.y"]


def test_no_circle_is_no_circle(count, package):
    assert count.circles(package(__init__="", a="from p import b", b="import os")) == []


def test_a_tool_that_is_not_installed_has_no_figure(count):
    assert count.findings("no_such_tool_here", [], "") is None
    lines = dict(
        line.rsplit("  ", 1)
        for line in count.table(count.figures([]), {"mypy": None, "ruff": 3}).splitlines()
    )
    assert [v.strip() for k, v in lines.items() if "mypy" in k or "ruff" in k] == [
        "not installed",
        "3",
    ]


def test_the_command_lists_the_places_of_a_figure():
    command = [sys.executable, "tools/count.py", "--list", "circles"]
    assert (
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stderr
        == ""
    )


def test_the_figures_of_the_package(count):
    figures = count.figures(count.sources(REPOSITORY / "rqtool"))
    assert figures.keys() == {*count.LISTS, "nodes_median", "nodes_overall"}
    assert 1 < figures["nodes_median"] < 20
    json.dumps(figures)
