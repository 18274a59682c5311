"""rqtool presets, ops, doctor: what there is to choose from, and what this machine has."""

from __future__ import annotations

from typing import Any

import rqtool
from rqtool.cli.options import shows
from rqtool.report import results


@shows(results.presets)
def presets() -> dict[str, Any]:
    """Show the macros that have a name, for --macro."""
    return {"command": "presets", "presets": rqtool.presets()}


@shows(results.operations)
def ops() -> dict[str, Any]:
    """Show which operations of a model are understood."""
    return rqtool.operations()


@shows(results.doctor)
def doctor() -> dict[str, Any]:
    """Show versions, processor, and how the reads will run."""
    return rqtool.doctor()
