"""The audit: every multiply-accumulate with a weight, counted while the model runs, must be in a
layer that the macro holds.

A matrix product bears weight when one of its operands comes from parameters alone. Counting what
the torch dispatcher sees catches what a look at modules misses: functional calls, attention
projections, tied and computed weights.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rqtool.errors import CoverageError
from rqtool.mapping.plan import Geometry
from rqtool.model.graph import Graph


def _matmul(args: tuple, out: torch.Tensor) -> int:
    return out.numel() * args[-1].shape[-2]


def _vector(args: tuple, out: torch.Tensor) -> int:
    return args[0].numel()


def _convolution(args: tuple, out: torch.Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return (x if transposed else out).numel() * prod(weight.shape[1:])


PRODUCTS = {
    "aten.mm": _matmul,
    "aten.bmm": _matmul,
    "aten.addmm": _matmul,
    "aten.baddbmm": _matmul,
    "aten.mv": _vector,
    "aten.convolution": _convolution,
}


class WeightMacs(TorchDispatchMode):
    """Counts weight-bearing multiply-accumulates of everything that runs inside; `total` at the
    end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.total = 0
        self.kept = [
            *model.parameters(),
            *model.buffers(),
        ]  # ids stay valid while we hold the tensors
        self.weights = {id(t) for t in self.kept}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        bearing = [id(t) in self.weights for t in tensors]
        name = str(func).rsplit(".", 1)[0]
        if name in PRODUCTS and any(bearing) and not all(bearing):
            self.total += PRODUCTS[name](args, out)
        if bearing and all(bearing):
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.kept.append(t)
                    self.weights.add(id(t))
        return out


@torch.no_grad()
def weight_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Weight-bearing multiply-accumulates of one image, in eval mode."""
    was_training = model.training
    with WeightMacs(model.eval()) as counter:
        model(torch.zeros(1, *input_shape))
    model.train(was_training)
    return counter.total


def layer_macs(graph: Graph) -> dict[str, int]:
    """Multiply-accumulates of each layer of the graph, for one image."""
    macs = {}
    for node in graph.convs():
        g = Geometry.from_dict(node.attrs["geometry"])
        macs[node.name] = g.rows * prod(node.shape)  # a position of a column costs K
    return macs


def check(model: nn.Module, network: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Raise CoverageError where the model does weight-bearing work that no captured layer does."""
    total, covered = weight_macs(model, input_shape), sum(layer_macs(network.graph).values())
    if total != covered:
        raise CoverageError(
            f"{covered:,} of the model's {total:,} weight-bearing "
            "multiply-accumulates are in layers that a macro can hold; "
            "the rest would stay outside silently, so write them as convolutions or linear layers"
        )
