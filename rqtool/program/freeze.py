"""From a trained network to its integer program: real scales become whole multipliers, and nothing real is left.

Between two reads a value is not a tensor but a linear combination of integer tensors, with real scales per channel:

    value = clamp(sum_n scale_n * x_n + offset, lo, hi)

Batch norm, bias, residual additions and ReLU only edit that formula; one `requant` pays for all of them when the next layer's
input codes are made. Where an operation needs numbers (a pool, a join, a second user) the value is written to a 20-bit grid whose
scale is a power of two: sums of such grids need no rounded multiplier, and since training snaps the inverse of an input scale to
a 10-bit mantissa, neither does the next quantiser. What is left of the real arithmetic is the rounding of grids and of the other multipliers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.hardware.macro import Macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.model.graph import Graph, Node
from rqtool.program.ir import REQUANT_BOUND, Op, Program, Tensor
from rqtool.program.prove import prove

GRID_PEAK = (1 << 19) - 1  # the 20-bit grid of values between layers: 2**19 times a 10-bit mantissa stays below 2**30
ODD_SUM_PEAK = (1 << 15) - 1  # values that are multiplied or divided by a number that is no power of two share bits with it
GRID_MARGIN = 2.0  # it reaches twice the largest value seen on the calibration images
OUTPUT_PEAK = 1 << 20  # class scores get finer codes
FINEST = REQUANT_BOUND / 4  # no grid is so fine that a proven bound reaches more steps: a requant would pass its own bound
LARGEST_BOUND = 1 << 20  # more times the peak, and fewer than 8 bits of the grid would be left for what was seen
SMALLEST = 2.0**-60  # where nothing was ever seen and nothing can come
MAX_SHIFT = 30
MAX_TERMS = 3


@dataclass(frozen=True)
class Frozen:
    """What one layer hands over. weight: int8 [O, C/groups, kh, kw]; zero: the input's zero code; s_x, s_w [O]: scales;
    unit [O]: partial-sum units per unit of acc; bias [O]; adc, consts: as the program stores them."""

    weight: np.ndarray
    zero: int
    s_x: float
    s_w: np.ndarray
    unit: np.ndarray
    bias: np.ndarray
    adc: dict[str, Any]
    consts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Norm:
    """Batch norm as value * mult + add, float64 [C]."""

    mult: np.ndarray
    add: np.ndarray


@dataclass(frozen=True)
class Value:
    """A pending linear combination; scales and offset are float64 arrays that broadcast to `shape` (per sample)."""

    terms: tuple[tuple[str, np.ndarray], ...]
    offset: np.ndarray
    shape: tuple[int, ...]
    lo: float = -inf
    hi: float = inf

    @property
    def open(self) -> bool:
        """No clamp is pending."""
        return self.lo == -inf and self.hi == inf

    @property
    def single(self) -> bool:
        """One integer tensor under a scale: shapes can be changed on the integers themselves."""
        return len(self.terms) == 1 and self.open

    @property
    def centred(self) -> bool:
        """Integer 0 is real 0."""
        return self.single and not np.any(self.offset)

    @property
    def plain(self) -> bool:
        """A grid: one positive scale for all, zero at zero, so that order and padding mean the same on integers."""
        return self.centred and self.terms[0][1].size == 1 and float(self.terms[0][1].flat[0]) > 0

    def map_arrays(self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], name: str) -> Value:
        """The value after a shape operation that made tensor `name`: scale and offset follow the integers."""
        moved = [a if a.size == 1 else change(np.broadcast_to(a, self.shape)) for a in (self.terms[0][1], self.offset)]
        moved = [a.reshape((1,) * len(shape)) if a.size == 1 else a for a in moved]
        return Value(((name, moved[0]),), moved[1], shape)


def per_channel(array: np.ndarray, rank: int) -> np.ndarray:
    """[C] as [C, 1, ...] with `rank` axes."""
    return np.asarray(array, dtype=np.float64).reshape(-1, *(1,) * (rank - 1))


class Freezer:
    """Walks a graph once and writes operations. layers: what each conv node became; norms: each batch norm; peaks: the largest
    magnitude of every node's value on calibration images."""

    def __init__(self, graph: Graph, macro: Macro, layers: dict[str, Frozen], norms: dict[str, Norm], peaks: dict[str, float]) -> None:
        self.graph, self.macro, self.layers, self.norms, self.peaks = graph, macro, layers, norms, peaks
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.constants: dict[str, np.ndarray] = {}
        self.values: dict[str, Value] = {}
        self.scales: dict[str, list[float]] = {}  # the real value of one unit of each accumulator, for the metadata

    # -- writing ---------------------------------------------------------------------------------------------------------
    def emit(self, kind: str, name: str, inputs: tuple[str, ...], shape: tuple[int, ...], lo: int, hi: int, attrs: dict[str, Any], consts: dict[str, np.ndarray] | None = None) -> str:
        """Add an operation and its output tensor, both called `name` (made unique)."""
        unique, n = name, 1
        while unique in self.tensors:
            n += 1
            unique = f"{name}@{n}"
        roles = {role: f"{unique}.{role}" for role in consts or {}}
        self.constants.update({roles[role]: np.ascontiguousarray(a) for role, a in (consts or {}).items()})
        self.tensors[unique] = Tensor(unique, tuple(int(n) for n in shape), int(lo), int(hi))
        self.ops.append(Op(kind, unique, inputs, unique, attrs, roles))
        return unique

    def requant(self, value: Value, name: str, scale: float, zero: int, lo: int, hi: int) -> str:
        """Write a value onto a grid: clamp(round_half_up(value / scale) + zero, lo, hi)."""
        lo, hi = (int(np.clip(edge, lo, hi)) if np.isfinite(edge) else limit for edge, limit in ((np.floor(value.lo / scale + zero + 0.5), lo), (np.floor(value.hi / scale + zero + 0.5), hi)))
        coefficients = [a / scale for _, a in value.terms]
        add = value.offset / scale + zero + 0.5
        peaks = [self.tensors[t].peak for t, _ in value.terms]
        shift = _largest_shift(coefficients, add, peaks, name)
        consts = {f"mult{n}": _whole(c, shift) for n, c in enumerate(coefficients)}
        consts["add"] = _whole(add, shift)
        return self.emit("requant", name, tuple(t for t, _ in value.terms), value.shape, lo, hi, {"shift": shift, "lo": lo, "hi": hi}, consts)

    def bound(self, value: Value) -> float:
        """The largest magnitude that the proven bounds of its tensors allow."""
        return float(np.max(sum(np.abs(a) * self.tensors[t].peak for t, a in value.terms) + np.abs(value.offset)))

    def real_scale(self, value: Value, name: str, reach: int) -> float:
        """The smallest scale at which `reach` steps cover the peak of node `name` with its margin and a requant can count them."""
        bound, peak = self.bound(value), self.peaks[name]
        if not bound <= LARGEST_BOUND * peak and peak > 0:
            raise InputError(
                f"{escaped(name)}: its weights allow values {bound / peak:.3g} times as large as any seen on the calibration images, beyond 2**20; "
                "its batch norm or weights are degenerate, retrain or prune that channel"
            )
        return max(GRID_MARGIN * peak / reach, bound / FINEST)

    def grid_scale(self, value: Value, name: str, reach: int = GRID_PEAK) -> float:
        """The same as a power of two."""
        return _dyadic(self.real_scale(value, name, reach))

    def settle(self, value: Value, name: str, scale: float | None = None, reach: int = GRID_PEAK) -> Value:
        """The value as whole numbers -reach..reach on a power-of-two grid that covers its peak (or a given one)."""
        scale = self.grid_scale(value, name, reach) if scale is None else scale
        tensor = self.requant(value, f"{name}.grid", scale, 0, -reach, reach)
        return _grid(tensor, scale, value.shape)

    def single(self, name: str) -> Value:
        """An input value that is one tensor without a pending clamp, settled if it was not."""
        return self.having(name, lambda v: v.single)

    def having(self, name: str, wanted: Callable[[Value], bool]) -> Value:
        """The value of node `name`, settled once and for all its users if it is not as `wanted`."""
        if not wanted(self.values[name]):
            self.values[name] = self.settle(self.values[name], name)
        return self.values[name]

    # -- walking ---------------------------------------------------------------------------------------------------------
    def run(self, pixels: Norm, whole: bool) -> Program:
        """The program; pixels: real = pixel * mult + add; whole: the input is uint8, not float32."""
        self.values[self.graph.input] = self._input(pixels, whole)
        for node in self.graph.nodes:
            value = LOWER[node.op](self, node)
            self.values[node.name] = value
            if len(self.graph.users(node.name)) > 1 and not value.single:
                self.having(node.name, lambda v: v.single)
        return self._finish()

    def _input(self, pixels: Norm, whole: bool) -> Value:
        shape, name = self.graph.input_shape, self.graph.input
        mult, add = (per_channel(a, len(shape)) for a in (pixels.mult, pixels.add))
        self.tensors[name] = Tensor(name, shape, 0, 255) if whole else Tensor(name, shape, None, None)
        if whole:
            return Value(((name, mult),), add, shape)
        reach = GRID_PEAK if np.all(np.frexp(mult)[0] == 0.5) else ODD_SUM_PEAK  # a factor that is no power of two needs bits of its own
        scale = _dyadic(GRID_MARGIN * (self.peaks[name] + np.abs(add).max()) / np.abs(mult).min() / reach)
        attrs = {"exponent": -int(np.log2(scale)), "lo": -reach, "hi": reach}
        tensor = self.emit("quantize", f"{name}.grid", (name,), shape, -reach, reach, attrs)
        return Value(((tensor, mult * scale),), add, shape)

    def _finish(self) -> Program:
        value, name = self.values[self.graph.output], self.graph.output
        for node in self.graph.nodes:
            if node.name == name and node.op == "tail":  # a softmax is left out: what it is given sets the range
                name = node.inputs[0]
        scale = self.real_scale(value, name, OUTPUT_PEAK) or 1.0
        output = self.requant(value, "output", scale, 0, -OUTPUT_PEAK, OUTPUT_PEAK)
        program = Program(self.macro, self.graph.input, output, self.tensors, tuple(self.ops), self.constants, {"output_scale": scale, "scales": self.scales, "islands": []})
        prove(program)
        return program


