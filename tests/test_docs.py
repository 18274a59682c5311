"""What the documents show is run: python blocks of the Markdown files, doctests of every module,
links."""

from __future__ import annotations

import doctest
import importlib
import re

import doc_blocks
import pytest
from conftest import REPOSITORY
from doc_blocks import Block, blocks, commands, run_python

from rqtool.hardware.macro import FIELDS, flag, preset_names

DOCUMENTS = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / "examples").rglob("*.md"),
    ]
)
MODULES = sorted(
    ".".join(p.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for p in (REPOSITORY / "rqtool").rglob("*.py")
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_python_blocks_run_and_print_what_they_show(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(path, "python"):
        run_python(block, names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_doctests(name):
    report: list[str] = []
    runner, module = doctest.DocTestRunner(), importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_the_hardware_page_lists_every_field_and_preset():
    text = (REPOSITORY / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert not [name for name in FIELDS if f"| `{flag(name)}` `{name}` |" not in text]
    assert not [name for name in preset_names() if f"| `{name}` |" not in text]


def test_the_helper_finds_blocks_and_checks_them(tmp_path):
    path = tmp_path / "a.md"
    path.write_text(
        "text\n```python\nx = 2\n```\n```console\n$ "
        "a\nb\n```\n```python\n>>> x + 1\n3\n>>> x\n3\n```\n",
        encoding="utf-8",
    )
    script, session = blocks(path, "python")
    assert (script.line, script.text, session.line) == (3, "x = 2\n", 10)
    assert [commands(block) for block in blocks(path, "console")] == [[("a", "b\n")]]
    names: dict[str, object] = {}
    run_python(script, names)
    run_python(Block(path, 10, "python", ">>> x + 1\n3\n"), names)
    with pytest.raises(AssertionError, match="Expected:\n    3\nGot:\n    2"):
        run_python(session, names)


def test_doctests_of_the_helper():
    assert doctest.testmod(doc_blocks).failed == 0
