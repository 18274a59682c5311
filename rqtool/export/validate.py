"""Own checks of a file that rqtool wrote: the ONNX checker does not notice a missing function
attribute, nor a changed weight.

graph        checker, strict shape inference, every ai.rqtool node has its function, inputs and attributes
document     schema, sha256 of every initializer, one layer per reads node, the rows that its graph gathers
ADC          thresholds follow from mult, shift and zero; the tensors that the graph uses hold the same mult and zero, or the same
             thresholds and levels;
             the float32 form that QLinearConv computes gives every code of every partial sum
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto

from rqtool.errors import CheckError, InputError, escaped
from rqtool.export import metadata
from rqtool.export.emit import DOMAIN
from rqtool.export.layout import by_read, differing_codes, gathered, thresholds_by_read
from rqtool.hardware import adc
from rqtool.hardware.converter import Ideal, Levels, Uniform
from rqtool.mapping.plan import Geometry
from rqtool.storage import read_file

CONSTANT_ROLES = {"mult": "adc_mult", "zero": "adc_zero"}


def load_onnx(path: str | Path) -> ModelProto:
    """The parsed model of a file; nothing in it is executed. Raises InputError where it cannot be
    read, is no ONNX file, or keeps tensors in other files (rqtool never writes those)."""
    data = read_file(path)
    try:
        model = ModelProto.FromString(data)
    except (DecodeError, ValueError) as e:
        raise InputError(
            f"{escaped(path)}: is not an ONNX file, or is damaged; give a file "
            "that rqtool export wrote"
        ) from e
    if any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        raise InputError(
            f"{escaped(path)}: keeps tensors in other files, which are not read; "
            "give a file that rqtool export wrote"
        )
    return model


def validate(model: ModelProto) -> dict[str, Any]:
    """The metadata document of a file whose graph, document and constants agree.

    Raises InputError where the model is not one that rqtool wrote, CheckError naming the first
    thing that differs.
    """
    doc = metadata.read(model)
    try:
        check_graph(model)
        nodes, constants = _reads_nodes(model, doc), metadata.constants_of(model)
        _check_constants(doc, constants)
        for layer in doc["layers"]:
            _check_layer(doc, layer, nodes[layer["node"]], constants)
        _check_kept(doc)
        if metadata.graph_sha256(model) != doc["graph_sha256"]:
            differs("the sha256 of the graph's nodes is not the one in the metadata")
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as e:  # parts that are well-formed one by one, but not together
        differs(f"the graph and the metadata contradict each other ({e})")
    return doc


def differs(what: str) -> NoReturn:
    raise CheckError(f"{escaped(what)}; the file is not what rqtool export wrote, export it again")


# -- the graph -------------------------------------------------------------------------------------
def check_graph(model: ModelProto) -> None:
    """Raise CheckError where the graph is not valid ONNX, or calls a function without all that the
    function declares."""
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        differs(f"the graph is not valid ONNX, {str(e).splitlines()[0]}")
    functions = {f.name: f for f in model.functions if f.domain == DOMAIN}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            _check_call(node, functions.get(node.op_type))


def _check_call(node: NodeProto, function: onnx.FunctionProto | None) -> None:
    if function is None:
        differs(f"node {node.name} calls {node.op_type}, which the file does not define")
    if len(node.input) != len(function.input):
        differs(
            f"node {node.name} gives {node.op_type} {len(node.input)} inputs, "
            f"not {len(function.input)}"
        )
    given, wanted = sorted(a.name for a in node.attribute), sorted(function.attribute)
    if given != wanted:
        differs(
            f"node {node.name} gives {node.op_type} the attributes "
            f"{', '.join(given) or 'none'}, not {', '.join(wanted) or 'none'}"
        )


# -- the document ----------------------------------------------------------------------------------
def _reads_nodes(model: ModelProto, doc: dict[str, Any]) -> dict[str, NodeProto]:
    """The reads nodes by name, which must be those of the document."""
    nodes = {
        n.name: n
        for n in model.graph.node
        if n.domain == DOMAIN and n.op_type.startswith(("ReConv", "ReLinear"))
    }
    described = [layer["node"] for layer in doc["layers"]]
    if sorted(nodes) != sorted(described):
        differs(
            f"the metadata describes the reads nodes {', '.join(described)}, but "
            f"the graph has {', '.join(nodes)}"
        )
    return nodes


def _check_constants(doc: dict[str, Any], constants: dict[str, np.ndarray]) -> None:
    if sorted(constants) != sorted(doc["constants"]):
        odd = sorted(set(constants) ^ set(doc["constants"]))
        differs(
            f"initializer {odd[0]} is only in "
            f"{'the graph' if odd[0] in constants else 'the metadata'}"
        )
    for name, array in constants.items():
        if metadata.sha256(array) != doc["constants"][name]:
            differs(f"the sha256 of initializer {name} is not the one in the metadata")


def _check_layer(
    doc: dict[str, Any], layer: dict[str, Any], node: NodeProto, constants: dict[str, np.ndarray]
) -> None:
    name, weight = layer["layer"], layer["weight"]
    if node.metadata_props and metadata.entry(node, f"node {escaped(node.name)}") != metadata.short(
        doc, layer
    ):
        differs(f"{name}: the copy of the metadata at its node is not the document's")
    if weight["tensor"] not in node.input or doc["constants"][weight["tensor"]] != weight["sha256"]:
        differs(f"{name}: its cells are not the tensor that the metadata names")
    if (node.input[0], node.output[0]) != (layer["input"]["tensor"], layer["acc"]["tensor"]):
        differs(
            f"{name}: its node reads {node.input[0]} and writes "
            f"{node.output[0]}, not {layer['input']['tensor']} and "
            f"{layer['acc']['tensor']}"
        )
    _check_geometry(layer, {a.name: list(a.ints) or a.i for a in node.attribute}, constants)
    if "macro" in layer:
        _check_macro(layer)
    CHECKS[layer["adc"]["kind"]](layer, node, constants)


def _check_macro(layer: dict[str, Any]) -> None:
    """What a layer's own macro says of it is what the layer says itself."""
    fields = layer["macro"]["fields"]
    pairs = {
        "wl": layer["rows"]["wordlines"],
        "io": layer["io"],
        "in_bits": layer["input"]["bits"],
        "w_bits": layer["weight"]["bits"],
        "adc_bits": layer["adc"]["bits"],
    }
    for name, described in pairs.items():
        if fields[name] != described:
            differs(f"{layer['layer']}: its macro has {name} {fields[name]}, the layer {described}")