def _dyadic(scale: float) -> float:
    """The smallest power of two that is not below `scale`, and not below 2**-60."""
    return 2.0 ** np.ceil(np.log2(max(scale, SMALLEST)))


def _grid(tensor: str, scale: float, shape: tuple[int, ...]) -> Value:
    rank = (1,) * len(shape)
    return Value(((tensor, np.full(rank, scale)),), np.zeros(rank), shape)


def _whole(a: np.ndarray, shift: int) -> np.ndarray:
    return np.floor(a * 2.0**shift + 0.5).astype(np.int32)


def _largest_shift(coefficients: list[np.ndarray], add: np.ndarray, peaks: list[int], name: str) -> int:
    """The finest shift at which sum |x|*mult + |add| stays below the requant bound."""
    reach = float(np.max(sum(np.abs(c) * p for c, p in zip(coefficients, peaks)) + np.abs(add)))
    room = REQUANT_BOUND - 2 - sum(peaks)  # each rounded multiplier can be half a unit larger
    if not np.isfinite(reach) or reach >= room:
        raise InputError(f"{escaped(name)}: a value reaches {reach:.3g} steps of its grid, beyond 2**30; its batch norm or weights are degenerate, retrain or prune that channel")
    return int(min(MAX_SHIFT, np.floor(np.log2(room / max(reach, 2.0**-MAX_SHIFT)))))


