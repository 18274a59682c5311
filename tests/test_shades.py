"""`make shades`, and tools/lowest.py: what is compared, what counts as a difference, and one small
job on one commit twice."""

from __future__ import annotations

import doctest
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from conftest import REPOSITORY

from rqtool.storage import save_tensors


def tool(name: str) -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REPOSITORY / "tools"))


@pytest.fixture(scope="module")
def shades() -> ModuleType:
    """tools/shades.py as a module."""
    return tool("shades")


@pytest.fixture
def in_git() -> Iterator[None]:
    """For tests that need the history; skipped in a copy without it."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("the repository has no git history here")
    yield


@pytest.mark.parametrize("name", ["shades", "lowest"])
def test_doctests_of_the_tools(name):
    found = doctest.testmod(tool(name))
    assert found.failed == 0 and found.attempted > 0


def test_figures_without_seconds(shades):
    assert shades.flat({"a": {"seconds": 1, "b": [1.5, {"c": None}]}, "d": []}) == {
        "a.b.0": 1.5,
        "a.b.1.c": None,
    }


def test_equal_values_are_no_difference(shades):
    assert shades.differences({"a": 1.0, "b": "x"}, {"b": "x", "a": 1.0}) == []


def test_what_is_on_one_side_only_is_a_difference(shades):
    old, new = "0" * 64, "f" * 64
    found = shades.differences({".onnx": old, "gone": 1}, {".onnx": new, "new": 2})
    assert found == [f".onnx: {'0' * 16} -> {'f' * 16}", "gone: 1 -> absent", "new: absent -> 2"]


def test_a_digest_is_of_type_shape_and_values(shades):
    a = np.arange(6, dtype=np.int32)
    others = [a.astype(np.int64), a.reshape(2, 3), a[::-1]]
    assert shades.digest(a.copy()) == shades.digest(a)
    assert len({shades.digest(x) for x in [a, *others]}) == 4


def test_seconds_do_not_count_in_a_checkpoint(shades, tmp_path):
    def digests(seconds: float, top1: float) -> dict:
        path = tmp_path / "job.rq"
        tensors = {"program/a": np.arange(3, dtype=np.int8)}
        save_tensors(
            path, tensors, {"tool": "x", "results": {"top1": top1, "seconds": seconds}}, force=True
        )
        return shades.rq_digests(path.read_bytes())

    first = digests(1.0, 90.0)
    assert first.keys() == {".rq tensor program/a", ".rq tool", ".rq results"}
    assert first == digests(2.0, 90.0)
    (line,) = shades.differences(first, digests(1.0, 91.0))
    assert line.startswith(".rq results: ")
    assert shades.rq_digests(b"another format").keys() == {".rq"}


def test_each_job_names_its_flags(shades):
    quantize, export = shades.Job("split", 2, 1).commands()
    assert quantize[-2:] == ["--sign-scheme", "split"] and "--no-twin" in quantize
    assert quantize[quantize.index("--threads") + 1] == "2" and export[0] == "export"
    assert [str(shades.Job("free", n, 0)) for n in (1, 2)] == ["free, 1 thread", "free, 2 threads"]


def test_a_job_that_stops_is_compared_by_its_last_message(shades, tmp_path, monkeypatch):
    monkeypatch.setitem(shades.JOBS, "wrong", ["--wl", "0"])
    found = shades.results(shades.Job("wrong", 1, 0), REPOSITORY, tmp_path / "run")
    assert found.keys() == {"stopped"}
    assert (
        found["stopped"].startswith("exit code 2: ")
        and "--wl must be a whole number" in found["stopped"]
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no commit to compare with; use make shades REF=commit"),
        (
            ["no-such-commit"],
            "'no-such-commit' is no commit of this repository; see `git log --oneline`",
        ),
        (
            ["HEAD", "--jobs", "x"],
            "'x' is no job; use some of default, nthu-2019, free, split, bit-serial, spread",
        ),
        (["HEAD", "--threads", "0"], "--threads '0' is no number of threads; use 1, 2 or 1,2"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(shades, in_git, capsys, arguments, sentence):
    assert shades.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.slow
def test_one_commit_does_not_differ_from_itself(in_git):
    command = [
        sys.executable,
        "tools/shades.py",
        "HEAD",
        "--jobs",
        "default",
        "--threads",
        "1",
        "--epochs",
        "0",
    ]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    head, job, end = ran.stdout.splitlines()
    assert len(set(head.split(" -> "))) == 1 and end == "no job differs"
    assert job.startswith("default, 1 thread: all ") and job.endswith(" values are equal")
