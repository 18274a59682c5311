"""The metadata document `rqtool.reram/1`: everything a compiler or a test bench needs to know about
the reads of a file.

It stands, as JSON, in the model's `metadata_props` (that copy counts) and shortened at each reads
node (optimisers drop those). docs/metadata.md explains every field; examples/read_metadata.py
reproduces every code with nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import (
    ModelProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from rqtool import __version__
from rqtool.errors import InputError
from rqtool.export.layout import Layout
from rqtool.export.schema import FORMAT, validate_schema
from rqtool.hardware import adc
from rqtool.hardware.converter import Converter, Ideal, Levels, Uniform
from rqtool.hardware.macro import Macro
from rqtool.program.ir import Op, Program, Tensor

ROW_ORDER = ["channel", "ky", "kx"]
CELL_LAYOUT = ["group", "tile", "plane", "column", *ROW_ORDER]
PLACE_LAYOUT = [*CELL_LAYOUT[:4], "place"]


def sha256(array: np.ndarray) -> str:
    """The digest of an array: its type, its shape and its bytes, little-endian in C order."""
    plain = np.ascontiguousarray(array)
    little = plain.astype(plain.dtype.newbyteorder("<"))
    return hashlib.sha256(
        f"{plain.dtype.name} {list(plain.shape)} ".encode() + little.tobytes()
    ).hexdigest()


def document(
    program: Program,
    body: str,
    layouts: dict[str, tuple[Layout, str]],
    constants: dict[str, np.ndarray],
) -> dict[str, Any]:
    """The document of a file, but for the digest of the graph that `attach` adds.

    body: what was asked for; layouts: per reads operation its layout and the body that its function
    has; constants: the initializers of the file by name, those of an operation named
    "operation/role".
    """
    macro, kept = program.macro, program.layers_off_macro()
    return {
        "format": FORMAT,
        "tool": {"name": "rqtool", "version": __version__},
        "body": body,
        "macro": {"preset": program.meta.get("preset"), **_macro(macro)},
        **({"layers_off_macro": kept} if kept else {}),
        "program": {"sha256": program.sha256(), "meta": program.meta},
        "input": _tensor(program.tensors[program.input]),
        "output": {
            **_tensor(program.tensors[program.output]),
            "scale": program.meta.get("output_scale"),
        },
        "constants": {name: sha256(array) for name, array in sorted(constants.items())},
        "layers": [_layer(layout, form) for layout, form in layouts.values()],
    }


def _macro(macro: Macro) -> dict[str, Any]:
    return {"sha256": macro.sha256(), "fields": macro.to_dict()}


def _tensor(t: Tensor) -> dict[str, Any]:
    return {"tensor": t.name, "dtype": t.dtype, "shape": list(t.shape), "lo": t.lo, "hi": t.hi}


def _layer(layout: Layout, form: str) -> dict[str, Any]:
    op, g, macro = layout.op, layout.geometry, layout.macro
    starts = range(0, g.group_columns, macro.io)
    return {
        "layer": op.attrs["layer"],
        "node": op.name,
        "kind": g.kind,
        "body": form,
        **({"macro": _macro(macro)} if macro != layout.program.macro else {}),
        "geometry": g.to_dict(),
        "rows": {
            "order": ROW_ORDER,
            "count": g.rows,
            "wordlines": macro.wl,
            "taken": layout.plan.order and list(layout.plan.order),
        },
        "columns": g.columns,
        "io": macro.io,
        "io_ranges": [[c, min(c + macro.io, g.group_columns)] for c in starts],
        "input": _input(layout),
        "weight": _weight(layout),
        "adc": _adc(layout),
        "reads": _reads(layout),
        "acc": _acc(layout),
        "requant": [
            _requant(layout.program, other)
            for other in layout.program.ops
            if other.kind == "requant" and op.output in other.inputs
        ],
    }


def _input(layout: Layout) -> dict[str, Any]:
    planes, pad = layout.plan.input_planes, layout.op.attrs["pad"]
    columns = {
        "factor": [p.factor for p in planes],
        "shift": [p.shift for p in planes],
        "bits": [p.bits for p in planes],
    }
    return {
        "tensor": layout.op.inputs[0],
        "bits": layout.macro.in_bits,
        "signed": pad != 0,
        "zero": pad,
        "planes": columns,
    }


def _weight(layout: Layout) -> dict[str, Any]:
    macro, planes = layout.macro, layout.plan.weight_planes
    columns = {
        key: [getattr(p, key) for p in planes] for key in ("factor", "shift", "bits", "part")
    }
    return {
        "tensor": f"{layout.op.name}/cells", "layout": PLACE_LAYOUT if layout.ordered else CELL_LAYOUT, "bits": macro.w_bits, "sign_scheme": macro.sign_scheme, "cell_bits": macro.cell_bits,
        "offset": macro.weight_offset, "zero_point": layout.cell_zero or 0, "span": layout.span, "first_channel": list(layout.first_channel),
        "planes": columns, "sha256": sha256(layout.cells),
    }  # fmt: skip


# -- the ADC ---------------------------------------------------------------------------------------
def _adc(layout: Layout) -> dict[str, Any]:
    macro, kind = layout.macro, type(layout.adc)
    common = {
        "kind": kind.kind, "bits": macro.adc_bits, "codebook": None if kind.exact else macro.codebook, "shift": None, "top": None, "tie_free": True,
        "steps": None, "step_of": None, "gain": None, "thresholds": None, "levels": None,
    }  # fmt: skip
    return common | ENTRIES[kind](layout)


def _ideal(layout: Layout) -> dict[str, Any]:
    return {}


def _levels(layout: Layout) -> dict[str, Any]:
    one = layout.adc
    return {
        "top": one.top,
        "thresholds": one.thresholds.tolist(),
        "levels": one.levels.tolist(),
    }


def _uniform(layout: Layout) -> dict[str, Any]:
    shift, top = layout.adc.shift, layout.adc.top
    pairs = [(int(m), int(z)) for m, z in layout.steps]
    tie_free = all(m % 2 for m, _ in pairs) and max(abs(p) for p in layout.p_range) < 1 << (
        shift - 1
    )
    return {
        "shift": shift, "top": top, "tie_free": tie_free, "steps": steps(pairs, shift, top), "step_of": _step_of(layout, pairs),
        "gain": layout.adc.gain.tolist(),
    }  # fmt: skip


ENTRIES: dict[type[Converter], Callable[[Layout], dict[str, Any]]] = {
    Ideal: _ideal,
    Uniform: _uniform,
    Levels: _levels,
}


def steps(pairs: list[tuple[int, int]], shift: int, top: int) -> dict[str, Any]:
    """The distinct (mult, zero) of a layer, in columns, with what follows from each: thresholds,
    clip bounds, the step for people.

    >>> steps([(8191, 2)], 15, 3)
    {'mult': [8191], 'zero': [2], 'thresholds': [[-6, -2, 3]], 'clip_lo': [-10], 'clip_hi': [6], 'step': [4.00049]}
    """
    thresholds = [adc.uniform_thresholds(m, shift, z, top) for m, z in pairs]
    sizes = [float(f"{(1 << shift) / m:.6g}") for m, _ in pairs]
    clips = [adc.clip_bounds(t, size) for t, size in zip(thresholds, sizes)]
    return {
        "mult": [m for m, _ in pairs], "zero": [z for _, z in pairs], "thresholds": [list(t) for t in thresholds],
        "clip_lo": [lo for lo, _ in clips], "clip_hi": [hi for _, hi in clips], "step": sizes,
    }  # fmt: skip


def _step_of(layout: Layout, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Which of the distinct steps each read uses: [tiles or 1][columns or 1]."""
    index = {pair: n for n, pair in enumerate(pairs)}
    mult, zero = np.broadcast_arrays(layout.adc.mult, layout.adc.zero)
    return [[index[pair] for pair in zip(m, z)] for m, z in zip(mult.tolist(), zero.tolist())]