# -- one rule per operation of the graph -----------------------------------------------------------------------------
def _conv(f: Freezer, node: Node) -> Value:
    layer, g = f.layers[node.name], Geometry.from_dict(node.attrs["geometry"])
    value = f.values[node.inputs[0]]
    codes = f.requant(value, f"{node.name}.codes", layer.s_x, layer.zero, 0, f.macro.q_x)
    codes, image = _to_image(f, codes, g, value.shape)
    bound = Plan.make(node.name, g, f.macro).acc_bound
    out = (g.columns, *g.out_size(*image[1:]))
    attrs = {"layer": node.name, "geometry": g.to_dict(), "pad": layer.zero, "adc": layer.adc}
    acc = f.emit("reads", node.name, (codes,), out, -bound, bound, attrs, {"weight": layer.weight, **layer.consts})
    scale = layer.s_x * layer.s_w
    terms = [(acc, per_channel(scale * layer.unit, 3))]
    f.scales[acc] = (scale * layer.unit).tolist()
    if f.macro.weight_offset:
        terms.append((_input_sum(f, node, codes, g, layer.zero, out), per_channel(-scale * f.macro.weight_offset, 3)))
    offset = layer.bias - scale * layer.zero * layer.weight.reshape(g.columns, -1).sum(1, dtype=np.int64)
    return _from_image(f, node, Value(tuple(terms), per_channel(offset, 3), out))


