"""From a trained network to its integer program: real scales become whole multipliers, and nothing
real is left.

Every value of the graph ends on a grid of numbers.py, and the requant that brings it there pays for
all of the real arithmetic in one rounding: batch norm, bias, averages and residual additions only
edit a formula of integer tensors under real factors, and a clamp only narrows the requant's ends.
Which grid that is follows from who takes the value:

    a layer              the layer's input codes: nothing lies between the accumulators and them but the requant
    the scores           21 bits that cover them
    anyone, or several   23 bits with a power of two as scale: such grids share one zero and fit float32
    a mean               the same, with fewer bits only for windows of more than 2**16 values

What the requant after a grid needs for its multipliers is no reason for a coarser grid: a requant
takes 64 bits where 32 do not do, and so does the sum of a large window.

The walk that writes the operations also keeps, in `Numbers`, what train/served.py needs to compute
the very same values in floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.hardware.macro import Macro
from rqtool.mapping.assign import Macros, assigned
from rqtool.mapping.plan import Geometry
from rqtool.model.graph import Graph, Node
from rqtool.program.ir import Op, Program, Tensor
from rqtool.program.numbers import DEAD_CHANNEL, Grid, Numbers, Place, Requant, requant
from rqtool.program.prove import prove

GRID_PEAK = (
    (1 << 22) - 1
)  # the grid of values between layers: exact in float32, and fine enough where the largest value is an outlier
SUM_PEAK = (
    1 << 38
) - 1  # the sum of a window: 14 bits are left for the multiplier that also divides
GRID_MARGIN = 2.0  # it reaches twice the largest value seen on the calibration images
OUTPUT_PEAK = 1 << 20  # class scores get finer codes
UNSEEN_STEPS = 1 << 28  # of a grid on which nothing was ever seen, up to what its weights allow
LARGEST_BOUND = 1 << 20  # more times the peak, and what was seen is no sample of what can come
SMALLEST = 2.0**-60  # where nothing was ever seen and nothing can come
MAX_TERMS = 3
SCORES: Place = (
    "",
    0,
)  # the scores where they are also used inside the network, on their way to a grid of their own

FOLDS = ("batch_norm", "affine", "add")  # operations that only edit a formula
PASSES = (
    "relu",
    "clamp",
    "dropout",
    "reshape",
    "permute",
    "slice",
    "maxpool",
)  # operations that are the same on the integers of any grid


@dataclass(frozen=True)
class Norm:
    """Batch norm as value * mult + add, float64 [C]."""

    mult: np.ndarray
    add: np.ndarray


@dataclass(frozen=True)
class Frozen:
    """What one layer hands over. weight: int8 [O, C/groups, kh, kw]; zero: the input's zero code;
    s_x, s_w [O]: scales; unit [O]: partial-sum units per unit of acc; bias [O]; adc, consts: as the
    program stores them; norm: each column's own multiplier and addend after that, None for none."""

    weight: np.ndarray
    zero: int
    s_x: float
    s_w: np.ndarray
    unit: np.ndarray
    bias: np.ndarray
    adc: dict[str, Any]
    consts: dict[str, np.ndarray]
    norm: Norm | None = None


@dataclass(frozen=True)
class Term:
    """tensor * scale (float64, broadcasts to the sum's shape). place: where the network forms it,
    from an operand that is `unit` times the tensor."""

    tensor: str
    scale: np.ndarray
    place: Place
    unit: float = 1.0


@dataclass(frozen=True)
class Formula:
    """sum of terms + offset (float64): a value that is on no grid yet."""

    terms: tuple[Term, ...]
    offset: np.ndarray
    shape: tuple[int, ...]

    def affine(self, mult: np.ndarray, add: np.ndarray) -> Formula:
        return replace(
            self,
            terms=tuple(replace(t, scale=t.scale * mult) for t in self.terms),
            offset=self.offset * mult + add,
        )


@dataclass(frozen=True)
class Value:
    """A value on a grid, within lo..hi of its integers: a tensor of the program, or (inputs,
    requant, name) that will write one.

    A tensor may still reach beyond lo..hi; whoever takes it clamps.
    """

    grid: Grid
    lo: int
    hi: int
    shape: tuple[int, ...]
    tensor: str | None = None
    source: tuple[tuple[str, ...], Requant, str] | None = None

    @property
    def peak(self) -> int:
        return max(abs(self.lo), abs(self.hi))

    def within(self, lo: int, hi: int) -> Value:
        """Clamped to lo..hi as well."""
        return replace(self, lo=min(max(self.lo, lo), hi), hi=max(min(self.hi, hi), lo))


