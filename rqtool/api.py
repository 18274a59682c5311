"""The public functions: each command of the shell is one call of one of these.

    quantize      a trained float model -> a .rq file, and the closing figures
    train_more    a .rq file -> another one, trained for more epochs
    evaluate      a .rq file -> top-1 of its integer program
    diagnose      a .rq file -> which layer's ADC costs most, and why
    export_onnx   a .rq file -> an ONNX file, proved equal bit for bit
    plan          a model or .rq file -> tiles, reads, cycles; no data needed
    inspect       any file rqtool reads -> what it holds; nothing in it is executed
    verify        a .rq or .onnx file -> what was found right; raises CheckError where anything is not
    operations    what of a model is understood, and what an integer program is made of
    run_demo      the whole job on an embedded model and data set

`presets` is in hardware/macro.py and `doctor` in report/doctor.py: they need no model, so they need no torch.

Results are dataclasses of plain data with `to_json()`. A `progress` has one method, `stage(name, total)`: a context manager that
gives a function to call with the number of units done and a note.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rqtool import checkpoint
from rqtool.checkpoint import Checkpoint
from rqtool.errors import CheckError, ConfigError, InputError, StorageError, escaped, suggestion
from rqtool.hardware.macro import Macro
from rqtool.kernels import choose
from rqtool.kernels.spec import Tables, make_spec
from rqtool.mapping.plan import Geometry, Plan
from rqtool.model.capture import LIFT, capture
from rqtool.model.data import Data, Images, Preprocess, held_out, load_data, subset
from rqtool.model.graph import Graph
from rqtool.model.load import load_model
from rqtool.model.network import Network
from rqtool.model.zoo import ZOO
from rqtool.program import golden
from rqtool.program.freeze import Norm
from rqtool.program.ir import ATTRIBUTES, Program
from rqtool.program.numbers import Numbers
from rqtool.program.run import Runner, certified
from rqtool.report.plots import histogram_svg, plot_files
from rqtool.storage import check_writable, write_atomic
from rqtool.train.diagnose import Diagnosis, Seen, examine, trials
from rqtool.train.finetune import Feed, Recipe, consider_norms, fitting_network, top1
from rqtool.train.frozen import freeze, lower, peaks_of
from rqtool.train.measure import layer_table, percent, predictions, real_predictions
from rqtool.train.relax import Relaxation
from rqtool.train.rewrite import plans, read_layers
from rqtool.train.served import Served
from rqtool.train.stages import MAIN, TWIN, Job, Stages
from rqtool.train.state import Runs, about_job, kept_runs

HELD_OUT_PEAK = 5000
DEMO_EPOCHS = 6  # its 3,600 training images are few steps each
TABLE_IMAGES = 128  # images behind clip rates
DIAGNOSIS_IMAGES = 1000  # that a diagnosis is measured on, where nobody says how many
PEAK_IMAGES, PEAK_BATCH = 512, 128  # images behind the ranges of grids


class Silent:
    """A progress that says nothing."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda n=1, note="": None


