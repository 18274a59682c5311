"""The stages of one job: calibration, epochs with an ideal ADC, the twin, and fine-tuning through
the macro's own ADC.

    float network -> calibrated -> [ideal_epochs with an ideal ADC -> its ADC calibrated] -> epochs through the ADC
    the twin      -> calibrated -> [the same                                            ] -> epochs with an ideal ADC

The teacher of a network with an ideal ADC is the float network, whichever teacher is asked for:
there is nothing better to learn from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from rqtool.mapping.assign import Macros
from rqtool.model.data import Preprocess
from rqtool.model.network import Network
from rqtool.program.freeze import Norm
from rqtool.train.calibrate import calibrate, take_norms
from rqtool.train.distill import Teacher
from rqtool.train.equalise import equalised
from rqtool.train.finetune import (
    AUTO,
    EVAL_BATCH,
    Candidate,
    Feed,
    Recipe,
    Run,
    consider,
    consider_norms,
    finetune,
    fitting_network,
    steps_per_epoch,
)
from rqtool.train.rates import RATES, find_rate
from rqtool.train.rewrite import read_layers, rewrite
from rqtool.train.state import Runs

CALIBRATION_VALUES = (
    1 << 28
)  # calibration is one pass over all its images, so it may hold more at once than a batch
TOLD_VALUES = 1 << 26  # scores of a teacher that are kept
IDEAL_STAGE, TWIN, TEACHER, MAIN = (
    "ideal-ADC epochs",
    "ideal-ADC twin",
    "the teacher's scores",
    "fine-tuning",
)


@dataclass(frozen=True)
class Job:
    """The inputs of one job, read and checked. pixels: real = pixel * mult + add; whole: pixels are
    uint8."""

    network: Network
    train: Feed
    held: Feed
    test: Feed
    measured_on: str
    preprocess: Preprocess
    pixels: Norm
    whole: bool
    classes: int


@dataclass
class Stages:
    """One job on its macros. Each network is trained when it is first asked for, and once; `runs`
    holds what was trained before an interruption."""

    job: Job
    macros: Macros
    recipe: Recipe
    progress: Any
    runs: Runs = field(default_factory=Runs)
    rates: dict[str, float] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Network:
        """The float network that calibration compares with, the ranges of its channels made alike
        where that is free."""
        job = self.job
        count = fitting_network(job.network, self.recipe.calibration_images, CALIBRATION_VALUES)
        images = job.train.real(job.train.sample(count, self.recipe.seed))
        return equalised(job.network, images, self.macros.default.q_x)

    def calibrated(
        self, macros: Macros, name: str, trained: Network | None = None
    ) -> tuple[Network, Candidate]:
        """(a network for `macros` in its chosen state, that state): from the float network, or with
        the weights and scales of `trained`."""
        network, job = rewrite(self.reference, macros), self.job
        if trained is not None:
            network.load_state_dict(network.state_dict() | trained.state_dict())
        if trained is None or not macros.ideal:
            count = fitting_network(network, self.recipe.calibration_images, CALIBRATION_VALUES)
            images = job.train.real(job.train.sample(count, self.recipe.seed))
            reference = self.reference if trained is None else trained
            with self.progress.stage(name, len(read_layers(network))) as done:
                calibrate(
                    network,
                    images,
                    reference,
                    done,
                    scales=trained is None,
                    policy=self.recipe.calibration,
                    rounding=self.recipe.rounding,
                )
        title = "post-training" if trained is None else IDEAL_STAGE
        best = consider_norms(title, network, job.train, job.held, self.recipe, None)
        if trained is None and any(node.op == "batch_norm" for node in network.graph.nodes):
            take_norms(network, self.reference)
            best = consider(f"{title}, batch norm of the float model", network, job.held, best)
        network.load_state_dict(best.state)
        return network, best

    def tuned(
        self, network: Network, best: Candidate, recipe: Recipe, teacher: Teacher | None, name: str
    ) -> Run:
        """Fine-tune `network` in place, from where the stage of this name was interrupted, if it
        was."""
        feeds, per_epoch, start = (
            (self.job.train, self.job.held),
            steps_per_epoch(len(self.job.train), recipe),
            self.runs.runs.get(name),
        )
        if not recipe.epochs:
            return finetune(network, *feeds, recipe, best)
        recipe = replace(recipe, lr=self.rate(network, recipe, teacher, name))
        with self.progress.stage(name, recipe.epochs * per_epoch) as done:
            if start is not None:
                done(start.epoch * per_epoch, f"{start.epoch} epochs were done before")
            return finetune(
                network,
                *feeds,
                recipe,
                best,
                lambda loss: done(1, f"loss {loss:.3f}"),
                teacher=teacher,
                start=start,
                epoch_done=partial(self.runs.keep, name),
            )

    def rate(self, network: Network, recipe: Recipe, teacher: Teacher | None, name: str) -> float:
        """The learning rate of a stage: the one asked for, or found; kept in `rates`."""
        if recipe.lr == AUTO and name not in self.rates:
            with self.progress.stage(f"{name}: learning rate", len(RATES)) as done:
                self.rates[name] = find_rate(network, self.job.train, recipe, teacher, done)
        self.rates.setdefault(name, recipe.lr)
        return self.rates[name]

    def followed(self) -> Recipe:
        """The recipe with the rate that the main stage was trained at."""
        return replace(self.recipe, lr=self.rates.get(MAIN, self.recipe.lr))

    def taught_by(self, network: Network) -> Teacher:
        """A teacher that is asked once for each image, unless every epoch moves them, there are too
        many to keep, or more than its scores is matched."""
        recipe, count = self.recipe, len(self.job.train) * self.job.classes
        once = (
            recipe.augment == "none"
            and not recipe.match
            and recipe.epochs + recipe.ideal_epochs > 0
            and count <= TOLD_VALUES
        )
        return Teacher(
            network,
            recipe.distill_weight,
            recipe.distill_temperature,
            self.told_by(network) if once else None,
            recipe.match,
        )

    @torch.no_grad()
    def told_by(self, network: Network) -> torch.Tensor:
        """float32 [images, classes]: the scores of all training images, in batches that depend on
        the network alone."""
        train, size = self.job.train, fitting_network(network, EVAL_BATCH)
        with self.progress.stage(TEACHER, -(-len(train) // size)) as done:
            scores = []
            for x in train.batches(size):
                scores.append(network.eval()(x))
                done()
        return torch.cat(scores)

    @cached_property
    def float_teacher(self) -> Teacher | None:
        """The teacher of a network with an ideal ADC."""
        return None if self.recipe.teacher == "none" else self.taught_by(self.job.network)

    @cached_property
    def ideal_stage(self) -> Network | None:
        """The network after the epochs with an ideal ADC that come first; None where there are
        none."""
        if not self.recipe.ideal_epochs:
            return None
        network, best = self.calibrated(self.macros.with_ideal_adc(), f"{IDEAL_STAGE}: calibration")
        self.tuned(
            network,
            best,
            replace(self.recipe, epochs=self.recipe.ideal_epochs),
            self.float_teacher,
            IDEAL_STAGE,
        )
        return network

    @cached_property
    def twin_run(self) -> tuple[Network, Run]:
        """The same training with an ideal ADC throughout: the network in its chosen state, and how
        it came there."""
        network, best = self.calibrated(
            self.macros.with_ideal_adc(), f"{TWIN}: calibration", self.ideal_stage
        )
        return network, self.tuned(
            network, best, self.recipe, self.float_teacher, f"{TWIN}: fine-tuning"
        )

    @property
    def twin(self) -> Network:
        return self.twin_run[0]

    def main(self, network: Network, best: Candidate) -> tuple[Network, Run]:
        """The network trained through the macro's own ADC, from the calibrated one."""
        if self.ideal_stage is not None:
            network, then = self.calibrated(self.macros, "calibration of the ADC", self.ideal_stage)
            best = then if then.better_than(best) else best
        taught_by_twin = self.recipe.teacher == "ideal" and not self.macros.ideal
        teacher = (
            self.taught_by(self.twin)
            if taught_by_twin and self.recipe.epochs
            else self.float_teacher
        )
        return network, self.tuned(network, best, self.recipe, teacher, MAIN)
