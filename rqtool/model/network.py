"""A graph with its parameters: a module that runs the nodes in order. Rewriting a layer for the
macro is exchanging its module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rqtool.mapping.plan import Geometry
from rqtool.model.graph import Graph, Node


def to_image(x: torch.Tensor, kind: str) -> torch.Tensor:
    """A layer's input as [N, C, H, W]: conv1d gets height 1, the features of a linear layer become
    channels of a 1x1 kernel."""
    if kind == "conv1d":
        return x.unsqueeze(2)
    return x.movedim(-1, 1).reshape(x.shape[0], x.shape[-1], -1, 1) if kind == "linear" else x


def from_image(y: torch.Tensor, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The way back, to the per-sample `shape`."""
    if kind == "conv1d":
        return y.squeeze(2)
    return y.squeeze(-1).transpose(1, 2).reshape(y.shape[0], *shape) if kind == "linear" else y


class Conv(nn.Module):
    """The float layer: any node of op "conv". weight: [O, C/groups, kh, kw]."""

    def __init__(self, geometry: Geometry, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.geometry, self.weight, self.bias = geometry, weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, O, H_out, W_out] from [N, C, H, W]."""
        g = self.geometry
        weight = self.weight.view(g.columns, g.channels // g.groups, *g.kernel)
        return F.conv2d(x, weight, self.bias, g.stride, g.padding, g.dilation, g.groups)


def _conv(node: Node, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kind = node.attrs["geometry"]["kind"]
    return from_image(module(to_image(x, kind)), kind, node.shape)


def flat_pads(pads: Iterable) -> list[int]:
    """(before, behind) of each axis as F.pad wants them: flat, the last axis first.

    >>> flat_pads([[0, 0], [1, 2], [3, 4]])
    [3, 4, 1, 2, 0, 0]
    """
    return [n for pair in reversed(list(pads)) for n in pair]


def _maxpool(node: Node, module: None, x: torch.Tensor) -> torch.Tensor:
    a = node.attrs
    return F.max_pool2d(
        F.pad(x, flat_pads(a["padding"]), value=float("-inf")),
        a["kernel"],
        a["stride"],
        0,
        a["dilation"],
    )


def _avgpool(node: Node, module: None, x: torch.Tensor) -> torch.Tensor:
    a = node.attrs
    return F.avg_pool2d(
        x, a["kernel"], a["stride"], a["padding"], count_include_pad=a["include_pad"]
    )


def _slice(node: Node, module: None, x: torch.Tensor) -> torch.Tensor:
    a = node.attrs
    return x[(slice(None),) * (a["axis"] + 1) + (slice(a["start"], a["stop"], a["step"]),)]


def _add(node: Node, module: None, *xs: torch.Tensor) -> torch.Tensor:
    """A sum without passes over memory for factors of 1."""
    first, *others = zip(node.attrs["signs"], xs)
    start = first[1] if first[0] == 1 else first[0] * first[1]
    return reduce(lambda total, part: torch.add(total, part[1], alpha=part[0]), others, start)


RUN: dict[str, Callable[..., torch.Tensor]] = {
    "conv": _conv,
    "batch_norm": lambda node, module, x: module(x),
    "relu": lambda node, module, x: F.relu(x),
    "clamp": lambda node, module, x: x.clamp(node.attrs["lo"], node.attrs["hi"]),
    "affine": lambda node, module, x: x * node.attrs["mult"] + node.attrs["add"],
    "add": _add,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "reshape": lambda node, module, x: x.reshape(x.shape[0], *node.attrs["shape"]),
    "permute": lambda node, module, x: x.permute(0, *(a + 1 for a in node.attrs["axes"])),
    "concat": lambda node, module, *xs: torch.cat(xs, node.attrs["axis"] + 1),
    "pad": lambda node, module, x: F.pad(x, flat_pads(node.attrs["pads"])),
    "slice": _slice,
    "dropout": lambda node, module, x: F.dropout(
        x, node.attrs["p"], module is not None and module.training
    ),
    "tail": lambda node, module, x: {"softmax": F.softmax, "log_softmax": F.log_softmax}[
        node.attrs["name"]
    ](x, -1),
}


def key(name: str) -> str:
    """A layer's name as a module key (torch forbids dots there)."""
    return name.replace(".", "/")


class Network(nn.Module):
    """A captured network. `layers` holds one module per named layer; `forward` runs the graph.

    >>> graph = Graph("x", (4,), "r", (Node("r", "relu", ("x",), (4,)),))
    >>> Network(graph, {})(torch.tensor([[-1.0, 0, 1, 2]])).tolist()
    [[0.0, 0.0, 1.0, 2.0]]
    """

    def __init__(self, graph: Graph, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.graph = graph
        self.layers = nn.ModuleDict({key(name): module for name, module in layers.items()})
        self._last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}

    def layer(self, name: str) -> nn.Module:
        return self.layers[key(name)]

    def set_layer(self, name: str, module: nn.Module) -> None:
        self.layers[key(name)] = module

    def compute(self, node: Node, *xs: torch.Tensor) -> torch.Tensor:
        """The value of one node from its inputs."""
        module = (
            self.layer(node.module) if node.module else (self if node.op == "dropout" else None)
        )
        return RUN[node.op](node, module, *xs)

    def forward(
        self, x: torch.Tensor, watch: Callable[[str, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """The output of the last node. watch(name, value) sees every value, the input too."""
        if watch:
            watch(self.graph.input, x)

        def compute(node: Node, *xs: torch.Tensor) -> torch.Tensor:
            value = self.compute(node, *xs)
            if watch:
                watch(node.name, value)
            return value

        return self.walk(x, compute)

    def walk(self, x: Any, compute: Callable[..., Any]) -> Any:
        """The output's value, where compute(node, *values of its inputs) gives a node's and x is
        the input's; each value is kept until its last use."""
        values = {self.graph.input: x}
        for i, node in enumerate(self.graph.nodes):
            values[node.name] = compute(node, *(values[name] for name in node.inputs))
            for name in node.inputs:
                if self._last_use[name] == i and name != self.graph.output:
                    values.pop(name, None)
        return values[self.graph.output]
