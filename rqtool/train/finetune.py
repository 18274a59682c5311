"""Fine-tuning through the ADC: AdamW on weights, scales and steps, noise that cools and ends hard,
selection on held-out images.

An epoch depends on the recipe, its number and the `Run` before it, on nothing else: an epoch that
diverged is done again from there at half the rate, and a run that was interrupted goes on from
there to the same bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rqtool.errors import CheckError, ConfigError, escaped, suggestion
from rqtool.model.data import Images, shuffled
from rqtool.model.network import Network
from rqtool.program.freeze import per_channel
from rqtool.train.augment import AUGMENTS, augmented
from rqtool.train.calibrate import CALIBRATIONS, ROUNDINGS, reestimate_norms
from rqtool.train.distill import TEACHERS, Teacher
from rqtool.train.heap import Watched
from rqtool.train.relax import MODES, Relaxation
from rqtool.train.rewrite import read_layers

EVAL_BATCH = 250
NORM_BATCH = 256
HELD_VALUES = (
    1 << 26
)  # numbers in the largest tensor of a batch, where nothing asks for a certain batch
ROLL_BACKS = 3  # epochs done again at half the rate, before a run is given up
EPOCH = "epoch"  # what the name of a candidate begins with that an epoch made
GRADIENT_PEAK = 5.0  # the norm to which longer gradients are cut

CHOICES = {
    "calibration": CALIBRATIONS,
    "rounding": ROUNDINGS,
    "mode": MODES,
    "zero": ("fixed", "learned"),
    "teacher": TEACHERS,
    "augment": AUGMENTS,
}
WHOLE_FIELDS = {
    "epochs": 0,
    "ideal_epochs": 0,
    "batch": 2,
    "seed": 0,
    "calibration_images": 2,
    "norm_images": 2,
    "held_out": 1,
}
TINY, HUGE = 1e-12, 1e12
AUTO = "auto"
REAL_FIELDS = {
    "lr": (TINY, HUGE, "a positive number or auto"), "weight_decay": (0, HUGE, "a number of at least 0"), "hard_share": (0, 1, "from 0 to 1"),
    "tau_start": (TINY, HUGE, "a positive number"), "tau_end": (TINY, HUGE, "a positive number"), "warmup": (0, 0.99, "from 0 to 0.99"),
    "distill_weight": (0, 1, "from 0 to 1"), "distill_temperature": (TINY, HUGE, "a positive number"), "match": (0, HUGE, "a number of at least 0"),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. Temperatures tau are in codes; `hard_share` of the steps at the end run
    without noise."""

    epochs: int = 2
    ideal_epochs: int = 0  # epochs with an ideal ADC, before these
    batch: int = 64
    lr: float | str = AUTO  # found by short tests (train/rates.py)
    weight_decay: float = 1e-4
    mode: str = "ste"
    zero: str = "fixed"
    seed: int = 0
    tau_start: float = 0.3
    tau_end: float = 0.08
    hard_share: float = 0.2
    warmup: float = 0.05
    calibration: str = "error"
    rounding: str = "learned"
    calibration_images: int = 512
    norm_images: int = 2048
    held_out: int | None = None  # None: a tenth of the training images, 5,000 at most
    teacher: str = "float"
    distill_weight: float = 0.9
    distill_temperature: float = 2.0
    match: float = 0.0
    augment: str = "none"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"--{name} {escaped(getattr(self, name))} is not known; "
                    f"{suggestion(str(getattr(self, name)), known)}"
                )
        for name, low in WHOLE_FIELDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                if not (name == "held_out" and value is None):
                    raise ConfigError(
                        f"--{name.replace('_', '-')} must be a whole number of at least "
                        f"{low}, not {escaped(value)}"
                    )
        for name, (low, high, what) in REAL_FIELDS.items():
            value = getattr(self, name)
            if name == "lr" and value == AUTO:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not (math.isfinite(value) and low <= value <= high)
            ):
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be {what}, not {escaped(value)}"
                )
        if self.match and self.teacher == "none":
            raise ConfigError(
                f"--match {self.match:g} compares with a teacher, but there is none; "
                "give --teacher float as well"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Feed:
    """Images as real-valued torch batches: real = pixel * mult + add; these are [C], or have the
    axes of an image and broadcast."""

    def __init__(self, images: Images, mult: np.ndarray, add: np.ndarray) -> None:
        self.images = images
        rank = images.x.ndim - 1
        self.mult, self.add = (
            torch.tensor(per_channel(a, rank), dtype=torch.float32)[None] for a in (mult, add)
        )

    def __len__(self) -> int:
        return len(self.images.y)

    def real(self, index: Any) -> torch.Tensor:
        """float32 [n, ...] of the images at `index` (a slice or array)."""
        return (
            torch.from_numpy(np.ascontiguousarray(self.images.x[index])).float() * self.mult
            + self.add
        )

    def labels(self, index: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.images.y[index], dtype=np.int64))

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """All images in order."""
        for at in range(0, len(self), size):
            yield self.real(slice(at, at + size))

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """The numbers int64 of at most `count` images, drawn by seed from all, as many of each
        class as there are to be had; any first part of them is such a sample, too."""
        drawn = shuffled(len(self), seed)
        labels = self.images.y[drawn]
        by_class = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[by_class], labels[by_class])
        turn = np.empty(len(drawn), np.int64)  # the how-many-eth of its class an image is
        turn[by_class] = np.arange(len(drawn)) - starts
        return drawn[np.argsort(turn, kind="stable")][:count]

    def sampled(self, size: int, count: int, seed: int = 0) -> Iterator[torch.Tensor]:
        """The images of a sample in batches."""
        index = self.sample(count, seed)
        for at in range(0, len(index), size):
            yield self.real(index[at : at + size])


