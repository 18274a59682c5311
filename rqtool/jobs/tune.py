"""Training jobs: a float model to a .rq file, and a .rq file to another one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rqtool import checkpoint
from rqtool.checkpoint import Checkpoint
from rqtool.errors import ConfigError, InputError, escaped
from rqtool.hardware.macro import Macro
from rqtool.jobs import suspicions
from rqtool.jobs.alarms import Alarms
from rqtool.jobs.chain import (
    Step,
    calibrated_steps,
    chain_rows,
    epoch_rows,
    say_what_the_twin_is,
    say_what_training_brought,
    tuned_step,
)
from rqtool.jobs.prepare import (
    Silent,
    check_augment,
    check_task,
    fitting_images,
    prepare,
    read_data,
    ready_kernels,
    sample,
    split,
)
from rqtool.jobs.results import Quantized, Trained
from rqtool.mapping.assign import Assignment, Macros, assignment_of
from rqtool.model.data import Data, Preprocess
from rqtool.model.network import Network
from rqtool.program.ir import Program
from rqtool.program.numbers import Numbers
from rqtool.storage import check_writable
from rqtool.train.finetune import Recipe, Run, consider_norms, fitting_network
from rqtool.train.fixed import FixedCheck, compare, tell
from rqtool.train.frozen import lower, peaks_of
from rqtool.train.measure import hits, layer_table, percent, predictions, real_predictions
from rqtool.train.paired import Loss, paired
from rqtool.train.rewrite import layer_rows, plans
from rqtool.train.served import Served
from rqtool.train.stages import MAIN, TWIN, Job, Stages
from rqtool.train.state import Runs, about_job, kept_runs

TEACH = ", or --teacher float"  # what `quantize` has beside the learning rate, and `train` has not
PEAK_IMAGES, PEAK_BATCH = 512, 128  # images behind the ranges of grids
STAYS = {
    "seed": "it decides which images are held " "out", "held_out": "its images have chosen the network",
    "calibration": "the network is calibrated", "rounding": "the network is calibrated", "calibration_images": "the network is calibrated", "ideal_epochs": "the network has met its ADC",
    **dict.fromkeys(("teacher", "distill_weight", "distill_temperature", "match"), "a .rq file holds no teacher"),
}  # fmt: skip


def quantize(
    model: str | Path | nn.Module,
    data: str | Data,
    macro: Macro | Assignment | None = None,
    *,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    keep: Iterable[str] = (),
    arch: str | None = None,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    preprocess: Preprocess | dict[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    weights: str | None = None,
    prefix: str | None = None,
    task: str | None = None,
    twin: bool = True,
    twin_out: str | Path | None = None,
    state: str | Path | None = None,
    force: bool = False,
    progress: Any = None,
) -> Quantized:
    """Rewrite a trained model for a macro, calibrate it, fine-tune it through the ADC, measure it,
    and save it to `out` (if given).

    model: a file, a built-in name or a torch module (it is not changed). data: as `load_data` reads
    it; needs training images. layers: fields of the macro that differ, by the name of a layer or a
    pattern; keep: what is kept off the macro as 8-bit digital layers (see `Assignment`). input_shape: what one image is for the model, (C, H, W), (C, L) or
    (F,), where it is not what the data set says. weights, prefix: where in a file the weights are
    ("model_ema"), and what stands before their names; needed where several fit. task: "classify"
    says that the model is a classifier where it does not look like one. preprocess: what a pixel is
    worth; a dictionary changes only those fields of the default for this data set. twin: also train
    the ideal-ADC twin equally long, which shows what the ADC alone costs; twin_out: save it as a
    .rq file, too. state: a file that is replaced after every epoch; where it exists, the same job
    goes on from it, to the same bits on the same number of threads. Raises RqError's kinds.
    """
    started, wanted = time.monotonic(), assignment_of(macro).and_also(layers, keep)
    recipe, progress = recipe or Recipe(), progress or Silent()
    if out is not None:
        check_writable(out, force)
    _check_twin_out(wanted.default, out, twin, twin_out, force)
    alarms = Alarms(progress)
    job = prepare(
        model, data, arch, recipe, preprocess, input_shape, progress, alarms, weights, prefix
    )
    macros = wanted.macros(layer_rows(job.network.graph))
    plans(job.network.graph, macros)  # what a macro cannot hold is refused before any work
    ready_kernels(progress, training=recipe.epochs + recipe.ideal_epochs > 0)
    with progress.stage("float model", 1) as done:
        right = hits(job.network, job.test)
        float_top1 = percent(right)
        done(1, f"top-1 {float_top1:.2f} %")
    check_task(
        job.network, str(data) if isinstance(data, str) else data.name, job.test, float_top1, task
    )
    alarms.say_all(
        suspicions.of_chance(
            float_top1, job.test.images.y, job.network.graph.shape(job.network.graph.output)[0]
        )
    )
    stages = Stages(job, macros, recipe, progress, _runs(state, macros, job, recipe))
    network, best = stages.calibrated(macros, "calibration")
    steps = [Step("float", right), *calibrated_steps(network, job, best.top1, progress)]
    measured = _measured(network, macros, job, progress, "post-training")
    ptq_top1 = measured.top1
    alarms.say_all(suspicions.of_gain(float_top1, ptq_top1, len(job.test)))
    network, run = stages.main(network, best)
    steps.append(tuned_step(network, job, best, run.best, progress))
    say_what_training_brought(
        alarms, run, stages.followed(), len(job.train), _lost_by_calibration(steps), TEACH
    )
    if run.best is not best:  # else nothing better was found, and that is measured already
        measured = _measured(network, macros, job, progress, "integer program")
    tell(measured.fixed, alarms.say)
    ideal = _twin(stages, run, measured, alarms) if twin else None
    figures = _figures(stages, network, run, measured, out, started, alarms)
    chain = chain_rows([*steps, Step("frozen", measured.right(job))])
    about = {
        "float_top1": float_top1,
        "ptq_top1": ptq_top1,
        "chain": chain,
        **_against(ideal, measured, job),
    }
    result = Quantized(**figures, **about, twin_out=None if twin_out is None else str(twin_out))
    _save(result, network, measured, job, force)
    if twin_out is not None:
        _save_twin(result, stages, ideal, force)
    return result


def train_more(
    source: str | Path,
    data: str | Data,
    *,
    out: str | Path | None = None,
    recipe: dict[str, Any] | None = None,
    state: str | Path | None = None,
    force: bool = False,
    progress: Any = None,
) -> Trained:
    """Train the network of a .rq file for more epochs through its ADC, with a schedule of its own,
    and save it to `out` (if given).

    data: what it was made with, so that the same images are held out. recipe: settings that are not
    as before; those in STAYS cannot change, and there is no teacher. state: as in `quantize`.
    Raises RqError's kinds.
    """
    started, progress = time.monotonic(), progress or Silent()
    alarms = Alarms(progress)
    if out is not None:
        check_writable(out, force)
    saved = checkpoint.load(source)
    history = recipes_of(saved, source)
    recipe = recipe_after(history[-1], recipe or {})
    job = _job_of(saved, read_data(data, "train", saved.preprocess.sizing), recipe, alarms)
    stages = Stages(job, saved.macros, recipe, progress, _runs(state, saved.macros, job, recipe))
    ready_kernels(progress, training=recipe.epochs > 0)
    with progress.stage("integer program before", len(job.test)) as done:
        before = predictions(saved.program, job.test.images, done) == job.test.images.y
    network = saved.network
    best = consider_norms("as before", network, job.train, job.held, recipe, None)
    run = stages.tuned(network, best, recipe, None, MAIN)
    say_what_training_brought(alarms, run, stages.followed(), len(job.train), None, "")
    measured = _measured(network, saved.macros, job, progress, "integer program")
    tell(measured.fixed, alarms.say)
    gain = paired(measured.right(job), before)
    about = {
        "source": str(source),
        "history": history,
        "before_top1": percent(before),
        "gain": gain,
    }
    result = Trained(**_figures(stages, network, run, measured, out, started, alarms), **about)
    _save(result, network, measured, job, force)
    return result


def recipes_of(saved: Checkpoint, source: str | Path) -> list[Recipe]:
    """The recipes that made a file, oldest first."""
    try:
        return [Recipe(**fields) for fields in (*saved.results.get("history", []), saved.recipe)]
    except (TypeError, AttributeError, ConfigError) as e:
        raise InputError(
            f"{escaped(source)}: its recipe is not one of this version "
            f"({escaped(e)}); make the file again"
        ) from e


def recipe_after(before: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe of more epochs: the one before with `changes`."""
    for name in changes.keys() & STAYS.keys():
        raise ConfigError(
            f"--{name.replace('_', '-')} cannot change when training goes on, "
            f"for {STAYS[name]}; leave it out"
        )
    return replace(before, **{"teacher": "none", "match": 0.0, "ideal_epochs": 0, **changes})