# -- results ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Quantized:
    """What `quantize` found. top-1 in percent of `images` images; `measured_on` is "test" or "held-out".

    float: the model as it came. ptq: calibrated, not trained. tuned: after `recipe.epochs` epochs, the integer program that was
    saved. ideal: the twin with an ideal ADC, trained equally long. agreement: percent of images on which the integer program and
    the network that is served, its graph run in floating point, name the same class (train/served.py). roll_backs: epochs that
    diverged and were done again, each at half the rate.
    """

    out: str | None
    macro: Macro
    recipe: Recipe
    float_top1: float
    ptq_top1: float
    tuned_top1: float
    ideal_top1: float | None
    agreement: float
    images: int
    measured_on: str
    train_images: int
    held_out_images: int
    chosen: str
    roll_backs: int
    layers: list[dict[str, Any]]
    seconds: float
    islands: tuple[str, ...] = ()

    @property
    def loss(self) -> float | None:
        """Points of top-1 that the ADC costs: ideal twin minus tuned."""
        return None if self.ideal_top1 is None else self.ideal_top1 - self.tuned_top1

    @property
    def reads_per_mac(self) -> float:
        return sum(row["reads"] for row in self.layers) / sum(row["macs"] for row in self.layers)

    def to_json(self) -> dict[str, Any]:
        metrics = {"float_top1": self.float_top1, "ptq_top1": self.ptq_top1, "tuned_top1": self.tuned_top1, "ideal_top1": self.ideal_top1}
        metrics |= {"adc_loss": self.loss, "agreement": self.agreement, "images": self.images, "reads_per_mac": self.reads_per_mac}
        return {
            "command": "quantize", "out": self.out, "macro": self.macro.to_dict(), "recipe": self.recipe.to_dict(), "metrics": metrics,
            "measured_on": self.measured_on, "train_images": self.train_images, "held_out_images": self.held_out_images, "chosen": self.chosen,
            "roll_backs": self.roll_backs, "fully_integer": not self.islands, "islands": list(self.islands), "layers_off_macro": [],
            "layers": self.layers, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What `train_more` found: top-1 of the integer programs before and after, in percent of `images` images. recipe: of these epochs;
    history: the recipes of all trainings before, oldest first. The rest is as in `Quantized`."""

    source: str
    out: str | None
    macro: Macro
    recipe: Recipe
    history: list[Recipe]
    before_top1: float
    tuned_top1: float
    agreement: float
    images: int
    measured_on: str
    train_images: int
    held_out_images: int
    chosen: str
    roll_backs: int
    layers: list[dict[str, Any]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        metrics = {name: getattr(self, name) for name in ("before_top1", "tuned_top1", "agreement", "images")}
        about = {name: getattr(self, name) for name in ("measured_on", "train_images", "held_out_images", "chosen", "roll_backs", "layers", "seconds")}
        recipes = {"recipe": self.recipe.to_dict(), "history": [recipe.to_dict() for recipe in self.history]}
        return {"command": "train", "source": self.source, "out": self.out, "macro": self.macro.to_dict(), **recipes, "metrics": metrics, **about}


@dataclass(frozen=True)
class Evaluated:
    """Top-1 in percent of `images` images by the integer program; adc is "real" or "ideal"."""

    source: str
    top1: float
    images: int
    adc: str
    measured_on: str
    macro: Macro
    seconds: float
    fast: dict[str, bool]

    def to_json(self) -> dict[str, Any]:
        metrics = {"top1": self.top1, "images": self.images}
        about = {"adc": self.adc, "measured_on": self.measured_on, "macro": self.macro.to_dict(), "seconds": self.seconds, "fused_layers": self.fast}
        return {"command": "eval", "source": self.source, "metrics": metrics, **about}


@dataclass(frozen=True)
class Exported:
    """An ONNX file and what was proved of it (None where it was not verified)."""

    source: str
    out: str
    body: str
    bytes: int
    report: dict[str, Any] | None
    vectors: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"command": "export", **asdict(self)}


@dataclass(frozen=True)
class Planned:
    """Rows of Plan.cost for one image, layer by layer, and their sums."""

    source: str
    macro: Macro
    input_shape: tuple[int, ...]
    layers: list[dict[str, Any]]

    @property
    def totals(self) -> dict[str, Any]:
        sums = {key: sum(row[key] for row in self.layers) for key in ("tiles", "macs", "reads", "cycles")}
        return sums | {"reads_per_mac": sums["reads"] / sums["macs"]}

    def to_json(self) -> dict[str, Any]:
        return {"command": "plan", "source": self.source, "macro": self.macro.to_dict(), "input_shape": list(self.input_shape), "layers": self.layers, "totals": self.totals}


# -- quantize --------------------------------------------------------------------------------------------------------
def quantize(
    model: str | Path | nn.Module,
    data: str | Data,
    macro: Macro | None = None,
    *,
    arch: str | None = None,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    preprocess: Preprocess | dict[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    twin: bool = True,
    state: str | Path | None = None,
    force: bool = False,
    progress: Any = None,
) -> Quantized:
    """Rewrite a trained model for a macro, calibrate it, fine-tune it through the ADC, measure it, and save it to `out` (if given).

    model: a file, a built-in name or a torch module (it is not changed). data: as `load_data` reads it; needs training images.
    input_shape: what one image is for the model, (C, H, W), (C, L) or (F,), where it is not what the data set says.
    preprocess: what a pixel is worth; a dictionary changes only those fields of the default for this data set.
    twin: also train the ideal-ADC twin equally long, which shows what the ADC alone costs. state: a file that is replaced after every
    epoch; where it exists, the same job goes on from it, to the same bits on the same number of threads. Raises RqError's kinds.
    """
    started, macro, recipe, progress = time.monotonic(), macro or Macro(), recipe or Recipe(), progress or Silent()
    if out is not None:
        check_writable(out, force)
    job = prepare(model, data, arch, recipe, preprocess, input_shape, progress)
    plans(job.network.graph, macro)  # what the macro cannot hold is refused before any work
    ready_kernels(progress, training=recipe.epochs + recipe.ideal_epochs > 0)
    with progress.stage("float model", 1) as done:
        float_top1 = top1(job.network, job.test)[0]
        done()
    stages = Stages(job, macro, recipe, progress, _runs(state, macro, job, recipe))
    network, best = stages.calibrated(macro, "calibration")
    measured = _measured(network, macro, job, progress, "post-training")
    ptq_top1 = measured[1]
    network, run = stages.main(network, best)
    if run.best is not best:  # else nothing better was found, and that is measured already
        measured = _measured(network, macro, job, progress, "integer program")
    saved, tuned_top1, found = measured
    real = real_predictions(Served(network, saved.numbers), job.test.images)
    ideal_top1 = _twin(stages, tuned_top1) if twin else None
    result = Quantized(
        None if out is None else str(out), macro, recipe, float_top1, ptq_top1, tuned_top1, ideal_top1, percent(found == real), len(job.test), job.measured_on,
        len(job.train), len(job.held), run.best.name, run.roll_backs, layer_table(network, job.train.real(slice(fitting_network(network, TABLE_IMAGES)))),
        round(time.monotonic() - started, 1),
    )  # fmt: skip
    if out is not None:
        _checkpoint(network, saved, job, recipe, result).save(out, force)
    return result


def ready_kernels(progress: Any, training: bool) -> None:
    """Make the fused kernels ready in a stage of their own: numba compiles them on first use (seconds) and keeps them for later runs."""
    if not choose.numba_available():
        return
    plan, one = Plan.make("one read", Geometry(1, 1), Macro()), np.ones((1, 1), np.int64)
    hard, x, n = make_spec(plan, one, one, one), torch.ones(1, 1, 1, 1), torch.ones(1, dtype=torch.int32)
    row, slope = np.zeros((1, 1), np.int64), np.ones((1, plan.macro.p_max - plan.macro.p_min + 1), np.float32)
    noisy = replace(hard, tables=Tables(plan.macro.p_min, row, slope), noise=Relaxation(1.0, 0).noise())
    calls = [lambda: certified(plan, one, one), lambda: choose.Exact(x[0, 0], hard, plan, True)(x, 0)]
    calls += [lambda xs=xs, kind=kind: choose.requant(xs, [n] * len(xs), n, 0, 0, 1, kind) for xs in ((x.int(),), (x.int(),) * 2) for kind in (torch.uint8, torch.int32)]
    if training:
        calls += [lambda spec=spec: choose.Fused.forward(x, x[0, 0], spec) for spec in (hard, noisy)]
        calls += [lambda: choose.Fused.backward(x, x[0, 0], hard, x)]
    with progress.stage("kernels (compiled on first use)", len(calls)) as done:
        for call in calls:
            call()
            done()


def fit(model: nn.Module, data: Data, input_shape: tuple[int, ...] | None) -> tuple[Network, Data]:
    """The captured model, and the data in the shape it takes.

    Without a given shape the images are tried as they are, then as signals (an axis of one channel dropped), then flat; the
    error of the first try is the one a user sees.
    """
    shape = data.train.shape
    tries = [input_shape] if input_shape else [shape, *([shape[1:]] if len(shape) == 3 and shape[0] == 1 else []), (prod(shape),)]
    reasons = []
    for candidate in dict.fromkeys(tries):
        parts = {name: images and images.reshaped(candidate) for name, images in (("train", data.train), ("test", data.test))}
        try:
            return capture(model, candidate), replace(data, **parts)
        except InputError as e:
            reasons.append(e)
    raise reasons[0]


def prepare(
    model: str | Path | nn.Module,
    data: str | Data,
    arch: str | None,
    recipe: Recipe,
    preprocess: Preprocess | dict[str, Any] | None,
    input_shape: tuple[int, ...] | None,
    progress: Any,
) -> Job:
    """Read and capture the model, read the data, and split it; raises InputError where they do not fit together."""
    with progress.stage("reading", 2) as done:
        data = load_data(data, unsplit="train") if isinstance(data, str) else data
        if data.train is None:
            raise InputError(f"{escaped(data.name)}: has no training images to calibrate on; give a data set with a training part (x_train, y_train)")
        done()
        network, data = fit(load_model(model, arch), data, input_shape)
        done()
    _check_classes(network, data)
    check_augment(network, recipe)
    if not isinstance(preprocess, Preprocess):
        preprocess = replace(Preprocess.of(data.train), **(preprocess or {}))
    return split(network, data, recipe, preprocess)


def split(network: Network, data: Data, recipe: Recipe, preprocess: Preprocess) -> Job:
    """The job, with the held-out images that the recipe's seed draws."""
    mult, add = preprocess.affine(data.train.shape[0])
    count = recipe.held_out or min(HELD_OUT_PEAK, max(1, len(data.train) // 10))
    rest, held = held_out(data.train, count, recipe.seed)
    feeds = (Feed(images, mult, add) for images in (rest, held, held if data.test is None else data.test))
    whole = data.train.x.dtype == np.uint8
    return Job(network, *feeds, "held-out" if data.test is None else "test", preprocess, Norm(mult, add), whole, data.classes)


def _check_classes(network: Network, data: Data) -> None:
    scores = network.graph.shape(network.graph.output)
    if len(scores) != 1:
        raise InputError(f"the model gives an output of shape {list(scores)} per image; rqtool measures class scores, one number per class")
    if data.classes > scores[0]:
        raise InputError(f"{escaped(data.name)}: labels go up to {data.classes - 1}, but the model scores {scores[0]} classes; give the data set the model was trained for")


def check_augment(network: Network, recipe: Recipe) -> None:
    """Refuse to move what is no image."""
    if recipe.augment != "none" and len(network.graph.input_shape) != 3:
        raise ConfigError(f"--augment {recipe.augment} moves images, but the model takes shape {list(network.graph.input_shape)}; give --augment none")


def _runs(state: str | Path | None, macro: Macro, job: Job, recipe: Recipe) -> Runs:
    return Runs() if state is None else kept_runs(state, about_job(job.network, macro, recipe, [job.train, job.held]))


def _twin(stages: Stages, tuned_top1: float) -> float:
    if stages.macro.ideal:
        return tuned_top1
    return _measured(stages.twin, stages.macro.with_ideal_adc(), stages.job, stages.progress, TWIN)[1]


@dataclass(frozen=True)
class Lowered:
    """A network's integer program, the numbers that `Served` computes it with, and the peaks that its grids come from."""

    program: Program
    numbers: Numbers
    peaks: dict[str, float]


def _measured(network: Network, macro: Macro, job: Job, progress: Any, name: str) -> tuple[Lowered, float, np.ndarray]:
    """(what the network became, top-1 of its program, the program's predictions)."""
    peaks = peaks_of(network, job.train.batches(fitting_network(network, PEAK_BATCH), PEAK_IMAGES))
    program, numbers = lower(network, macro, peaks, job.pixels, job.whole)
    with progress.stage(name, len(job.test)) as done:
        found = predictions(program, job.test.images, done)
    return Lowered(program, numbers, peaks), percent(found == job.test.images.y), found


def _checkpoint(network: Network, saved: Lowered, job: Job, recipe: Recipe, result: Quantized | Trained) -> Checkpoint:
    return Checkpoint(result.macro, network, saved.program, saved.peaks, job.preprocess, job.classes, recipe.to_dict(), result.to_json())


# -- train on --------------------------------------------------------------------------------------------------------
STAYS = {
    "seed": "it decides which images are held out", "held_out": "its images have chosen the network",
    "calibration": "the network is calibrated", "calibration_images": "the network is calibrated", "ideal_epochs": "the network has met its ADC",
    "teacher": "a .rq file holds no teacher", "distill_weight": "a .rq file holds no teacher", "distill_temperature": "a .rq file holds no teacher",
}  # fmt: skip


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
    """Train the network of a .rq file for more epochs through its ADC, with a schedule of its own, and save it to `out` (if given).

    data: what it was made with, so that the same images are held out. recipe: settings that are not as before; those in STAYS cannot
    change, and there is no teacher. state: as in `quantize`. Raises RqError's kinds.
    """
    started, progress = time.monotonic(), progress or Silent()
    if out is not None:
        check_writable(out, force)
    saved = checkpoint.load(source)
    history = recipes_of(saved, source)
    recipe = recipe_after(history[-1], recipe or {})
    job = _job_of(saved, load_data(data, unsplit="train") if isinstance(data, str) else data, recipe)
    runs = _runs(state, saved.macro, job, recipe)
    ready_kernels(progress, training=recipe.epochs > 0)
    with progress.stage("integer program before", len(job.test)) as done:
        before = percent(predictions(saved.program, job.test.images, done) == job.test.images.y)
    network = saved.network
    best = consider_norms("as before", network, job.train, job.held, recipe, None)
    run = Stages(job, saved.macro, recipe, progress, runs).tuned(network, best, recipe, None, MAIN)
    frozen, tuned_top1, found = _measured(network, saved.macro, job, progress, "integer program")
    result = Trained(
        str(source), None if out is None else str(out), saved.macro, recipe, history, before, tuned_top1, percent(found == real_predictions(Served(network, frozen.numbers), job.test.images)),
        len(job.test), job.measured_on, len(job.train), len(job.held), run.best.name, run.roll_backs,
        layer_table(network, job.train.real(slice(fitting_network(network, TABLE_IMAGES)))), round(time.monotonic() - started, 1),
    )  # fmt: skip
    if out is not None:
        _checkpoint(network, frozen, job, recipe, result).save(out, force)
    return result


def recipes_of(saved: Checkpoint, source: str | Path) -> list[Recipe]:
    """The recipes that made a file, oldest first."""
    try:
        return [Recipe(**fields) for fields in (*saved.results.get("history", []), saved.recipe)]
    except (TypeError, AttributeError, ConfigError) as e:
        raise InputError(f"{escaped(source)}: its recipe is not one of this version ({escaped(e)}); make the file again") from e


def recipe_after(before: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe of more epochs: the one before with `changes`."""
    for name in changes.keys() & STAYS.keys():
        raise ConfigError(f"--{name.replace('_', '-')} cannot change when training goes on, for {STAYS[name]}; leave it out")
    return replace(before, **{"teacher": "none", "ideal_epochs": 0, **changes})


def _job_of(saved: Checkpoint, data: Data, recipe: Recipe) -> Job:
    """The job of training a checkpoint on."""
    if data.train is None:
        raise InputError(f"{escaped(data.name)}: has no training images; give a data set with a training part (x_train, y_train)")
    check_augment(saved.network, recipe)
    parts = {name: images and _fitting_images(saved, data, images) for name, images in (("train", data.train), ("test", data.test))}
    return split(saved.network, replace(data, **parts), recipe, saved.preprocess)


# -- evaluate --------------------------------------------------------------------------------------------------------
def evaluate(
    source: str | Path, data: str | Data, *, adc: str = "real", limit: int | None = None, min_acc: float | None = None, progress: Any = None
) -> Evaluated:
    """Top-1 of a .rq file's integer program on the test images of a data set (its only images, if it is not split).

    adc: "real", or "ideal" for the same trained network with every ADC ideal (not retrained: the twin in `quantize` is).
    limit: a random subset of so many images. Raises CheckError where top-1 is below min_acc.
    """
    started, progress = time.monotonic(), progress or Silent()
    if adc not in ("real", "ideal"):
        raise ConfigError(f"--adc {escaped(adc)} is not known; {suggestion(str(adc), ('ideal', 'real'))}")
    if min_acc is not None and not 0 <= min_acc <= 100:
        raise ConfigError(f"--min-acc must be from 0 to 100 percent, not {min_acc:g}")
    saved = checkpoint.load(source)
    images, measured_on = _images_for(saved, load_data(data) if isinstance(data, str) else data, limit)
    program = saved.program if adc == "real" else ideal_program(saved)
    ready_kernels(progress, training=False)
    with progress.stage("integer program", len(images)) as done:
        found = predictions(program, images, done)
    accuracy = percent(found == images.y)
    if min_acc is not None and accuracy < min_acc:
        raise CheckError(f"{escaped(source)}: top-1 is {accuracy:.2f} % on {len(images)} images, below --min-acc {min_acc:g}")
    return Evaluated(str(source), accuracy, len(images), adc, measured_on, program.macro, round(time.monotonic() - started, 1), Runner(program).fast)


def _images_for(saved: Checkpoint, data: Data, limit: int | None) -> tuple[Images, str]:
    images = _fitting_images(saved, data, data.test if data.test is not None else data.train)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    return (images if limit is None else subset(images, limit, seed=0)), "test" if data.test is not None else "train"


def _fitting_images(saved: Checkpoint, data: Data, images: Images) -> Images:
    """Images of a data set in the shape the program takes; raises InputError where they are not what it was made for."""
    wanted = saved.program.tensors[saved.program.input]
    if prod(images.shape) == prod(wanted.shape):
        images = images.reshaped(wanted.shape)
    if images.shape != wanted.shape:
        raise InputError(f"{escaped(data.name)}: images have shape {list(images.shape)}, but the model takes {list(wanted.shape)}; give the data set it was made for")
    if str(images.x.dtype) != wanted.dtype:
        raise InputError(f"{escaped(data.name)}: images are {images.x.dtype}, but the model takes {wanted.dtype}; give pixels in the form it was quantized with")
    if data.classes > saved.network.graph.shape(saved.network.graph.output)[0]:
        raise InputError(f"{escaped(data.name)}: labels go up to {data.classes - 1}, but the model scores {saved.classes} classes; give the data set the model was trained for")
    return images


def ideal_program(saved: Checkpoint) -> Program:
    """The integer program of the same trained network with an ideal ADC."""
    macro = saved.macro.with_ideal_adc()
    network = checkpoint.build_network(saved.network.graph, macro, saved.network.state_dict())
    whole = saved.program.tensors[saved.program.input].dtype == "uint8"
    return freeze(network, macro, saved.peaks, Norm(*saved.preprocess.affine(saved.network.graph.input_shape[0])), whole)


# -- diagnose --------------------------------------------------------------------------------------------------------
def diagnose(source: str | Path, data: str | Data, *, limit: int | None = None, plots: str | Path | None = None, progress: Any = None) -> Diagnosis:
    """Which layer's ADC costs a .rq file most: every layer's reads judged, and top-1 of the trained network with ADCs made ideal one by one.

    data, limit: the images as in `evaluate`, 1,000 at most where limit is None. plots: a folder for an SVG of each layer's partial sums.
    Raises ConfigError for plots of an ideal ADC or over files that exist, and what `evaluate` raises.
    """
    started, progress = time.monotonic(), progress or Silent()
    saved = checkpoint.load(source)
    network, names = saved.network, list(read_layers(saved.network))
    images, measured_on = _images_for(saved, load_data(data) if isinstance(data, str) else data, DIAGNOSIS_IMAGES if limit is None else limit)
    if plots is not None and saved.macro.ideal:
        raise ConfigError(f"{escaped(source)}: its ADC is ideal and has no thresholds to draw; leave --plots out")
    files = [] if plots is None else plot_files(plots, names)
    feed = Feed(images, *saved.preprocess.affine(images.shape[0]))
    sample = feed.real(slice(fitting_network(network, TABLE_IMAGES)))
    with progress.stage("diagnosis", (1 + len(trials(network))) * len(images)) as done:
        found, figures = examine(network, feed, sample, done)
    for file, name in zip(files, names):
        write_atomic(file, _plot(name, found[name]).encode())
    return Diagnosis(source=str(source), measured_on=measured_on, **figures, plots=list(map(str, files)), seconds=round(time.monotonic() - started, 1))


def _plot(name: str, seen: Seen) -> str:
    macro = seen.plan.macro
    shared = "" if seen.adcs == 1 else f"; the thresholds are those of the {macro.granularity} with the median step, one of {seen.adcs}"
    return histogram_svg(name, seen.histogram, macro.p_min, seen.thresholds, seen.full_scale, f"{int(seen.histogram.sum()):,} reads{shared}")


# -- export ----------------------------------------------------------------------------------------------------------
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
    """Write a .rq file's integer program as ONNX (default: beside it, .onnx) with `rqtool.reram/1` metadata.

    body: "qlinear" (fast) or "explicit" (partial sums are tensors). verify: prove the file equal to the definition first, on
    `images` test images of `data`, or on random pixels. vectors: a folder for golden vectors. Raises CheckError where a single
    integer differs; nothing is written then.
    """
    from rqtool.export.onnx import to_onnx
    from rqtool.export.vectors import write_vectors
    from rqtool.export.verify import verify as prove

    progress = progress or Silent()
    out = Path(source).with_suffix(".onnx") if out is None else Path(out)
    check_writable(out, force)
    saved = checkpoint.load(source)
    x = _sample_images(saved, data, images)
    with progress.stage("export", 2) as done:
        model = to_onnx(saved.program, body)
        done(1, "verifying" if verify else "")
        report = prove(model, saved.program, x).to_dict() if verify else None
        done()
    blob = model.SerializeToString(deterministic=True)
    write_atomic(out, blob, force=force)
    if vectors is not None:
        write_vectors(saved.program, x, vectors, force=force)
    return Exported(str(source), str(out), body, len(blob), report, None if vectors is None else str(vectors))


def _sample_images(saved: Checkpoint, data: str | Data | None, count: int) -> np.ndarray:
    if count < 1:
        raise ConfigError(f"--images must be at least 1, not {count}")
    if data is not None:
        return _images_for(saved, load_data(data) if isinstance(data, str) else data, count)[0].x
    spec, random = saved.program.tensors[saved.program.input], np.random.default_rng(0)
    if spec.dtype == "uint8":
        return random.integers(0, 256, (count, *spec.shape), dtype=np.uint8)
    return random.normal(0, saved.peaks[saved.network.graph.input] / 3, (count, *spec.shape)).astype(np.float32)


# -- plan, inspect, verify -------------------------------------------------------------------------------------------
def plan(model: str | Path | nn.Module, macro: Macro | None = None, *, arch: str | None = None, input_shape: tuple[int, ...] | None = None) -> Planned:
    """The reads of a model on a macro, for one image; no data needed.

    model: a .rq file (whose own macro is the default), a model file, a built-in name or a torch module. input_shape: (C, H, W) of
    one image; built-in networks and .rq files know theirs.
    """
    name = model if isinstance(model, (str, Path)) else type(model).__name__
    if str(name).endswith(".rq"):
        saved = checkpoint.load(name)
        graph, macro = saved.network.graph, macro or saved.macro
    else:
        graph = capture(load_model(model, arch), _shape_for(name, arch, input_shape)).graph
    macro = macro or Macro()
    return Planned(str(name), macro, graph.input_shape, [p.cost(_positions(graph, p)) for p in plans(graph, macro).values()])


def _positions(graph: Graph, plan: Plan) -> int:
    return prod(graph.shape(plan.name)) // plan.geometry.columns


def _shape_for(name: str | Path, arch: str | None, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    known = ZOO.get(str(arch)) or ZOO.get(str(name))
    if shape is not None:
        return shape
    if known is None:
        raise ConfigError(f"{escaped(name)}: a model file does not say what it takes; give --input C,H,W, for example --input 1,28,28")
    return known.shape


def inspect(path: str | Path) -> dict[str, Any]:
    """What a file holds, as plain data: .rq, .onnx, or a model file (names and shapes of its tensors). Nothing is executed."""
    suffix = Path(path).suffix
    if suffix == ".rq":
        return _inspect_rq(checkpoint.load(path), path)
    if suffix == ".onnx":
        return _inspect_onnx(path)
    from rqtool.model.load import state_of

    state = state_of(path)
    if suffix == ".safetensors":  # which keeps no order
        state = dict(sorted(state.items()))
    tensors = [{"name": escaped(k), "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for k, t in state.items()]
    return {"command": "inspect", "source": str(path), "kind": "weights", "values": sum(t.numel() for t in state.values()), "tensors": tensors}


def _inspect_rq(saved: Checkpoint, path: str | Path) -> dict[str, Any]:
    ops = [{"kind": op.kind, "name": op.name, "output": list(saved.program.tensors[op.output].shape)} for op in saved.program.ops]
    about = {"macro": saved.macro.to_dict(), "preprocess": saved.preprocess.to_dict(), "classes": saved.classes, "recipe": saved.recipe, "results": saved.results}
    return {"command": "inspect", "source": str(path), "kind": "rq", **about, "program_sha256": saved.program.sha256(), "ops": ops}


def _inspect_onnx(path: str | Path) -> dict[str, Any]:
    from rqtool.export import metadata
    from rqtool.export.validate import load_onnx

    document = metadata.read(load_onnx(path))
    try:
        Macro(**document["macro"]["fields"])
    except (TypeError, ConfigError) as e:
        raise InputError(f"{escaped(path)}: its metadata describes no macro that can be ({escaped(e)}); export the file again") from e
    return {"command": "inspect", "source": str(path), "kind": "onnx", "metadata": document}


def verify(path: str | Path) -> dict[str, Any]:
    """What was checked of a .rq or .onnx file and found right, as plain data. Raises InputError where it cannot be read, CheckError
    where it is not what rqtool wrote or computes.

    .rq: every hash, the program's structure, and every integer of one random image against the definition. .onnx: the graph, the
    metadata, their hashes and ADC codes, and every accumulator of one random image, by onnxruntime and by the metadata alone.
    """
    suffix = Path(path).suffix
    if suffix not in (".rq", ".onnx"):
        raise InputError(f"{escaped(path)}: is no kind of file that rqtool writes; give a .rq or .onnx file")
    checked = _verify_rq(path) if suffix == ".rq" else _verify_onnx(path)
    return {"source": str(path), "kind": suffix[1:], **checked}


def _verify_rq(path: str | Path) -> dict[str, Any]:
    saved = checkpoint.load(path)
    x = _sample_images(saved, None, 1)
    want, got = golden.run(saved.program, x), Runner(saved.program).trace(torch.from_numpy(x))
    for name, values in want.items():
        if not np.array_equal(values, got[name].numpy()):
            raise CheckError(f"{escaped(path)}: tensor {escaped(name)} differs from the definition on a random image; please report this as a bug")
    return {"program_sha256": saved.program.sha256(), "tensors": len(want), "integers": int(sum(values.size for values in want.values()))}


def _verify_onnx(path: str | Path) -> dict[str, Any]:
    from rqtool.export.validate import enumerated, load_onnx, validate
    from rqtool.export.verify import verify_file

    model = load_onnx(path)
    doc = validate(model)
    codes = sum(enumerated(layer) for layer in doc["layers"])
    return {"program_sha256": doc["program"]["sha256"], "layers": len(doc["layers"]), "codes": codes, "accumulators": verify_file(model)}


def operations() -> dict[str, Any]:
    """The aten operations that are understood in a model, the operations of an integer program, and the built-in networks."""
    networks = [{"name": name, "input_shape": list(entry.shape), "about": entry.about} for name, entry in ZOO.items()]
    return {"command": "ops", "model": sorted(LIFT), "program": {kind: sorted(names) for kind, names in ATTRIBUTES.items()}, "networks": networks}


# -- demo ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Demo:
    """The three results of the demo."""

    quantized: Quantized
    evaluated: Evaluated
    exported: Exported

    def to_json(self) -> dict[str, Any]:
        parts = {"quantize": self.quantized, "eval": self.evaluated, "export": self.exported}
        return {"command": "demo", **{name: part.to_json() for name, part in parts.items()}}


def run_demo(folder: str | Path = "rqtool-demo", *, macro: Macro | None = None, recipe: Recipe | None = None, progress: Any = None) -> Demo:
    """The whole job, offline, on the embedded network and 5,000 Fashion-MNIST images; demo.rq and demo.onnx in `folder` are replaced."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"{escaped(folder)}: cannot be made ({e.strerror}); name another folder") from e
    rq, onnx = folder / "demo.rq", folder / "demo.onnx"
    quantized = quantize("demo", "demo", macro, out=rq, recipe=recipe or Recipe(epochs=DEMO_EPOCHS), force=True, progress=progress)
    evaluated = evaluate(rq, "demo", progress=progress)
    return Demo(quantized, evaluated, export_onnx(rq, onnx, data="demo", images=4, force=True, progress=progress))
