"""tools/wrap.py: prose, comments and strings end within 100 columns, everything else stays, and so
does the meaning."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import REPOSITORY

WORDS = (
    "one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen"
)


@pytest.fixture(scope="module")
def wrap() -> ModuleType:
    """tools/wrap.py as a module."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    import wrap

    sys.path.remove(str(REPOSITORY / "tools"))
    return wrap


def test_doctests(wrap):
    found = doctest.testmod(wrap)
    assert found.failed == 0 and found.attempted > 0


def test_a_docstring_is_filled_from_its_long_line_on(wrap):
    text = f'def f():\n    """Short.\n\n    Also short,\n    {WORDS}\n    and more.\n    """\n'
    lines = wrap.wrapped(text).splitlines()
    assert lines[:4] == ["def f():", '    """Short.', "", "    Also short,"]
    assert (
        max(map(len, lines)) <= 100 and lines[-2].endswith("and more.") and lines[-1] == '    """'
    )
    assert " ".join(" ".join(lines[4:-1]).split()) == f"{WORDS} and more."


def test_quotes_on_the_last_line_stay_there_where_they_fit(wrap):
    made = wrap.wrapped(f'"""{WORDS}"""\n').splitlines()
    assert (
        made[0].startswith('"""one')
        and made[-1].endswith('seventeen"""')
        and max(map(len, made)) <= 100
    )


def test_quotes_that_do_not_fit_have_a_line_of_their_own(wrap):
    exact = "x" * 49 + " " + "y" * 49
    assert wrap.wrapped(f'"""Words.\n\n{exact}"""\n') == f'"""Words.\n\n{exact}\n"""\n'


@pytest.mark.parametrize(
    "line", [f">>> f('{WORDS}')", f"- {WORDS}", f"name   {WORDS}", f"    {WORDS}", f"| {WORDS} |"]
)
def test_doctests_lists_and_tables_stay(wrap, line):
    text = f'"""Words.\n\n{line}\nfour, five\n"""\n'
    assert wrap.wrapped(text) == text


def test_the_output_of_a_doctest_stays(wrap):
    text = f'"""Words.\n\n>>> f()\n{WORDS}\n"""\n'
    assert wrap.wrapped(text) == text


def test_comments_of_their_own_lines_are_filled(wrap):
    made = wrap.wrapped(f"x = 1\n# {WORDS}\n# and more\ny = 2\n").splitlines()
    assert made[0] == "x = 1" and made[-1] == "y = 2" and max(map(len, made)) <= 100
    assert all(line.startswith("# ") for line in made[1:-1])
    assert " ".join(line[2:] for line in made[1:-1]) == f"{WORDS} and more"


def test_rulers_are_cut_and_pragmas_stay(wrap):
    assert wrap.wrapped("# -- files " + "-" * 109 + "\n") == "# -- files " + "-" * 89 + "\n"
    pragma = f"# fmt: off {WORDS}\n"
    assert wrap.wrapped(pragma) == pragma


def test_a_long_string_is_cut_into_two_of_the_same_text(wrap):
    text = f'x = f"{WORDS} {{a + b}} {WORDS}"\n'
    made = wrap.wrapped(text)
    assert made != text and ast.dump(ast.parse(made)) == ast.dump(ast.parse(text))
    assert len(made) < len(text) + 30


@pytest.mark.parametrize(
    "text",
    [
        f'x = "{"x" * 120}"\n',
        f'x = """{WORDS}\n{WORDS}"""\n',
        f'x = "{WORDS[:60]}"\n',
        f'x = rb"{"x" * 120}"\n',
    ],
)
def test_strings_that_cannot_be_cut_stay(wrap, text):
    assert wrap.wrapped(text) == text


def test_escapes_and_braces_are_not_cut_apart(wrap):
    text = f'x = f"{{ {{"a": 1}}["a"] }} {{{{ {WORDS} }}}} \\" {WORDS}"\n'.replace(
        '{"a": 1}["a"]', "len('a b c d e f g h i j k l m n o p q r s t u v w x y z')"
    )
    assert ast.dump(ast.parse(wrap.wrapped(text))) == ast.dump(ast.parse(text))


def test_every_file_keeps_its_meaning_and_a_second_time_changes_nothing(wrap):
    for path in sorted((REPOSITORY / "rqtool" / "export").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        made = wrap.wrapped(text)
        assert wrap.meaning(made) == wrap.meaning(text), path
        assert wrap.docstrings(made) == wrap.comments(made) == made, path


def test_the_command_changes_files_and_lists_what_stays(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(f"# {WORDS}\nx = 1  # {WORDS}\n")
    command = [sys.executable, "tools/wrap.py", str(tmp_path)]
    checked = subprocess.run(
        [*command, "--check"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (
        checked.returncode == 1
        and checked.stderr == "1 files would be changed\n"
        and path.read_text().count("\n") == 2
    )
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (
        ran.stdout == f"{path}:3: {9 + len(WORDS)} columns\n" and path.read_text().count("\n") == 3
    )