def fitting(shapes: Iterable[tuple[int, ...]], most: int, values: int = HELD_VALUES) -> int:
    """How many images may go through at once: `most`, or fewer where the largest of the per-sample
    `shapes` is large; at least 2.

    >>> fitting([(16, 28, 28)], 250), fitting([(64, 112, 112)], 250)
    (250, 83)
    """
    return max(2, min(most, values // max(math.prod(s) for s in shapes)))


def fitting_network(network: Network, most: int, values: int = HELD_VALUES) -> int:
    """The same for the values of a network."""
    return fitting(
        [network.graph.input_shape, *(n.shape for n in network.graph.nodes)], most, values
    )


@torch.no_grad()
def top1(network: Network, feed: Feed) -> tuple[float, float]:
    """(percent of images whose largest score is the label's, mean cross-entropy), in eval mode."""
    right, loss = judged(network, feed)
    return percent_of(right), loss


@torch.no_grad()
def judged(network: Network, feed: Feed) -> tuple[torch.Tensor, float]:
    """(bool [N]: whether an image's largest score is the label's, mean cross-entropy), in eval
    mode."""
    network.eval()
    right, loss, size = [], 0.0, fitting_network(network, EVAL_BATCH)
    for at in range(0, len(feed), size):
        part = slice(at, at + size)
        scores, labels = network(feed.real(part)), feed.labels(part)
        right.append(scores.argmax(1) == labels)
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
    return torch.cat(right), loss / len(feed)


def percent_of(right: torch.Tensor) -> float:
    """
    >>> percent_of(torch.tensor([True, False, True, True]))
    75.0
    """
    return 100 * int(right.sum()) / len(right)


def temperature(recipe: Recipe, progress: float) -> float | None:
    """tau at a share of the steps done: geometric from start to end, then None (hard codes)."""
    soft = 1 - recipe.hard_share
    if recipe.mode == "ste" or progress >= soft:
        return None
    return recipe.tau_start * (recipe.tau_end / recipe.tau_start) ** (progress / soft)


def rate(peak: float, warmup: float, progress: float) -> float:
    """Learning rate: linear warm-up to `peak` in a share of the steps, then a cosine to zero."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def optimizer(network: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW at rate 0, for every step sets its own; only weight matrices decay, for scales and
    batch norm have no reason to shrink."""
    decayed = [
        p
        for p in network.parameters()
        if p.requires_grad and p.dim() > 1 and p.dtype == torch.float32
    ]
    ids = {id(p) for p in decayed}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in ids]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=0.0,
    )


