"""rqtool quantize: a trained model and a data set -> a .rq file and its closing figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import rqtool
from rqtool.cli import values
from rqtool.cli.options import (
    MACRO,
    PIXELS,
    RECIPE,
    Arch,
    DataSource,
    Force,
    InputShape,
    Prefix,
    State,
    Threads,
    Weights,
    argument,
    macro_of,
    option,
    shows,
    takes,
    use_threads,
)
from rqtool.cli.progress import make_progress
from rqtool.report import results


@shows(results.quantized)
@takes("recipe", RECIPE, "Fine-tuning")
@takes("pixels", PIXELS, "Pixels")
@takes("macro", MACRO, "Macro")
def quantize(
    model: Annotated[
        str,
        argument(
            metavar="MODEL",
            help="A torch or safetensors file, a folder of the latter, or a built-in network.",
        ),
    ],
    data: DataSource,
    macro: dict[str, Any],
    recipe: dict[str, Any],
    pixels: dict[str, Any],
    arch: Arch = None,
    input: InputShape = None,
    weights: Weights = None,
    prefix: Prefix = None,
    task: Annotated[
        str | None,
        option(
            "--task",
            metavar="KIND",
            help="Say that the model is a classifier where it does not look like one: classify.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        option(
            "--out",
            metavar="FILE.rq",
            help="The file to write (default: named like the model, in the current folder).",
        ),
    ] = None,
    no_twin: Annotated[
        bool,
        option(
            "--no-twin",
            help="Do not train the ideal-ADC twin, which shows what the ADC alone costs.",
        ),
    ] = False,
    twin_out: Annotated[
        str | None, option("--twin-out", metavar="FILE.rq", help="Save the ideal-ADC twin as well.")
    ] = None,
    state: State = None,
    threads: Threads = None,
    force: Force = False,
) -> dict[str, Any]:
    """Compress a trained model for a macro.

    Calibrate it, fine-tune it through the ADC, freeze it to integers, measure it, and save it as a
    .rq file.
    """
    described, shape = macro_of(macro), values.sizes("--input", input)
    use_threads(threads)
    done = rqtool.quantize(
        model, data, described, arch=arch, out=out or f"{Path(model).stem}.rq", recipe=rqtool.Recipe(**recipe), preprocess=pixels, input_shape=shape,
        weights=weights, prefix=prefix, task=task,
        twin=not no_twin, twin_out=twin_out, state=state, force=force, progress=make_progress(),
    )  # fmt: skip
    return done.to_json()
