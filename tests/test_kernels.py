"""The carriers of the reads: every accumulator equals golden's, every gradient an explicit float64
formula, on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CASES, images, layer_program

from rqtool.errors import ConfigError
from rqtool.hardware import adc
from rqtool.hardware.converter import Levels
from rqtool.hardware.macro import Macro
from rqtool.kernels import (
    blocks,
    certify,
    choose,
    compiled,
    cpu,
    records,
    reference,
    requant,
    threads,
    vector,
)
from rqtool.kernels.spec import (
    Noise,
    ReadSpec,
    Tables,
    free_level_spec,
    inside_spec,
    make_spec,
    read_spec,
)
from rqtool.mapping.plan import Geometry, Plan
from rqtool.mapping.planes import extract
from rqtool.program import golden, run
from rqtool.program.ir import Op, Program, Tensor
from rqtool.train.relax import Relaxation, slope_tables

pytestmark = pytest.mark.usefixtures("one_thread")


# -- random layers: shapes wider than those of programs.py -----------------------------------------
@dataclass(frozen=True)
class Layer:
    """One reads operation with its input codes uint8 [N, C, H, W]."""

    program: Program
    x: np.ndarray

    @property
    def op(self) -> Op:
        return self.program.ops[0]

    @property
    def plan(self) -> Plan:
        return self.program.plan(self.op)


def pick(rng: np.random.Generator, *options):
    return options[rng.integers(len(options))]


def random_macro(rng: np.random.Generator) -> Macro:
    while True:
        in_bits, w_bits, levels = (
            int(rng.integers(1, 7)),
            int(rng.integers(2, 7)),
            pick(rng, "uniform", "uniform", "free"),
        )
        scheme = pick(rng, "signed", "split", "offset")
        try:
            return Macro(
                wl=int(rng.integers(1, 60)), adc_bits=int(rng.integers(1, 9)), in_bits=in_bits, w_bits=w_bits, sign_scheme=scheme, pack=pick(rng, "rows", "kernels", "spread"),
                codebook=pick(rng, None, "sign-magnitude"), dac_bits=pick(rng, None, int(rng.integers(1, in_bits + 1))), cell_bits=pick(rng, None, int(rng.integers(1, w_bits))),
                levels=levels, granularity=pick(rng, "layer", "column") if levels == "free" else pick(rng, "layer", "column", "tile"),
            )  # fmt: skip
        except ConfigError:
            continue


def random_geometry(rng: np.random.Generator) -> Geometry:
    groups = pick(rng, 1, 1, 1, 2, 3, 5)
    channels, columns = groups * int(rng.integers(1, 5)), groups * int(rng.integers(1, 7))
    if rng.random() < 0.2:  # depthwise
        channels = groups = int(rng.integers(1, 9))
        columns = groups * int(rng.integers(1, 3))
    two = lambda lo, hi: (int(rng.integers(lo, hi)), int(rng.integers(lo, hi)))  # noqa: E731
    kernel = two(1, 8)
    return Geometry(
        channels,
        columns,
        kernel,
        two(1, 4),
        (int(rng.integers(0, kernel[0])), int(rng.integers(0, kernel[1]))),
        two(1, 3),
        groups,
    )


def random_tables(rng: np.random.Generator, plan: Plan) -> dict[str, np.ndarray]:
    macro, tiles, columns = plan.macro, len(plan.tiles), plan.geometry.columns
    if macro.levels == "free":
        thresholds = np.sort(
            rng.integers(
                macro.p_min,
                macro.p_max + 2,
                (columns if macro.granularity == "column" else 1, macro.top),
            )
        )
        return {
            "thresholds": thresholds,
            "levels": np.sort(rng.integers(-32767, 32768, macro.top + 1)),
        }
    shape = {
        "layer": (1, 1),
        "column": (1, columns),
        "tile": pick(rng, (tiles, 1), (tiles, columns)),
    }[macro.granularity]
    step = np.exp(
        rng.uniform(0, np.log(max(2.0, (macro.p_max - macro.p_min) / (macro.top + 1))), shape)
    )
    gain = rng.integers(1, 128, shape) if macro.granularity == "tile" else np.ones((1, 1))
    return {
        "mult": adc.snap(step, macro.shift),
        "zero": pick(rng, np.full((1, 1), macro.zero), rng.integers(0, macro.top + 1, shape)),
        "gain": gain,
    }


def random_layer(seed: int) -> Layer:
    rng = np.random.default_rng(seed)
    while True:
        macro, g = random_macro(rng), random_geometry(rng)
        try:
            plan = Plan.make("layer", g, macro)
        except ConfigError:
            continue
        size = tuple(
            d * (k - 1) + 1 - min(2 * p, d * (k - 1)) + int(rng.integers(0, 9))
            for k, d, p in zip(g.kernel, g.dilation, g.padding)
        )
        if plan.reads_per_position * np.prod(g.out_size(*size)) < 200_000:
            break
    weight = rng.integers(
        -macro.q_w, macro.q_w + 1, (g.columns, g.channels // g.groups, *g.kernel)
    ).astype(np.int8)
    tables = {role: np.asarray(a).astype(np.int32) for role, a in random_tables(rng, plan).items()}
    spec = (
        {"kind": "free"}
        if macro.levels == "free"
        else {"kind": "uniform", "shift": macro.shift, "top": macro.top}
    )
    attrs = {
        "layer": "layer",
        "geometry": g.to_dict(),
        "pad": int(rng.integers(0, macro.q_x + 1)),
        "adc": spec,
    }
    consts = {"weight": weight, **tables} | (
        {"order": rng.permutation(g.rows).astype(np.int32)} if macro.pack == "spread" else {}
    )
    tensors = {
        "x": Tensor("x", (g.channels, *size), 0, macro.q_x),
        "y": Tensor("y", (g.columns, *g.out_size(*size)), -plan.acc_bound, plan.acc_bound),
    }
    program = Program(
        macro,
        "x",
        "y",
        tensors,
        (Op("reads", "layer", ("x",), "y", attrs, {role: role for role in consts}),),
        consts,
    )
    return Layer(
        program,
        rng.integers(0, macro.q_x + 1, (int(rng.integers(1, 5)), g.channels, *size)).astype(
            np.uint8
        ),
    )


def spec_of(layer: Layer) -> ReadSpec:
    """What the kernels get: the padding is in the input already."""
    spec = read_spec(layer.plan, layer.program.adc(layer.op))
    return replace(spec, geometry=replace(spec.geometry, padding=(0, 0)))


def padded(layer: Layer) -> np.ndarray:
    ph, pw = layer.plan.geometry.padding
    return np.pad(
        layer.x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=layer.op.attrs["pad"]
    ).astype(np.int64)


def by_planes(layer: Layer, forward) -> np.ndarray:
    """acc int64 through `forward(x, weight)` of each pair of planes."""
    plan, x = layer.plan, padded(layer)
    weight = (
        layer.program.const(layer.op, "weight").astype(np.int64).reshape(plan.geometry.columns, -1)
    )
    pairs = [(a, b) for a in plan.input_planes for b in plan.weight_planes]
    return sum(
        a.factor
        * b.factor
        * np.asarray(forward(extract(x, a), extract(weight, b))).astype(np.int64)
        for a, b in pairs
    )


@settings(max_examples=200)
@given(st.integers(0, 1 << 32))
def test_every_accumulator_equals_golden(seed):
    layer = random_layer(seed)
    spec, expected = spec_of(layer), golden.run(layer.program, layer.x)["y"]
    fused = [
        by_planes(layer, lambda x, w: cpu.forward(x, w, spec, 1, dot8=dot8, dtype=dtype))
        for dot8, dtype in ((True, np.float32), (False, np.float32), (True, np.int32))
    ]
    chunked = by_planes(
        layer,
        lambda x, w: reference.forward(torch.from_numpy(x).double(), torch.from_numpy(w), spec),
    )
    assert np.array_equal(chunked, expected)
    assert np.array_equal(
        run.prepared(layer.program, layer.op)(torch.from_numpy(layer.x)).numpy(), expected
    )
    if layer.plan.acc_bound < choose.FLOAT32_WHOLE:
        assert all(np.array_equal(acc, expected) for acc in fused)


@pytest.mark.parametrize("name", CASES)
def test_the_shared_cases_equal_golden(name):
    program = layer_program(CASES[name], seed=3)
    x = images(program, 3)
    op = program.ops[0]
    assert np.array_equal(
        run.prepared(program, op)(torch.from_numpy(x)).numpy(), golden.run(program, x)[op.output]
    )


@pytest.mark.parametrize("name", CASES)
def test_without_numba_the_chunked_carrier_gives_the_same(name, monkeypatch):
    """In float32 where it is certified, else in float64."""
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    program = layer_program(CASES[name])
    x, reads = images(program, 3), run.prepared(program, program.ops[0])
    assert reads.certified
    assert not run.Runner(program).fast[program.ops[0].attrs["layer"]]
    expected = golden.run(program, x)[program.ops[0].output]
    assert np.array_equal(reads(torch.from_numpy(x)).numpy(), expected)
    monkeypatch.setattr(run, "certified", lambda *args: False)
    monkeypatch.setattr(run, "certified_levels", lambda *args: False)
    assert np.array_equal(
        run.prepared(program, program.ops[0])(torch.from_numpy(x)).numpy(), expected
    )
    assert choose.for_training(torch.zeros(1), None) is choose.Chunked


def test_a_code_that_differs_is_not_certified(monkeypatch):
    plan = layer_program(CASES["kernel_per_read"]).plan(
        layer_program(CASES["kernel_per_read"]).ops[0]
    )
    mult, zero = np.array([[513]]), np.array([[8]])
    assert run.certified(plan, mult, zero)
    for name in ("codes", "codes16") if vector.DOT8 else ("codes",):
        right = getattr(certify, name)
        with monkeypatch.context() as patch:
            patch.setattr(certify, name, lambda p, *adc, right=right: right(p, *adc) + (p == -945))
            assert not run.certified(plan, mult, zero)
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert run.certified(plan, mult, zero)
    right = reference.codes
    monkeypatch.setattr(reference, "codes", lambda p, *adc: right(p, *adc) + (p == 944))
    assert not run.certified(plan, mult, zero)


def test_the_fused_carrier_is_left_where_float32_is_too_small():
    """8-bit inputs and weights with large gains: a sum of values passes 2**24, the exact path is
    taken, and it equals golden."""
    macro = Macro(
        in_bits=8, w_bits=8, adc_bits=8, wl=2, dac_bits=1, granularity="tile", sign_scheme="split"
    )
    g = Geometry(64, 2)
    plan = Plan.make("layer", g, macro)
    assert plan.acc_bound > choose.FLOAT32_WHOLE
    rng = np.random.default_rng(0)
    x, w = (
        torch.from_numpy(rng.integers(0, 2, (2, 64, 3, 3))),
        torch.from_numpy(rng.integers(0, 128, (2, 64))),
    )
    spec = make_spec(plan, np.full((32, 1), 32767), np.zeros((1, 1)), np.full((32, 1), 127))
    chunked = choose.Exact(w, spec, plan, True)(x, 0)
    assert torch.equal(chunked, 127 * torch.einsum("nkyx,ok->noyx", x, w).int())


# -- gradients -------------------------------------------------------------------------------------
class Adc(torch.autograd.Function):
    """step * (code - zero) of partial sums with the formulas of design page 3 written out, in
    float64.

    p: [..], u = p / step; noise is added before the thresholds and stays out of u; slope: m'(u), or
    None for the hard code. zero is in p / step + zero and comes off again, so it moves the value by
    step * (slope - 1): gradients are in units of the step.
    """

    @staticmethod
    def forward(ctx, p, step, zero, rate, lo, hi, noise, slope):
        u = p * rate
        raw = torch.floor(u + 0.5 + noise)
        ctx.save_for_backward(u, raw, lo, hi, slope)
        return step * torch.minimum(torch.maximum(raw, lo), hi)

    @staticmethod
    def backward(ctx, gy):
        u, raw, lo, hi, slope = ctx.saved_tensors
        below, above = raw < lo, raw > hi
        if slope is None:
            d_p = torch.where(below | above, 0.0, 1.0)
            d_step = torch.where(below, lo, torch.where(above, hi, raw - u))
        else:
            d_p = slope
            d_step = torch.where(below, lo, torch.where(above, hi, raw)) - u * slope
        return gy * d_p, gy * d_step, gy * (d_p - 1), None, None, None, None, None


def order_of(spec: ReadSpec) -> list[int]:
    """The row at each place."""
    return list(range(spec.geometry.rows) if spec.order is None else spec.order)


def explicit_gradients(x, weight, spec: ReadSpec, gy, noise=0.0, slope_of=None):
    """(dx, dw, dstep [T, O], dzero [T, O]) in float64 by autograd through unfold, one tile and one
    group at a time.

    noise: 0 or float64 [N, T, O, L]; slope_of(p, t): slopes of p [N, columns of a group, L] in that
    tile.
    """
    g = spec.geometry
    x, weight = (torch.from_numpy(np.asarray(a, np.float64)).requires_grad_() for a in (x, weight))
    rate, lo, hi = (torch.from_numpy(a.astype(np.float64)) for a in (spec.rate, spec.lo, spec.hi))
    step, zero = torch.ones_like(rate).requires_grad_(), torch.zeros_like(rate).requires_grad_()
    order, out = order_of(spec), []
    for group in range(g.groups):
        channels = slice(group * g.channels // g.groups, (group + 1) * g.channels // g.groups)
        columns = slice(group * g.group_columns, (group + 1) * g.group_columns)
        rows = torch.nn.functional.unfold(x[:, channels], g.kernel, g.dilation, 0, g.stride)
        y = 0
        for t, (start, stop) in enumerate(spec.tiles):
            p = torch.einsum(
                "ok,nkl->nol", weight[columns][:, order[start:stop]], rows[:, order[start:stop]]
            )
            numbers = [a[t, columns].view(1, -1, 1) for a in (step, zero, rate, lo, hi)]
            slope = None if slope_of is None else slope_of(p.detach(), t)
            y = y + Adc.apply(
                p,
                *numbers,
                torch.as_tensor(noise if np.isscalar(noise) else noise[:, t, columns]),
                slope,
            )
        out.append(y)
    torch.cat(out, 1).backward(torch.from_numpy(gy.astype(np.float64)).flatten(2))
    return tuple(a.grad.numpy() for a in (x, weight, step, zero))


def fused_backward(x, w, spec, gy):
    return cpu.backward(x, w, spec, gy.astype(np.float32), 1)


def plain_backward(x, w, spec, gy):
    return cpu.backward(x, w, spec, gy.astype(np.float32), 1, dot8=False)


def chunked_backward(x, w, spec, gy):
    return [
        a.numpy()
        for a in reference.backward(
            *(torch.from_numpy(np.asarray(a, np.float32)) for a in (x, w)),
            spec,
            torch.from_numpy(gy.astype(np.float32)),
        )
    ]


CARRIERS = {"fused": fused_backward, "plain": plain_backward, "chunked": chunked_backward}


@dataclass(frozen=True)
class Problem:
    """One pair of planes of a layer: padded codes x, weights w, the spec and a gradient to send
    back."""

    x: np.ndarray
    w: np.ndarray
    spec: ReadSpec
    gy: np.ndarray
    macro: Macro


def problem(seed: int) -> Problem:
    """A random layer with uniform codes and small slope tables, read in one pair of planes."""
    while (
        layer := random_layer(seed)
    ).program.macro.levels == "free" or layer.program.macro.p_max > 2000:
        seed += 1
    plan, rng = layer.plan, np.random.default_rng(seed)
    weight = (
        layer.program.const(layer.op, "weight").astype(np.int64).reshape(plan.geometry.columns, -1)
    )
    gy = rng.standard_normal((layer.x.shape[0], *layer.program.tensors["y"].shape))
    return Problem(
        extract(padded(layer), plan.input_planes[0]),
        extract(weight, plan.weight_planes[0]),
        spec_of(layer),
        gy,
        plan.macro,
    )


def close(got, expected, counted: float):
    """Equal to 1e-5 of what was summed up: `counted` is the sum of magnitudes, the scale at which
    float32 can round."""
    return np.abs(got - expected).max() <= 1e-5 * max(counted, 1e-30)


def summed(case: Problem) -> tuple[float, ...]:
    """The sizes of the terms behind one entry of dx, dw, dstep and dzero."""
    gy, (top,) = np.abs(case.gy), {max(np.abs(case.spec.lo).max(), case.spec.hi.max())}
    return (
        gy.max() * np.abs(case.w).sum(0).max(),
        gy.sum((0, 2, 3)).max() * max(1, case.x.max()),
        gy.sum((0, 2, 3)).max() * 2 * top,
        gy.sum((0, 2, 3)).max(),
    )


@pytest.mark.parametrize("carrier", CARRIERS)
@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 32))
def test_hard_gradients_are_the_straight_through_formulas(carrier, seed):
    case = problem(seed)
    got = CARRIERS[carrier](case.x, case.w, case.spec, case.gy)
    for a, b, size in zip(
        got, explicit_gradients(case.x, case.w, case.spec, case.gy), summed(case)
    ):
        assert close(a, b, size)


def noisy(case: Problem, tau: float = 0.3, seed: int = 7) -> Problem:
    """The problem with noise and the exact slope, as a training step sets it up."""
    zero = (-case.spec.lo).astype(np.int64)
    tables = slope_tables(
        torch.from_numpy(case.spec.rate.astype(np.float64) * 2.0**case.macro.shift),
        torch.from_numpy(zero),
        case.macro.shift,
        case.macro.top,
        tau,
        case.macro.p_min,
        case.macro.p_max,
    )
    return replace(
        case, spec=replace(case.spec, tables=tables, noise=Relaxation(tau, seed).noise())
    )


def fused_forward(x, w, spec):
    return cpu.forward(x, w, spec, 1)


def plain_forward(x, w, spec):
    return cpu.forward(x, w, spec, 1, dot8=False)


def chunked_forward(x, w, spec):
    return reference.forward(
        *(torch.from_numpy(np.asarray(a, np.float32)) for a in (x, w)), spec
    ).numpy()


FORWARD = {"fused": fused_forward, "plain": plain_forward, "chunked": chunked_forward}


def drawn_codes(forward, case: Problem) -> np.ndarray:
    """q float64 [N, T, O, L] of a noisy forward pass: one tile at a time, the others weighed with
    0."""
    tiles = []
    for t in range(len(case.spec.tiles)):
        gain = np.zeros_like(case.spec.gain)
        gain[t] = 1
        tiles.append(forward(case.x, case.w, replace(case.spec, gain=gain, adc=None)))
    return (
        np.stack(tiles, 1)
        .reshape(case.x.shape[0], len(tiles), case.gy.shape[1], -1)
        .astype(np.float64)
    )


def partial_sums(case: Problem) -> np.ndarray:
    """int64 [N, T, O, L]."""
    g = case.spec.geometry
    rows = golden.rows_of(case.x, g, 0).reshape(case.x.shape[0], g.groups, g.rows, -1)[
        :, :, order_of(case.spec)
    ]
    w = case.w.reshape(g.groups, g.group_columns, -1)[:, :, order_of(case.spec)]
    tiles = [
        np.einsum("gok,ngkl->ngol", w[:, :, a:b], rows[:, :, a:b]).reshape(
            case.x.shape[0], g.columns, -1
        )
        for a, b in case.spec.tiles
    ]
    return np.stack(tiles, 1)


@pytest.mark.parametrize("carrier", CARRIERS)
@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 32))
def test_noisy_gradients_use_the_codes_that_were_drawn(carrier, seed):
    case = noisy(problem(seed))
    q, p = drawn_codes(FORWARD[carrier], case), partial_sums(case)
    tables, lo, hi = (
        case.spec.tables,
        case.spec.lo[None, :, :, None],
        case.spec.hi[None, :, :, None],
    )
    assert ((lo <= q) & (q <= hi)).all()
    slope = tables.slope[
        tables.row[None, :, :, None] if tables.row.shape == case.spec.rate.shape else 0,
        p - tables.p_min,
    ].astype(np.float64)
    u = p * case.spec.rate.astype(np.float64)[None, :, :, None]
    gy = case.gy.reshape(case.gy.shape[0], 1, case.gy.shape[1], -1)
    got = CARRIERS[carrier](case.x, case.w, case.spec, case.gy)
    assert close(got[2], (gy * (q - u * slope)).sum((0, 3)), summed(case)[2])
    noise = q - np.floor(u + 0.5)  # any noise that leads to q; dx and dw depend on the slope alone
    g = case.spec.geometry
    grouped = lambda a: torch.from_numpy(a)  # noqa: E731
    lines = {t: grouped(slope[:, t]) for t in range(len(case.spec.tiles))}
    seen = iter([(group, t) for group in range(g.groups) for t in range(len(case.spec.tiles))])

    def slope_of(p, t):
        group, _ = next(seen)
        return lines[t][:, group * g.group_columns : (group + 1) * g.group_columns]

    for a, b, size in zip(
        got,
        explicit_gradients(case.x, case.w, case.spec, case.gy, grouped(noise), slope_of),
        summed(case),
    ):
        assert close(a, b, size)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_noise_of_both_passes_is_the_same_to_the_last_code(carrier, monkeypatch):
    """With slope 0 and whole-number gradients, dstep is a sum of whole numbers: it must equal the
    forward pass's exactly."""
    monkeypatch.setattr(reference, "CHUNK_VALUES", 5000)  # several chunks
    plan = Plan.make("layer", Geometry(5, 6, (3, 3)), Macro(wl=16))
    rng = np.random.default_rng(1)
    x, w = rng.integers(0, 16, (9, 5, 13, 11)), rng.integers(-7, 8, (6, 45))
    spec = make_spec(plan, np.array([[2047]]), np.array([[8]]), np.ones((1, 1)))
    row = np.zeros((len(plan.tiles), 6), np.int64)
    slope = Tables(
        plan.macro.p_min, row, np.zeros((1, plan.macro.p_max - plan.macro.p_min + 1), np.float32)
    )
    gy = rng.integers(-3, 4, (9, 6, 11, 9))
    case = Problem(
        x, w, replace(spec, tables=slope, noise=Relaxation(0.3, 5).noise()), gy, plan.macro
    )
    q = drawn_codes(FORWARD[carrier], case)
    hard = drawn_codes(FORWARD[carrier], replace(case, spec=spec))
    assert 0.2 < (q != hard).mean() < 0.7  # the noise is there
    assert np.array_equal(
        CARRIERS[carrier](x, w, case.spec, gy)[2], (gy.reshape(9, 1, 6, -1) * q).sum((0, 3))
    )


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize(
    ("mult", "zero", "top"),
    [(8191, 2, 3), (4681, 8, 15), (32767, 0, 15), (1365, 15, 15), (3277, 7, 14)],
)
def test_gradients_on_both_clip_edges(carrier, mult, zero, top):
    """One read of one row, every partial sum there is: the step's gradient changes from q - u to
    the end code at the right p."""
    bits, codebook = (4, "sign-magnitude" if top == 14 else "twos") if top > 3 else (2, "twos")
    macro = Macro(wl=1, in_bits=7, w_bits=2, adc_bits=bits, codebook=codebook)
    assert macro.top == top
    p = np.arange(-127, 128)
    plan = Plan.make("layer", Geometry(1, 2), macro)
    spec = make_spec(plan, np.array([[mult]]), np.array([[zero]]), np.ones((1, 1)))
    low, high = (
        -(zero * 2**15 + 2**14) // mult + 1,
        -(-((top - zero) * 2**15 + 2**14) // mult) - 1,
    )  # the outermost p that do not clip
    inside = (p >= low) & (p <= high)
    code = np.array([adc.uniform_code(int(v), mult, 15, zero, top) for v in p])
    assert set(code[p < low]) <= {0} and set(code[p > high]) <= {top}
    expected_step = np.where(inside, code - zero - p * mult / 2**15, code - zero)
    for value in p:  # one partial sum at a time, so that dstep is one term
        x, column = np.array([abs(value)]).reshape(1, 1, 1, 1), int(value < 0)
        gy = np.zeros((1, 2, 1, 1))
        gy[0, column] = 1.5
        dx, dw, dstep, dzero = CARRIERS[carrier](x, np.array([[1], [-1]]), spec, gy)
        n = int(value) + 127
        sign = 1 - 2 * column
        assert float(dx.flat[0]) == 1.5 * sign * inside[n]
        assert float(dw[column, 0]) == 1.5 * abs(value) * inside[n]
        assert float(dzero[0, column]) == 1.5 * (inside[n] - 1.0)
        assert float(dstep[0, column]) == pytest.approx(1.5 * expected_step[n], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("drawn", [-0.75, -0.25, 0.0, 0.25, 0.75])
@pytest.mark.parametrize(
    ("mult", "zero", "top"), [(8191, 2, 3), (4681, 8, 15), (32767, 0, 15), (3277, 7, 14)]
)
def test_gradients_on_both_clip_edges_with_noise(carrier, mult, zero, top, drawn):
    """As above with a noise that is known: it moves the code, and stays out of p / step, so the
    step's gradient is q - u * slope."""
    macro = Macro(
        wl=1,
        in_bits=7,
        w_bits=2,
        adc_bits=4 if top > 3 else 2,
        codebook="sign-magnitude" if top == 14 else "twos",
    )
    plan = Plan.make("layer", Geometry(1, 2), macro)
    spec = make_spec(plan, np.array([[mult]]), np.array([[zero]]), np.ones((1, 1)))
    tables = slope_tables(
        torch.tensor([[mult]]), torch.tensor([[zero]]), 15, top, 0.3, macro.p_min, macro.p_max
    )
    tables = replace(tables, row=np.zeros((1, 2), np.int64))
    spec = replace(spec, tables=tables, noise=Noise(np.full(1 << 17, drawn, np.float32), 3))
    low, high = (
        round(-(zero + 0.5 + drawn) * 2**15 / mult),
        round((top - zero + 0.5 - drawn) * 2**15 / mult),
    )
    for value in {
        p for edge in (low, high, 0) for p in range(edge - 3, edge + 4) if -127 <= p <= 127
    }:
        x, column = np.array([abs(value)]).reshape(1, 1, 1, 1), int(value < 0)
        gy = np.zeros((1, 2, 1, 1))
        gy[0, column] = 1.5
        w = np.array([[1], [-1]])
        slope_of = lambda p, t: torch.from_numpy(tables.slope[0].astype(np.float64))[
            p.long() - macro.p_min
        ]  # noqa: E731
        for got, expected in zip(
            CARRIERS[carrier](x, w, spec, gy), explicit_gradients(x, w, spec, gy, drawn, slope_of)
        ):
            assert np.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_table_gradients_do_not_move_the_step():
    """Free levels: dp comes from the slope table, and there is no step to learn."""
    plan = Plan.make("layer", Geometry(3, 5, (3, 3)), Macro(levels="free"))
    rng = np.random.default_rng(2)
    x, w, gy = (
        rng.integers(0, 16, (2, 3, 6, 7)),
        rng.integers(-7, 8, (5, 27)),
        rng.standard_normal((2, 5, 4, 5)),
    )
    spec = free_level_spec(plan, np.arange(-70, 80, 10)[None], np.arange(-800, 800, 100))
    slope = rng.random((1, plan.macro.p_max - plan.macro.p_min + 1)).astype(np.float32)
    spec = replace(spec, tables=replace(spec.tables, slope=slope))
    expected = explicit_gradients(
        x,
        w,
        spec,
        gy,
        0.0,
        lambda p, t: torch.from_numpy(slope[0].astype(np.float64))[p.long() - plan.macro.p_min],
    )
    for backward in CARRIERS.values():
        dx, dw, dstep, dzero = backward(x, w, spec, gy)
        assert not dstep.any() and not dzero.any()
        assert close(dx, expected[0], np.abs(gy).max() * np.abs(w).sum(0).max())
        assert close(dw, expected[1], np.abs(gy).sum((0, 2, 3)).max() * 15)


@pytest.mark.parametrize(
    "macro",
    [
        Macro(granularity="column"),
        Macro(granularity="column", wl=128, sign_scheme="split"),
        Macro(granularity="column", in_bits=2, w_bits=3, wl=5),
    ],
    ids=Macro.describe,
)
@settings(max_examples=15)
@given(seed=st.integers(0, 1 << 32))
def test_reads_within_the_ends_hand_the_gradient_on_exactly(macro, seed):
    """Whole numbers all through, so that float32 is exact: every form gives the very sums, at the
    ends themselves too."""
    rng, plan = (
        np.random.default_rng(seed),
        Plan.make("layer", Geometry(2, 6, (3, 2), (2, 1)), macro),
    )
    lo, hi = np.sort(rng.integers(max(-60, macro.p_min), min(60, macro.p_max) + 1, (2, 6)), 0)
    x, w, gy = (
        rng.integers(0, macro.q_x + 1, (2, 2, 7, 6)),
        rng.integers(-macro.q_w, macro.q_w + 1, (6, 12)),
        rng.integers(-9, 10, (2, 6, 3, 5)),
    )
    w = extract(w, plan.weight_planes[0])
    spec, (low, high) = (
        inside_spec(plan, lo, hi),
        (torch.from_numpy(ends).view(1, -1, 1) for ends in (lo, hi)),
    )
    dx, dw, *_ = explicit_gradients(
        x, w, spec, gy, 0.0, lambda p, t: ((p >= low) & (p <= high)).double()
    )
    for backward in CARRIERS.values():
        got = backward(x, w, spec, gy)
        assert np.array_equal(got[0], dx) and np.array_equal(got[1], dw)


# -- threads, empty batches ------------------------------------------------------------------------
@pytest.mark.parametrize("with_noise", [False, True])
def test_the_same_bits_on_one_and_two_threads(with_noise):
    plan = Plan.make("layer", Geometry(6, 10, (3, 3), groups=2), Macro(granularity="tile"))
    rng = np.random.default_rng(3)
    x, w = (
        rng.integers(0, 16, (11, 6, 14, 15)).astype(np.float32),
        rng.integers(-7, 8, (10, 27)).astype(np.float32),
    )
    tiles = len(plan.tiles)
    spec = make_spec(
        plan,
        2 * rng.integers(300, 3000, (tiles, 1)) + 1,
        np.array([[8]]),
        rng.integers(1, 128, (tiles, 1)),
    )
    gy = rng.standard_normal((11, 10, 12, 13)).astype(np.float32)
    if with_noise:
        spec = noisy(Problem(x, w, spec, gy, plan.macro)).spec
    for dot8 in (True, False):
        assert np.array_equal(
            cpu.forward(x, w, spec, 1, dot8=dot8), cpu.forward(x, w, spec, 2, dot8=dot8)
        )
        for one, two in zip(
            cpu.backward(x, w, spec, gy, 1, dot8=dot8), cpu.backward(x, w, spec, gy, 2, dot8=dot8)
        ):
            assert np.array_equal(one, two)


def test_noise_differs_by_seed_column_and_tile():
    plan = Plan.make("layer", Geometry(18, 4), Macro())
    spec = make_spec(plan, np.array([[513]]), np.array([[8]]), np.ones((1, 1)))
    zeros = np.zeros((1, 18, 16, 16), np.float32)
    case = lambda seed: Problem(
        zeros,
        np.zeros((4, 18)),
        replace(spec, noise=Relaxation(1.0, seed).noise()),
        np.zeros((1, 4, 16, 16)),
        plan.macro,
    )  # noqa: E731
    drawn = np.concatenate(
        [drawn_codes(fused_forward, case(seed)).reshape(8, -1) for seed in (1, 2)]
    )
    same = [(a == b).mean() for n, a in enumerate(drawn) for b in drawn[n + 1 :]]
    assert (
        len(same) == 120 and max(same) < 0.4
    )  # two independent draws at temperature 1 agree in about a fifth


@pytest.mark.parametrize("carrier", FORWARD)
def test_large_seeds_are_as_good_as_small_ones(carrier):
    plan = Plan.make("layer", Geometry(9, 4), Macro())
    spec = make_spec(plan, np.array([[513]]), np.array([[8]]), np.ones((1, 1)))
    noise = Relaxation(1.0, (1 << 80) + 3).noise()
    y = FORWARD[carrier](np.zeros((1, 9, 4, 4)), np.zeros((4, 9)), replace(spec, noise=noise))
    assert y.any()


def test_an_image_of_one_position_and_columns_that_fill_no_strip():
    plan = Plan.make("layer", Geometry(5, 3, kind="linear"), Macro(wl=2))
    spec = make_spec(plan, np.array([[32767]]), np.array([[8]]), np.ones((1, 1)))
    x, w = (
        np.arange(5, dtype=np.float32).reshape(1, 5, 1, 1) % 2,
        np.array([[1, -1, 1, -1, 1], [0, 1, 0, 1, 0], [0, -1, 0, -1, 0]]),
    )
    assert cpu.forward(x, w, spec, 2).ravel().tolist() == [-2, 2, -2]


# -- free levels, requantisation, threads, compiled code -------------------------------------------
@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), bits=st.integers(1, 5))
def test_free_levels_in_16_bits_are_the_table(seed, bits):
    """Any ascending thresholds, for the layer or for each column, also equal ones and ones that no
    partial sum reaches; every partial sum there is."""
    rng, macro = (
        np.random.default_rng(seed),
        Macro(levels="free", adc_bits=bits, wl=int(np.random.default_rng(seed).integers(1, 60))),
    )
    plan = Plan.make("layer", Geometry(2, 3), macro)
    thresholds, levels = (
        np.sort(
            rng.integers(macro.p_min - 5, macro.p_max + 6, (int(rng.choice([1, 3])), macro.top)), 1
        ),
        np.sort(rng.integers(-32767, 32768, macro.top + 1)),
    )
    spec = free_level_spec(plan, thresholds, levels)
    found = certify.every_level(np.arange(macro.p_min, macro.p_max + 1), spec)
    assert vector.DOT8 <= len(found) <= 2 * vector.DOT8
    expected = [
        [levels[adc.threshold_code(p, row.tolist())] for p in range(macro.p_min, macro.p_max + 1)]
        for row in thresholds
    ]
    assert all(np.array_equal(values, expected) for values in (spec.tables.value, *found))


