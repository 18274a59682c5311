"""The documents of the command line say what it does: help pages, plans and presets word for word,
every command at least spelled right."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from doc_blocks import Block, blocks, commands

from rqtool.cli import main
from rqtool.cli.main import COMMANDS, run

CLI, README = REPOSITORY / "docs" / "cli.md", REPOSITORY / "README.md"
SHOWN = [
    (path, command, output)
    for path in (CLI, README)
    for block in blocks(path, "console")
    for command, output in commands(block)
]
EXACT = [
    (command, output)
    for _, command, output in SHOWN
    if "--help" in command or command.split()[1] in ("plan", "presets")
]


@pytest.fixture(autouse=True)
def in_a_pipe(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.mark.parametrize(("command", "output"), EXACT, ids=[command for command, _ in EXACT])
def test_the_output_is_the_one_shown(capsys, command, output):
    assert run(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("command", [command for _, command, _ in SHOWN])
def test_every_command_that_is_shown_can_be_parsed(command):
    name, *arguments = shlex.split(command)[1:]
    if name in COMMANDS and "--help" not in arguments:
        main._app().commands[name].make_context(name, arguments)


def test_every_command_has_its_help_page():
    assert [command for path, command, _ in SHOWN if path == CLI] == [
        "rqtool --help",
        *(f"rqtool {name} --help" for name in COMMANDS),
    ]


def test_the_readme_names_every_document():
    text = README.read_text(encoding="utf-8")
    assert not [p.name for p in (REPOSITORY / "docs").glob("*.md") if f"docs/{p.name}" not in text]


def test_the_exit_codes_are_those_of_the_errors():
    from rqtool import errors

    codes = {
        e.exit_code
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, errors.RqError)
    }
    text = CLI.read_text(encoding="utf-8")
    assert not [code for code in codes if f"\n| {code} |" not in text]


def test_refreshing_a_document_changes_outputs_only(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    monkeypatch.delitem(sys.modules, "refresh_docs", raising=False)
    import refresh_docs

    old = (
        "text\n```console\n$ rqtool --version\nold\nlines\n$ ls\nfile\n$ "
        "rqtool plan demo --wl 4096 --adc-bits 1\n```\nmore\n"
    )
    new = refresh_docs.refreshed(old)
    (version, listing, plan), before = (
        commands(Block(Path("a.md"), 1, "console", new.split("```")[1].removeprefix("console\n"))),
        old.split("```"),
    )
    assert (version, listing) == (("rqtool --version", "rqtool 0.1.0\n"), ("ls", "file\n"))
    assert plan[1].startswith("model  demo\n") and new.split("```")[::2] == before[::2]
