"""rqtool demo: the whole job on an embedded network and data set."""

from __future__ import annotations

from typing import Annotated, Any

import rqtool
from rqtool.cli import values
from rqtool.cli.options import Threads, option, shows, use_threads
from rqtool.cli.progress import make_progress
from rqtool.report import results


@shows(results.demo)
def demo(
    folder: Annotated[
        str,
        option(
            "--folder", metavar="DIR", help="Where demo.rq and demo.onnx go (default rqtool-demo)."
        ),
    ] = "rqtool-demo",
    epochs: Annotated[
        str, option("--epochs", metavar="N", help="Epochs of fine-tuning (default 6).")
    ] = "6",
    threads: Threads = None,
) -> dict[str, Any]:
    """Do the whole job on an embedded model and data set.

    Quantize, eval and export, offline, with a small network and 5,000 Fashion-MNIST images.
    """
    count = values.whole("--epochs", epochs)
    use_threads(threads)
    return rqtool.run_demo(
        folder, recipe=rqtool.Recipe(epochs=count), progress=make_progress()
    ).to_json()
