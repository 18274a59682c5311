"""The definition itself: against torch with an ideal ADC, against numbers worked by hand and plain
fractions with a real one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rqtool.errors import ConfigError, InputError
from rqtool.hardware import adc
from rqtool.hardware.macro import SIGN_SCHEMES, Macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.program import golden
from rqtool.program.ir import ATTRIBUTES, Op, Program, Tensor, check, requant_peak

WIDE = 2**31 - 1
IDEAL = {"kind": "ideal"}


# -- programs by hand ------------------------------------------------------------------------------
def reads_op(geometry: Geometry, pad: int, spec: dict, **consts) -> Op:
    attrs = {"layer": "layer", "geometry": geometry.to_dict(), "pad": pad, "adc": spec}
    return Op("reads", "layer", ("x",), "acc", attrs, {role: role for role in ("weight", *consts)})


def reads_program(
    macro: Macro,
    geometry: Geometry,
    weight: np.ndarray,
    size: tuple[int, int],
    pad: int = 0,
    spec: dict = IDEAL,
    **consts,
) -> Program:
    """x (input codes) -> acc (accumulators), nothing more."""
    bound = Plan.make("layer", geometry, macro).acc_bound
    tensors = {
        "x": Tensor("x", (geometry.channels, *size), 0, macro.q_x),
        "acc": Tensor("acc", (geometry.columns, *geometry.out_size(*size)), -bound, bound),
    }
    constants = {
        "weight": weight.astype(np.int8),
        **{role: np.array(c, np.int32) for role, c in consts.items()},
    }
    program = Program(
        macro, "x", "acc", tensors, (reads_op(geometry, pad, spec, **consts),), constants
    )
    check(program)
    return program


def with_corrections(program: Program) -> Program:
    """Behind the reads, what the digital side takes off: the offset times the input sum, the zero
    code times the weight sum."""
    (op,), macro = program.ops, program.macro
    geometry, pad = Geometry.from_dict(op.attrs["geometry"]), op.attrs["pad"]
    shape = program.tensors["acc"].shape
    peak = geometry.rows * macro.q_x
    xsum = Op(
        "xsum",
        "xsum",
        ("x",),
        "sums",
        {"geometry": geometry.to_dict(), "pad": pad, "columns": geometry.columns},
    )
    requant = Op(
        "requant",
        "result",
        ("acc", "sums"),
        "y",
        {"shift": 0, "lo": -WIDE, "hi": WIDE},
        {"mult0": "one", "mult1": "minus_offset", "add": "minus_z"},
    )
    weight_sums = (
        program.constants["weight"]
        .astype(np.int64)
        .reshape(geometry.columns, -1)
        .sum(1)
        .reshape(-1, 1, 1)
    )
    constants = {
        "one": np.array([1]),
        "minus_offset": np.array([-macro.weight_offset]),
        "minus_z": -pad * weight_sums,
    }
    return replace(
        program,
        output="y",
        tensors={
            **program.tensors,
            "sums": Tensor("sums", shape, 0, peak),
            "y": Tensor("y", shape, -WIDE, WIDE),
        },
        ops=(op, xsum, requant),
        constants={**program.constants, **{k: v.astype(np.int32) for k, v in constants.items()}},
    )


def run(program: Program, x: np.ndarray) -> np.ndarray:
    check(program)
    return golden.run(program, x)[program.output]


def draw_layer(
    rng: np.random.Generator, macro: Macro, g: Geometry, size: tuple[int, int], n: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Weights with both extremes in them, and inputs with theirs."""
    w = rng.integers(-macro.q_w, macro.q_w + 1, (g.columns, g.channels // g.groups, *g.kernel))
    x = rng.integers(0, macro.q_x + 1, (n, g.channels, *size))
    w.flat[0], w.flat[-1], x.flat[0], x.flat[-1] = -macro.q_w, macro.q_w, macro.q_x, 0
    return w, x


# -- promise: with an ideal ADC a layer is the integer convolution ---------------------------------
def torch_layer(x: np.ndarray, w: np.ndarray, g: Geometry) -> np.ndarray:
    """The same layer by torch in float64, where these integers are exact; padding holds 0."""
    x, w = torch.from_numpy(x).double(), torch.from_numpy(w).double()
    if g.kind == "linear":
        y = F.linear(x.flatten(1), w.flatten(1))[..., None, None]
    elif g.kind == "conv1d":
        y = F.conv1d(
            x[:, :, 0], w[:, :, 0], None, g.stride[1], g.padding[1], g.dilation[1], g.groups
        )[:, :, None]
    else:
        y = F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)
    return y.numpy()


GEOMETRIES = {
    "1x1": (Geometry(5, 4), (3, 4)),
    "2x2": (Geometry(3, 2, (2, 2)), (4, 5)),
    "3x3 same": (Geometry(4, 5, (3, 3), padding=(1, 1)), (5, 6)),
    "3x3 strided": (Geometry(2, 3, (3, 3), (2, 2), (1, 1)), (7, 8)),
    "3x3 dilated": (Geometry(2, 3, (3, 3), padding=(2, 2), dilation=(2, 2)), (6, 7)),
    "4x4": (Geometry(2, 2, (4, 4), (2, 1), (1, 2)), (6, 6)),
    "5x5": (Geometry(1, 3, (5, 5), (2, 2), (2, 2)), (9, 8)),
    "6x2 uneven": (Geometry(2, 3, (6, 2), (3, 1), (0, 1), (1, 3)), (9, 7)),
    "7x7": (Geometry(3, 2, (7, 7), (2, 2), (3, 3)), (9, 9)),
    "grouped": (Geometry(6, 4, (3, 3), padding=(1, 1), groups=2), (4, 5)),
    "depthwise": (Geometry(4, 4, (3, 3), (2, 1), (1, 0), groups=4), (6, 5)),
    "depthwise twice": (Geometry(3, 6, (3, 3), groups=3), (4, 4)),
    "conv1d": (Geometry(3, 4, (1, 5), (1, 2), (0, 2), kind="conv1d"), (1, 11)),
    "conv1d dilated, grouped": (
        Geometry(4, 2, (1, 3), (1, 1), (0, 3), (1, 3), 2, kind="conv1d"),
        (1, 9),
    ),
    "linear": (Geometry(37, 6, kind="linear"), (1, 1)),
    "linear, one row": (Geometry(1, 1, kind="linear"), (1, 1)),
}


def slicings(scheme: str) -> list[Macro]:
    """Every sign scheme meets serial inputs, sliced weights, wordlines that divide the rows and
    ones that do not."""
    base = Macro(adc_bits=None, sign_scheme=scheme)
    return [
        base,
        replace(base, wl=128),
        replace(base, wl=1),
        replace(base, wl=7, dac_bits=1),
        replace(base, wl=16, cell_bits=1),
        replace(base, wl=10, dac_bits=3, cell_bits=2),
        replace(base, wl=100, pack="kernels", dac_bits=2),
    ]


@pytest.mark.parametrize("scheme", SIGN_SCHEMES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_ideal_reads_are_the_integer_convolution(name, scheme):
    g, size = GEOMETRIES[name]
    for seed, macro in enumerate(slicings(scheme)):
        w, x = draw_layer(np.random.default_rng(seed), macro, g, size)
        y = run(with_corrections(reads_program(macro, g, w, size)), x)
        assert np.array_equal(y, torch_layer(x, w, g)), macro


@pytest.mark.parametrize("scheme", SIGN_SCHEMES)
@pytest.mark.parametrize("z", [1, 8, 15])
@pytest.mark.parametrize("name", ["3x3 same", "5x5", "depthwise", "conv1d", "linear"])
def test_signed_inputs_are_codes_with_a_zero_and_padding_holds_it(name, z, scheme):
    g, size = GEOMETRIES[name]
    for macro in slicings(scheme)[::3]:
        w, codes = draw_layer(np.random.default_rng(z), macro, g, size)
        y = run(with_corrections(reads_program(macro, g, w, size, pad=z)), codes)
        assert np.array_equal(y, torch_layer(codes - z, w, g)), macro


@st.composite
def ideal_layers(draw):
    scheme, w_bits, in_bits = (
        draw(st.sampled_from(SIGN_SCHEMES)),
        draw(st.integers(2, 8)),
        draw(st.integers(1, 8)),
    )
    macro = Macro(
        wl=draw(st.integers(1, 40)), adc_bits=None, w_bits=w_bits, in_bits=in_bits, sign_scheme=scheme,
        dac_bits=draw(st.integers(1, in_bits)), cell_bits=draw(st.integers(1, w_bits - (scheme != "offset"))),
    )  # fmt: skip
    pair = lambda lo, hi: draw(st.tuples(st.integers(lo, hi), st.integers(lo, hi)))  # noqa: E731
    kernel, dilation, groups = pair(1, 7), pair(1, 2), draw(st.integers(1, 3))
    g = Geometry(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        pair(1, 3),
        pair(0, 3),
        dilation,
        groups,
    )
    size = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, pair(0, 3)))
    return macro, g, size, draw(st.integers(0, macro.q_x)), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=150)