FITTING = [
    range(-70, 80, 10),
    (-218, -140, -96, -65, -41, -22, -6, 7, 23, 43, 69, 102, 145, 205, 301),
    range(-7, 8),
    (-900, *range(-240, 241, 40), 900),
]
CROWDED = [
    (-900, -800, -700, -600, *range(-3, 4), 600, 700, 800, 900),
    (-400, -186, -86, -40, -19, -9, -4, 1, 4, 9, 19, 40, 86, 186, 400),
]


def test_one_wrong_level_of_one_column_is_no_certificate(monkeypatch):
    plan = Plan.make("layer", Geometry(2, 3), Macro(levels="free", granularity="column"))
    spec = free_level_spec(
        plan, np.arange(-70, 80, 10) + np.array([[0], [3], [9]]), np.arange(-7, 9) * 50
    )
    wrong = spec.tables.value.copy()
    wrong[2, 1000] += 1
    for found, certified in (([spec.tables.value], True), ([spec.tables.value, wrong], False)):
        monkeypatch.setattr(choose, "every_level", lambda p, spec, found=found: found)
        assert run.certified_levels(spec) == certified


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 32))
def test_codes_of_every_partial_sum_are_those_of_each(seed):
    """Thresholds close together, far apart, and all on one side of what can occur."""
    rng, macro = (
        np.random.default_rng(seed),
        Macro(
            wl=3,
            adc_bits=int(np.random.default_rng(seed).integers(1, 4)),
            levels="free",
            sign_scheme=pick(np.random.default_rng(seed), "signed", "split"),
        ),
    )
    low, high = np.sort(rng.integers(macro.p_min - 300, macro.p_max + 301, 2))
    thresholds = np.sort(rng.integers(low, high + 1, (int(rng.integers(1, 4)), macro.top)), 1)
    expected = [
        [adc.threshold_code(p, row) for p in range(macro.p_min, macro.p_max + 1)]
        for row in thresholds.tolist()
    ]
    levels = Levels(thresholds, np.zeros(macro.top + 1, np.int64))
    assert levels.codes(macro.p_min, macro.p_max).tolist() == expected