def per_channel(array: np.ndarray, rank: int) -> np.ndarray:
    """[C] as [C, 1, ...] with `rank` axes; an array that has as many stays as it is."""
    array = np.asarray(array, dtype=np.float64)
    return array if array.ndim == rank else array.reshape(-1, *(1,) * (rank - 1))


class Freezer:
    """Walks a graph once and writes operations. layers: what each conv node became; norms: each
    batch norm; peaks: the largest magnitude of every node's value on calibration images."""

    def __init__(
        self,
        graph: Graph,
        macro: Macro | Macros,
        layers: dict[str, Frozen],
        norms: dict[str, Norm],
        peaks: dict[str, float],
    ) -> None:
        self.graph, self.macros = graph, assigned(macro)
        self.layers, self.norms, self.peaks = layers, norms, peaks
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.constants: dict[str, np.ndarray] = {}
        self.values: dict[str, Value | Formula] = {}
        self.scales: dict[
            str, list[float]
        ] = {}  # the real value of one unit of each accumulator, for the metadata
        self.numbers = Numbers()
        self.scores = next(
            (n.inputs[0] for n in graph.nodes if n.op == "tail"), graph.output
        )  # a softmax is left out: what it is given are the scores

    # -- writing -----------------------------------------------------------------------------------
    def emit(
        self,
        kind: str,
        name: str,
        inputs: tuple[str, ...],
        shape: tuple[int, ...],
        lo: int,
        hi: int,
        attrs: dict[str, Any],
        consts: dict[str, np.ndarray] | None = None,
    ) -> str:
        """Add an operation and its output tensor, both called `name` (made unique)."""
        unique, n = name, 1
        while unique in self.tensors:
            n += 1
            unique = f"{name}@{n}"
        roles = {role: f"{unique}.{role}" for role in consts or {}}
        self.constants.update(
            {roles[role]: np.ascontiguousarray(a) for role, a in (consts or {}).items()}
        )
        self.tensors[unique] = Tensor(unique, tuple(int(n) for n in shape), int(lo), int(hi))
        self.ops.append(Op(kind, unique, inputs, unique, attrs, roles))
        return unique

    def written(self, value: Value, name: str) -> Value:
        """The value as a tensor with no clamp pending; `name` is the node's, for a clamp that needs
        an operation of its own."""
        if value.tensor is None:
            inputs, number, name = value.source
        else:
            spec = self.tensors[value.tensor]
            if value.lo <= spec.lo and spec.hi <= value.hi:
                return value
            rank = (1,) * len(value.shape)
            inputs, number, name = (
                (value.tensor,),
                Requant((np.ones(rank, np.int32),), np.zeros(rank, np.int32), 0, value.grid),
                f"{name}.clamp",
            )
        attrs = {"shift": number.shift, "lo": value.lo, "hi": value.hi}
        consts = {f"mult{n}": mult for n, mult in enumerate(number.mults)} | {"add": number.add}
        return replace(
            value,
            tensor=self.emit(
                "requant", name, inputs, value.shape, value.lo, value.hi, attrs, consts
            ),
            source=None,
        )

    def moved(self, kind: str, node: Node, attrs: dict[str, Any]) -> Value:
        """An operation on the integers of a grid, whatever they stand for."""
        value = self.operand(node, 0)
        spec = self.tensors[value.tensor]
        lo, hi = (min(0, spec.lo), max(0, spec.hi)) if kind == "pad" else (spec.lo, spec.hi)
        return Value(
            value.grid,
            lo,
            hi,
            node.shape,
            self.emit(kind, node.name, (spec.name,), node.shape, lo, hi, attrs),
        )

    def operand(self, node: Node, n: int) -> Value:
        """The n-th input of a node as a tensor."""
        name = node.inputs[n]
        self.values[name] = self.written(self.values[name], name)
        return self.values[name]

    # -- grids -------------------------------------------------------------------------------------
    def settle(self, formula: Formula, name: str) -> Value:
        """The value of node `name` on the grid that its users ask for."""
        grid, title = self.target(formula, name)
        peaks = [self.tensors[t.tensor].peak for t in formula.terms]
        number = requant([t.scale for t in formula.terms], formula.offset, peaks, grid, title)
        self.numbers.rounds[name] = number
        self.numbers.factors.update(
            {t.place: number.factor(n, t.unit) for n, t in enumerate(formula.terms)}
        )
        return Value(
            grid,
            grid.lo,
            grid.hi,
            formula.shape,
            None,
            (tuple(t.tensor for t in formula.terms), number, title),
        )

    def regrid(self, value: Value, place: Place, grid: Grid, name: str) -> Value:
        """The value on another grid; the clamp that may be pending is done there, since a requant
        keeps the order of values."""
        value = value if value.tensor else self.written(value, name)
        spec, rank = self.tensors[value.tensor], (1,) * len(value.shape)
        number = requant([np.full(rank, value.grid.scale)], np.zeros(rank), [spec.peak], grid, name)
        self.numbers.regrids[place] = number.factor(0, value.grid.scale), number
        lo, hi = (min(max(number.of(end), grid.lo), grid.hi) for end in (value.lo, value.hi))
        return Value(grid, lo, hi, value.shape, None, ((spec.name,), number, name))

    def narrowed(self, node: Node, reach: int) -> Value:
        """The first input of a node as a tensor of at most `reach` steps."""
        name = node.inputs[0]
        if self.values[name].peak <= reach:
            return self.operand(node, 0)
        grid = Grid(_dyadic(GRID_MARGIN * self.peaks[name] / reach), 0, -reach, reach)
        return self.written(
            self.regrid(self.values[name], (node.name, 0), grid, f"{name}.grid"), name
        )

    def target(self, formula: Formula, name: str) -> tuple[Grid, str]:
        """(the grid for the value of node `name`, what to call the operation that writes it)."""
        end, user = self.taker(name)
        if self.leaves(end):
            return self.output_grid(self.bound(formula), end), "output"
        if user and user.op == "conv":
            return self.code_grid(user), f"{user.name}.codes"
        reach = GRID_PEAK if user is None else _reach(user)
        return Grid(
            _dyadic(self.real_scale(self.bound(formula), end, reach)), 0, -reach, reach
        ), f"{end}.grid"

    def taker(self, name: str) -> tuple[str, Node | None]:
        """(the last node that hands the integers of `name` on as they are, the only node that takes
        them from there or None)."""
        while True:
            user = self.only_user(name)
            if user is None or user.op not in PASSES:
                return name, user
            name = user.name

    def only_user(self, name: str) -> Node | None:
        users = [n for n in self.graph.nodes for x in n.inputs if x == name]
        return users[0] if len(users) == 1 and name != self.scores else None

    def leaves(self, name: str) -> bool:
        """Whether a value is the scores and nothing else."""
        return name == self.scores and all(n.op == "tail" for n in self.graph.users(name))

    def code_grid(self, conv: Node) -> Grid:
        """The input codes of a layer."""
        layer = self.layers[conv.name]
        return Grid(layer.s_x, layer.zero, 0, self.macros.of(conv.name).q_x)

    def output_grid(self, bound: float, name: str) -> Grid:
        return Grid(self.real_scale(bound, name, OUTPUT_PEAK) or 1.0, 0, -OUTPUT_PEAK, OUTPUT_PEAK)

    def bound(self, formula: Formula) -> float:
        """The largest magnitude that the proven bounds of its tensors allow."""
        return float(
            np.max(
                sum(np.abs(t.scale) * self.tensors[t.tensor].peak for t in formula.terms)
                + np.abs(formula.offset)
            )
        )

    def real_scale(self, bound: float, name: str, reach: int) -> float:
        """The scale at which `reach` steps cover the peak of node `name` with its margin."""
        peak = self.peaks[name]
        if not bound <= LARGEST_BOUND * peak and peak > 0:
            raise InputError(
                f"{escaped(name)}: its weights allow values {bound / peak:.3g} times "
                "as large as any seen on the calibration images, beyond 2**20; "
                f"{DEAD_CHANNEL}"
            )
        return GRID_MARGIN * peak / reach if peak > 0 else bound / UNSEEN_STEPS

    # -- walking -----------------------------------------------------------------------------------
    def run(self, pixels: Norm, whole: bool) -> tuple[Program, Numbers]:
        """The program and its numbers; pixels: real = pixel * mult + add; whole: the input is
        uint8, not float32."""
        self.keep(self.graph.input, self._input(pixels, whole))
        for node in self.graph.nodes:
            self.keep(node.name, LOWER[node.op](self, node))
        return self._finish(), self.numbers

    def keep(self, name: str, made: Value | Formula) -> None:
        """Settle what no user will edit further, and write what several users would each write."""
        user = self.only_user(name)
        if isinstance(made, Formula) and (user is None or user.op not in FOLDS):
            made = self.settle(made, name)
        if isinstance(made, Value) and user is None and self.graph.users(name):
            made = self.written(made, name)
        self.values[name] = made

    def _input(self, pixels: Norm, whole: bool) -> Formula:
        shape, name = self.graph.input_shape, self.graph.input
        mult, add = (per_channel(a, len(shape)) for a in (pixels.mult, pixels.add))
        self.tensors[name] = (
            Tensor(name, shape, 0, 255) if whole else Tensor(name, shape, None, None)
        )
        if whole:
            return Formula((Term(name, mult, (name, 0)),), add, shape)
        scale = _dyadic(
            GRID_MARGIN * (self.peaks[name] + np.abs(add).max()) / np.abs(mult).min() / GRID_PEAK
        )
        attrs = {"exponent": -int(np.log2(scale)), "lo": -GRID_PEAK, "hi": GRID_PEAK}
        self.numbers.pixels = (attrs["exponent"], -GRID_PEAK, GRID_PEAK)
        tensor = self.emit("quantize", f"{name}.grid", (name,), shape, -GRID_PEAK, GRID_PEAK, attrs)
        return Formula((Term(tensor, mult * scale, (name, 0)),), add, shape)

    def _finish(self) -> Program:
        name = self.scores
        value = self.values[name]
        if value.grid.hi != OUTPUT_PEAK:
            value = self.regrid(
                value, SCORES, self.output_grid(value.peak * value.grid.scale, name), "output"
            )
        value = self.written(value, name)
        meta = {"output_scale": value.grid.scale, "scales": self.scales, "islands": []}
        program = Program(
            self.macros.default,
            self.graph.input,
            value.tensor,
            self.tensors,
            tuple(self.ops),
            self.constants,
            meta,
            own=self.macros.own,
            digital=self.macros.digital,
        )
        prove(program)
        return program


