"""The audit: weight-bearing multiply-accumulates by hand, and what a graph leaves out is refused."""

from __future__ import annotations

import pytest
import torch
from styles import STYLES, Model, captured
from torch import nn
from torch.nn import functional as F

from rqtool.errors import CoverageError
from rqtool.mapping.plan import Geometry
from rqtool.model import audit
from rqtool.model.graph import Graph, Node
from rqtool.model.network import Conv, Network


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


HAND_COUNTS = {
    "linear": (lambda: nn.Linear(6, 3), (6,), 18),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), (6,), 18),
    "linear on 5 positions": (lambda: nn.Linear(6, 3), (5, 6), 90),
    "conv": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 6, 5), 2 * 9 * 4 * 30),
    "strided, dilated": (lambda: nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), (2, 1)), (2, 7, 5), 2 * 6 * 4 * (3 * 4)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5), 3 * 9 * 4 * 9),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (6, 5, 5), 9 * 12 * 9),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, 2), (3, 10), 3 * 4 * 5 * 4),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, 2), (2, 4, 4), 2 * 16 * 3 * 4),
    "used twice": (lambda: Model(lambda m, x: m.a(m.a(x)), a=nn.Linear(6, 6)), (6,), 72),
    "matmul": (lambda: Model(lambda m, x: x @ m.w, w=weight(6, 3)), (6,), 18),
    "matmul from the left": (lambda: Model(lambda m, x: m.w @ x, w=weight(3, 6)), (6, 5), 90),
    "einsum": (lambda: Model(lambda m, x: torch.einsum("npk,ok->npo", x, m.w), w=weight(3, 6)), (5, 6), 90),
    "batched": (lambda: Model(lambda m, x: torch.bmm(x.transpose(0, 1), m.w), w=weight(5, 6, 3)), (5, 6), 90),
    "computed weight": (lambda: Model(lambda m, x: F.linear(x, m.w * m.w.abs().mean()), w=weight(3, 6)), (6,), 18),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), (6,), 18),
    "buffer": (lambda: nn.Sequential(nn.Linear(6, 3)).requires_grad_(False), (6,), 18),
    "products of weights alone": (lambda: Model(lambda m, x: F.linear(x, m.a @ m.b), a=weight(3, 4), b=weight(4, 6)), (6,), 18),
    "products of values alone": (lambda: Model(lambda m, x: x @ x.transpose(1, 2)), (5, 6), 0),
    "attention": (lambda: Model(lambda m, x: F.scaled_dot_product_attention(m.q(x), x, x), q=nn.Linear(6, 6)), (5, 6), 180),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_COUNTS)
def test_counts_are_those_worked_by_hand(name):
    build, shape, macs = HAND_COUNTS[name]
    model = build().train()
    assert audit.weight_macs(model, shape) == macs
    assert model.training


def test_layers_of_a_graph_are_counted_by_name():
    network = captured("sequential")[1]
    assert audit.layer_macs(network.graph) == {
        "0": 18 * 5 * 64,
        "4": 45 * 6 * 4,
        "7": 24 * 7,
        "9": 7 * 4,
    }


@pytest.mark.parametrize("name", STYLES)
def test_every_style_is_covered_whole(name):
    model, network = captured(name)
    assert (
        sum(audit.layer_macs(network.graph).values())
        == audit.weight_macs(model, STYLES[name].shape)
        > 0
    )


def half_a_network(conv: nn.Linear) -> Network:
    geometry = Geometry(conv.in_features, conv.out_features, kind="linear")
    node = Node(
        "a", "conv", ("input",), (conv.out_features,), {"geometry": geometry.to_dict()}, "a"
    )
    return Network(
        Graph("input", (conv.in_features,), "a", (node,)),
        {"a": Conv(geometry, conv.weight, conv.bias)},
    )


SILENT = {
    "matmul": (
        lambda a: Model(lambda m, x: m.a(x) @ m.w, a=a, w=weight(100, 20)),
        "600 of the model's 2,600",
    ),
    "computed weight": (
        lambda a: Model(lambda m, x: F.linear(m.a(x), m.w.tanh()), a=a, w=weight(3, 100)),
        "600 of the model's 900",
    ),
    "used twice": (lambda a: Model(lambda m, x: m.a(x) + m.a(-x), a=a), "600 of the model's 1,200"),
    "not used": (lambda a: Model(lambda m, x: x, a=a), "600 of the model's 0"),
}


@pytest.mark.parametrize("name", SILENT)
def test_work_that_a_graph_leaves_out_is_refused(name):
    a = nn.Linear(6, 100)
    build, counts = SILENT[name]
    with pytest.raises(CoverageError) as e:
        audit.check(build(a), half_a_network(a), (6,))
    assert str(e.value) == (
        f"{counts} weight-bearing multiply-accumulates are in layers that a "
        "macro can hold; the rest would stay outside silently, so write them "
        "as convolutions or linear layers"
    )
    assert e.value.exit_code == 4