@given(ideal_layers())
def test_ideal_reads_of_any_layer(layer):
    macro, g, size, z, seed = layer
    w, codes = draw_layer(np.random.default_rng(seed), macro, g, size, n=1)
    assert np.array_equal(
        run(with_corrections(reads_program(macro, g, w, size, pad=z)), codes),
        torch_layer(codes - z, w, g),
    )


def test_the_uncorrected_offset_accumulator_is_too_large_by_the_input_sum():
    macro, g = Macro(adc_bits=None, sign_scheme="offset"), Geometry(3, 1, kind="linear")
    x = np.array([1, 2, 3]).reshape(1, 3, 1, 1)
    assert run(reads_program(macro, g, np.array([-7, 0, 7]), (1, 1)), x).item() == -7 + 21 + 8 * 6


# -- by hand: 5 rows on 3 wordlines, 2-bit inputs, 3-bit weights, a 2-bit ADC ----------------------
BY_HAND = Macro(wl=3, adc_bits=2, in_bits=2, w_bits=3)
WEIGHTS = np.array([[3, -2, 1, -3, 2], [-1, 0, 2, 1, 1]])
INPUTS = np.array([[3, 0, 2, 3, 1], [1, 3, 0, 0, 2]]).reshape(2, 5, 1, 1)
STEP_4 = {
    "mult": [[8191]],
    "zero": [[2]],
    "gain": [[1]],
}  # code 0: p <= -7, 1: -6..-3, 2: -2..2, 3: p >= 3
TWO_BIT = {"kind": "uniform", "shift": 15, "top": 3}
FC = Geometry(5, 2, kind="linear")


