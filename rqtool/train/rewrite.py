"""From a float network to one whose layers are read through the macro: the graph stays, the modules
are exchanged."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rqtool.hardware.macro import Macro
from rqtool.mapping.assign import Macros, assigned
from rqtool.mapping.plan import Geometry, Plan
from rqtool.model.graph import Graph
from rqtool.model.network import Network
from rqtool.train.layers import ColumnNorm, ReadLayer


def layer_rows(graph: Graph) -> dict[str, int]:
    """The rows of every layer by name, in order: what an assignment is made for."""
    return {node.name: Geometry.from_dict(node.attrs["geometry"]).rows for node in graph.convs()}


def plans(graph: Graph, macro: Macro | Macros) -> dict[str, Plan]:
    """The plan of every layer by name. Raises ConfigError where its macro cannot hold a layer."""
    return {
        node.name: assigned(macro).plan(node.name, Geometry.from_dict(node.attrs["geometry"]))
        for node in graph.convs()
    }


def rewrite(network: Network, macro: Macro | Macros) -> Network:
    """A copy of the network with a ReadLayer for each convolution and linear layer, not calibrated
    yet."""
    network = copy.deepcopy(network)
    for name, plan in plans(network.graph, macro).items():
        conv = network.layer(name)
        network.set_layer(
            name, ReadLayer(plan, conv.weight, conv.bias, column_norm(network.graph, name))
        )
    for node in network.graph.nodes:
        if node.op == "batch_norm":
            network.set_layer(node.module, own_norm(network.layer(node.module)))
    return network


def column_norm(graph: Graph, name: str) -> ColumnNorm | None:
    """The digital multipliers and addends of a layer's columns; None where batch norm behind the
    layer has them. Those of the scores are static: the statistics of a batch do not belong there.
    """
    users = graph.users(name)
    if name != graph.output and [node.op for node in users] == ["batch_norm"]:
        return None
    columns = Geometry.from_dict(graph.node(name).attrs["geometry"]).columns
    return ColumnNorm(
        columns, static=name == graph.output or any(node.op == "tail" for node in users)
    )


def own_norm(norm: nn.Module) -> nn.Module:
    """A copy of batch norm with numbers that no other layer shares, multipliers and addends among
    them: they cost a chip nothing."""
    own = type(norm)(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, name) is not None:
                getattr(own, name).copy_(getattr(norm, name))
    return own.train(norm.training)


def read_layers(network: Network) -> dict[str, ReadLayer]:
    """The layers on the macro, by name."""
    return {node.name: network.layer(node.name) for node in network.graph.convs()}