def _job_of(saved: Checkpoint, data: Data, recipe: Recipe, alarms: Alarms) -> Job:
    """The job of training a checkpoint on."""
    alarms.say_all(data.notes)
    if data.train is None:
        raise InputError(
            f"{escaped(data.name)}: has no training images; give a data set with "
            "a training part (x_train, y_train)"
        )
    check_augment(saved.network, recipe, saved.preprocess.axes)
    parts = {
        name: images and fitting_images(saved, data, images)
        for name, images in (("train", data.train), ("test", data.test))
    }
    return split(saved.network, replace(data, **parts), recipe, saved.preprocess)


# -- the work of both ------------------------------------------------------------------------------
def _runs(state: str | Path | None, macros: Macros, job: Job, recipe: Recipe) -> Runs:
    return (
        Runs()
        if state is None
        else kept_runs(state, about_job(job.network, macros, recipe, [job.train, job.held]))
    )


def _check_twin_out(
    macro: Macro, out: str | Path | None, twin: bool, twin_out: str | Path | None, force: bool
) -> None:
    """Refuse a file for a twin that there will not be, or that cannot be written."""
    if twin_out is None:
        return
    if not twin:
        raise ConfigError(
            "--twin-out saves the ideal-ADC twin, which --no-twin leaves out; use one of the two"
        )
    if macro.ideal:
        raise ConfigError(
            "--twin-out: with --adc-bits ideal the network is its own twin; leave --twin-out out"
        )
    target = check_writable(twin_out, force, option="--twin-out")
    if out is not None and target == check_writable(out, force):
        raise ConfigError(
            f"{escaped(twin_out)}: is the file of --out, too; give another --twin-out"
        )