def test_reads_by_hand():
    program = reads_program(BY_HAND, FC, WEIGHTS, (1, 1), spec=TWO_BIT, **STEP_4)
    reads = list(golden.each_read(program, program.ops[0], INPUTS))
    assert [(r.tile, r.input_plane, r.weight_plane, r.factor) for r in reads] == [
        (0, 0, 0, 1),
        (1, 0, 0, 1),
    ]
    assert [r.p.reshape(2, 2).tolist() for r in reads] == [[[11, 1], [-3, -1]], [[-7, 4], [4, 2]]]
    assert [r.code.reshape(2, 2).tolist() for r in reads] == [[[3, 2], [1, 2]], [[0, 3], [3, 2]]]
    assert [r.value.reshape(2, 2).tolist() for r in reads] == [[[1, 0], [-1, 0]], [[-2, 1], [1, 0]]]
    assert run(program, INPUTS).reshape(2, 2).tolist() == [[-1, 1], [0, 0]]


def test_split_bit_serial_reads_by_hand():
    """Thresholds 1, 2, 3: codes are the partial sums, saturated at 3. Column 0, input (3, 0, 2 | 3,
    1): tile 0 positive 3 and 4 -> 3 and 3, negative 0; tile 1 positive 2 and 0, negative 3 and 3; 3
    + 2*3 + (2 - 3) + 2*(0 - 3) = 2."""
    macro = replace(BY_HAND, sign_scheme="split", codebook="unsigned", dac_bits=1)
    program = reads_program(
        macro, FC, WEIGHTS, (1, 1), spec=TWO_BIT, mult=[[32767]], zero=[[0]], gain=[[1]]
    )
    reads = list(golden.each_read(program, program.ops[0], INPUTS[:1]))
    assert [r.factor for r in reads] == [1, -1, 2, -2, 1, -1, 2, -2]
    assert [r.p[0, 0, 0].item() for r in reads] == [3, 0, 4, 0, 2, 3, 0, 3]
    assert [r.code[0, 0, 0].item() for r in reads] == [3, 0, 3, 0, 2, 3, 0, 3]
    assert run(program, INPUTS[:1]).ravel()[0] == 2