def _dyadic(scale: float) -> float:
    """The smallest power of two that is not below `scale`, and not below 2**-60."""
    return 2.0 ** np.ceil(np.log2(max(scale, SMALLEST)))


def _reach(user: Node) -> int:
    """How many steps a value may have for the only node that takes it."""
    return _sum_reach(user) if user.op == "avgpool" else GRID_PEAK


def _sum_reach(pool: Node) -> int:
    return min(GRID_PEAK, max(1, SUM_PEAK // prod(pool.attrs["kernel"])))


# -- one rule per operation of the graph -----------------------------------------------------------
def _conv(f: Freezer, node: Node) -> Formula:
    layer, g = f.layers[node.name], Geometry.from_dict(node.attrs["geometry"])
    codes, image = _to_image(f, _codes(f, node), g)
    plan = f.macros.plan(node.name, g)
    bound, weight_offset = plan.acc_bound, plan.macro.weight_offset
    out = (g.columns, *g.out_size(*image[1:]))
    attrs = {"layer": node.name, "geometry": g.to_dict(), "pad": layer.zero, "adc": layer.adc}
    acc = f.emit(
        "reads",
        node.name,
        (codes,),
        out,
        -bound,
        bound,
        attrs,
        {"weight": layer.weight, **layer.consts},
    )
    scale = layer.s_x * layer.s_w
    f.scales[acc] = (scale * layer.unit).tolist()
    terms = [Term(_from_image(f, node, acc), _by_column(scale * layer.unit, node), (node.name, 0))]
    if weight_offset:
        total = _from_image(f, node, _input_sum(f, node, codes, g, layer.zero, out))
        terms.append(Term(total, _by_column(-scale * weight_offset, node), (node.name, 1)))
    offset = layer.bias - scale * layer.zero * layer.weight.reshape(g.columns, -1).sum(
        1, dtype=np.int64
    )
    formula = Formula(tuple(terms), _by_column(offset, node), node.shape)
    return (
        formula
        if layer.norm is None
        else formula.affine(_by_column(layer.norm.mult, node), _by_column(layer.norm.add, node))
    )


def _codes(f: Freezer, node: Node) -> Value:
    """A layer's input on its code grid."""
    value, grid = f.values[node.inputs[0]], f.code_grid(node)
    if value.grid == grid:
        return f.operand(node, 0)
    name = f"{node.name}.codes"
    return f.written(f.regrid(value, (node.name, 0), grid, name), name)


def _by_column(array: np.ndarray, node: Node) -> np.ndarray:
    """[O] or [1] for the shape of a layer's node: the columns of a linear layer come last."""
    rank = len(node.shape)
    return (
        np.asarray(array).reshape(*(1,) * (rank - 1), -1)
        if node.attrs["geometry"]["kind"] == "linear"
        else per_channel(array, rank)
    )


def _input_sum(
    f: Freezer, node: Node, codes: str, g: Geometry, zero: int, out: tuple[int, ...]
) -> str:
    columns = 1 if g.groups == 1 else g.columns
    return f.emit(
        "xsum",
        f"{node.name}.xsum",
        (codes,),
        (columns, *out[1:]),
        0,
        g.rows * f.macros.of(node.name).q_x,
        {"geometry": g.to_dict(), "pad": zero, "columns": columns},
    )


def _to_image(f: Freezer, value: Value, g: Geometry) -> tuple[str, tuple[int, ...]]:
    """The codes as [C, H, W], as model.network.to_image does."""
    codes, shape = value.tensor, value.shape
    if g.kind == "conv1d":
        image = (shape[0], 1, shape[1])
    elif g.kind == "linear":
        codes = _permuted(f, codes, [len(shape) - 1, *range(len(shape) - 1)])
        image = (shape[-1], prod(shape[:-1]), 1)
    else:
        return codes, shape
    return _reshaped(f, codes, image, "image"), image


def _from_image(f: Freezer, node: Node, tensor: str) -> str:
    """The way back to the node's own shape, for a tensor of as many columns as the node or one."""
    shape = f.tensors[tensor].shape
    if node.attrs["geometry"]["kind"] == "linear":
        return _reshaped(
            f, _permuted(f, tensor, [1, 2, 0]), (*node.shape[:-1], shape[0]), "reshape"
        )
    return _reshaped(f, tensor, (shape[0], *node.shape[1:]), "reshape")


def _permuted(f: Freezer, tensor: str, axes: list[int]) -> str:
    """The tensor with its axes in another order; as it is where only one of them is longer than 1,
    for a reshape follows."""
    spec = f.tensors[tensor]
    if max(spec.shape) == prod(spec.shape):
        return tensor
    return f.emit(
        "permute",
        f"{tensor}.permute",
        (tensor,),
        tuple(spec.shape[a] for a in axes),
        spec.lo,
        spec.hi,
        {"axes": axes},
    )


def _reshaped(f: Freezer, tensor: str, shape: tuple[int, ...], suffix: str) -> str:
    spec = f.tensors[tensor]
    return (
        tensor
        if spec.shape == shape
        else f.emit(
            "reshape",
            f"{tensor}.{suffix}",
            (tensor,),
            shape,
            spec.lo,
            spec.hi,
            {"shape": list(shape)},
        )
    )


def _affine(f: Freezer, node: Node, mult: np.ndarray, add: np.ndarray) -> Formula:
    made = f.values[node.inputs[0]]
    if isinstance(made, Formula):
        return made.affine(mult, add)
    value = f.operand(node, 0)
    return Formula(
        (Term(value.tensor, value.grid.scale * mult, (node.name, 0), value.grid.scale),),
        np.asarray(add),
        node.shape,
    )


def _batch_norm(f: Freezer, node: Node) -> Formula:
    norm, rank = f.norms[node.name], len(node.shape)
    return _affine(f, node, per_channel(norm.mult, rank), per_channel(norm.add, rank))


def _scalars(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """mult and add of an affine node, as arrays that broadcast to it."""
    return tuple(per_channel(node.attrs[role], len(node.shape)) for role in ("mult", "add"))


def _clamp(f: Freezer, node: Node) -> Value:
    value = f.values[node.inputs[0]]
    lo, hi = (value.grid.index(node.attrs[end]) for end in ("lo", "hi"))
    f.numbers.bounds[node.name] = value.grid.real(lo), value.grid.real(hi)
    return value.within(lo, hi)


def _relu(f: Freezer, node: Node) -> Value:
    value = f.values[node.inputs[0]]
    return value.within(value.grid.zero, value.grid.hi)


def _add(f: Freezer, node: Node) -> Formula:
    parts = [f.values[name] for name in node.inputs]
    while sum(len(p.terms) if isinstance(p, Formula) else 1 for p in parts) > MAX_TERMS and any(
        isinstance(p, Formula) for p in parts
    ):
        longest = max(
            range(len(parts)),
            key=lambda n: len(parts[n].terms) if isinstance(parts[n], Formula) else 0,
        )
        f.values[node.inputs[longest]] = parts[longest] = f.settle(
            parts[longest], node.inputs[longest]
        )
    formulas = [
        p if isinstance(p, Formula) else _as_formula(f.operand(node, n), (node.name, n))
        for n, p in enumerate(parts)
    ]
    signed = [
        p.affine(np.float64(sign), np.float64(0)) for sign, p in zip(node.attrs["signs"], formulas)
    ]
    return Formula(
        tuple(t for p in signed for t in p.terms), sum(p.offset for p in signed), node.shape
    )


def _as_formula(value: Value, place: Place) -> Formula:
    rank = (1,) * len(value.shape)
    return Formula(
        (Term(value.tensor, np.full(rank, value.grid.scale), place, value.grid.scale),),
        np.zeros(rank),
        value.shape,
    )


def _avgpool(f: Freezer, node: Node) -> Formula:
    a, area = node.attrs, prod(node.attrs["kernel"])
    value = f.narrowed(node, _sum_reach(node))
    spec, attrs = (
        f.tensors[value.tensor],
        {"kernel": a["kernel"], "stride": a["stride"], "padding": [[p, p] for p in a["padding"]]},
    )
    tensor = f.emit(
        "sumpool",
        node.name,
        (spec.name,),
        node.shape,
        min(0, spec.lo) * area,
        max(0, spec.hi) * area,
        attrs,
    )
    count = np.full((1, 1, 1), area) if a["include_pad"] else _covered(value.shape[1:], attrs)
    return Formula(
        (Term(tensor, value.grid.scale / count, (node.name, 0), value.grid.scale),),
        np.zeros((1, 1, 1)),
        node.shape,
    )


def _covered(size: tuple[int, ...], attrs: dict[str, Any]) -> np.ndarray:
    """How many real positions each window holds: [1, H_out, W_out]."""
    ones = np.pad(np.ones(size), attrs["padding"])
    windows = np.lib.stride_tricks.sliding_window_view(ones, attrs["kernel"])[
        :: attrs["stride"][0], :: attrs["stride"][1]
    ]
    return windows.sum((-1, -2))[None]


def _concat(f: Freezer, node: Node) -> Value:
    grid = Grid(max(f.values[name].grid.scale for name in node.inputs), 0, -GRID_PEAK, GRID_PEAK)
    parts = [_joined(f, node, n, grid) for n in range(len(node.inputs))]
    lo, hi = min(p.lo for p in parts), max(p.hi for p in parts)
    tensor = f.emit(
        "concat",
        node.name,
        tuple(p.tensor for p in parts),
        node.shape,
        lo,
        hi,
        {"axis": node.attrs["axis"]},
    )
    return Value(grid, lo, hi, node.shape, tensor)


def _joined(f: Freezer, node: Node, n: int, grid: Grid) -> Value:
    """The n-th part of a join on the grid of all."""
    name = node.inputs[n]
    if f.values[name].grid.scale == grid.scale:
        return f.operand(node, n)
    return f.written(f.regrid(f.values[name], (node.name, n), grid, f"{name}.grid"), name)


LOWER: dict[str, Callable[[Freezer, Node], Value | Formula]] = {
    "conv": _conv,
    "batch_norm": _batch_norm,
    "relu": _relu,
    "clamp": _clamp,
    "affine": lambda f, n: _affine(f, n, *_scalars(n)),
    "add": _add,
    "maxpool": lambda f, n: f.moved("maxpool", n, dict(n.attrs)),
    "avgpool": _avgpool,
    "reshape": lambda f, n: f.moved("reshape", n, {"shape": list(n.attrs["shape"])}),
    "permute": lambda f, n: f.moved("permute", n, {"axes": list(n.attrs["axes"])}),
    "concat": _concat,
    "pad": lambda f, n: f.moved("pad", n, {"pads": [list(p) for p in n.attrs["pads"]]}),
    "slice": lambda f, n: f.moved("slice", n, dict(n.attrs)),
    "dropout": lambda f, n: f.values[n.inputs[0]],
    "tail": lambda f, n: f.values[n.inputs[0]],
}
