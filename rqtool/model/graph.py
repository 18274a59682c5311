"""A captured network as plain data: named nodes over per-sample shapes, comparable with == and
printable.

op          attributes                                          modules
conv        geometry (conv1d, conv2d and linear alike)          weight, bias
batch_norm  features, eps, momentum                             weight, bias, running mean and variance
relu        -
clamp       lo, hi                                              (relu6, hardtanh, clamp)
affine      mult, add: one number each                          (x + 1, 2 * x, x / 3, -x)
add         signs, one per input                                (residual connections)
maxpool     kernel, stride, padding, dilation                   padding as ((top, bottom), (left, right))
avgpool     kernel, stride, padding, include_pad
reshape     shape
permute     axes (0 is the first after batch)
concat      axis
pad         pads, one (before, behind) per axis
slice       axis, start, stop, step
dropout     p
tail        name (softmax, log_softmax): keeps the order of the classes, so the integer program ends before it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Node:
    """One operation; `module` names its parameters in the network, `shape` is its output for one
    sample."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    module: str | None = None


@dataclass(frozen=True)
class Graph:
    """Nodes in order, from the input of shape `input_shape` (one sample) to `output`."""

    input: str
    input_shape: tuple[int, ...]
    output: str
    nodes: tuple[Node, ...]

    def node(self, name: str) -> Node:
        return next(n for n in self.nodes if n.name == name)

    def shape(self, name: str) -> tuple[int, ...]:
        return (
            self.input_shape
            if name == self.input
            else next(n.shape for n in self.nodes if n.name == name)
        )

    def users(self, name: str) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if name in n.inputs)

    def convs(self) -> tuple[Node, ...]:
        """The layers that the macro will hold, in order."""
        return tuple(n for n in self.nodes if n.op == "conv")

    def to_json(self) -> dict[str, Any]:
        nodes = [
            {
                "name": n.name,
                "op": n.op,
                "inputs": list(n.inputs),
                "shape": list(n.shape),
                "attrs": n.attrs,
                "module": n.module,
            }
            for n in self.nodes
        ]
        return {
            "input": self.input,
            "input_shape": list(self.input_shape),
            "output": self.output,
            "nodes": nodes,
        }

    @staticmethod
    def from_json(d: dict[str, Any]) -> Graph:
        nodes = tuple(
            Node(n["name"], n["op"], tuple(n["inputs"]), tuple(n["shape"]), n["attrs"], n["module"])
            for n in d["nodes"]
        )
        return Graph(d["input"], tuple(d["input_shape"]), d["output"], nodes)