@dataclass(frozen=True)
class Candidate:
    """A state of the network and what the held-out images say of it. right: bool [N], which of them
    it names rightly; None where only their share is known."""

    name: str
    top1: float
    loss: float
    state: dict[str, torch.Tensor]
    right: torch.Tensor | None = None

    def better_than(self, other: Candidate | None) -> bool:
        """By top-1 where the two differ by more than the paired standard error, else by loss: the
        best top-1 of many states on few images is a matter of luck."""
        if other is None:
            return True
        if self.right is None or other.right is None:
            return (self.top1, -self.loss) > (other.top1, -other.loss)
        won, lost = (int((a & ~b).sum()) for a, b in self._pairs(other))
        if (won - lost) ** 2 > won + lost:
            return won > lost
        return self.loss < other.loss

    def _pairs(self, other: Candidate) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (self.right, other.right), (other.right, self.right)


def consider(name: str, network: Network, held: Feed, best: Candidate | None) -> Candidate:
    """The better of `best` and the network as it is, by the held-out images."""
    right, loss = judged(network, held)
    state = copy.deepcopy(network.state_dict())
    now = Candidate(name, percent_of(right), loss, state, right)
    return now if now.better_than(best) else best


def consider_norms(
    name: str, network: Network, train: Feed, held: Feed, recipe: Recipe, best: Candidate | None
) -> Candidate:
    """As `consider`, first as it is and then with batch norm re-estimated; the network is left as
    it came."""
    best = consider(name, network, held, best)
    state = copy.deepcopy(network.state_dict())
    reestimate_norms(
        network,
        train.sampled(fitting_network(network, NORM_BATCH), recipe.norm_images, recipe.seed),
    )
    best = consider(f"{name}, batch norm re-estimated", network, held, best)
    network.load_state_dict(state)
    return best


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. top1, loss: of the better of its candidates on the held-out images;
    first_loss, last_loss: the training loss, a mean over the first and over the last tenth of its
    steps."""

    number: int
    top1: float
    loss: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Run:
    """Fine-tuning between two epochs: all that the next one starts from. history: the epochs done,
    in order.

    epoch: epochs done. roll_backs: epochs that diverged so far; each halved the rate. network: the
    state of the network; optim: what AdamW keeps of each parameter, "NUMBER/NAME" (empty before the
    first step).
    """

    epoch: int
    roll_backs: int
    best: Candidate
    network: dict[str, torch.Tensor]
    optim: dict[str, torch.Tensor]
    history: tuple[Epoch, ...] = ()

    @property
    def improved(self) -> bool:
        """Whether an epoch of it was chosen, and not the state before."""
        return self.best.name.startswith(EPOCH)


def finetune(
    network: Network, train: Feed, held: Feed, recipe: Recipe, best: Candidate, step_done: Callable[[float], None] = lambda loss: None, *,
    teacher: Teacher | None = None, start: Run | None = None, epoch_done: Callable[[Run], None] = lambda run: None,
) -> Run:  # fmt: skip
    """Train until `recipe.epochs` epochs are done; `network` ends in the state of the run's best
    candidate (`best` is the first).

    start: go on from there. step_done(loss) is called after each step, epoch_done(run) after each
    epoch and roll-back. An epoch that diverges is done again at half the rate; raises CheckError
    where that has not helped three times.
    """
    for layer in read_layers(network).values():
        if layer.adc.zero_can_move():
            layer.real_zero.requires_grad_(recipe.zero == "learned")
    optim = optimizer(network, recipe.weight_decay)
    run = start or _run(0, 0, best, network, optim)
    while run.epoch < recipe.epochs:
        _restore(run, network, optim)
        try:
            losses = _epoch(network, optim, train, recipe, run, teacher, step_done)
            now = consider_norms(f"{EPOCH} {run.epoch + 1}", network, train, held, recipe, None)
            best = now if now.better_than(run.best) else run.best
            history = (*run.history, _epoch_row(run.epoch + 1, now, losses))
            run = replace(
                _run(run.epoch + 1, run.roll_backs, best, network, optim), history=history
            )
        except CheckError as e:
            run = _rolled_back(run, recipe, e)
        epoch_done(run)
    network.load_state_dict(run.best.state)
    network.eval()
    return run


def _epoch(
    network: Network,
    optim: torch.optim.Optimizer,
    train: Feed,
    recipe: Recipe,
    run: Run,
    teacher: Teacher | None,
    step_done: Callable[[float], None],
) -> list[float]:
    """The loss of each step."""
    network.train()
    losses = []
    torch.manual_seed(_seed(recipe.seed, run.epoch))
    order, per_epoch = (
        batch_order(len(train), recipe.seed, run.epoch),
        steps_per_epoch(len(train), recipe),
    )
    first, total, process = run.epoch * per_epoch, recipe.epochs * per_epoch, Watched()
    for step in range(first, first + per_epoch):
        index = np.sort(order[(step - first) * recipe.batch : (step - first + 1) * recipe.batch])
        _prepare(network, optim, recipe, step, total, 0.5**run.roll_backs)
        x, labels = (
            augmented(train.real(index), recipe.augment, (recipe.seed, step)),
            train.labels(index),
        )
        loss = (
            partial(teacher.lesson, index=index, remaining=1 - step / total)
            if teacher
            else untaught
        )
        try:
            losses.append(train_step(network, optim, partial(loss, network, x, labels)))
            step_done(losses[-1])
            process.step_done()
        except FloatingPointError as e:
            raise CheckError(
                f"{e} after {step} of {total} steps; lower --lr {recipe.lr:g}, or "
                "check the model's weights and the images"
            ) from e
    _quiet(network)
    if not all(torch.isfinite(value).all() for value in network.state_dict().values()):
        raise CheckError(
            f"a weight is not a number after {first + per_epoch} of {total} "
            f"steps; lower --lr {recipe.lr:g}"
        )
    return losses


def _epoch_row(number: int, now: Candidate, losses: list[float]) -> Epoch:
    tenth = -(-len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return Epoch(number, now.top1, now.loss, first, last)


def batch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order int64 [images] in which an epoch takes the images: the (epoch + 1)-th permutation
    of the seed's stream."""
    stream = np.random.default_rng(seed)
    for _ in range(epoch):
        stream.permutation(images)
    return stream.permutation(images)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _run(
    epoch: int, roll_backs: int, best: Candidate, network: Network, optim: torch.optim.Optimizer
) -> Run:
    kept = {
        f"{number}/{name}": value.clone()
        for number, values in optim.state_dict()["state"].items()
        for name, value in values.items()
    }
    return Run(epoch, roll_backs, best, copy.deepcopy(network.state_dict()), kept)


