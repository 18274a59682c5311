"""rqtool eval: top-1 of a .rq file's integer program."""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli import values
from rqtool.cli.options import DataSource, Threads, argument, option, shows, use_threads
from rqtool.cli.progress import make_progress
from rqtool.report import results


@shows(results.evaluated)
def evaluate(
    rq: Annotated[str, argument(metavar="RQ", help="A file that rqtool quantize wrote.")],
    data: DataSource,
    adc: Annotated[str, option("--adc", metavar="real|ideal", help="The macro's ADC, or one that changes nothing (default real).")] = "real",
    limit: Annotated[str | None, option("--limit", metavar="N", help="Use a random N of the images, the same ones each time.")] = None,
    min_acc: Annotated[str | None, option("--min-acc", metavar="P", help="Exit with 5 where top-1 is below P percent.")] = None,
    threads: Threads = None,
) -> dict[str, Any]:
    """Measure the accuracy of a .rq file's integer program.

    Top-1 on the test images of a data set, or on all images of one that is not divided.
    """
    most, least = values.whole("--limit", limit), values.number("--min-acc", min_acc)
    use_threads(threads)
    return rqtool.evaluate(rq, data, adc=adc, limit=most, min_acc=least, progress=make_progress()).to_json()