# -- reads and what follows ------------------------------------------------------------------------
def _reads(layout: Layout) -> dict[str, list[Any]]:
    """One entry per tile, input plane, weight plane and group, in this order (the last runs
    fastest), for all columns of the group."""
    plan, width = layout.plan, layout.geometry.group_columns
    rows = []
    for t, (start, stop) in enumerate(plan.tiles):
        for i, a in enumerate(plan.input_planes):
            for j, b in enumerate(plan.weight_planes):
                lo, hi = plan.p_bounds(i, j)
                for g in range(layout.geometry.groups):
                    rows.append(
                        (
                            t,
                            i,
                            j,
                            g,
                            b.part,
                            b.shift,
                            a.factor * b.factor,
                            start,
                            stop,
                            g * width,
                            (g + 1) * width,
                            lo,
                            hi,
                        )
                    )
    names = (
        "tile",
        "serial",
        "plane",
        "group",
        "polarity",
        "slice",
        "factor",
        "row_start",
        "row_stop",
        "col_start",
        "col_stop",
        "p_min",
        "p_max",
    )
    return {name: list(column) for name, column in zip(names, zip(*rows))}


def _acc(layout: Layout) -> dict[str, Any]:
    """scale: the real value of one unit of each column (or of all of them), where the program's
    meta knows it."""
    name = layout.op.output
    scale = layout.program.meta.get("scales", {}).get(name)
    return {
        "tensor": name,
        "bits": 32,
        "bound": layout.plan.acc_bound,
        "scale": None if scale is None else list(np.atleast_1d(scale).tolist()),
    }


