"""rqtool verify: are these files what rqtool wrote, and do they compute what they say?"""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli.options import argument, shows
from rqtool.report import results


@shows(results.verified)
def verify(
    files: Annotated[list[str], argument(metavar="FILE...", help=".rq and .onnx files.")],
) -> dict[str, Any]:
    """Check files that rqtool wrote.

    Hashes, structure, ADC codes, and what the file computes for one random image, to the last
    integer. Exit code 5 where anything differs.
    """
    return {"command": "verify", "files": [rqtool.verify(file) for file in files]}