@pytest.mark.parametrize("carrier", ["one pass", "torch"])
@pytest.mark.parametrize("granularity", ["layer", "column", "tile"])
def test_values_of_a_table_get_the_gradients_of_the_reads_that_looked_them_up(
    granularity, carrier, monkeypatch
):
    """Counted one by one, in every row of its own."""
    if carrier == "torch":
        monkeypatch.setattr(choose, "numba_available", lambda: False)
    g, macro = (
        Geometry(4, 6, (3, 2), groups=2),
        Macro(wl=5, in_bits=2, w_bits=3, granularity=granularity),
    )
    plan, rng = Plan.make("layer", g, macro), np.random.default_rng(0)
    tiles, columns, span = len(plan.tiles), g.columns, macro.p_max - macro.p_min + 1
    row = np.broadcast_to(
        {
            "layer": np.zeros((1, 1), int),
            "column": np.arange(columns)[None],
            "tile": np.arange(tiles)[:, None],
        }[granularity],
        (tiles, columns),
    ).copy()
    tables = Tables(macro.p_min, row, None, np.zeros((row.max() + 1, span), np.float32))
    spec = replace(inside_spec(plan, 0, 0), tables=tables)
    x, w, gy = (
        rng.integers(0, 4, (2, 4, 5, 4)),
        rng.integers(-3, 4, (6, 12)),
        rng.standard_normal((2, 6, 3, 3)).astype(np.float32),
    )
    rows, expected = golden.rows_of(x, g, 0), np.zeros(spec.tables.value.shape)
    for t, (start, stop) in enumerate(plan.tiles):
        p = np.einsum(
            "gok,ngkyx->ngoyx", w.reshape(2, 3, 12)[:, :, start:stop], rows[:, :, start:stop]
        ).reshape(gy.shape)
        for at in np.ndindex(*gy.shape):
            expected[row[t, at[1]], p[at] - macro.p_min] += gy[at]
    got = choose.table_gradient(
        *(torch.from_numpy(a).float() for a in (x, w)), spec, torch.from_numpy(gy)
    )
    assert got.dtype == torch.float64 and np.allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("thresholds", "forms"), [*((t, [0, 3]) for t in FITTING), *((t, [3]) for t in CROWDED)]
)
def test_free_levels_are_found_by_buckets_where_no_two_thresholds_share_one(thresholds, forms):
    """The second set is that of a convolution of ResNet-20; crowded ones are dense in the middle
    and far apart outside."""
    plan = Plan.make("layer", Geometry(2, 3), Macro(levels="free"))
    spec = free_level_spec(plan, np.array([thresholds]), np.arange(-7, 9) * 50)
    assert [form for form, _ in records.levels16(spec)] == forms


