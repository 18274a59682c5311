"""Run every rqtool command that Markdown files show in console blocks, and put its real output
below it.

    python tools/refresh_docs.py README.md docs/cli.md

The commands of one file run in its order, in one empty folder. Only stdout is shown. Lines that do
not begin with "$ rqtool" stay.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ rqtool(.*)\n(?:(?!\$ ).*\n)*", re.MULTILINE)


def output(arguments: str, folder: str) -> str:
    """What `rqtool arguments` prints on stdout; progress goes on to stderr."""
    command = [sys.executable, "-m", "rqtool", *shlex.split(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def refreshed(text: str) -> str:
    """A document with the output of its commands as it is now."""
    with tempfile.TemporaryDirectory() as folder:
        return BLOCK.sub(
            lambda block: COMMAND.sub(
                lambda m: f"$ rqtool{m[1]}\n{output(m[1], folder)}", block[0]
            ),
            text,
        )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")
