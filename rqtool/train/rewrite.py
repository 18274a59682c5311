"""From a float network to one whose layers are read through the macro: the graph stays, the modules are exchanged."""

from __future__ import annotations

import copy

from rqtool.hardware.macro import Macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.model.graph import Graph
from rqtool.model.network import Network
from rqtool.train.layers import ReadLayer


def plans(graph: Graph, macro: Macro) -> dict[str, Plan]:
    """The plan of every layer by name. Raises ConfigError where the macro cannot hold a layer."""
    return {node.name: Plan.make(node.name, Geometry.from_dict(node.attrs["geometry"]), macro) for node in graph.convs()}


def rewrite(network: Network, macro: Macro) -> Network:
    """A copy of the network with a ReadLayer for each convolution and linear layer, not calibrated yet."""
    network = copy.deepcopy(network)
    for name, plan in plans(network.graph, macro).items():
        conv = network.layer(name)
        network.set_layer(name, ReadLayer(plan, conv.weight, conv.bias))
    return network


def read_layers(network: Network) -> dict[str, ReadLayer]:
    """The layers on the macro, by name."""
    return {node.name: network.layer(node.name) for node in network.graph.convs()}
