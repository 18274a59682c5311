"""Prints a pip constraints file with the lowest release of every dependency that pyproject.toml
allows.

    python tools/lowest.py > constraints.txt
    make test CONSTRAINTS=constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*([0-9][0-9.]*)(?:,.*)?")


def lowest(requirements: list[str]) -> list[str]:
    """One constraint for each requirement. Ends the program at one that has no lowest release.

    >>> lowest(["numba>=0.61,<0.69", "typer >= 0.16"])
    ['numba==0.61', 'typer==0.16']
    """
    found = []
    for requirement in requirements:
        match = REQUIREMENT.fullmatch(requirement.strip())
        if match is None:
            sys.exit(f"{requirement}: has no lowest release; write it as name>=release")
        found.append(f"{match[1]}=={match[2]}")
    return found


def requirements(project: Path = PROJECT) -> list[str]:
    """What the package and its tests need."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return [*table["dependencies"], *table["optional-dependencies"]["test"]]


if __name__ == "__main__":
    print("\n".join(lowest(requirements())))