def test_gains_of_tiles_and_steps_of_columns_by_hand():
    """Tile 0: step 4 and gain 4; tile 1: step 1, zero 2 and 1. Codes of tile 1 in column 0: -7 ->
    0, 4 -> 3; column 1: 4 -> 3, 2 -> 3."""
    macro = replace(BY_HAND, granularity="tile")
    tables = {"mult": [[8191, 8191], [32767, 32767]], "zero": [[2, 2], [2, 1]], "gain": [[4], [1]]}
    program = reads_program(macro, FC, WEIGHTS, (1, 1), spec=TWO_BIT, **tables)
    assert run(program, INPUTS).reshape(2, 2).tolist() == [[4 - 2, 0 + 2], [-4 + 1, 0 + 2]]


def test_free_levels_by_hand():
    macro = replace(BY_HAND, levels="free")
    free = {"kind": "free", "top": 3}
    program = reads_program(
        macro, FC, WEIGHTS, (1, 1), spec=free, thresholds=[[-5, 0, 5]], levels=[-9, -2, 1, 12]
    )
    assert run(program, INPUTS).reshape(2, 2).tolist() == [[12 - 9, 1 + 1], [-2 + 1, -2 + 1]]


def test_free_levels_with_thresholds_of_columns_by_hand():
    """Column 0 as above; column 1, whose step is a fifth: 1 -> code 3, -1 -> 1, 4 -> 3, 2 -> 3."""
    macro = replace(BY_HAND, levels="free", granularity="column")
    program = reads_program(
        macro,
        FC,
        WEIGHTS,
        (1, 1),
        spec={"kind": "free"},
        thresholds=[[-5, 0, 5], [-1, 0, 1]],
        levels=[-9, -2, 1, 12],
    )
    assert run(program, INPUTS).reshape(2, 2).tolist() == [[12 - 9, 12 + 12], [-2 + 1, -2 + 12]]


# -- any ADC: plain loops and fractions ------------------------------------------------------------
def plain_code(p: int, mult: int, shift: int, zero: int, top: int) -> int:
    return max(0, min(round(Fraction(p * mult, 1 << shift)) + zero, top))


def plain_planes(q: int, bits: int, width: int) -> list[tuple[int, int]]:
    """(factor, digit) of |q| in base 2**width, with the sign of q on every digit."""
    return [
        (1 << s, math.copysign(1, q) * ((abs(q) >> s) & ((1 << min(width, bits - s)) - 1)))
        for s in range(0, bits, width)
    ]


def plain_weight(w: int, m: Macro) -> list[tuple[int, int]]:
    if m.sign_scheme == "signed":
        return plain_planes(w, m.w_bits - 1, m.cell_bits)
    if m.sign_scheme == "offset":
        return plain_planes(w + 2 ** (m.w_bits - 1), m.w_bits, m.cell_bits)
    return plain_planes(max(w, 0), m.w_bits - 1, m.cell_bits) + [
        (-f, d) for f, d in plain_planes(max(-w, 0), m.w_bits - 1, m.cell_bits)
    ]


def plain_layer(m: Macro, w: np.ndarray, x: np.ndarray, convert) -> list[list[int]]:
    """A fully connected layer, read by read: nothing of the plan, the planes or the ADC is used."""
    result = []
    for sample in x:
        inputs = [plain_planes(int(v), m.in_bits, m.dac_bits) for v in sample]
        result.append([])
        for o, column in enumerate(w):
            weights, acc = [plain_weight(int(v), m) for v in column], 0
            for t, start in enumerate(range(0, len(column), m.wl)):
                rows = range(start, min(start + m.wl, len(column)))
                for i, j in product(range(len(inputs[0])), range(len(weights[0]))):
                    p = sum(int(weights[k][j][1]) * int(inputs[k][i][1]) for k in rows)
                    acc += inputs[0][i][0] * weights[0][j][0] * convert(p, t, o)
            result[-1].append(acc)
    return result


