"""Ranges of channels made alike before a depthwise layer, where that costs nothing (after Nagel et
al., ICCV 2019, section 4.1; there the cost is in the weights, here there is none).

A depthwise layer reads each channel by columns of its own, and a column has a weight scale of its
own. So a channel may be divided by any positive r on its way in, by the digital multiplier of what
gives it, and multiplied by r in the layer's weights: the function stays as it is, and the one scale
that all input codes share suits every channel. Between the two may lie only what keeps a factor of
a channel a factor: relu, pools, dropout.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from rqtool.mapping.plan import Geometry
from rqtool.model.graph import Graph, Node
from rqtool.model.network import Conv, Network
from rqtool.train.quantizers import GRID

PASSES = ("relu", "maxpool", "avgpool", "dropout")
SOURCES = ("conv", "batch_norm")
WIDEST = 64.0  # no channel is made larger or smaller by more
VALUES = 1 << 14  # of each channel, behind its range


@torch.no_grad()
def equalised(network: Network, x: torch.Tensor, peak: int) -> Network:
    """A float network of the same function, the channels of each depthwise layer's inputs of like
    range where the layer before can give that. x: real-valued images [N, ...]; peak: the largest
    input code."""
    pairs = {node.inputs[0]: (source, node) for source, node in depthwise_pairs(network.graph)}
    if not pairs:
        return network
    network = copy.deepcopy(network).eval()
    ratios: dict[str, torch.Tensor] = {}

    def watch(name: str, value: torch.Tensor) -> None:
        if name in pairs:
            ratios[name] = channel_ratios(value, peak)

    network(x, watch)
    for name, (source, node) in pairs.items():
        divide_outputs(network.layer(source.module or source.name), ratios[name])
        multiply_inputs(network.layer(node.module or node.name), ratios[name])
    return network


def depthwise_pairs(graph: Graph) -> list[tuple[Node, Node]]:
    """(what gives the channels, the depthwise layer) wherever nothing else sees them on the way."""
    found = []
    for node in graph.nodes:
        if node.op == "conv" and is_depthwise(node):
            source = source_of(graph, node.inputs[0])
            if source is not None and shares_nothing(graph, source, node):
                found.append((source, node))
    return found


def is_depthwise(node: Node) -> bool:
    """Whether every group has one channel."""
    geometry = Geometry.from_dict(node.attrs["geometry"])
    return geometry.groups == geometry.channels > 1 and geometry.kind != "linear"


def source_of(graph: Graph, name: str) -> Node | None:
    """The layer or batch norm whose values come to `name` through PASSES alone, each with one user;
    None where there is none."""
    while name != graph.input and name != graph.output and len(graph.users(name)) == 1:
        node = graph.node(name)
        if node.op in SOURCES:
            linear = node.op == "conv" and node.attrs["geometry"]["kind"] == "linear"
            return None if linear else node
        if node.op not in PASSES:
            return None
        name = node.inputs[0]
    return None


def shares_nothing(graph: Graph, *nodes: Node) -> bool:
    """Whether no other node has the same parameters."""
    modules = [node.module for node in graph.nodes if node.module]
    return all(modules.count(node.module) <= 1 for node in nodes)


def channel_ratios(value: torch.Tensor, peak: int) -> torch.Tensor:
    """float32 [C]: the best scale of each channel of values [N, C, ...] over their geometric mean,
    within 1 / WIDEST to WIDEST; 1 for a channel that is 0 throughout."""
    channels = value.transpose(0, 1).flatten(1)
    channels = channels[:, :: max(1, channels.shape[1] // VALUES)]
    largest = channels.abs().amax(1)
    alive = largest > 0
    if not alive.any():
        return torch.ones_like(largest)
    whole = torch.where(alive, largest, torch.ones_like(largest)) / peak
    best, least = whole.clone(), torch.full_like(whole, torch.inf)
    for factor in torch.linspace(0.15, 1.0, GRID // 4).tolist():
        scale = (whole * factor).unsqueeze(1)
        codes = torch.floor(channels / scale + 0.5).clamp(-peak, peak)
        error = (codes * scale - channels).square().mean(1)
        best = torch.where(error < least, scale.squeeze(1), best)
        least = torch.minimum(error, least)
    middle = best[alive].log().mean().exp()
    return torch.where(alive, (best / middle).clamp(1 / WIDEST, WIDEST), torch.ones_like(best))


def divide_outputs(module: nn.Module, ratios: torch.Tensor) -> None:
    """Divide each output channel of a layer or batch norm by its ratio."""
    if isinstance(module, Conv):
        module.weight = nn.Parameter(module.weight / _rows(ratios, module.weight))
    else:
        weight = torch.ones_like(ratios) if module.weight is None else module.weight
        module.weight = nn.Parameter(weight / ratios)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias / ratios)


def multiply_inputs(module: Conv, ratios: torch.Tensor) -> None:
    """Multiply the weights of a depthwise layer by the ratios of their channels."""
    columns = ratios.repeat_interleave(len(module.weight) // len(ratios))
    module.weight = nn.Parameter(module.weight * _rows(columns, module.weight))


def _rows(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[O] so that it broadcasts along the rows of a weight [O, ...]. New parameters follow, for a
    weight may be tied to another layer's."""
    return values.view(-1, *(1,) * (weight.dim() - 1))