def _input_sum(f: Freezer, node: Node, codes: str, g: Geometry, zero: int, out: tuple[int, ...]) -> str:
    columns = 1 if g.groups == 1 else g.columns
    return f.emit("xsum", f"{node.name}.xsum", (codes,), (columns, *out[1:]), 0, g.rows * f.macro.q_x, {"geometry": g.to_dict(), "pad": zero, "columns": columns})


def _to_image(f: Freezer, codes: str, g: Geometry, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The codes as [C, H, W], as model.network.to_image does."""
    spec = f.tensors[codes]
    if g.kind == "conv1d":
        image = (shape[0], 1, shape[1])
    elif g.kind == "linear":
        if len(shape) > 1:
            axes = [len(shape) - 1, *range(len(shape) - 1)]
            codes = f.emit("permute", f"{codes}.permute", (codes,), tuple(shape[a] for a in axes), spec.lo, spec.hi, {"axes": axes})
        image = (shape[-1], prod(shape[:-1]), 1)
    else:
        return codes, shape
    return f.emit("reshape", f"{codes}.image", (codes,), image, spec.lo, spec.hi, {"shape": list(image)}), image


def _from_image(f: Freezer, node: Node, value: Value) -> Value:
    """The way back to the node's own shape."""
    if node.shape == value.shape:
        return value
    if not value.single:
        value = f.settle(value, node.name)
    if node.attrs["geometry"]["kind"] == "linear" and value.shape[1] > 1:
        value = _permuted(f, f"{node.name}.permute", value, [1, 2, 0])
    return _reshaped(f, f"{node.name}.reshape", value, node.shape)


def _reshaped(f: Freezer, name: str, value: Value, shape: tuple[int, ...]) -> Value:
    spec = f.tensors[value.terms[0][0]]
    tensor = f.emit("reshape", name, (spec.name,), shape, spec.lo, spec.hi, {"shape": list(shape)})
    return value.map_arrays(lambda a: a.reshape(shape), tuple(shape), tensor)


def _permuted(f: Freezer, name: str, value: Value, axes: list[int]) -> Value:
    spec = f.tensors[value.terms[0][0]]
    shape = tuple(value.shape[a] for a in axes)
    tensor = f.emit("permute", name, (spec.name,), shape, spec.lo, spec.hi, {"axes": list(axes)})
    return value.map_arrays(lambda a: a.transpose(axes), shape, tensor)


def _scaled(f: Freezer, name: str, mult: np.ndarray, add: np.ndarray) -> Value:
    value = f.having(name, lambda v: v.open)
    return replace(value, terms=tuple((t, a * mult) for t, a in value.terms), offset=value.offset * mult + add)


def _batch_norm(f: Freezer, node: Node) -> Value:
    norm, rank = f.norms[node.name], len(node.shape)
    return _scaled(f, node.inputs[0], per_channel(norm.mult, rank), per_channel(norm.add, rank))


def _clamped(lo: float, hi: float) -> Callable[[Value], Value]:
    return lambda v: replace(v, lo=min(max(v.lo, lo), hi), hi=max(min(v.hi, hi), lo))


def _add(f: Freezer, node: Node) -> Value:
    values = [f.having(name, lambda v: v.open) for name in node.inputs]
    while sum(len(v.terms) for v in values) > MAX_TERMS:
        longest = max(range(len(values)), key=lambda n: len(values[n].terms))
        values[longest] = f.settle(values[longest], node.inputs[longest])
    signed = list(zip(node.attrs["signs"], values))
    terms = tuple((t, s * a) for s, v in signed for t, a in v.terms)
    return Value(terms, sum(s * v.offset for s, v in signed), node.shape)


def _maxpool(f: Freezer, node: Node) -> Value:
    value = f.having(node.inputs[0], lambda v: v.plain)
    spec = f.tensors[value.terms[0][0]]
    tensor = f.emit("maxpool", node.name, (spec.name,), node.shape, spec.lo, spec.hi, dict(node.attrs))
    return replace(value, terms=((tensor, value.terms[0][1]),), shape=node.shape)


def _avgpool(f: Freezer, node: Node) -> Value:
    a, area = node.attrs, prod(node.attrs["kernel"])
    pads = [[p, p] for p in a["padding"]]
    divides = area & (area - 1) == 0 and (a["include_pad"] or not any(a["padding"]))
    reach = max(1, (GRID_PEAK if divides else ODD_SUM_PEAK) // area)
    value = f.settle(f.values[node.inputs[0]], node.inputs[0], reach=reach)
    spec = f.tensors[value.terms[0][0]]
    attrs = {"kernel": a["kernel"], "stride": a["stride"], "padding": pads}
    tensor = f.emit("sumpool", node.name, (spec.name,), node.shape, min(0, spec.lo) * area, max(0, spec.hi) * area, attrs)
    count = np.full((1, 1, 1), area) if a["include_pad"] else _covered(value.shape[1:], attrs)
    return replace(value, terms=((tensor, value.terms[0][1] / count),), shape=node.shape)


def _covered(size: tuple[int, ...], attrs: dict[str, Any]) -> np.ndarray:
    """How many real positions each window holds: [1, H_out, W_out]."""
    ones = np.pad(np.ones(size), attrs["padding"])
    windows = np.lib.stride_tricks.sliding_window_view(ones, attrs["kernel"])[:: attrs["stride"][0], :: attrs["stride"][1]]
    return windows.sum((-1, -2))[None]


def _concat(f: Freezer, node: Node) -> Value:
    scale = max(f.grid_scale(f.values[name], name) for name in node.inputs)
    values = [f.settle(f.values[name], name, scale) for name in node.inputs]
    tensor = f.emit("concat", node.name, tuple(v.terms[0][0] for v in values), node.shape, -GRID_PEAK, GRID_PEAK, {"axis": node.attrs["axis"]})
    return _grid(tensor, scale, node.shape)


def _pad(f: Freezer, node: Node) -> Value:
    value = f.having(node.inputs[0], lambda v: v.plain)
    spec = f.tensors[value.terms[0][0]]
    tensor = f.emit("pad", node.name, (spec.name,), node.shape, min(0, spec.lo), max(0, spec.hi), {"pads": [list(p) for p in node.attrs["pads"]]})
    return replace(value, terms=((tensor, value.terms[0][1]),), shape=node.shape)


def _slice(f: Freezer, node: Node) -> Value:
    value, a = f.single(node.inputs[0]), node.attrs
    spec = f.tensors[value.terms[0][0]]
    tensor = f.emit("slice", node.name, (spec.name,), node.shape, spec.lo, spec.hi, dict(a))
    cut = (slice(None),) * a["axis"] + (slice(a["start"], a["stop"], a["step"]),)
    return value.map_arrays(lambda array: array[cut], node.shape, tensor)


LOWER: dict[str, Callable[[Freezer, Node], Value]] = {
    "conv": _conv,
    "batch_norm": _batch_norm,
    "relu": lambda f, n: _clamped(0.0, inf)(f.values[n.inputs[0]]),
    "clamp": lambda f, n: _clamped(n.attrs["lo"], n.attrs["hi"])(f.values[n.inputs[0]]),
    "affine": lambda f, n: _scaled(f, n.inputs[0], np.float64(n.attrs["mult"]), np.float64(n.attrs["add"])),
    "add": _add,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "reshape": lambda f, n: _reshaped(f, n.name, f.single(n.inputs[0]), tuple(n.attrs["shape"])),
    "permute": lambda f, n: _permuted(f, n.name, f.single(n.inputs[0]), n.attrs["axes"]),
    "concat": _concat,
    "pad": _pad,
    "slice": _slice,
    "dropout": lambda f, n: f.values[n.inputs[0]],
    "tail": lambda f, n: f.values[n.inputs[0]],
}
