"""The verifier between stages: every operation's shape and bounds, worked out from its inputs, must
be what the program declares.

A program that passes can be run by any carrier without an index out of range or an integer that
does not fit: freezing runs this on what it made, and loading a file runs it on what it read.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from rqtool.errors import ConfigError, InputError, escaped
from rqtool.hardware.converter import of_macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.program.ir import (
    INT32,
    MAX_SHIFT,
    MAX_WIDE_SHIFT,
    WIDE_BOUND,
    Op,
    Program,
    Tensor,
    check,
    is_wide,
)

Made = tuple[tuple[int, ...], int, int]  # shape, lo, hi


class Broken(Exception):
    """What is wrong with one operation, in a few words."""


def need(fine: Any, what: str) -> None:
    if not fine:
        raise Broken(what)


def whole(value: Any, lo: int, hi: int, what: str) -> int:
    need(
        type(value) is int and lo <= value <= hi,
        f"{what} is {value!r}, not a whole number from {lo} to {hi}",
    )
    return value


def wholes(values: Any, count: int, lo: int, what: str) -> list[int]:
    need(
        isinstance(values, (list, tuple)) and len(values) == count,
        f"{what} is {values!r}, not {count} whole numbers",
    )
    return [whole(v, lo, INT32, what) for v in values]


def pairs(values: Any, count: int, what: str) -> list[list[int]]:
    need(
        isinstance(values, (list, tuple)) and len(values) == count,
        f"{what} is {values!r}, not {count} pairs",
    )
    return [wholes(p, 2, 0, what) for p in values]


# -- one rule per operation ------------------------------------------------------------------------
def _quantize(p: Program, op: Op, x: Tensor) -> Made:
    need(x.lo is None, "its input is not float32")
    whole(op.attrs["exponent"], -126, 126, "exponent")
    return x.shape, *_limits(op)


def _limits(op: Op) -> tuple[int, int]:
    lo, hi = (whole(op.attrs[end], -INT32, INT32, end) for end in ("lo", "hi"))
    need(lo <= hi, "lo is above hi")
    return lo, hi


def geometry(d: Any) -> Geometry:
    """The geometry that a dictionary describes, every number checked."""
    names = {"channels", "columns", "kernel", "stride", "padding", "dilation", "groups", "kind"}
    need(
        isinstance(d, dict) and set(d) == names and d["kind"] in ("conv1d", "conv2d", "linear"),
        "its geometry is not one",
    )
    for name in ("channels", "columns", "groups"):
        whole(d[name], 1, INT32, name)
    for name in ("kernel", "stride", "dilation", "padding"):
        wholes(d[name], 2, 0 if name == "padding" else 1, name)
    need(
        d["channels"] % d["groups"] == 0 and d["columns"] % d["groups"] == 0,
        "its groups do not divide its channels and columns",
    )
    return Geometry.from_dict(d)


def _window(p: Program, op: Op, x: Tensor) -> tuple[Geometry, tuple[int, int]]:
    """(geometry, output size) of an operation that sees a codes tensor through a kernel."""
    g, q_x = geometry(op.attrs["geometry"]), _largest_code(p, op)
    need(
        x.lo is not None and x.lo >= 0 and x.hi <= q_x,
        f"its input is not codes 0..{q_x}",
    )
    need(len(x.shape) == 3 and x.shape[0] == g.channels, f"its input has shape {list(x.shape)}")
    whole(op.attrs["pad"], 0, q_x, "pad")
    return g, _positive(g.out_size(*x.shape[1:]))


def _largest_code(p: Program, op: Op) -> int:
    """The largest input code of a layer's own macro. The sum of the input codes is for the layer
    that reads the same tensor."""
    if op.kind == "reads":
        return p.macros.of(_layer(op)).q_x
    readers = [p.macros.of(_layer(o)).q_x for o in p.reads() if o.inputs == op.inputs]
    return max(readers, default=p.macro.q_x)


def _layer(op: Op) -> str:
    name = op.attrs["layer"]
    need(type(name) is str, f"its layer is {name!r}, not a name")
    return name


def _positive(size: tuple[int, ...]) -> tuple[int, ...]:
    need(min(size) >= 1, "its window is larger than its input")
    return size


def _reads(p: Program, op: Op, x: Tensor) -> Made:
    g, size = _window(p, op, x)
    layer = _layer(op)
    weight, macro = p.const(op, "weight"), p.macros.of(layer)
    need(
        weight.dtype == np.int8 and weight.shape == (g.columns, g.channels // g.groups, *g.kernel),
        "its weight has another shape or type",
    )
    need(
        weight.size and int(np.abs(weight.astype(np.int64)).max()) <= macro.q_w,
        f"its weights pass {macro.q_w}",
    )
    plan = p.macros.plan(layer, g)
    need(not plan.digital or macro.ideal, "it is kept off the macro, but its ADC is not ideal")
    need(of_macro(macro).belongs(op.attrs["adc"], macro), "its ADC is not the macro's")
    p.adc(op).check(macro, len(plan.tiles), g.columns)
    if macro.pack == "spread":
        need("order" in op.consts, "it has no constant for order")
        order = p.const(op, "order")
        need(
            order.shape == (g.rows,) and np.array_equal(np.sort(order), np.arange(g.rows)),
            "its order is not one of its rows",
        )
    return (g.columns, *size), -plan.acc_bound, plan.acc_bound


def _xsum(p: Program, op: Op, x: Tensor) -> Made:
    g, size = _window(p, op, x)
    need(
        op.attrs["columns"] in (g.groups, g.columns), "its columns are neither one a group nor all"
    )
    return (op.attrs["columns"], *size), 0, g.rows * _largest_code(p, op)


def _requant(p: Program, op: Op, *xs: Tensor) -> Made:
    whole(op.attrs["shift"], 0, MAX_WIDE_SHIFT if is_wide(p, op) else MAX_SHIFT, "shift")
    add, *mults = arrays = [
        p.const(op, role) for role in ("add", *(f"mult{n}" for n in range(len(xs))))
    ]
    need(
        add.dtype in (np.int32, np.int64) and all(a.dtype == np.int32 for a in mults),
        "its constants are not int32",
    )
    shape = np.broadcast_shapes(*(x.shape for x in xs))
    need(
        np.broadcast_shapes(shape, *(a.shape for a in arrays)) == shape,
        "its constants do not fit its inputs",
    )
    return shape, *_limits(op)


def _pool(op: Op, x: Tensor, dilation: list[int]) -> tuple[int, ...]:
    need(len(x.shape) == 3, f"its input has shape {list(x.shape)}")
    kernel, stride = (wholes(op.attrs[name], 2, 1, name) for name in ("kernel", "stride"))
    pads = pairs(op.attrs["padding"], 2, "padding")
    size = tuple(
        (n + sum(pad) - d * (k - 1) - 1) // s + 1
        for n, pad, d, k, s in zip(x.shape[1:], pads, dilation, kernel, stride)
    )
    return x.shape[0], *_positive(size)


def _maxpool(p: Program, op: Op, x: Tensor) -> Made:
    return _pool(op, x, wholes(op.attrs["dilation"], 2, 1, "dilation")), x.lo, x.hi


def _sumpool(p: Program, op: Op, x: Tensor) -> Made:
    area = prod(wholes(op.attrs["kernel"], 2, 1, "kernel"))
    return _pool(op, x, [1, 1]), min(0, x.lo) * area, max(0, x.hi) * area


def _reshape(p: Program, op: Op, x: Tensor) -> Made:
    wanted = wholes(op.attrs["shape"], len(op.attrs["shape"]), -1, "shape")
    rest = prod(n for n in wanted if n != -1)
    need(rest > 0 and wanted.count(-1) <= 1, f"shape is {wanted}")
    shape = tuple(prod(x.shape) // rest if n == -1 else n for n in wanted)
    need(prod(shape) == prod(x.shape), f"{list(x.shape)} has another size")
    return shape, x.lo, x.hi


def _permute(p: Program, op: Op, x: Tensor) -> Made:
    axes = wholes(op.attrs["axes"], len(x.shape), 0, "axes")
    need(sorted(axes) == list(range(len(x.shape))), f"axes are {axes}")
    return tuple(x.shape[a] for a in axes), x.lo, x.hi


def _axis(op: Op, x: Tensor) -> int:
    return whole(op.attrs["axis"], 0, len(x.shape) - 1, "axis")


def _concat(p: Program, op: Op, *xs: Tensor) -> Made:
    axis = _axis(op, xs[0])
    rests = {x.shape[:axis] + x.shape[axis + 1 :] for x in xs}
    need(len(rests) == 1 and len({len(x.shape) for x in xs}) == 1, "its inputs do not fit together")
    shape = xs[0].shape
    return (
        (*shape[:axis], sum(x.shape[axis] for x in xs), *shape[axis + 1 :]),
        min(x.lo for x in xs),
        max(x.hi for x in xs),
    )


def _pad(p: Program, op: Op, x: Tensor) -> Made:
    pads = pairs(op.attrs["pads"], len(x.shape), "pads")
    return tuple(n + sum(pad) for n, pad in zip(x.shape, pads)), min(0, x.lo), max(0, x.hi)


def _slice(p: Program, op: Op, x: Tensor) -> Made:
    axis = _axis(op, x)
    start, stop, step = (
        whole(op.attrs[name], low, INT32, name)
        for name, low in (("start", 0), ("stop", 0), ("step", 1))
    )
    count = len(range(start, min(stop, x.shape[axis]), step))
    need(count, "it leaves nothing")
    return (*x.shape[:axis], count, *x.shape[axis + 1 :]), x.lo, x.hi


RULES: dict[str, Callable[..., Made]] = {
    "quantize": _quantize, "reads": _reads, "xsum": _xsum, "requant": _requant, "maxpool": _maxpool, "sumpool": _sumpool,
    "reshape": _reshape, "permute": _permute, "concat": _concat, "pad": _pad, "slice": _slice,
}  # fmt: skip


# -- the whole program -----------------------------------------------------------------------------
WRONG = (
    Broken,
    ConfigError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
)  # what forged data can raise in here


def prove(program: Program) -> None:
    """Refuse a program whose shapes or bounds do not follow from its operations; raises InputError
    with the first one."""
    where = "its tensors"
    try:
        for name, tensor in program.tensors.items():
            _check_tensor(name, tensor)
        need(program.input in program.tensors, f"it has no input {program.input!r}")
        check(program)
        for op in program.ops:
            where = f"'{op.name}'"
            _check(program, op)
    except WRONG as e:
        raise InputError(
            f"the integer program is broken at {escaped(where)}: {escaped(e)}; make the file again"
        ) from e


def _check_tensor(name: str, t: Tensor) -> None:
    need(isinstance(name, str) and t.name == name, f"a tensor is called {name!r}")
    wholes(t.shape, len(t.shape), 1, f"the shape of {t.name}")
    if t.lo is not None or t.hi is not None:
        need(
            whole(t.lo, -WIDE_BOUND, WIDE_BOUND, f"lo of {t.name}")
            <= whole(t.hi, -WIDE_BOUND, WIDE_BOUND, f"hi of {t.name}"),
            f"lo of {t.name} is above hi",
        )


def _check(program: Program, op: Op) -> None:
    inputs = [program.tensors[name] for name in op.inputs]
    need(
        inputs and (op.kind in ("requant", "concat") or len(inputs) == 1),
        f"it has {len(inputs)} inputs",
    )
    need(op.kind == "quantize" or all(x.lo is not None for x in inputs), "its input is float32")
    wide = op.kind == "requant" and is_wide(program, op)
    need(wide or all(x.dtype != "int64" for x in inputs), "its input is int64")
    shape, lo, hi = RULES[op.kind](program, op, *inputs)
    declared = program.tensors[op.output]
    need(
        (op.kind == "sumpool" and op.output != program.output) or declared.dtype != "int64",
        "its output is int64",
    )
    need(
        declared.lo is not None and tuple(shape) == declared.shape,
        f"its output has shape {list(shape)}, not {list(declared.shape)}",
    )
    need(
        declared.lo <= lo and hi <= declared.hi,
        f"its output reaches {lo}..{hi}, beyond {declared.lo}..{declared.hi}",
    )
