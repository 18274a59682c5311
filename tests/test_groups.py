"""The groups of tests: every file is in one, the names are those of pyproject.toml, and -m chooses
by them."""

from __future__ import annotations

import tomllib

import pytest
from conftest import GROUPS, REPOSITORY

KINDS = {"unit", "files", "numerics"}


def test_every_file_has_its_groups():
    files = {path.stem for path in (REPOSITORY / "tests").glob("test_*.py")}
    assert files - GROUPS.keys() == set(), "give each of them a row in GROUPS of tests/conftest.py"
    assert GROUPS.keys() - files == set(), "there is no such file; take the row out of GROUPS"


def test_a_file_is_of_one_kind_and_may_be_slow():
    groups = {name: set(words.split()) for name, words in GROUPS.items()}
    assert not [name for name, words in groups.items() if len(words & KINDS) != 1]
    assert set().union(*groups.values()) == KINDS | {"slow"}


def test_the_markers_are_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["tool"]["pytest"]["ini_options"]["markers"]
    assert {line.partition(":")[0] for line in declared} == KINDS | {"slow", "cuda"}


def test_a_test_has_the_markers_of_its_file(request: pytest.FixtureRequest):
    assert {mark.name for mark in request.node.iter_markers()} == {"unit"}