@settings(max_examples=150)
@given(st.data())
def test_any_uniform_adc_equals_plain_fractions(data):
    scheme = data.draw(st.sampled_from(SIGN_SCHEMES))
    w_bits, in_bits, bits = (
        data.draw(st.integers(2, 4)),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 8)),
    )
    m = Macro(
        wl=data.draw(st.integers(1, 6)), adc_bits=bits, w_bits=w_bits, in_bits=in_bits, sign_scheme=scheme, granularity="tile",
        dac_bits=data.draw(st.integers(1, in_bits)), cell_bits=data.draw(st.integers(1, w_bits - (scheme != "offset"))),
    )  # fmt: skip
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, columns = int(rng.integers(1, 14)), int(rng.integers(1, 4))
    tiles = -(-rows // m.wl)
    shapes = [(1, 1), (1, columns), (tiles, 1), (tiles, columns)]
    shape, gain_shape = shapes[rng.integers(4)], shapes[rng.integers(4)]
    mult, zero, gain = (
        rng.integers(0, 2**14, shape) * 2 + 1,
        rng.integers(0, m.top + 1, shape),
        rng.integers(1, 128, gain_shape),
    )
    w, x = rng.integers(-m.q_w, m.q_w + 1, (columns, rows)), rng.integers(0, m.q_x + 1, (2, rows))

    def at(table: np.ndarray, t: int, o: int) -> int:
        return int(np.broadcast_to(table, (tiles, columns))[t, o])

    def convert(p: int, t: int, o: int) -> int:
        return at(gain, t, o) * (
            plain_code(p, at(mult, t, o), m.shift, at(zero, t, o), m.top) - at(zero, t, o)
        )

    g = Geometry(rows, columns, kind="linear")
    program = reads_program(
        m,
        g,
        w,
        (1, 1),
        spec={"kind": "uniform", "shift": m.shift, "top": m.top},
        mult=mult,
        zero=zero,
        gain=gain,
    )
    assert run(program, x[..., None, None])[..., 0, 0].tolist() == plain_layer(m, w, x, convert)


@settings(max_examples=60)
@given(st.data())
def test_any_free_levels_equal_a_plain_table(data):
    m = Macro(
        wl=4,
        in_bits=2,
        w_bits=3,
        sign_scheme=data.draw(st.sampled_from(SIGN_SCHEMES)),
        levels="free",
        adc_bits=data.draw(st.integers(1, 4)),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = int(rng.integers(1, 3))
    thresholds, levels = (
        np.sort(rng.integers(m.p_min, m.p_max + 2, (rows, m.top))),
        np.sort(rng.integers(-99, 99, m.top + 1)),
    )
    w, x = rng.integers(-m.q_w, m.q_w + 1, (2, 10)), rng.integers(0, m.q_x + 1, (2, 10))
    program = reads_program(
        m,
        Geometry(10, 2),
        w,
        (1, 1),
        spec={"kind": "free", "top": m.top},
        thresholds=thresholds,
        levels=levels,
    )
    plain = plain_layer(
        m,
        w,
        x,
        lambda p, t, o: int(levels[sum(p >= threshold for threshold in thresholds[o % rows])]),
    )
    assert run(program, x[..., None, None])[..., 0, 0].tolist() == plain


@given(ideal_layers())
def test_partial_sums_stay_within_the_plan(layer):
    macro, g, size, z, seed = layer
    w, x = draw_layer(np.random.default_rng(seed), macro, g, size, n=1)
    program = reads_program(macro, g, w, size, pad=z)
    plan = program.plan(program.ops[0])
    for read in golden.each_read(program, program.ops[0], x):
        low, high = plan.p_bounds(read.input_plane, read.weight_plane)
        assert low <= read.p.min() and read.p.max() <= high


# -- the other operations --------------------------------------------------------------------------
def apply(
    kind: str, attrs: dict, *xs: np.ndarray, shape: tuple[int, ...], consts: dict | None = None
) -> np.ndarray:
    """What one operation makes of `xs`."""
    constants = {k: np.array(v, np.int32) for k, v in (consts or {}).items()}
    tensors = {
        f"x{n}": Tensor(f"x{n}", x.shape[1:], int(x.min()), int(x.max())) for n, x in enumerate(xs)
    }
    op = Op(kind, kind, tuple(tensors), "y", attrs, {k: k for k in constants})
    program = Program(
        Macro(), "x0", "y", {**tensors, "y": Tensor("y", shape, -WIDE, WIDE)}, (op,), constants
    )
    return golden.RULES[kind](program, op, *(x.astype(np.int64) for x in xs))


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(-300, 0), st.integers(0, 300))
def test_requant_is_floor_division_and_clamp(seed, shift, lo, hi):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-9000, 9000, (2, 3, 2, 2)), rng.integers(-9000, 9000, (2, 3, 2, 2))
    consts = {
        "mult0": rng.integers(-3000, 3000, (3, 1, 1)),
        "mult1": rng.integers(-3000, 3000, (3, 1, 1)),
        "add": rng.integers(-(2**20), 2**20, (3, 1, 1)),
    }
    y = apply(
        "requant", {"shift": shift, "lo": lo, "hi": hi}, a, b, shape=a.shape[1:], consts=consts
    )
    for index in np.ndindex(a.shape):
        m0, m1, add = (int(consts[k][index[1], 0, 0]) for k in ("mult0", "mult1", "add"))
        assert y[index] == max(
            lo, min((int(a[index]) * m0 + int(b[index]) * m1 + add) // 2**shift, hi)
        )


def test_requant_rounds_half_up_when_its_addend_says_so():
    x = np.array([-3, -2, -1, 0, 1, 2, 3]).reshape(1, 7)
    y = apply(
        "requant", {"shift": 1, "lo": -9, "hi": 9}, x, shape=(7,), consts={"mult0": [1], "add": [1]}
    )
    assert y.tolist() == [[-1, -1, 0, 0, 1, 1, 2]]


def quantized(x: np.ndarray, exponent: int, lo: int, hi: int) -> np.ndarray:
    op = Op("quantize", "in", ("x",), "q", {"exponent": exponent, "lo": lo, "hi": hi})
    program = Program(
        Macro(),
        "x",
        "q",
        {"x": Tensor("x", x.shape[1:], None, None), "q": Tensor("q", x.shape[1:], lo, hi)},
        (op,),
        {},
    )
    return run(program, x)


def test_quantize_rounds_halves_up_on_a_dyadic_grid():
    x = np.array(
        [[-9, -0.375, -0.3125, -0.125, 0, 0.124, 0.125, 0.3749, 0.375, 3.5, 99]], np.float32
    )
    assert quantized(x, 2, -2, 15).tolist() == [[-2, -1, -1, 0, 0, 0, 1, 1, 2, 14, 15]]


@given(st.lists(st.floats(-300, 300, width=16), min_size=1, max_size=20), st.integers(-4, 4))
def test_quantize_equals_fractions(values, exponent):
    """Half-precision values, so that the sum with a half is exact in float32; beyond that, float32
    arithmetic is the definition."""
    x = np.array([values], np.float32)
    exact = [
        max(
            -999,
            min(math.floor(Fraction(float(v)) * Fraction(2) ** exponent + Fraction(1, 2)), 999),
        )
        for v in x[0]
        if abs(v) > 2**-8 or v == 0
    ]
    keep = (np.abs(x) > 2**-8) | (x == 0)
    assert quantized(x, exponent, -999, 999)[keep].tolist() == exact


@st.composite
def windows(draw):
    pair = lambda lo, hi: draw(st.tuples(st.integers(lo, hi), st.integers(lo, hi)))  # noqa: E731
    kernel, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 2)
    pads = [draw(st.tuples(st.integers(0, k // 2), st.integers(0, k // 2))) for k in kernel]
    size = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, pair(0, 4)))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(-50, 50, (2, 3, *size))
    return x, kernel, stride, pads, dilation


def padded(x: np.ndarray, pads, fill: float) -> torch.Tensor:
    return F.pad(torch.from_numpy(x).double(), (*pads[1], *pads[0]), value=fill)


@given(windows())
def test_maxpool_equals_torch_and_padding_never_wins(case):
    x, kernel, stride, pads, dilation = case
    y = F.max_pool2d(padded(x, pads, -np.inf), kernel, stride, 0, dilation).numpy()
    attrs = {
        "kernel": list(kernel),
        "stride": list(stride),
        "padding": [list(p) for p in pads],
        "dilation": list(dilation),
    }
    assert np.array_equal(apply("maxpool", attrs, x, shape=y.shape[1:]), y)


@given(windows())
def test_sumpool_equals_torch(case):
    x, kernel, stride, pads, _ = case
    y = F.avg_pool2d(padded(x, pads, 0), kernel, stride, divisor_override=1).numpy()
    attrs = {"kernel": list(kernel), "stride": list(stride), "padding": [list(p) for p in pads]}
    assert np.array_equal(apply("sumpool", attrs, x, shape=y.shape[1:]), y)


def test_moves_equal_torch():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    t = torch.from_numpy(x)
    moves = {
        "reshape": ({"shape": [12, 5]}, t.reshape(2, 12, 5)),
        "permute": ({"axes": [2, 0, 1]}, t.permute(0, 3, 1, 2)),
        "pad": ({"pads": [[0, 2], [1, 0], [0, 3]]}, F.pad(t, (0, 3, 1, 0, 0, 2))),
        "slice": ({"axis": 1, "start": 1, "stop": 4, "step": 2}, t[:, :, 1:4:2]),
    }
    for kind, (attrs, y) in moves.items():
        assert np.array_equal(apply(kind, attrs, x, shape=tuple(y.shape[1:])), y.numpy()), kind
    assert np.array_equal(
        apply("concat", {"axis": 2}, x, x[..., :2], shape=(3, 4, 7)),
        torch.cat([t, t[..., :2]], 3).numpy(),
    )


@given(ideal_layers())
def test_xsum_is_a_convolution_with_ones(layer):
    macro, g, size, z, seed = layer
    _, x = draw_layer(np.random.default_rng(seed), macro, g, size, n=1)
    ones = np.ones((g.columns, g.channels // g.groups, *g.kernel), int)
    y = torch_layer(x - z, ones, g) + z * g.rows
    assert np.array_equal(
        apply(
            "xsum", {"geometry": g.to_dict(), "pad": z, "columns": g.columns}, x, shape=y.shape[1:]
        ),
        y,
    )


# -- running a whole program -----------------------------------------------------------------------
def small_program() -> Program:
    return with_corrections(reads_program(BY_HAND, FC, WEIGHTS, (1, 1), spec=TWO_BIT, **STEP_4))


def test_run_returns_every_tensor_or_the_ones_asked_for():
    everything = golden.run(small_program(), INPUTS.astype(np.uint8))
    assert list(everything) == ["x", "acc", "sums", "y"]
    assert all(a.dtype == np.int64 for a in everything.values())
    assert everything["sums"].reshape(2, 2).tolist() == [[9, 9], [6, 6]]
    assert list(golden.run(small_program(), INPUTS, keep=["y"])) == ["y"]


def test_a_bound_that_is_left_is_a_bug():
    program = small_program()
    program.tensors["acc"] = Tensor("acc", (2, 1, 1), 0, 1)
    with pytest.raises(AssertionError) as caught:
        golden.run(program, INPUTS)
    assert str(caught.value) == "layer: -1..1 leaves 0..1"
    program.tensors["acc"] = Tensor("acc", (2, 2, 1), 0, 1)
    with pytest.raises(AssertionError) as caught:
        golden.run(program, INPUTS)
    assert str(caught.value) == "layer: shape (2, 1, 1) is not (2, 2, 1)"


def test_tensors_know_their_carrier():
    dtypes = {(0, 255): "uint8", (0, 256): "int32", (-1, 3): "int32", (None, None): "float32"}
    assert {bounds: Tensor("t", (1,), *bounds).dtype for bounds in dtypes} == dtypes
    assert Tensor("t", (1,), -9, 3).peak == 9


# -- plain data, and what check refuses ------------------------------------------------------------
def test_a_program_comes_back_from_json_with_the_same_digest():
    program = small_program()
    back = Program.from_json(json.loads(json.dumps(program.to_json())), program.constants)
    assert back == program and back.sha256() == program.sha256()


def test_the_digest_sees_everything_but_meta():
    program = small_program()
    other = [
        replace(program, macro=replace(program.macro, wl=5)),
        replace(program, output="acc"),
        replace(program, ops=program.ops[:2]),
        replace(program, constants={**program.constants, "one": np.array([2], np.int32)}),
        replace(program, tensors={**program.tensors, "y": Tensor("y", (2, 1, 1), 0, 1)}),
    ]
    assert len({p.sha256() for p in (program, *other)}) == 6
    assert replace(program, meta={"note": 1}).sha256() == program.sha256()


def broken(**changes) -> str:
    with pytest.raises(InputError) as caught:
        check(replace(small_program(), **changes))
    return str(caught.value)


def changed(n: int, **changes) -> dict:
    ops = list(small_program().ops)
    ops[n] = replace(ops[n], **changes)
    return {"ops": tuple(ops)}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (changed(0, kind="dense"), "'layer': operation dense is unknown"),
        (changed(0, kind="\x1b[2J"), "'layer': operation \\x1b[2J is unknown"),
        (changed(1, attrs={"pad": 0}), "'xsum': its attributes are ['pad']"),
        (changed(0, inputs=("y",)), "'layer': y is used before it is made"),
        (changed(1, output="nowhere"), "'xsum': nowhere has no shape"),
        (
            changed(0, attrs={**small_program().ops[0].attrs, "adc": {"kind": "flash"}}),
            "'layer': adc flash is unknown",
        ),
        (
            changed(0, consts={"weight": "weight", "mult": "mult", "zero": "zero"}),
            "'layer': it has no constant for gain",
        ),
        (
            changed(2, consts={"mult0": "one", "add": "minus_z"}),
            "'result': it has no constant for mult1",
        ),
        (
            changed(0, consts={**small_program().ops[0].consts, "weight": "w"}),
            "'layer': integer constant w is missing",
        ),
        (
            {"constants": {**small_program().constants, "weight": WEIGHTS / 2}},
            "'layer': integer constant weight is missing",
        ),
        (
            {"constants": {**small_program().constants, "minus_z": np.array([2**30], np.int32)}},
            "'result': its sum can pass 2**30",
        ),
    ],
)
def test_check_refuses(changes, what):
    assert broken(**changes) == f"the integer program is broken at {what}; make the file again"


def test_check_refuses_an_output_that_is_never_made():
    assert (
        broken(output="z") == "the integer program never makes its output 'z'; make the file again"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d.pop("ops"),
            "the integer program is not readable ('ops'); make the file again",
        ),
        (
            lambda d: d.update(tensors=3),
            "the integer program is not readable ('int' object is not iterable); "
            "make the file again",
        ),
        (
            lambda d: d["macro"].update(wires=3),
            "the integer program is not readable (Macro.__init__() got an "
            "unexpected keyword argument 'wires'); make the file again",
        ),
        (
            lambda d: d["ops"][0].update(kind=[]),
            "the integer program is not readable (unhashable type: 'list'); make the file again",
        ),
        (
            lambda d: d["ops"][0].update(kind="dense"),
            "the integer program is broken at 'layer': operation dense is "
            "unknown; make the file again",
        ),
    ],
)
def test_data_that_is_no_program_is_refused(change, sentence):
    data = json.loads(json.dumps(small_program().to_json()))
    change(data)
    with pytest.raises(InputError) as caught:
        Program.from_json(data, small_program().constants)
    assert str(caught.value) == sentence