def _requant(program: Program, op: Op) -> dict[str, Any]:
    mults = [f"{op.name}/mult{n}" for n in range(len(op.inputs))]
    numbers = {key: op.attrs[key] for key in ("shift", "lo", "hi")}
    return {
        "node": op.name,
        **numbers,
        "add": f"{op.name}/add",
        "mult": mults,
        "inputs": list(op.inputs),
        "output": op.output,
    }


# -- in and out of a model -------------------------------------------------------------------------
def short(doc: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """The copy that stands at the node of a layer: enough to recognise it, and to find the rest."""
    group_columns = layer["columns"] // layer["geometry"]["groups"]
    return {
        "format": doc["format"], "layer": layer["layer"], "macro_sha256": layer.get("macro", doc["macro"])["sha256"], "wordlines": layer["rows"]["wordlines"], "io": layer["io"],
        "adc": {key: layer["adc"][key] for key in ("kind", "bits", "codebook", "shift", "top")}, "weight_sha256": layer["weight"]["sha256"],
        "reads_per_position": len(layer["reads"]["tile"]) * group_columns,
    }  # fmt: skip


def graph_sha256(model: ModelProto) -> str:
    """The digest of what the graph does: nodes, functions, and the names and types of its tensors;
    documentation is left out."""
    functions = [
        (f.name, list(f.input), list(f.output), list(f.attribute), [_node(n) for n in f.node])
        for f in model.functions
    ]
    types = [
        _typed(v)
        for values in (model.graph.input, model.graph.output, model.graph.value_info)
        for v in values
    ]
    opsets = sorted((o.domain, o.version) for o in model.opset_import)
    return hashlib.sha256(
        repr(([_node(n) for n in model.graph.node], functions, types, opsets)).encode()
    ).hexdigest()


def _typed(value: ValueInfoProto) -> tuple[Any, ...]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]


def _node(node: NodeProto) -> tuple[Any, ...]:
    attributes = sorted(
        (a.name, a.type, a.ref_attr_name or _plain(helper.get_attribute_value(a)))
        for a in node.attribute
    )
    return node.domain, node.op_type, node.name, list(node.input), list(node.output), attributes


def _plain(value: Any) -> str:
    """An attribute's value as text; a tensor by its digest."""
    return (
        sha256(numpy_helper.to_array(value))
        if isinstance(value, TensorProto)
        else repr(list(value) if hasattr(value, "__len__") else value)
    )


def attach(model: ModelProto, doc: dict[str, Any]) -> None:
    """Write the document into the model with the digest of its graph, and its short copies to the
    nodes."""
    doc["graph_sha256"] = graph_sha256(model)
    _write(model.metadata_props, doc)
    nodes = {node.name: node for node in model.graph.node}
    for layer in doc["layers"]:
        _write(nodes[layer["node"]].metadata_props, short(doc, layer))


def _write(props: Any, data: dict[str, Any]) -> None:
    props.append(
        StringStringEntryProto(
            key=FORMAT, value=json.dumps(data, separators=(",", ":"), allow_nan=False)
        )
    )


def entry(holder: ModelProto | NodeProto, what: str) -> Any:
    """The parsed JSON that a model or a node carries under `rqtool.reram/1`; raises InputError
    where there is none."""
    texts = [p.value for p in holder.metadata_props if p.key == FORMAT]
    if len(texts) != 1:
        raise InputError(
            f"{what} has {len(texts) or 'no'} metadata {FORMAT}; give a file "
            "that rqtool export wrote and nothing has rewritten"
        )
    try:
        return json.loads(texts[0])
    except (ValueError, RecursionError) as e:
        raise InputError(
            f"{what} has metadata {FORMAT} that is not JSON; export the file again"
        ) from e


def read(model: ModelProto) -> dict[str, Any]:
    """The checked document of a model; raises InputError where it is absent, damaged or does not
    follow the schema."""
    doc = entry(model, "the model")
    validate_schema(doc)
    return doc


def constants_of(model: ModelProto) -> dict[str, np.ndarray]:
    """The initializers of a model by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