@pytest.mark.parametrize(
    ("rows", "forms"),
    [
        ([FITTING[0], FITTING[3], FITTING[1]], [0, 3]),
        ([FITTING[0], CROWDED[0], FITTING[1]], [3]),
        ([[5] * 15, FITTING[0], [9999] * 15], [0, 3]),
    ],
)
def test_columns_take_the_first_form_that_all_of_them_can(rows, forms):
    """Rows of fewer steps are halved as often as the others; tiles share the records of their
    columns."""
    plan = Plan.make("layer", Geometry(20, 3), Macro(levels="free", granularity="column"))
    spec = free_level_spec(plan, np.array(rows), np.arange(-7, 9) * 50)
    found = records.levels16(spec)
    assert [(form, len(each)) for form, each in found] == [(form, 3) for form in forms]
    assert records.sixteen(spec, 4).adcs.shape == (1, 1, 4) and run.certified_levels(spec)


def test_free_levels_with_more_steps_than_registers_hold_stay_tables():
    plan = Plan.make("layer", Geometry(2, 3), Macro(levels="free", adc_bits=6))
    spec = free_level_spec(plan, np.arange(-31, 32)[None], np.arange(64))
    assert records.levels16(spec) == []


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 32))
def test_requantisation_equals_the_torch_form(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 9, rng.integers(1, 4)))
    count, (lo, hi, dtype) = (
        int(rng.integers(1, 4)),
        pick(rng, (0, 15, torch.uint8), (-1000, 900, torch.int32)),
    )
    const = lambda: torch.from_numpy(
        rng.integers(-500, 500, tuple(pick(rng, 1, n) for n in shape)).astype(np.int32)
    )  # noqa: E731
    xs = [
        torch.from_numpy(
            rng.integers(
                -5000, 5000, (3, *(pick(rng, n, n, 1) if n_x else n for n in shape))
            ).astype(np.int32)
        )
        for n_x in range(count)
    ]
    xs[0] = pick(rng, xs[0], (xs[0] & 255).to(torch.uint8))
    mults, add, shift = [const() for _ in xs], const() * 100, int(rng.integers(0, 12))
    expected = (
        ((sum(x.int() * m for x, m in zip(xs, mults)) + add) >> shift).clamp(lo, hi).to(dtype)
    )
    got = choose.requant(tuple(xs), mults, add, shift, lo, hi, dtype)
    assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("pool", ["openmp", "own threads"])
