"""Fine-tuning through the ADC: AdamW on weights, scales and steps, noise that cools and ends hard, selection on held-out images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rqtool.errors import CheckError, ConfigError, escaped, suggestion
from rqtool.model.data import Images
from rqtool.model.network import Network
from rqtool.train.calibrate import reestimate_norms
from rqtool.train.relax import MODES, Relaxation
from rqtool.train.rewrite import read_layers

EVAL_BATCH = 250
NORM_BATCH = 256
HELD_VALUES = 1 << 26  # numbers in the largest tensor of a batch, where nothing asks for a certain batch


WHOLE_FIELDS = {"epochs": 0, "batch": 2, "seed": 0, "calibration_images": 2, "norm_images": 2, "held_out": 1}
TINY, HUGE = 1e-12, 1e12
REAL_FIELDS = {
    "lr": (TINY, HUGE, "a positive number"), "weight_decay": (0, HUGE, "a number of at least 0"), "hard_share": (0, 1, "from 0 to 1"),
    "tau_start": (TINY, HUGE, "a positive number"), "tau_end": (TINY, HUGE, "a positive number"), "warmup": (0, 0.99, "from 0 to 0.99"),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. Temperatures are in codes; `hard_share` of the steps at the end run without noise."""

    epochs: int = 2
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    mode: str = "relaxed"
    seed: int = 0
    tau_start: float = 0.3
    tau_end: float = 0.08
    hard_share: float = 0.2
    warmup: float = 0.05
    calibration_images: int = 512
    norm_images: int = 2048
    held_out: int | None = None  # None: a tenth of the training images, 5,000 at most

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"--mode {escaped(self.mode)} is not known; {suggestion(str(self.mode), MODES)}")
        for name, low in WHOLE_FIELDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                if not (name == "held_out" and value is None):
                    raise ConfigError(f"--{name.replace('_', '-')} must be a whole number of at least {low}, not {escaped(value)}")
        for name, (low, high, what) in REAL_FIELDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"--{name.replace('_', '-')} must be {what}, not {escaped(value)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Feed:
    """Images as real-valued torch batches: real = pixel * mult + add, per channel."""

    def __init__(self, images: Images, mult: np.ndarray, add: np.ndarray) -> None:
        self.images = images
        shape = (1, -1, *(1,) * (images.x.ndim - 2))
        self.mult, self.add = (torch.tensor(a, dtype=torch.float32).view(shape) for a in (mult, add))

    def __len__(self) -> int:
        return len(self.images.y)

    def real(self, index: Any) -> torch.Tensor:
        """float32 [n, ...] of the images at `index` (a slice or array)."""
        return torch.from_numpy(np.ascontiguousarray(self.images.x[index])).float() * self.mult + self.add

    def labels(self, index: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.images.y[index], dtype=np.int64))

    def batches(self, size: int, limit: int | None = None) -> Iterator[torch.Tensor]:
        """The first `limit` images in order."""
        count = len(self) if limit is None else min(limit, len(self))
        for at in range(0, count, size):
            yield self.real(slice(at, min(at + size, count)))


