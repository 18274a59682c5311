"""rqtool inspect: what a file holds."""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli.options import Weights, argument, shows
from rqtool.report import results


@shows(results.inspected)
def inspect(
    file: Annotated[str, argument(metavar="FILE", help="A .rq, .onnx, safetensors or torch file.")],
    weights: Weights = None,
) -> dict[str, Any]:
    """Show what a file holds; nothing in it is executed."""
    return rqtool.inspect(file, weights)