def test_every_thread_takes_chunks_until_none_is_left(pool, monkeypatch):
    if pool == "own threads":
        monkeypatch.setattr(threads, "openmp", lambda: 0)
    elif not threads.openmp():
        pytest.skip("torch brings no GNU OpenMP here")
    layer = random_layer(5)
    for count in (1, 2, 3, 9):
        prepared, x = (
            cpu.Prepared(
                layer.program.const(layer.op, "weight").reshape(layer.plan.geometry.columns, -1),
                spec_of(layer),
            ),
            np.repeat(padded(layer), 20, 0),
        )
        monkeypatch.setattr(cpu, "MAX_CHUNKS", 1)
        whole = cpu.run(prepared, x, count)
        monkeypatch.setattr(cpu, "MAX_CHUNKS", 8)
        assert np.array_equal(cpu.run(prepared, x, count), whole)


@given(images=st.integers(0, 300), positions=st.integers(1, 2000), most=st.integers(1, 20))
def test_chunks_are_all_images_once_and_none_is_small(images, positions, most):
    bounds = threads.chunks(images, positions, most)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == images and 1 <= len(sizes) <= most
    assert len(sizes) == 1 or (sizes.min() >= 1 and images * positions // len(sizes) >= 256)


def test_compiled_code_is_made_anew_when_any_emitter_changes():
    kernels = (
        cpu._forward_share,
        cpu._forward16_share,
        cpu._backward_share,
        blocks.gather,
        certify._convert,
        requant._requant,
        threads._team,
    )
    stamps = {kernel._cache._cache_file._source_stamp for kernel in kernels}
    assert stamps == {
        tuple(n for path in compiled.SOURCES for n in (path.stat().st_mtime, path.stat().st_size))
    }
    assert {"cpu.py", "blocks.py", "strips.py", "vector.py", "threads.py"} <= {
        path.name for path in compiled.SOURCES
    }


def test_a_kernel_compiles_beside_a_cache_that_has_its_parts(tmp_path):
    """A second process needs a form that the first one did not: what they share comes from the
    cache, the rest is compiled."""
    say = (
        "import torch; from rqtool.kernels.choose import requant; x = "
        "torch.ones(2, 3, dtype=torch.int32)"
    )
    call = "print(requant((x,) * {0}, [x[0]] * {0}, x[0], 0, 0, 9, torch.uint8).tolist())"
    for inputs in (1, 3):
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NUMBA_CACHE_DIR": str(tmp_path)}
        ran = subprocess.run(
            [sys.executable, "-c", f"{say}; {call.format(inputs)}"],
            env=env,
            check=True,
            capture_output=True,
            text=True,
        )
        assert ran.stdout == f"{[[inputs + 1] * 3] * 2}\n"
