"""The learning rate of a job, found by short tests: a network that is nearly right already is
easily trained worse.

Each test trains from the calibrated state on the first batches of the first epoch, with the
schedule of a whole run squeezed into a few steps, and is judged by its loss on other training
images. Neighbouring rates are tried as long as they are better, a higher one only as long as its
loss is at least a tenth less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from rqtool.errors import CheckError
from rqtool.model.network import Network
from rqtool.train.calibrate import reestimate_norms
from rqtool.train.distill import Teacher
from rqtool.train.finetune import (
    NORM_BATCH,
    Feed,
    Recipe,
    batch_order,
    fitting_network,
    optimizer,
    rate,
    steps_per_epoch,
    train_step,
    untaught,
)

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST = RATES.index(1e-3)
WORTH = 0.9  # of the loss: a higher rate also forgets more of what few images do not show
STEPS = 40  # of a test, or the whole run: fewer rank small rates before those that end better
JUDGES = 512  # training images


def find_rate(
    network: Network,
    train: Feed,
    recipe: Recipe,
    teacher: Teacher | None,
    done: Callable[..., None] = lambda n, note: None,
) -> float:
    """The rate of RATES whose test ends with the least loss, a higher one only where it is clearly
    less; the network is left as it came. done(1, note) after each test."""
    losses: dict[int, float] = {}

    def loss(place: int) -> float:
        if place not in losses:
            losses[place] = _tested(network, train, recipe, teacher, RATES[place])
            done(1, f"{RATES[place]:g}: loss {losses[place]:.4f}")
        return losses[place]

    best = FIRST
    while best + 1 < len(RATES) and loss(best + 1) < WORTH * loss(best):
        best += 1
    while best > 0 and loss(best - 1) < loss(best):
        best -= 1
    return RATES[best]


def steps_of_a_test(images: int, recipe: Recipe) -> int:
    """How many steps a test takes.

    >>> steps_of_a_test(50_000, Recipe(epochs=2)), steps_of_a_test(1_000, Recipe(epochs=1))
    (40, 15)
    """
    return min(STEPS, recipe.epochs * steps_per_epoch(images, recipe))


def _tested(
    network: Network, train: Feed, recipe: Recipe, teacher: Teacher | None, lr: float
) -> float:
    """The loss after a test at one rate; infinite where it diverges."""
    start = copy.deepcopy(network.state_dict())
    judges = train.sample(JUDGES, recipe.seed + 1)
    try:
        _train(network, train, recipe, teacher, lr)
        reestimate_norms(network, [train.real(judges)[: fitting_network(network, NORM_BATCH)]])
        return _judged(network, train, judges, teacher)
    except (FloatingPointError, CheckError):
        return float("inf")
    finally:
        network.load_state_dict(start)
        network.eval()


def _train(
    network: Network, train: Feed, recipe: Recipe, teacher: Teacher | None, lr: float
) -> None:
    network.train()
    torch.manual_seed(recipe.seed)  # of dropout
    optim, count = optimizer(network, recipe.weight_decay), steps_of_a_test(len(train), recipe)
    order = batch_order(len(train), recipe.seed, 0)
    for step in range(count):
        index = np.sort(
            np.take(order, range(step * recipe.batch, (step + 1) * recipe.batch), mode="wrap")
        )
        for group in optim.param_groups:
            group["lr"] = rate(lr, recipe.warmup, (step + 1) / (count + 1))
        train_step(
            network,
            optim,
            partial(_loss(teacher, index), network, train.real(index), train.labels(index)),
        )


def _loss(teacher: Teacher | None, index: np.ndarray) -> Callable[..., torch.Tensor]:
    return partial(teacher.lesson, index=index) if teacher else untaught


@torch.no_grad()
def _judged(network: Network, train: Feed, judges: np.ndarray, teacher: Teacher | None) -> float:
    size, total = fitting_network(network, NORM_BATCH), 0.0
    for at in range(0, len(judges), size):
        index = judges[at : at + size]
        total += len(index) * float(
            _loss(teacher, index)(network, train.real(index), train.labels(index))
        )
    loss = total / len(judges)
    return loss if np.isfinite(loss) else float("inf")