def test_a_macro_that_cannot_be_is_refused_as_such():
    data = small_program().to_json()
    data["macro"]["wl"] = 0
    with pytest.raises(ConfigError) as caught:
        Program.from_json(data, small_program().constants)
    assert str(caught.value) == "--wl must be a whole number from 1 to 4096, not 0"


def test_requant_peak_is_reached_by_the_worst_inputs():
    program = small_program()
    assert (
        requant_peak(program, program.ops[2]) == program.tensors["acc"].peak == 6
    )  # signed reads, no zero code: acc * 1 alone
    program.constants.update(
        minus_offset=np.array([-4], np.int32), minus_z=np.array([[[5]], [[-7]]], np.int32)
    )
    assert requant_peak(program, program.ops[2]) == 6 + 4 * 15 + 7  # input sums of 5 rows reach 15


def test_every_operation_has_a_rule():
    assert set(golden.RULES) == set(ATTRIBUTES)


def test_code_of_no_partial_sum_leaves_the_code_book():
    program = reads_program(BY_HAND, FC, WEIGHTS, (1, 1), spec=TWO_BIT, **STEP_4)
    p = np.arange(-27, 28).reshape(1, 1, 1, 1, -1)
    converter = program.adc(program.ops[0]).at(0, 1)
    code = converter.code(p)
    value = converter.value(code)
    assert set(code.ravel().tolist()) == set(range(BY_HAND.top + 1))
    assert np.array_equal(value, adc.uniform_value(code, BY_HAND.zero))