def fitting(shapes: Iterable[tuple[int, ...]], most: int, values: int = HELD_VALUES) -> int:
    """How many images may go through at once: `most`, or fewer where the largest of the per-sample `shapes` is large; at least 2.

    >>> fitting([(16, 28, 28)], 250), fitting([(64, 112, 112)], 250)
    (250, 83)
    """
    return max(2, min(most, values // max(math.prod(s) for s in shapes)))


def fitting_network(network: Network, most: int, values: int = HELD_VALUES) -> int:
    """The same for the values of a network."""
    return fitting([network.graph.input_shape, *(n.shape for n in network.graph.nodes)], most, values)


@torch.no_grad()
def top1(network: Network, feed: Feed) -> tuple[float, float]:
    """(percent of images whose largest score is the label's, mean cross-entropy), in eval mode."""
    network.eval()
    hits, loss, size = 0, 0.0, fitting_network(network, EVAL_BATCH)
    for at in range(0, len(feed), size):
        part = slice(at, at + size)
        scores, labels = network(feed.real(part)), feed.labels(part)
        hits += int((scores.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
    return 100 * hits / len(feed), loss / len(feed)


def temperature(recipe: Recipe, progress: float) -> float | None:
    """tau at a share of the steps done: geometric from start to end, then None (hard codes)."""
    soft = 1 - recipe.hard_share
    if recipe.mode == "ste" or progress >= soft:
        return None
    return recipe.tau_start * (recipe.tau_end / recipe.tau_start) ** (progress / soft)


def rate(recipe: Recipe, progress: float) -> float:
    """Learning rate: linear warm-up, then a cosine to zero."""
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))


def optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; only weight matrices decay, for scales and batch norm have no reason to shrink."""
    decayed = [p for p in network.parameters() if p.requires_grad and p.dim() > 1 and p.dtype == torch.float32]
    ids = {id(p) for p in decayed}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in ids]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}], lr=recipe.lr)


@dataclass(frozen=True)
class Candidate:
    """A state of the network and what the held-out images say of it."""

    name: str
    top1: float
    loss: float
    state: dict[str, torch.Tensor]

    def better_than(self, other: Candidate | None) -> bool:
        return other is None or (self.top1, -self.loss) > (other.top1, -other.loss)


def consider(name: str, network: Network, held: Feed, best: Candidate | None) -> Candidate:
    """The better of `best` and the network as it is, by held-out top-1, then loss."""
    accuracy, loss = top1(network, held)
    now = Candidate(name, accuracy, loss, copy.deepcopy(network.state_dict()))
    return now if now.better_than(best) else best


def consider_norms(name: str, network: Network, train: Feed, held: Feed, recipe: Recipe, best: Candidate | None) -> Candidate:
    """As `consider`, first as it is and then with batch norm re-estimated; the network is left as it came."""
    best = consider(name, network, held, best)
    state = copy.deepcopy(network.state_dict())
    reestimate_norms(network, train.batches(fitting_network(network, NORM_BATCH), recipe.norm_images))
    best = consider(f"{name}, batch norm re-estimated", network, held, best)
    network.load_state_dict(state)
    return best


def finetune(network: Network, train: Feed, held: Feed, recipe: Recipe, best: Candidate, step_done: Callable[[float], None] = lambda loss: None) -> Candidate:
    """The best candidate after `recipe.epochs` epochs; `network` ends in its state. step_done(loss) is called after each step.

    Raises CheckError where the loss is not a number.
    """
    order, optim = np.random.default_rng(recipe.seed), optimizer(network, recipe)
    torch.manual_seed(recipe.seed)
    per_epoch = steps_per_epoch(len(train), recipe)
    total, step = recipe.epochs * per_epoch, 0
    for epoch in range(recipe.epochs):
        network.train()
        shuffled = order.permutation(len(train))
        for n in range(per_epoch):
            index = np.sort(shuffled[n * recipe.batch : (n + 1) * recipe.batch])
            _prepare(network, optim, recipe, step, total)
            loss = _step(network, optim, train.real(index), train.labels(index))
            step += 1
            if not math.isfinite(loss):
                raise CheckError(f"the loss is not a number after {step} of {total} steps; lower --lr {recipe.lr:g}")
            step_done(loss)
        _quiet(network)
        best = consider_norms(f"epoch {epoch + 1}", network, train, held, recipe, best)
    network.load_state_dict(best.state)
    network.eval()
    return best


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Full batches only: a batch of one image has no batch statistics."""
    return max(1, images // recipe.batch)


def _prepare(network: Network, optim: torch.optim.Optimizer, recipe: Recipe, step: int, total: int) -> None:
    for group in optim.param_groups:
        group["lr"] = rate(recipe, step / total)
    tau = temperature(recipe, step / total)
    for n, layer in enumerate(read_layers(network).values()):
        layer.relaxation = None if tau is None else Relaxation(tau, (recipe.seed * 1_000_003 + step) * 1024 + n)


def _quiet(network: Network) -> None:
    for layer in read_layers(network).values():
        layer.relaxation = None


def _step(network: Network, optim: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor) -> float:
    optim.zero_grad(set_to_none=True)
    loss = F.cross_entropy(network(x), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optim.step()
    return float(loss.detach())