def _check_kept(doc: dict[str, Any]) -> None:
    """What is kept off the macro are layers without an ADC."""
    ideal = {layer["layer"] for layer in doc["layers"] if layer["adc"]["kind"] == "ideal"}
    for row in doc.get("layers_off_macro", []):
        if row["layer"] not in ideal:
            differs(f"{row['layer']} is kept off the macro, but is no layer without an ADC")


def _check_geometry(
    layer: dict[str, Any], attributes: dict[str, Any], constants: dict[str, np.ndarray]
) -> None:
    """Strides, padding and sizes of the document are those that the node has."""
    g, weight, taken, (top, left) = (
        layer["geometry"],
        layer["weight"],
        layer["rows"]["taken"],
        layer["geometry"]["padding"],
    )
    pads = (
        attributes["pads"]
        if "pads" in attributes
        else constants[f"{layer['node']}/code_pads"][[2, 3, 6, 7]].tolist()
    )
    reads = (
        g["groups"]
        * len(weight["first_channel"])
        * len(weight["planes"]["factor"])
        * (layer["columns"] // g["groups"])
    )
    pairs = {
        "stride": (g["stride"], attributes["strides"]),
        "dilation": (g["dilation"], attributes["dilations"]),
        "padding": ([top, left, top, left], pads),
        "padding code": (
            layer["input"]["zero"] if any(g["padding"]) else 0,
            attributes.get("pad_code", 0),
        ),
        "number of tiles": (g["groups"] * len(weight["first_channel"]), attributes["group"]),
        "number of columns": ([g["columns"], layer["columns"]], [attributes["acc_shape"][1]] * 2),
        "shape of the cells": (
            [reads, weight["span"], *(g["kernel"] if taken is None else [1, 1])],
            list(constants[weight["tensor"]].shape),
        ),
    }
    for what, (described, built) in pairs.items():
        if described != built:
            differs(
                f"{layer['layer']}: the {what} is {described} in the metadata, but "
                f"{built} in the graph"
            )
    _check_rows(layer, constants)


def _check_rows(layer: dict[str, Any], constants: dict[str, np.ndarray]) -> None:
    """The rows that meet in each tile of the document are those that the graph gathers."""
    name, weight, taken, g = (
        layer["layer"],
        layer["weight"],
        layer["rows"]["taken"],
        Geometry.from_dict(layer["geometry"]),
    )
    if layer["rows"]["count"] != g.rows or (
        taken is not None and sorted(taken) != list(range(g.rows))
    ):
        differs(f"{name}: its rows are not each of {g.rows} once")
    last = g.rows // (1 if taken else prod(g.kernel)) - weight["span"]
    if max(weight["first_channel"]) > last:
        differs(
            f"{name}: a tile begins at channel {max(weight['first_channel'])} of "
            f"its group, but the last one that can is {last}"
        )
    expected = gathered(g, weight["first_channel"], weight["span"], taken)
    if not np.array_equal(
        expected, constants.get(f"{layer['node']}/channels", np.arange(expected.size))
    ):
        differs(f"{name}: the channels that its graph gathers are not those of the metadata")


def _check_uniform(
    layer: dict[str, Any], node: NodeProto, constants: dict[str, np.ndarray]
) -> None:
    name, spec, steps = layer["layer"], layer["adc"], layer["adc"]["steps"]
    attributes = {a.name: a.i for a in node.attribute}
    if (attributes["adc_shift"], attributes["adc_top"]) != (spec["shift"], spec["top"]):
        differs(
            f"{name}: its node has adc_shift {attributes['adc_shift']} and "
            f"adc_top {attributes['adc_top']}, the metadata {spec['shift']} and "
            f"{spec['top']}"
        )
    pairs = list(zip(steps["mult"], steps["zero"]))
    if steps != metadata.steps(pairs, spec["shift"], spec["top"]):
        differs(f"{name}: the thresholds in the metadata do not follow from mult, shift and zero")
    for role, suffix in CONSTANT_ROLES.items():
        if not np.array_equal(_expanded(layer, role), constants[f"{layer['node']}/{suffix}"]):
            differs(
                f"{name}: the tensor {layer['node']}/{suffix} is not the {role} of the metadata"
            )
    if layer["body"] == "qlinear":
        _check_requantisation(layer, np.array(pairs, np.int64))


def _check_ideal(layer: dict[str, Any], node: NodeProto, constants: dict[str, np.ndarray]) -> None:
    """It has no tensors."""


def _check_levels(layer: dict[str, Any], node: NodeProto, constants: dict[str, np.ndarray]) -> None:
    thresholds = thresholds_by_read(np.array(layer["adc"]["thresholds"]), *_counts(layer))
    for role, described in {
        "thresholds": thresholds,
        "levels": np.array(layer["adc"]["levels"]),
    }.items():
        if not np.array_equal(described, constants[f"{layer['node']}/{role}"]):
            differs(
                f"{layer['layer']}: the tensor {layer['node']}/{role} is not the "
                f"{role} of the metadata"
            )


CHECKS = {Ideal.kind: _check_ideal, Uniform.kind: _check_uniform, Levels.kind: _check_levels}


def _check_requantisation(layer: dict[str, Any], pairs: np.ndarray) -> None:
    """Enumerate the float32 form, after the bounds within which it can be exact (they also keep the
    enumeration finite)."""
    name, spec, (lo, hi) = layer["layer"], layer["adc"], p_range(layer)
    if not adc.float32_exact(max(-lo, hi), spec["shift"], spec["top"].bit_length()):
        differs(
            f"{name}: its partial sums, {lo}..{hi}, are beyond what float32 "
            f"keeps exact at shift {spec['shift']}"
        )
    wrong = differing_codes(pairs, (lo, hi), spec["shift"], spec["top"])
    if wrong:
        differs(
            f"{name}: {wrong} partial sums get another code from QLinearConv "
            "than from the thresholds"
        )


def _expanded(layer: dict[str, Any], role: str) -> np.ndarray:
    """What the tensor of mult or zero must hold, from the document's tables."""
    return by_read(
        np.array(layer["adc"]["steps"][role])[np.array(layer["adc"]["step_of"])], *_counts(layer)
    )


def _counts(layer: dict[str, Any]) -> tuple[int, int, int, int]:
    """Groups, tiles of one, weight planes, and columns: what the reads of a layer run over."""
    weight = layer["weight"]
    return (
        layer["geometry"]["groups"],
        len(weight["first_channel"]),
        len(weight["planes"]["factor"]),
        layer["columns"],
    )


def p_range(layer: dict[str, Any]) -> tuple[int, int]:
    """The smallest and largest partial sum of a layer's reads."""
    return min(layer["reads"]["p_min"]), max(layer["reads"]["p_max"])


def enumerated(layer: dict[str, Any]) -> int:
    """How many (partial sum, step) pairs of a layer were tried."""
    lo, hi = p_range(layer)
    return (hi - lo + 1) * len(layer["adc"]["steps"]["mult"]) if layer["body"] == "qlinear" else 0
