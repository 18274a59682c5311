"""rqtool train: more epochs for a .rq file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import rqtool
from rqtool.cli.options import (
    AGAIN,
    DataSource,
    Force,
    State,
    Threads,
    argument,
    option,
    shows,
    takes,
    use_threads,
)
from rqtool.cli.progress import make_progress
from rqtool.report import results


@shows(results.trained)
@takes("recipe", AGAIN, "Fine-tuning")
def train(
    rq: Annotated[str, argument(metavar="RQ", help="A file that rqtool quantize wrote.")],
    data: DataSource,
    recipe: dict[str, Any],
    out: Annotated[
        str | None,
        option(
            "--out",
            metavar="FILE.rq",
            help="The file to write (default: beside RQ, its name ending in -trained).",
        ),
    ] = None,
    state: State = None,
    threads: Threads = None,
    force: Force = False,
) -> dict[str, Any]:
    """Train a .rq file for more epochs.

    The learning rate and the noise start anew, weights and steps from where they were. The images
    that were held out stay so, if the data set is the same.
    """
    use_threads(threads)
    target = out or str(Path(rq).with_name(f"{Path(rq).stem}-trained.rq"))
    return rqtool.train_more(
        rq, data, out=target, recipe=recipe, state=state, force=force, progress=make_progress()
    ).to_json()