def _restore(run: Run, network: Network, optim: torch.optim.Optimizer) -> None:
    """Network and optimizer as they were; both get copies."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in run.optim.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value.clone()
    network.load_state_dict(run.network)
    optim.load_state_dict({"state": state, "param_groups": optim.state_dict()["param_groups"]})


def _rolled_back(run: Run, recipe: Recipe, e: CheckError) -> Run:
    """The run before the epoch that diverged, at half the rate; raises CheckError where that was
    done often enough."""
    if run.roll_backs == ROLL_BACKS:
        where = (
            f"epoch {run.epoch + 1} of {recipe.epochs} diverged, also after "
            f"{ROLL_BACKS} roll-backs to half the rate each"
        )
        raise CheckError(f"{where}: {e}") from e
    return replace(run, roll_backs=run.roll_backs + 1)


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Full batches only: a batch of one image has no batch statistics."""
    return max(1, images // recipe.batch)


def _prepare(
    network: Network,
    optim: torch.optim.Optimizer,
    recipe: Recipe,
    step: int,
    total: int,
    share: float,
) -> None:
    for group in optim.param_groups:
        group["lr"] = share * rate(recipe.lr, recipe.warmup, step / total)
    tau = temperature(recipe, step / total)
    for n, layer in enumerate(read_layers(network).values()):
        layer.relaxation = (
            None
            if tau is None
            else Relaxation(tau, (recipe.seed * 1_000_003 + step) * 1024 + n, recipe.mode)
        )


def _quiet(network: Network) -> None:
    for layer in read_layers(network).values():
        layer.relaxation = None


def untaught(network: Network, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a network that has labels alone to learn from."""
    return F.cross_entropy(network(x), labels)


def train_step(
    network: Network, optim: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]
) -> float:
    """The loss of a batch, loss_of(), before the step it makes. Raises FloatingPointError, and
    makes no step, where loss or gradient is no number."""
    optim.zero_grad(set_to_none=True)
    loss = loss_of()
    if not torch.isfinite(loss):
        raise FloatingPointError("the loss is not a number")
    loss.backward()
    if not torch.isfinite(nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_PEAK)):
        raise FloatingPointError("the gradient is not a number")
    optim.step()
    return float(loss.detach())
