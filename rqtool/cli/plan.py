"""rqtool plan: tiles, reads and cycles of a model on a macro."""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli import values
from rqtool.cli.options import (
    MACRO,
    Arch,
    InputShape,
    Prefix,
    Weights,
    argument,
    macro_of,
    shows,
    takes,
)
from rqtool.cli.progress import make_progress
from rqtool.report import results


@shows(results.planned)
@takes("macro", MACRO, "Macro")
def plan(
    model: Annotated[
        str,
        argument(
            metavar="MODEL",
            help="A model file, a built-in network, or a .rq file (whose own macro is "
            "the default).",
        ),
    ],
    macro: dict[str, Any],
    arch: Arch = None,
    input: InputShape = None,
    weights: Weights = None,
    prefix: Prefix = None,
) -> dict[str, Any]:
    """Show tiles, reads and cycles, layer by layer.

    All counts are for one image. No data is needed.
    """
    described, shape = macro_of(macro) if macro else None, values.sizes("--input", input)
    return rqtool.plan(
        model,
        described,
        arch=arch,
        input_shape=shape,
        weights=weights,
        prefix=prefix,
        progress=make_progress(),
    ).to_json()
