"""rqtool plan: tiles, reads and cycles of a model on a macro."""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli import values
from rqtool.cli.options import MACRO, Arch, InputShape, argument, macro_of, shows, takes
from rqtool.report import results


@shows(results.planned)
@takes("macro", MACRO, "Macro")
def plan(
    model: Annotated[str, argument(metavar="MODEL", help="A model file, a built-in network, or a .rq file (whose own macro is the default).")],
    macro: dict[str, Any],
    arch: Arch = None,
    input: InputShape = None,
) -> dict[str, Any]:
    """Show tiles, reads and cycles, layer by layer.

    All counts are for one image. No data is needed.
    """
    return rqtool.plan(model, macro_of(macro) if macro else None, arch=arch, input_shape=values.sizes("--input", input)).to_json()