def _lost_by_calibration(steps: list[Step]) -> Loss:
    """What calibration cost against the float model, all of it."""
    calibrated = [step.right for step in steps if step.name != "tuned" and step.right is not None]
    return paired(steps[0].right, calibrated[-1])


@dataclass(frozen=True)
class Twin:
    """The ideal-ADC twin, measured. network: None where the macro's own network is its twin."""

    network: Network | None
    run: Run
    measured: Measured


def _twin(stages: Stages, run: Run, measured: Measured, alarms: Alarms) -> Twin:
    if stages.macros.ideal:
        return Twin(None, run, measured)
    network, twin_run = stages.twin_run
    say_what_the_twin_is(alarms, twin_run)
    macros, job = stages.macros.with_ideal_adc(), stages.job
    return Twin(network, twin_run, _measured(network, macros, job, stages.progress, TWIN))


def _against(twin: Twin | None, measured: Measured, job: Job) -> dict[str, Any]:
    """The fields of `Quantized` that compare with the twin."""
    if twin is None:
        return {"ideal_top1": None, "twin_chosen": None, "adc_loss": None}
    loss = None if twin.network is None else paired(twin.measured.right(job), measured.right(job))
    return {"ideal_top1": twin.measured.top1, "twin_chosen": twin.run.best.name, "adc_loss": loss}


def _save_twin(result: Quantized, stages: Stages, twin: Twin, force: bool) -> None:
    """Write the twin as a .rq file, with its own figures."""
    job, measured, macro = stages.job, twin.measured, stages.macros.default.with_ideal_adc()
    top1 = {"float_top1": result.float_top1, "tuned_top1": measured.top1}
    results = {
        "command": "quantize", "out": result.twin_out, "twin_of": result.out,
        "metrics": {**top1, "images": result.images}, "measured_on": job.measured_on,
        "chosen": twin.run.best.name, "epochs": epoch_rows(twin.run),
    }  # fmt: skip
    about = (job.preprocess, job.classes, result.recipe.to_dict(), results)
    saved = Checkpoint(macro, twin.network, measured.program, measured.peaks, *about)
    saved.save(result.twin_out, force)


@dataclass(frozen=True)
class Measured:
    """A network's integer program, the numbers that `Served` computes it with, the peaks that its
    grids come from; the classes that the program names for the test images, and their top-1; what
    it cost to fix the numbers."""

    program: Program
    numbers: Numbers
    peaks: dict[str, float]
    found: np.ndarray
    top1: float
    fixed: FixedCheck

    def right(self, job: Job) -> np.ndarray:
        """bool [N]: which of the test images the program names rightly."""
        return self.found == job.test.images.y


def _measured(network: Network, macros: Macros, job: Job, progress: Any, name: str) -> Measured:
    peaks = peaks_of(network, job.train.sampled(fitting_network(network, PEAK_BATCH), PEAK_IMAGES))
    program, numbers = lower(network, macros, peaks, job.pixels, job.whole)
    with progress.stage(name, len(job.test)) as done:
        found = predictions(program, job.test.images, done)
    fixed = compare(network, Served(network, numbers), job.test, found)
    return Measured(program, numbers, peaks, found, percent(found == job.test.images.y), fixed)


def _figures(
    stages: Stages,
    network: Network,
    run: Run,
    measured: Measured,
    out: str | Path | None,
    started: float,
    alarms: Alarms,
) -> dict[str, Any]:
    """The fields of `Tuned`, by name."""
    job = stages.job
    agreement = percent(
        measured.found == real_predictions(Served(network, measured.numbers), job.test.images)
    )
    return {
        "out": None if out is None else str(out), "macro": stages.macros.default, "macros": stages.macros.own, "layers_off_macro": measured.program.layers_off_macro(), "recipe": stages.recipe, "learning_rate": stages.rates.get(MAIN), "tuned_top1": measured.top1, "agreement": agreement,
        "images": len(job.test), "measured_on": job.measured_on, "train_images": len(job.train), "held_out_images": len(job.held), "chosen": run.best.name,
        "roll_backs": run.roll_backs, "epochs": epoch_rows(run), "layers": layer_table(network, sample(network, job.train)), "seconds": round(time.monotonic() - started, 1), "warnings": tuple(alarms.sentences),
    }  # fmt: skip


def _save(
    result: Quantized | Trained, network: Network, measured: Measured, job: Job, force: bool
) -> None:
    """Write the .rq file, where one is asked for."""
    if result.out is not None:
        parts = (
            measured.program,
            measured.peaks,
            job.preprocess,
            job.classes,
            result.recipe.to_dict(),
            result.to_json(),
        )
        Checkpoint(result.macro, network, *parts).save(result.out, force)
