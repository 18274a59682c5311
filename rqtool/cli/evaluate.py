"""rqtool eval: top-1 of a .rq file's integer program."""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli import values
from rqtool.cli.options import DataSource, Threads, argument, option, shows, use_threads
from rqtool.cli.progress import make_progress
from rqtool.errors import ConfigError
from rqtool.report import results


@shows(results.evaluated)
def evaluate(
    rq: Annotated[str, argument(metavar="RQ", help="A file that rqtool quantize wrote.")],
    data: DataSource,
    adc: Annotated[
        str,
        option(
            "--adc",
            metavar="real|ideal",
            help="The macro's ADC, or one that changes nothing (default real).",
        ),
    ] = "real",
    limit: Annotated[
        str | None,
        option(
            "--limit", metavar="N", help="Use a random N of the images, the same ones each time."
        ),
    ] = None,
    min_acc: Annotated[
        str | None,
        option("--min-acc", metavar="P", help="Exit with 5 where top-1 is below P percent."),
    ] = None,
    diagnose: Annotated[
        bool,
        option(
            "--diagnose",
            help="Also find the layer whose ADC costs most, on 1,000 images or --limit.",
        ),
    ] = False,
    plots: Annotated[
        str | None,
        option(
            "--plots",
            metavar="DIR",
            help="With --diagnose: draw each layer's partial sums and thresholds, as SVG.",
        ),
    ] = None,
    threads: Threads = None,
) -> dict[str, Any]:
    """Measure the accuracy of a .rq file's integer program.

    Top-1 on the test images of a data set, or on all images of one that is not divided.
    """
    most, least = values.whole("--limit", limit), values.number("--min-acc", min_acc)
    if plots is not None and not diagnose:
        raise ConfigError("--plots draws what --diagnose counts; give both")
    if diagnose and adc != "real":
        raise ConfigError("--diagnose compares the macro's ADC with an ideal one; leave --adc out")
    use_threads(threads)
    progress = make_progress()
    # first, so that its sentence is on stderr and its plots are there where --min-acc then fails
    found = (
        {
            "diagnosis": rqtool.diagnose(
                rq, data, limit=most, plots=plots, progress=progress
            ).to_json()
        }
        if diagnose
        else {}
    )
    return {
        **rqtool.evaluate(
            rq, data, adc=adc, limit=most, min_acc=least, progress=progress
        ).to_json(),
        **found,
    }
