"""What it costs to fix the numbers of a network: the network in float arithmetic against its
integer program, image by image.

The served network (train/served.py) has the program's numbers, so the two agree whatever those are.
Here the program is compared with the network as it was before, whose values lie on no grid, on
images with labels. Single input codes beside a tie flip in any network, and in a deep one they flip
more; so only top-1 decides, and only beyond what chance gives: with b images that the network alone
names right and c that the program alone does, two standard errors of the difference are 2 sqrt(b +
c) images, and at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
import torch

from rqtool.errors import CheckError, escaped
from rqtool.model.network import Network
from rqtool.program.numbers import Grid
from rqtool.train.finetune import EVAL_BATCH, Feed, fitting_network
from rqtool.train.served import Served

MOST_IMAGES = 5000  # of the images, drawn where there are more
LARGEST_LOSS = 2.0  # points of top-1
COARSE = 0.005  # a grid is too coarse where it moves a value by more of its mean magnitude
WAY_OUT = (
    "if its largest value stands out, clamp it in the model, or leave out the images that cause it"
)
SAMPLE, SAMPLE_VALUES = (
    16,
    1 << 26,
)  # images that show which grid is coarse, and the numbers that they may hold


@dataclass(frozen=True)
class FixedCheck:
    """before_top1, after_top1: percent of `images` that the network and its program name right;
    same_class: percent on which they name the same class; counting_error: points that chance can
    make of the loss; worst, worst_error: the value that its own grid moves most, and by which share
    of its mean magnitude (None and 0 where nothing beyond chance was lost)."""

    before_top1: float
    after_top1: float
    same_class: float
    images: int
    counting_error: float
    worst: str | None = None
    worst_error: float = 0.0

    @property
    def loss(self) -> float:
        """Points of top-1."""
        return self.before_top1 - self.after_top1

    @property
    def counts(self) -> bool:
        """Whether the loss is more than chance."""
        return self.loss > self.counting_error

    @property
    def refused(self) -> bool:
        """Whether the loss is large and a grid is to blame."""
        return self.counts and self.loss > LARGEST_LOSS and self.worst_error > COARSE

    def describe(self) -> str:
        """One sentence for people."""
        start = (
            f"fixing the numbers of the network costs {self.loss:.2f} points of top-1 "
            f"({self.before_top1:.2f} to {self.after_top1:.2f} on {self.images} "
            f"images, counting error {self.counting_error:.2f})"
        )
        name, moved = escaped(self.worst), f"{100 * self.worst_error:.2g} % of its mean magnitude"
        if self.worst_error > COARSE:
            return (
                f"{start}: the grid of the value '{name}' is too coarse (it moves it "
                f"by {moved}); {WAY_OUT}"
            )
        return (
            f"{start}, and no grid is too coarse (that of '{name}' moves its "
            f"value most, by {moved}): codes beside a tie flip; "
            "train for an epoch (--epochs 1), or measure on more images"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    network: Network, served: Served, feed: Feed, found: np.ndarray | None = None
) -> FixedCheck:
    """What fixing its numbers cost a network, on labelled images (at most 5,000 of them, drawn).

    served: the network on the numbers of its program; found: int64 [N], the classes that the
    program names, if they are known.
    """
    index = _drawn(len(feed), MOST_IMAGES)
    labels = np.asarray(feed.images.y)[index]
    before = _classes(network.eval(), index, feed.real)
    after = (
        _classes(served, index, lambda part: _pixels(feed, part))
        if found is None
        else np.asarray(found)[index]
    )
    right, kept = before == labels, after == labels
    differing = int((right != kept).sum())
    check = FixedCheck(
        *(100 * float(np.mean(hits)) for hits in (right, kept, before == after)),
        len(index),
        100 * max(1.0, 2 * sqrt(differing)) / len(index),
    )
    if not check.counts:
        return check
    errors = grid_errors(network, served, feed)
    worst = max(errors, key=errors.get)
    return FixedCheck(**{**asdict(check), "worst": worst, "worst_error": errors[worst]})


def tell(check: FixedCheck, say: Callable[[str], None]) -> None:
    """Say what was lost beyond chance; raises CheckError where that is more than 2 points and a
    grid is too coarse."""
    if check.refused:
        raise CheckError(check.describe())
    if check.counts:
        say(check.describe())


def _drawn(count: int, most: int) -> np.ndarray:
    return (
        np.arange(count)
        if count <= most
        else np.sort(np.random.default_rng(0).choice(count, most, replace=False))
    )


def _pixels(feed: Feed, index: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(feed.images.x[index]))


@torch.no_grad()
def _classes(
    network: Network, index: np.ndarray, read: Callable[[np.ndarray], torch.Tensor]
) -> np.ndarray:
    size = fitting_network(network, EVAL_BATCH)
    parts = [index[at : at + size] for at in range(0, len(index), size)]
    return np.concatenate([network(read(part)).argmax(1).numpy() for part in parts])


# -- which grid ------------------------------------------------------------------------------------
@torch.no_grad()
def grid_errors(network: Network, served: Served, feed: Feed) -> dict[str, float]:
    """How far each value of a network is moved by its own grid, as a share of its mean magnitude,
    on some of the images.

    Each sum is given what the network itself has, so no error of an earlier grid counts. At a
    layer's input codes the network's own rounding is left out of it.
    """
    held = sum(prod(n.shape) for n in network.graph.nodes) + prod(network.graph.input_shape)
    index = _drawn(len(feed), max(1, min(SAMPLE, SAMPLE_VALUES // held)))
    values: dict[str, torch.Tensor] = {}
    network.eval()(feed.real(index), lambda name, value: values.update({name: value}))
    errors: dict[str, float] = {}
    for name, grid, got in _on_grids(network, served, _pixels(feed, index), values):
        errors[name] = max(errors.get(name, 0.0), _moved(got, values[name], grid))
    return errors


def _on_grids(
    network: Network, served: Served, pixels: torch.Tensor, values: dict[str, torch.Tensor]
) -> Iterator[tuple[str, Grid, torch.Tensor]]:
    """(value, grid, the value on it) for each grid of the served network, given the `values` of the
    network."""
    rounds, regrids = served.numbers.rounds, served.numbers.regrids
    results = {network.graph.input: served.on_grid(pixels)}
    for node in network.graph.nodes:
        for n, name in enumerate(node.inputs):
            if (node.name, n) in regrids:
                yield (
                    name,
                    regrids[node.name, n][1].grid,
                    served.regridded((node.name, n), values[name]),
                )
        given = [
            results[name] if results[name].dtype == torch.float64 else values[name]
            for name in node.inputs
        ]
        results[node.name] = served.compute(
            node, *given
        )  # a sum that is still open is float64, and goes on as it is
    yield from ((name, number.grid, results[name]) for name, number in rounds.items())


def _moved(got: torch.Tensor, value: torch.Tensor, grid: Grid) -> float:
    """The mean distance of `got` from a value, over the value's mean magnitude."""
    value = value.double()
    if grid.lo == 0:  # input codes of a layer; the grids of all other values have two sides
        value = (
            torch.floor(value / grid.scale + grid.zero + 0.5).clamp(grid.lo, grid.hi) - grid.zero
        ) * grid.scale
    moved, size = float((got.double() - value).abs().mean()), float(value.abs().mean())
    return moved / size if size > 0 else 0.0
