"""What each step of a job costs: the network after every step, on the same images.

    float       the model as it came
    ideal ADC   calibrated: inputs and weights quantised, every ADC ideal; not trained
    ADC         the same network through the macro's own ADC: post-training quantisation
    tuned       after training, in floating point, before its numbers are fixed
    frozen      the integer program that is saved

States are chosen on the held-out images; these figures are of the images that the result is
measured on, and each difference has its paired error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rqtool.jobs.alarms import Alarms
from rqtool.model.network import Network
from rqtool.train.finetune import Candidate, Epoch, Recipe, Run, steps_per_epoch
from rqtool.train.measure import hits, ideal_adcs, percent
from rqtool.train.paired import Loss, paired
from rqtool.train.rewrite import read_layers
from rqtool.train.stages import Job

FEW_STEPS = 100  # fewer training steps than this hardly move a network
HARDLY = 0.02  # a training loss that falls by a smaller share has hardly moved
CHANCE = 2.0  # standard errors
GENTLER = 3  # the factor to try on a learning rate that looks wrong
NOTHING_TO_GAIN = (
    "calibration lost nothing significant against the float model, so there was little to gain; "
    "--epochs 0 saves the time"
)
MORE_STEPS = "use more --epochs, a smaller --batch or more training images"
OLD_TWIN = (
    "the loss to the ADC compares with a network that training did not help; "
    "try another --lr or more --epochs"
)


# -- the chain -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """A network after one step. right: bool [N], per image; None where the step changed nothing, so
    that there is nothing to measure. held_out: its top-1 on the held-out images, where a choice
    asked for it."""

    name: str
    right: np.ndarray | None
    held_out: float | None = None


def calibrated_steps(network: Network, job: Job, held_out: float, progress: Any) -> list[Step]:
    """The steps "ideal ADC" and "ADC": a calibrated network with its ADCs ideal, then with its own."""
    layers = read_layers(network)
    own = not all(layer.plan.macro.ideal for layer in layers.values())
    with progress.stage("accuracy after calibration", (1 + own) * len(job.test)) as done:
        with ideal_adcs(network, layers):
            ideal = hits(network, job.test, done)
        real = hits(network, job.test, done) if own else None
    if real is None:
        return [Step("ideal ADC", ideal, held_out), Step("ADC", None, held_out)]
    return [Step("ideal ADC", ideal), Step("ADC", real, held_out)]


def tuned_step(
    network: Network, job: Job, calibrated: Candidate, chosen: Candidate, progress: Any
) -> Step:
    """The step "tuned": the network in its chosen state; nothing is measured where that is the
    calibrated one. States are compared by name: one read from a file is another object."""
    if chosen.name == calibrated.name:
        return Step("tuned", None, chosen.top1)
    with progress.stage("accuracy after fine-tuning", len(job.test)) as done:
        return Step("tuned", hits(network, job.test, done), chosen.top1)


def chain_rows(steps: list[Step]) -> list[dict[str, Any]]:
    """JSON rows: each step's top-1, and what it cost against the step before; negative where it
    gained. A step that changed nothing costs 0, which is no estimate: its error is None."""
    rows: list[dict[str, Any]] = []
    before = None
    for step in steps:
        cost: dict[str, Any] = {"loss": 0.0, "se": None, "interval": None}
        if before is None:
            cost["loss"] = None
        elif step.right is not None:
            cost = paired(before, step.right).to_json()
        before = before if step.right is None else step.right
        top1 = {"top1": percent(before), **cost, "held_out_top1": step.held_out}
        rows.append({"step": step.name, **top1})
    return rows


def epoch_rows(run: Run) -> list[dict[str, Any]]:
    """JSON rows, one per epoch; a loss that is no number is None."""
    return [_epoch_row(e) for e in run.history]


def _epoch_row(e: Epoch) -> dict[str, Any]:
    losses = {
        "held_out_loss": e.loss, "train_loss_start": e.first_loss, "train_loss_end": e.last_loss
    }  # fmt: skip
    finite = {name: _finite(loss) for name, loss in losses.items()}
    return {"epoch": e.number, "held_out_top1": e.top1, **finite}


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# -- training that brought nothing -----------------------------------------------------------------
def say_what_training_brought(
    alarms: Alarms, run: Run, recipe: Recipe, images: int, to_gain: Loss | None, ways: str
) -> None:
    """An alarm where no epoch was chosen though there were some, with the reason as far as the
    epochs show one.

    images: trained on. to_gain: what calibration cost against the float model, None where that is
    not known; ways: what may help beside the learning rate, "" for nothing.
    """
    if run.improved or not run.history:
        return
    best = max(run.history, key=lambda e: (e.top1, -e.loss))
    epochs = f"the best of {len(run.history)} epochs" if len(run.history) > 1 else "its only epoch"
    head = "training brought nothing, so the network from before it was kept: held-out top-1 was"
    figures = f"{run.best.top1:.2f} % before and {best.top1:.2f} % after {epochs}"
    steps = recipe.epochs * steps_per_epoch(images, recipe)
    alarms.say(f"{head} {figures}; {_reason(run, recipe, steps, to_gain, ways)}")


def _reason(run: Run, recipe: Recipe, steps: int, to_gain: Loss | None, ways: str) -> str:
    first, last = run.history[0], run.history[-1]
    a, b = first.first_loss, last.last_loss
    went = f"the training loss went from {a:.3f} to {b:.3f}"
    lower, higher = (f"try --lr {lr:.2g}" for lr in (recipe.lr / GENTLER, recipe.lr * GENTLER))
    if to_gain is not None and to_gain.significance <= CHANCE:
        return NOTHING_TO_GAIN
    if steps < FEW_STEPS:
        return f"{steps} training steps are few; {MORE_STEPS}"
    if not b < a:
        return f"{went}, so --lr {recipe.lr:g} is probably too high; {lower}"
    if len(run.history) > 1 and last.top1 == max(e.top1 for e in run.history) > first.top1:
        return f"accuracy was still rising in the last epoch and {went}; use more --epochs"
    if a - b < HARDLY * a:
        return f"{went}, hardly at all, so --lr {recipe.lr:g} is probably too low; {higher}"
    return f"{went}, but held-out accuracy did not follow; {lower}{ways}"


def say_what_the_twin_is(alarms: Alarms, run: Run) -> None:
    """An alarm where the twin was trained as long in form only."""
    if run.history and not run.improved:
        kept = f"which kept its state from before training ({run.best.name})"
        alarms.say(f"no epoch improved the ideal-ADC twin, {kept}, so {OLD_TWIN}")
