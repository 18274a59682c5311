"""The scripts for users are run as a user runs them, and stay short; read_metadata.py reads what
they write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

import rqtool

EXAMPLES = REPOSITORY / "examples"


def run(folder: Path, script: str, *arguments: str) -> str:
    """What a script prints; it must end well and without a Python warning."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, output) of quantize_own_model.py."""
    folder = tmp_path_factory.mktemp("own")
    return folder, run(folder, "quantize_own_model.py", "--out", "made", "--epochs", "1")


def test_every_script_is_short_and_says_how_it_is_called():
    texts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert texts.keys() == {"quantize_own_model.py", "compare_macros.py", "read_metadata.py"}
    assert not [name for name, text in texts.items() if not 60 <= text.count("\n") <= 150]
    assert not [name for name, text in texts.items() if f"\n    python examples/{name}" not in text]


def test_a_model_of_ones_own_is_compressed_and_exported(own):
    folder, printed = own
    figures = {
        name.strip(): float(value)
        for name, value in re.findall(r"^([\w -]+?) {2,}([\d.]+)", printed, re.MULTILINE)
    }
    assert figures.keys() == {
        "float",
        "post-training",
        "fine-tuned",
        "with an ideal ADC",
        "reads per MAC",
    }
    assert 80 < figures["float"] < 100 and figures["fine-tuned"] > 70
    assert printed.endswith("integers match the reference\n")
    assert (
        rqtool.verify(folder / "made" / "shapes.rq")["program_sha256"]
        == rqtool.verify(folder / "made" / "shapes.onnx")["program_sha256"]
    )


def test_the_metadata_of_that_file_is_read(own):
    folder, _ = own
    lines = run(folder, "read_metadata.py", "made/shapes.onnx").splitlines()
    assert [line.split(",")[0] for line in lines] == ["0: conv2d", "4: conv2d", "9: linear"]
    codes = np.random.default_rng(0).integers(0, 16, (2, 12, 6, 6), dtype=np.uint8)
    np.save(folder / "codes.npy", codes)
    assert run(folder, "read_metadata.py", "made/shapes.onnx", "4", "codes.npy").startswith(
        "4.acc.npy: int64 [2, 16, 6, 6], "
    )


def test_macros_are_compared_in_two_tables(tmp_path):
    printed = run(tmp_path, "compare_macros.py", "default", "nthu-2019")
    costs, accuracies = (part.splitlines() for part in printed.split("\n\n"))
    assert costs[0].split("  ")[0] == accuracies[0].split("  ")[0] == "macro"
    assert (
        [line.split()[0] for line in costs[1:]]
        == [line.split()[0] for line in accuracies[1:]]
        == ["default", "nthu-2019"]
    )
    planned = rqtool.plan("demo", rqtool.Macro()).totals
    assert costs[1].split()[4:] == [f"{planned['reads']:,}", f"{planned['cycles']:,}", "0.111"]
    assert all(60 < float(line.split()[1]) < 95 for line in accuracies[1:])
    assert not list(tmp_path.iterdir())


def test_an_unknown_macro_is_named(tmp_path):
    command = [sys.executable, str(EXAMPLES / "compare_macros.py"), "nthu"]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith(
        "error: no macro 'nthu'; use some of default, column steps, spread "
        "rows, split signs, bit-serial, 128 wordlines, nthu-2019"
    )
