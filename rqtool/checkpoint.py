"""The .rq file: a network, its integer program and everything said about them, in one safetensors
file. No pickle.

tensors   program/NAME    integer constants of the program
          network/NAME    the trained network's parameters and buffers, so that training and re-freezing can go on
document  tool, macro, program, graph, peaks, preprocess, classes, recipe, results
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rqtool import __version__
from rqtool.errors import InputError, RqError, escaped
from rqtool.hardware.macro import Macro
from rqtool.mapping.assign import Macros, assigned
from rqtool.mapping.plan import Geometry
from rqtool.model.data import Preprocess
from rqtool.model.graph import Graph, Node
from rqtool.model.network import Network
from rqtool.program.ir import Program
from rqtool.program.prove import Broken, geometry, prove, wholes
from rqtool.storage import load_tensors, save_tensors
from rqtool.train.layers import ReadLayer
from rqtool.train.rewrite import column_norm


@dataclass
class Checkpoint:
    """What a .rq file holds. peaks: the largest magnitude of each value of the graph on calibration
    images (grids come from it); results: the closing figures of `quantize`, as JSON data."""

    macro: Macro
    network: Network
    program: Program
    peaks: dict[str, float]
    preprocess: Preprocess
    classes: int
    recipe: dict[str, Any]
    results: dict[str, Any]

    @property
    def macros(self) -> Macros:
        """The macro of every layer."""
        return Macros(self.macro, self.program.own, self.program.digital)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write atomically. Raises ConfigError where the file exists and force is off, StorageError
        where it cannot be written."""
        document = {
            "tool": f"rqtool {__version__}", "macro": self.macro.to_dict(), "program": self.program.to_json(), "graph": self.network.graph.to_json(),
            "peaks": self.peaks, "preprocess": self.preprocess.to_dict(), "classes": self.classes, "recipe": self.recipe, "results": self.results,
        }  # fmt: skip
        tensors = {f"program/{name}": a for name, a in self.program.constants.items()}
        tensors |= {
            f"network/{name}": t.detach().numpy() for name, t in self.network.state_dict().items()
        }
        save_tensors(path, tensors, document, force)


def load(path: str | Path) -> Checkpoint:
    """The checkpoint of a .rq file. Raises InputError where it is not one, or damaged."""
    tensors, document = load_tensors(path)
    try:
        return _build(tensors, document)
    except InputError as e:
        raise InputError(f"{escaped(path)}: {e}") from e
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        RqError,
    ) as e:
        raise InputError(
            f"{escaped(path)}: its parts do not fit together ({escaped(e)}); make the file again"
        ) from e


def _build(tensors: dict[str, np.ndarray], document: dict[str, Any]) -> Checkpoint:
    if "kind" in document:
        raise InputError(
            f"holds a {escaped(document['kind'])} (--state); give the .rq file "
            "that was written at the end"
        )
    parts: dict[str, dict[str, np.ndarray]] = {"program": {}, "network": {}}
    for name, array in tensors.items():
        room, _, rest = name.partition("/")
        parts[room][rest] = array
    macro, graph = Macro(**document["macro"]), Graph.from_json(document["graph"])
    program = Program.from_json(
        document["program"], _with_rows(document["program"], parts["program"])
    )
    macros = Macros(macro, program.own, program.digital)
    network = build_network(
        graph, macros, {name: torch.from_numpy(np.array(a)) for name, a in parts["network"].items()}
    )
    prove(program)
    _check_network(graph, program)
    return Checkpoint(
        macro,
        network,
        program,
        document["peaks"],
        Preprocess.from_dict(document["preprocess"]),
        document["classes"],
        document["recipe"],
        document["results"],
    )


def _with_rows(program: dict[str, Any], constants: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The constants of a program; a file from before columns had thresholds of their own has them
    without the axis of the columns."""
    names = {op["consts"]["thresholds"] for op in program["ops"] if "thresholds" in op["consts"]}
    return {
        name: np.atleast_2d(array) if name in names else array for name, array in constants.items()
    }


def _check_network(graph: Graph, program: Program) -> None:
    """Refuse a graph whose layers or shapes are not the program's: what `plan` and re-freezing
    would read from it."""
    try:
        layers = {node.name: geometry(node.attrs["geometry"]) for node in graph.convs()}
        for node in graph.nodes:
            wholes(node.shape, len(node.shape), 1, f"the shape of {node.name}")
    except Broken as e:
        raise InputError(f"the network is broken: {escaped(e)}; make the file again") from e
    reads = {op.attrs["layer"]: geometry(op.attrs["geometry"]) for op in program.reads()}
    if layers != reads or tuple(graph.input_shape) != program.tensors[program.input].shape:
        raise InputError(
            "the network and the integer program are not the same; make the file again"
        )


def build_network(graph: Graph, macro: Macro | Macros, state: dict[str, torch.Tensor]) -> Network:
    """A network of ReadLayers and batch norms with the given state (names as in
    `Network.state_dict`)."""
    macros = assigned(macro)
    network = Network(
        graph, {n.name: _module(graph, n, macros, state) for n in graph.nodes if n.module}
    )
    ideal = tuple(_prefix(n) for n in graph.convs() if macros.of(n.name).ideal)
    network.load_state_dict(
        {k: v for k, v in state.items() if not _of_adc(k) or not k.startswith(ideal)}
    )
    return network.eval()


def _prefix(node: Node) -> str:
    """What the names of a node's parameters begin with."""
    return f"layers.{node.module.replace('.', '/')}."


ADC_STATE = ("log_step", "zero", "real_zero", "thresholds", "levels", "unit", "log_gaps")


def _of_adc(name: str) -> bool:
    """Whether a state name belongs to a layer's ADC (and has no place in a network with an ideal
    one)."""
    path = name.split(".")  # layers, the layer's key (which has no dots), and what it holds
    return len(path) == 3 and path[-1] in ADC_STATE


def _module(graph: Graph, node: Node, macros: Macros, state: dict[str, torch.Tensor]) -> nn.Module:
    prefix = _prefix(node)
    if node.op == "batch_norm":
        rank = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(node.shape)]
        return rank(
            node.attrs["features"],
            eps=node.attrs["eps"],
            momentum=node.attrs["momentum"],
            affine=prefix + "weight" in state,
        )
    plan = macros.plan(node.name, Geometry.from_dict(node.attrs["geometry"]))
    weight, bias = (state.get(prefix + role) for role in ("weight", "bias"))
    norm = (
        column_norm(graph, node.name) if prefix + "norm.weight" in state else None
    )  # an older file's layers have none
    return ReadLayer(plan, nn.Parameter(weight), None if bias is None else nn.Parameter(bias), norm)
