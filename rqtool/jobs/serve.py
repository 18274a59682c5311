"""What is done with a finished .rq file: its integer program measured, its ADCs judged, and the
program written as ONNX."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rqtool import checkpoint
from rqtool.checkpoint import Checkpoint
from rqtool.errors import CheckError, ConfigError, escaped, suggestion
from rqtool.jobs.alarms import Alarms
from rqtool.jobs.prepare import Silent, images_for, ready_kernels, sample, sample_images
from rqtool.jobs.results import Evaluated, Exported
from rqtool.model.data import Data
from rqtool.program.freeze import Norm
from rqtool.program.ir import Program
from rqtool.program.run import Runner
from rqtool.report.plots import histogram_svg, plot_files
from rqtool.storage import check_writable, write_atomic
from rqtool.train.diagnose import Diagnosis, Seen, examine, trials
from rqtool.train.finetune import Feed
from rqtool.train.frozen import freeze
from rqtool.train.measure import percent, predictions
from rqtool.train.rewrite import read_layers

DIAGNOSIS_IMAGES = 1000  # that a diagnosis is measured on, where nobody says how many


def evaluate(
    source: str | Path,
    data: str | Data,
    *,
    adc: str = "real",
    limit: int | None = None,
    min_acc: float | None = None,
    progress: Any = None,
) -> Evaluated:
    """Top-1 of a .rq file's integer program on the test images of a data set (its only images, if
    it is not split).

    adc: "real", or "ideal" for the same trained network with every ADC ideal (not retrained: the
    twin in `quantize` is). limit: a random subset of so many images. Raises CheckError where top-1
    is below min_acc.
    """
    started, progress = time.monotonic(), progress or Silent()
    if adc not in ("real", "ideal"):
        raise ConfigError(
            f"--adc {escaped(adc)} is not known; {suggestion(str(adc), ('ideal', 'real'))}"
        )
    if min_acc is not None and not 0 <= min_acc <= 100:
        raise ConfigError(f"--min-acc must be from 0 to 100 percent, not {min_acc:g}")
    saved, alarms = checkpoint.load(source), Alarms(progress)
    images, measured_on = images_for(saved, data, limit, alarms)
    program = saved.program if adc == "real" else ideal_program(saved)
    ready_kernels(progress, training=False)
    with progress.stage("integer program", len(images)) as done:
        found = predictions(program, images, done)
    accuracy = percent(found == images.y)
    if min_acc is not None and accuracy < min_acc:
        raise CheckError(
            f"{escaped(source)}: top-1 is {accuracy:.2f} % on {len(images)} "
            f"images, below --min-acc {min_acc:g}"
        )
    return Evaluated(
        str(source),
        accuracy,
        len(images),
        adc,
        measured_on,
        program.macro,
        round(time.monotonic() - started, 1),
        {
            layer: fast
            for layer, fast in Runner(program).fast.items()
            if layer not in program.digital
        },
        tuple(alarms.sentences),
        program.own,
        program.layers_off_macro(),
    )


def ideal_program(saved: Checkpoint) -> Program:
    """The integer program of the same trained network with an ideal ADC."""
    macros = saved.macros.with_ideal_adc()
    network = checkpoint.build_network(saved.network.graph, macros, saved.network.state_dict())
    whole = saved.program.tensors[saved.program.input].dtype == "uint8"
    return freeze(
        network,
        macros,
        saved.peaks,
        Norm(*saved.preprocess.factors(saved.network.graph.input_shape)),
        whole,
    )


def diagnose(
    source: str | Path,
    data: str | Data,
    *,
    limit: int | None = None,
    plots: str | Path | None = None,
    progress: Any = None,
) -> Diagnosis:
    """Which layer's ADC costs a .rq file most: every layer's reads judged, and top-1 of the trained
    network with ADCs made ideal one by one.

    data, limit: the images as in `evaluate`, 1,000 at most where limit is None. plots: a folder for
    an SVG of each layer's partial sums. Raises ConfigError for plots of an ideal ADC or over files
    that exist, and what `evaluate` raises.
    """
    started, progress = time.monotonic(), progress or Silent()
    saved = checkpoint.load(source)
    network = saved.network
    names = [name for name, layer in read_layers(network).items() if not layer.plan.macro.ideal]
    images, measured_on = images_for(
        saved, data, DIAGNOSIS_IMAGES if limit is None else limit, Alarms(progress)
    )
    if plots is not None and not names:
        raise ConfigError(
            f"{escaped(source)}: its ADC is ideal and has no thresholds to draw; leave --plots out"
        )
    files = [] if plots is None else plot_files(plots, names)
    feed = Feed(images, *saved.preprocess.factors(images.shape))
    first = sample(network, feed)
    with progress.stage("diagnosis", (1 + len(trials(network))) * len(images)) as done:
        found, figures = examine(network, feed, first, done)
    for file, name in zip(files, names):
        write_atomic(file, _plot(name, found[name]).encode())
    return Diagnosis(
        source=str(source),
        measured_on=measured_on,
        **figures,
        plots=list(map(str, files)),
        seconds=round(time.monotonic() - started, 1),
    )


def _plot(name: str, seen: Seen) -> str:
    macro = seen.plan.macro
    shared = (
        ""
        if seen.adcs == 1
        else f"; the thresholds are those of the {macro.granularity} with the "
        f"median step, one of {seen.adcs}"
    )
    return histogram_svg(
        name,
        seen.histogram,
        macro.p_min,
        seen.thresholds,
        seen.full_scale,
        f"{int(seen.histogram.sum()):,} reads{shared}",
    )


def export_onnx(
    source: str | Path,
    out: str | Path | None = None,
    *,
    body: str = "qlinear",
    verify: bool = True,
    data: str | Data | None = None,
    images: int = 8,
    vectors: str | Path | None = None,
    force: bool = False,
    progress: Any = None,
) -> Exported:
    """Write a .rq file's integer program as ONNX (default: beside it, .onnx) with `rqtool.reram/1`
    metadata.

    body: "qlinear" (fast) or "explicit" (partial sums are tensors). verify: prove the file equal to
    the definition first, on `images` test images of `data`, or on random pixels. vectors: a folder
    for golden vectors. Raises CheckError where a single integer differs; nothing is written then.
    """
    from rqtool.export.onnx import to_onnx
    from rqtool.export.vectors import write_vectors
    from rqtool.export.verify import verify as prove

    progress = progress or Silent()
    out = Path(source).with_suffix(".onnx") if out is None else Path(out)
    check_writable(out, force)
    saved = checkpoint.load(source)
    x = sample_images(saved, data, images, progress)
    with progress.stage("export", 2) as done:
        model = to_onnx(saved.program, body)
        done(1, "verifying" if verify else "")
        report = prove(model, saved.program, x).to_dict() if verify else None
        done()
    blob = model.SerializeToString(deterministic=True)
    write_atomic(out, blob, force=force)
    if vectors is not None:
        write_vectors(saved.program, x, vectors, force=force)
    return Exported(
        str(source), str(out), body, len(blob), report, None if vectors is None else str(vectors)
    )
