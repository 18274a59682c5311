"""The trained network with the numbers of its integer program: what is served, computed in floating
point.

The graph runs node by node as in training, with the kernels of training's forward pass. What
differs is that each value is brought to its grid where the program does so: a sum is formed in
float64 with factors mult / 2**shift, which is exact (program/numbers.py), then floored and clamped.
Every input code of every layer and every score therefore equals the program's; nothing here runs
the program.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from rqtool.model.graph import Node
from rqtool.model.network import Network, from_image, to_image
from rqtool.program.freeze import SCORES
from rqtool.program.numbers import Numbers, Requant
from rqtool.train.reads import pad_codes


class Served(Network):
    """A network on the numbers that `train.frozen.lower` found for it; the layers are shared, not
    copied.

    forward takes pixels, uint8 or float32 [N, ...], and gives scores, float32. A value between
    nodes is float32, exact or next to its grid point, or float64 where it is a part of a sum that
    is still open, in steps of that sum's grid.
    """

    def __init__(self, network: Network, numbers: Numbers) -> None:
        super().__init__(
            network.graph,
            {
                name: network.layer(name)
                for name in {n.module for n in network.graph.nodes if n.module}
            },
        )
        self.numbers = numbers
        self.factors = {
            place: torch.from_numpy(np.asarray(a, np.float64))
            for place, a in numbers.factors.items()
        }
        self.eval()

    @torch.no_grad()
    def forward(
        self, pixels: torch.Tensor, watch: Callable[[str, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """The scores, float32 [N, classes]. watch(name, value) sees every value, the input too."""
        return self.regridded(SCORES, super().forward(self.on_grid(pixels), watch))

    def on_grid(self, pixels: torch.Tensor) -> torch.Tensor:
        """The value of the graph's input."""
        if self.numbers.pixels:
            exponent, lo, hi = self.numbers.pixels
            pixels = torch.floor(pixels * 2.0**exponent + 0.5).clamp(
                lo, hi
            )  # in float32, as the program's quantize
        name = self.graph.input
        return self.rounded(name, self.scaled((name, 0), pixels))

    def compute(self, node: Node, *xs: torch.Tensor) -> torch.Tensor:
        """The value of one node, on its grid."""
        xs = [self.regridded((node.name, n), x) for n, x in enumerate(xs)]
        rule = SERVE.get(node.op)
        return self.rounded(
            node.name, rule(self, node, *xs) if rule else super().compute(node, *xs)
        )

    def scaled(self, place: tuple[str, int], x: torch.Tensor) -> torch.Tensor:
        """An operand in steps of its sum's grid, float64; as it is where its factor went to an
        earlier node."""
        return x.double() * self.factors[place] if place in self.factors else x

    def rounded(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """A node's value on the grid where it ends, if it ends at this node."""
        return _rounded(self.numbers.rounds[name], y) if name in self.numbers.rounds else y

    def regridded(self, place: tuple[str, int], x: torch.Tensor) -> torch.Tensor:
        """An operand on the grid that its node asks for, if that is another one."""
        if place not in self.numbers.regrids:
            return x
        factor, number = self.numbers.regrids[place]
        return _rounded(number, x.double() * torch.from_numpy(factor))


def _rounded(number: Requant, y: torch.Tensor) -> torch.Tensor:
    """float32 (k - zero) * scale for the steps y (float64) without 1/2 and zero."""
    grid = number.grid
    k = torch.floor(y + torch.from_numpy(number.add / 2.0**number.shift)).clamp_(grid.lo, grid.hi)
    return k.sub_(grid.zero).mul_(grid.scale).float()


# -- operations that do not do as in training ------------------------------------------------------
def _conv(served: Served, node: Node, x: torch.Tensor) -> torch.Tensor:
    layer, kind = served.layer(node.name), node.attrs["geometry"]["kind"]
    codes = pad_codes(
        layer.input(to_image(x, kind)), layer.plan.geometry.padding, int(layer.input.zero)
    )
    weight = layer.weight_codes()
    if layer.watch:
        layer.watch(layer, codes, weight)
    return sum(
        served.scaled((node.name, n), from_image(y, kind, node.shape))
        for n, y in enumerate(layer.accumulators(codes, weight))
    )


def _add(served: Served, node: Node, *xs: torch.Tensor) -> torch.Tensor:
    return sum(served.scaled((node.name, n), x) for n, x in enumerate(xs))


def _affine(served: Served, node: Node, x: torch.Tensor) -> torch.Tensor:
    return served.scaled((node.name, 0), x)


def _avgpool(served: Served, node: Node, x: torch.Tensor) -> torch.Tensor:
    a = node.attrs
    return served.scaled(
        (node.name, 0),
        F.avg_pool2d(x.double(), a["kernel"], a["stride"], a["padding"], divisor_override=1),
    )


def _clamp(served: Served, node: Node, x: torch.Tensor) -> torch.Tensor:
    lo, hi = served.numbers.bounds[node.name]
    return x.clamp(lo, hi)


SERVE: dict[str, Callable[..., torch.Tensor]] = {
    "conv": _conv,
    "batch_norm": _affine,
    "affine": _affine,
    "add": _add,
    "avgpool": _avgpool,
    "clamp": _clamp,
    "tail": lambda served, node, x: (
        x
    ),  # the program ends before it, too: rounded probabilities can be equal where scores are not
}
