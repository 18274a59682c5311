"""The ONNX file of an integer program: one node per operation, one model-local function per kind of
node, standard operators inside.

    reads       ai.rqtool::ReConv, ai.rqtool::ReLinear    bodies.py
    requant     ai.rqtool::Requant, with several inputs ai.rqtool::RequantAdd
    quantize    ai.rqtool::Quantize
    xsum        ai.rqtool::InputSum
    sumpool     ai.rqtool::GlobalSumPool, ai.rqtool::SumPool
    maxpool     MaxPool on uint8, ai.rqtool::WindowMax on int32 (onnxruntime has no int32 kernel)
    the rest    Reshape, Transpose, Concat, Pad, Slice

Every tensor of the program keeps its name, type and integers. docs/onnx.md has one section per
function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from rqtool.errors import ConfigError, InputError, escaped, suggestion
from rqtool.export import metadata
from rqtool.export.bodies import CONV_ATTRIBUTES, write_reads
from rqtool.export.emit import (
    DOMAIN,
    DOMAIN_VERSION,
    DTYPES,
    IR_VERSION,
    OPSET,
    Body,
    Int,
    Library,
    Ref,
)
from rqtool.export.layout import Layout
from rqtool.mapping.plan import Geometry
from rqtool.program.ir import Op, Program, Tensor, check, is_wide, requant_peak

XY = ("x", "y")
FORMS = ("qlinear", "explicit")
MAX_FLOOR_SHIFT = 30  # a requant's sum lies within 2**30: every larger shift gives the same -1 or 0


class Graph:
    """The main graph under construction: nodes, initializers, and the functions they call."""

    def __init__(self, program: Program, form: str):
        self.program, self.form = program, form
        self.body = Body("/")
        self.library = Library()
        self.initializers: dict[str, np.ndarray] = {}
        self.layouts: dict[
            str, tuple[Layout, str]
        ] = {}  # of each reads operation, with the body its function has

    def constant(self, op: Op, role: str, array: np.ndarray) -> str:
        """An initializer that belongs to one operation."""
        name = f"{op.name}/{role}"
        self.initializers[name] = array
        return name

    def call(self, op: Op, function: str, inputs: list[str], **attributes: Any) -> str:
        """A function node; the name of its output."""
        output = self.body.fresh(f"{op.name}/y")
        self.body.append(function, tuple(inputs), output, DOMAIN, **attributes).name = op.name
        return output

    def plain(self, op: Op, kind: str, *inputs: str, **attributes: Any) -> str:
        """A standard node."""
        output = self.body.node(kind, *inputs, out=f"{op.name}/y", **attributes)
        self.body.nodes[-1].name = op.name
        return output

    def add(self, op: Op) -> None:
        """The nodes of one operation, ending in the tensor of its name and type."""
        value, dtype = RULES[op.kind](self, op)
        wanted = self.program.tensors[op.output].dtype
        last = self.body.nodes[-1]
        if dtype == wanted:
            last.output[0] = op.output
        else:
            self.body.append("Cast", (value,), op.output, to=DTYPES[wanted])

    def tensor(self, name: str) -> Tensor:
        return self.program.tensors[name]


Value = tuple[str, str]  # name and type of what a rule has made


def _reads(graph: Graph, op: Op) -> Value:
    layout = Layout(graph.program, op)
    name, writer = write_reads(layout, graph.form, graph.library)
    graph.layouts[op.name] = layout, writer.form
    inputs = [graph.constant(op, role, array) for role, array in writer.inputs.items()]
    return graph.call(op, name, [op.inputs[0], *inputs], **writer.attributes), "int32"


def _xsum(graph: Graph, op: Op) -> Value:
    """Sums of input codes by a ConvInteger with ones, one channel per group, repeated for the
    columns of the group."""
    if graph.tensor(op.inputs[0]).dtype != "uint8":
        raise InputError(
            f"{escaped(op.name)}: sums of input codes need a uint8 tensor, not "
            f"{graph.tensor(op.inputs[0]).dtype}; requantise the input first"
        )
    g, body = (
        Geometry.from_dict(op.attrs["geometry"]),
        Body(given=[*XY, "code_pads", "ones", "column_group"]),
    )
    (ph, pw), columns = g.padding, op.attrs["columns"]
    x = body.node(
        "Pad", "x", "code_pads", body.attribute("pad_code", TensorProto.UINT8), out="padded"
    )
    refs = {
        name: Ref(name, AttributeProto.INT if name == "group" else AttributeProto.INTS)
        for name in CONV_ATTRIBUTES
    }
    sums = body.node(
        "ConvInteger", x, "ones", body.const(0, np.uint8), body.const(0, np.uint8), **refs
    )
    body.append("Gather", (sums, "column_group"), "y", axis=1)
    attributes = {
        "strides": g.stride,
        "dilations": g.dilation,
        "group": g.groups,
        "pad_code": op.attrs["pad"],
    }
    doc = (
        "The sum of the input codes under a kernel, for every column: what "
        "weights with an offset have to take off."
    )
    name = graph.library.intern(
        "InputSum", ["x", "code_pads", "ones", "column_group"], "y", body, list(attributes), doc
    )
    pads = graph.constant(op, "code_pads", np.array([0, 0, ph, pw, 0, 0, ph, pw]))
    ones = graph.constant(
        op, "ones", np.ones((g.groups, g.channels // g.groups, *g.kernel), np.uint8)
    )
    repeat = graph.constant(op, "column_group", np.repeat(np.arange(g.groups), columns // g.groups))
    return graph.call(op, name, [op.inputs[0], pads, ones, repeat], **attributes), "int32"


def _quantize(graph: Graph, op: Op) -> Value:
    body = Body(given=XY)
    scale = body.node("Constant", out="scale", value_float=Ref("scale", AttributeProto.FLOAT))
    shifted = body.node("Add", body.node("Mul", "x", scale), body.const(0.5, np.float32))
    bounds = [body.attribute(end, TensorProto.FLOAT) for end in ("lo", "hi")]
    body.append(
        "Cast",
        (body.node("Clip", body.node("Floor", shifted), *bounds),),
        "y",
        to=TensorProto.INT32,
    )
    doc = (
        "clamp(floor(x * scale + 1/2), lo, hi); scale is a power of two, so "
        "nothing is rounded before the floor."
    )
    attributes = {"scale": 2.0 ** op.attrs["exponent"], "lo": op.attrs["lo"], "hi": op.attrs["hi"]}
    name = graph.library.intern("Quantize", ["x"], "y", body, list(attributes), doc)
    return graph.call(op, name, [op.inputs[0]], **attributes), "int32"


def _requant(graph: Graph, op: Op) -> Value:
    count, peak, wide = len(op.inputs), requant_peak(graph.program, op), is_wide(graph.program, op)
    kind = TensorProto.INT64 if wide else TensorProto.INT32
    xs, mults = [f"x{n}" for n in range(count)], [f"mult{n}" for n in range(count)]
    body = Body(given=[*xs, "add", *mults, "y"])
    total = "add"
    for x, mult in zip(xs, mults):
        factor = body.cast(mult, kind) if wide else mult
        total = body.node("Add", body.node("Mul", body.cast(x, kind), factor), total, out="sum")
    most = op.attrs["shift"] if wide else MAX_FLOOR_SHIFT
    attributes = {"shift": min(op.attrs["shift"], most), "lo": op.attrs["lo"], "hi": op.attrs["hi"]}
    shift, lo, hi = (
        Int(body, body.attribute(k, TensorProto.INT32), v, v) for k, v in attributes.items()
    )
    (Int(body, total, -peak, peak, wide) >> shift).clip(lo, hi)
    body.nodes[-1].output[0] = "y"
    doc = (
        f"clamp(({' + '.join(map('*'.join, zip(xs, mults)))} + add) >> "
        "shift, lo, hi), the shift rounding down."
    )
    name = graph.library.intern(
        "Requant" if count == 1 else "RequantAdd",
        [*xs, "add", *mults],
        "y",
        body,
        list(attributes),
        doc,
    )
    constants = [
        graph.constant(op, role, graph.program.const(op, role)) for role in ("add", *mults)
    ]
    return graph.call(op, name, [*op.inputs, *constants], **attributes), "int32"


# -- pools -----------------------------------------------------------------------------------------
def _padded(body: Body, x: str, pads: list[list[int]], fill: int, dtype: Any) -> str:
    if not any(map(any, pads)):
        return x
    (top, bottom), (left, right) = pads
    return body.node(
        "Pad",
        x,
        body.const([0, 0, top, left, 0, 0, bottom, right], np.int64),
        body.const(fill, dtype),
        out="padded",
    )


def _windowed(body: Body, x: str, join: str, op: Op, size: tuple[int, ...]) -> str:
    """Each window of both axes joined by Add or Max, one axis after the other: kh + kw strided
    slices, exact in int32.

    size: (height, width) of the output.
    """
    axes = zip(
        (2, 3), op.attrs["kernel"], op.attrs["stride"], op.attrs.get("dilation", (1, 1)), size
    )
    for axis, kernel, stride, dilation, count in axes:
        taps = [
            _slice(body, x, axis, tap * dilation, tap * dilation + (count - 1) * stride + 1, stride)
            for tap in range(kernel)
        ]
        x = taps[0]
        for tap in taps[1:]:
            x = body.node(join, x, tap)
    return x


def _slice(body: Body, x: str, axis: int, start: int, stop: int, step: int) -> str:
    return body.node("Slice", x, *(body.const([v], np.int64) for v in (start, stop, axis, step)))


def _maxpool(graph: Graph, op: Op) -> Value:
    x, spec = op.inputs[0], graph.tensor(op.inputs[0])
    if spec.dtype == "uint8":
        x = _padded(graph.body, x, op.attrs["padding"], spec.lo, np.uint8)
        attributes = {
            "kernel_shape": op.attrs["kernel"],
            "strides": op.attrs["stride"],
            "dilations": op.attrs["dilation"],
        }
        return graph.plain(op, "MaxPool", x, **attributes), "uint8"
    body = Body(given=XY)
    _windowed(
        body,
        _padded(body, "x", op.attrs["padding"], spec.lo, np.int32),
        "Max",
        op,
        graph.tensor(op.output).shape[1:],
    )
    return _pool_call(graph, op, "WindowMax", body, "The largest of a window of int32."), "int32"


def _sumpool(graph: Graph, op: Op) -> Value:
    body, spec, kind = Body(given=XY), graph.tensor(op.inputs[0]), graph.tensor(op.output).dtype
    kind = "int32" if kind == "uint8" else kind
    x = body.cast("x", DTYPES[kind])
    if tuple(op.attrs["kernel"]) == spec.shape[1:] and not any(map(any, op.attrs["padding"])):
        body.node("ReduceSum", x, body.const([2, 3], np.int64), keepdims=1)
        return _pool_call(graph, op, "GlobalSumPool", body, "The sum over height and width."), kind
    _windowed(
        body,
        _padded(body, x, op.attrs["padding"], 0, kind),
        "Add",
        op,
        graph.tensor(op.output).shape[1:],
    )
    return _pool_call(graph, op, "SumPool", body, "The sum of a window."), kind


def _pool_call(graph: Graph, op: Op, name: str, body: Body, doc: str) -> str:
    """Windows are constants of the body, so a second geometry becomes SumPool_2; a 1x1 window has
    no node at all without the Identity."""
    if not body.nodes or body.nodes[-1].op_type in ("Constant", "Pad"):
        body.node("Identity", body.nodes[-1].output[0] if body.nodes else "x")
    body.nodes[-1].output[0] = "y"
    return graph.call(op, graph.library.intern(name, ["x"], "y", body, [], doc), [op.inputs[0]])


# -- moves -----------------------------------------------------------------------------------------
def _reshape(graph: Graph, op: Op) -> Value:
    shape = graph.body.const([0, *graph.tensor(op.output).shape], np.int64)
    return graph.plain(op, "Reshape", op.inputs[0], shape), graph.tensor(op.inputs[0]).dtype


def _permute(graph: Graph, op: Op) -> Value:
    return graph.plain(
        op, "Transpose", op.inputs[0], perm=[0, *(a + 1 for a in op.attrs["axes"])]
    ), graph.tensor(op.inputs[0]).dtype


def _concat(graph: Graph, op: Op) -> Value:
    wanted = graph.tensor(op.output).dtype
    parts = [
        x if graph.tensor(x).dtype == wanted else graph.body.cast(x, DTYPES[wanted])
        for x in op.inputs
    ]
    return graph.plain(op, "Concat", *parts, axis=op.attrs["axis"] + 1), wanted


def _pad(graph: Graph, op: Op) -> Value:
    dtype = graph.tensor(op.inputs[0]).dtype
    before, behind = zip(*op.attrs["pads"])
    pads = graph.body.const([0, *before, 0, *behind], np.int64)
    return graph.plain(op, "Pad", op.inputs[0], pads, graph.body.const(0, dtype)), dtype


def _cut(graph: Graph, op: Op) -> Value:
    spec, axis = graph.tensor(op.inputs[0]), op.attrs["axis"]
    start, stop, step = slice(op.attrs["start"], op.attrs["stop"], op.attrs["step"]).indices(
        spec.shape[axis]
    )
    ends = [graph.body.const([v], np.int64) for v in (start, stop, axis + 1, step)]
    return graph.plain(op, "Slice", op.inputs[0], *ends), spec.dtype


RULES: dict[str, Callable[[Graph, Op], Value]] = {
    "quantize": _quantize, "reads": _reads, "xsum": _xsum, "requant": _requant, "maxpool": _maxpool, "sumpool": _sumpool,
    "reshape": _reshape, "permute": _permute, "concat": _concat, "pad": _pad, "slice": _cut,
}  # fmt: skip


def to_onnx(program: Program, body: str = "qlinear") -> ModelProto:
    """The program as an ONNX model, opset 21, with a dynamic batch; every tensor keeps its name,
    its type and its integers.

    body: "qlinear" (the ADC is the requantisation of a QLinearConv, wherever that is certified) or
    "explicit" (int32 partial sums stand in the graph; slower, equal). Raises InputError for a
    program that is not sound, ConfigError for another body.
    """
    if body not in FORMS:
        raise ConfigError(f"--body {escaped(body)} is not known; {suggestion(str(body), FORMS)}")
    check(program)
    _refuse_shared_names(program)
    graph = Graph(program, body)
    for op in program.ops:
        graph.add(op)
    model = _model(graph)
    metadata.attach(model, metadata.document(program, body, graph.layouts, graph.initializers))
    return model


def _refuse_shared_names(program: Program) -> None:
    """Nodes and their constants are found by the names of operations."""
    names = Counter(op.name for op in program.ops)
    for name, count in names.items():
        if count > 1:
            raise InputError(
                f"the integer program has {count} operations called "
                f"'{escaped(name)}'; make the file again"
            )


def value_info(tensor: Tensor) -> Any:
    """Name, type and shape of a tensor of the program, its batch called N."""
    return helper.make_tensor_value_info(tensor.name, DTYPES[tensor.dtype], ["N", *tensor.shape])


def _model(graph: Graph) -> ModelProto:
    program, nodes = graph.program, graph.body.nodes
    infos = [
        value_info(program.tensors[op.output]) for op in program.ops if op.output != program.output
    ]
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(a), name)
        for name, a in graph.initializers.items()
    ]
    ends = [[value_info(program.tensors[name])] for name in (program.input, program.output)]
    proto = helper.make_graph(nodes, "rqtool", *ends, initializers, value_info=infos)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(
        proto,
        opset_imports=opsets,
        functions=list(graph.library.functions.values()),
        ir_version=IR_VERSION,
        producer_name="rqtool",
    )
