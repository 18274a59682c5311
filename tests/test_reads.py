"""Reads under autograd: planes hand gradients on exactly, and a layer's forward pass is made of the
codes and steps that are served."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import log

import numpy as np
import pytest
import torch
from test_kernels import explicit_gradients
from torch import nn
from torch.nn import functional as F

from rqtool.errors import CheckError
from rqtool.hardware import adc
from rqtool.hardware.macro import Macro
from rqtool.kernels import choose
from rqtool.kernels.spec import Noise, make_spec
from rqtool.mapping.plan import Geometry, Plan
from rqtool.mapping.planes import input_planes, weight_planes
from rqtool.program import golden
from rqtool.program.ir import Op, Program, Tensor
from rqtool.train import adc_state
from rqtool.train.adc_numbers import adc_numbers, group_shape, level_units, nearest_thresholds
from rqtool.train.frozen import frozen_layer
from rqtool.train.layers import ReadLayer
from rqtool.train.reads import pad_codes, scaled, split_planes
from rqtool.train.relax import Relaxation, mean_slope

pytestmark = pytest.mark.usefixtures("one_thread")


# Every way to cut weights and inputs, with partial sums that 8 bits hold at step 1.
SCHEMES = {
    "signed": Macro(wl=2, in_bits=3, w_bits=4),
    "signed slices": Macro(wl=3, in_bits=3, w_bits=4, cell_bits=2),
    "signed binary cells, bit-serial": Macro(wl=9, in_bits=3, w_bits=4, cell_bits=1, dac_bits=1),
    "split": Macro(wl=2, in_bits=3, w_bits=4, sign_scheme="split"),
    "split slices": Macro(wl=5, in_bits=3, w_bits=4, sign_scheme="split", cell_bits=2),
    "split, bit-serial": Macro(
        wl=9, in_bits=3, w_bits=4, sign_scheme="split", dac_bits=2, cell_bits=1
    ),
    "offset": Macro(wl=2, in_bits=3, w_bits=4, sign_scheme="offset"),
    "offset slices": Macro(wl=4, in_bits=3, w_bits=4, sign_scheme="offset", cell_bits=3),
    "offset, bit-serial": Macro(
        wl=7, in_bits=4, w_bits=4, sign_scheme="offset", dac_bits=1, cell_bits=2
    ),
    "one bit inputs": Macro(wl=9, in_bits=1, w_bits=3),
    "two bit weights": Macro(wl=9, in_bits=3, w_bits=2),
}
GEOMETRIES = {
    "conv": Geometry(3, 5, (3, 3), padding=(1, 1)),
    "strided groups": Geometry(4, 6, (3, 2), (2, 1), (1, 0), groups=2),
    "dilated depthwise": Geometry(3, 6, (2, 2), dilation=(2, 1), groups=3),
    "linear": Geometry(20, 4, kind="linear"),
}


def perfect(macro: Macro) -> Macro:
    """The macro with an ADC of step 1 that nothing clips."""
    macro = replace(macro, adc_bits=8, range="fixed", step=1.0, codebook=None)
    assert macro.p_max <= (127 if macro.p_min < 0 else 255)
    return macro


def layer_of(macro: Macro, g: Geometry, seed: int = 0, zero: int = 0) -> ReadLayer:
    """A layer with random weights, scales and steps."""
    rng = torch.Generator().manual_seed(seed)
    layer = ReadLayer(
        Plan.make("layer", g, macro),
        nn.Parameter(torch.randn(g.columns, g.channels // g.groups, *g.kernel, generator=rng)),
        nn.Parameter(torch.randn(g.columns, generator=rng)),
    )
    layer.weights.calibrate(layer.weight.detach().reshape(g.columns, -1))
    layer.input.zero.fill_(zero)
    with torch.no_grad():
        layer.input.log_scale.fill_(np.log(0.21))
        if not macro.ideal:
            layer.log_step += (
                torch.rand(layer.log_step.shape, generator=rng) * np.log(max(1.5, macro.p_max / 8))
                if macro.range == "calibrated" and macro.levels == "uniform"
                else 0
            )
    return layer


def codes_and_weights(
    macro: Macro, g: Geometry, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, macro.q_x + 1, (2, g.channels, *((1, 1) if g.kind == "linear" else (6, 7))))
    return torch.from_numpy(x).float().requires_grad_(), torch.from_numpy(
        rng.integers(-macro.q_w, macro.q_w + 1, (g.columns, g.rows))
    ).float().requires_grad_()


# -- planes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEMES)
def test_planes_add_up_and_hand_back_the_whole_gradient(name):
    macro = SCHEMES[name]
    for peak_low, peak_high, planes, offset in (
        (-macro.q_w, macro.q_w, weight_planes(macro), macro.weight_offset),
        (0, macro.q_x, input_planes(macro), 0),
    ):
        q = torch.arange(peak_low, peak_high + 1).float().requires_grad_()
        parts = split_planes(q, planes)
        assert torch.equal(sum(p.factor * part for p, part in zip(planes, parts)), q + offset)
        g = torch.arange(q.numel()).float() - 3
        sum(p.factor * part * g for p, part in zip(planes, parts)).sum().backward()
        assert torch.allclose(q.grad, g, rtol=1e-6, atol=0)


def test_the_gradient_of_a_weight_goes_to_its_own_polarity():
    q = torch.tensor([-3.0, 0.0, 2.0]).requires_grad_()
    positive, negative = split_planes(q, weight_planes(Macro(sign_scheme="split")))
    (
        positive * torch.tensor([1.0, 10.0, 100.0])
        + negative * torch.tensor([1000.0, 10000.0, 100000.0])
    ).sum().backward()
    assert q.grad.tolist() == [-1000, 10, 100]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", SCHEMES)
def test_with_a_perfect_adc_reads_are_a_convolution_and_so_is_their_gradient(name, geometry):
    macro, g = perfect(SCHEMES[name]), replace(GEOMETRIES[geometry], padding=(0, 0))
    layer = layer_of(macro, g)
    x, w = codes_and_weights(macro, g)
    gy = torch.randn(
        2, g.columns, *g.out_size(*x.shape[2:]), generator=torch.Generator().manual_seed(2)
    )
    got = layer.adc.read(x, w)
    (got * gy).sum().backward()
    grads = x.grad, w.grad
    x.grad = w.grad = None
    expected = F.conv2d(
        x, w.view(g.columns, -1, *g.kernel), None, g.stride, 0, g.dilation, g.groups
    )
    (expected * gy).sum().backward()
    planes = sum(
        abs(a.factor * b.factor) for a in layer.plan.input_planes for b in layer.plan.weight_planes
    )
    step = 2**15 / 32767  # the representable step next to 1
    offset = macro.weight_offset * layer.input_sum(x.detach())
    assert torch.allclose(got, step * (expected + offset) - offset, rtol=1e-5, atol=1e-4 * planes)
    for a, b in zip(grads, (x.grad, w.grad)):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-5 * float(gy.abs().sum(0).max()) * planes)


# -- the layer's forward pass ----------------------------------------------------------------------
MACROS = {
    "layer": Macro(),
    "column": Macro(granularity="column"),
    "tile": Macro(granularity="tile"),
    "split tile": Macro(granularity="tile", sign_scheme="split", wl=5),
    "offset column": Macro(granularity="column", sign_scheme="offset"),
    "serial slices": Macro(dac_bits=1, cell_bits=2),
    "full": Macro(range="full", adc_bits=6),
    "fixed": Macro(range="fixed", step=17.3),
    "free": Macro(levels="free", adc_bits=3),
    "free split": Macro(levels="free", sign_scheme="split"),
    "free column": Macro(levels="free", granularity="column"),
    "free column, two bits": Macro(
        levels="free", granularity="column", adc_bits=2, wl=5, sign_scheme="split", dac_bits=2
    ),
    "free column, nthu": Macro(
        levels="free", granularity="column", in_bits=2, w_bits=3, codebook="sign-magnitude"
    ),
    "many rows": Macro(wl=128, in_bits=2),
}


def program_of(layer: ReadLayer, size: tuple[int, int]) -> Program:
    """The layer's frozen integers as a program of one operation on codes."""
    frozen, g = frozen_layer(layer), layer.plan.geometry
    bound = layer.plan.acc_bound
    op = Op(
        "reads",
        "y",
        ("x",),
        "y",
        {"layer": "y", "geometry": g.to_dict(), "pad": frozen.zero, "adc": frozen.adc},
        {role: role for role in ("weight", *frozen.consts)},
    )
    tensors = {
        "x": Tensor("x", (g.channels, *size), 0, layer.plan.macro.q_x),
        "y": Tensor("y", (g.columns, *g.out_size(*size)), -bound, bound),
    }
    return Program(
        layer.plan.macro, "x", "y", tensors, (op,), {"weight": frozen.weight, **frozen.consts}
    )


def with_levels(layer: ReadLayer, seed: int, peak: int = 3000) -> ReadLayer:
    macro, rng = layer.plan.macro, np.random.default_rng(seed)
    if macro.levels == "free":
        zero, levels = (
            int(rng.integers(0, macro.top + 1)),
            torch.from_numpy(np.sort(rng.integers(-peak, peak, macro.top + 1))),
        )
        levels -= int(levels[zero])
        ratio = (
            np.exp(rng.uniform(-2, 1, layer.unit.numel()))
            if macro.granularity == "column"
            else np.ones(1)
        )
        layer.adc.set_levels(
            nearest_thresholds(levels, zero, torch.from_numpy(ratio / level_units(macro))),
            levels,
            ratio,
        )
    return layer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("zero", [0, 5])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", MACROS)
def test_the_forward_pass_is_the_frozen_integers_times_their_scales(name, geometry, zero, training):
    macro, g = MACROS[name], GEOMETRIES[geometry]
    zero = min(zero, macro.q_x)
    layer = with_levels(layer_of(macro, g, zero=zero), 3).train(training)
    x = torch.randn(
        2,
        g.channels,
        *((1, 1) if g.kind == "linear" else (6, 7)),
        generator=torch.Generator().manual_seed(4),
    )
    frozen = frozen_layer(layer)
    codes = np.clip(
        np.floor(x.numpy() / np.float32(frozen.s_x) + frozen.zero + np.float32(0.5)), 0, macro.q_x
    ).astype(np.int64)
    acc = golden.run(program_of(layer, x.shape[2:]), codes)["y"]
    per_column = (1, -1, 1, 1)
    sums = golden.rows_of(codes, g, frozen.zero).sum(2).repeat(g.group_columns, 1)
    real = (
        acc * frozen.unit.reshape(per_column)
        - macro.weight_offset * sums
        - (zero * frozen.weight.reshape(g.columns, -1).sum(1, dtype=np.int64)).reshape(per_column)
    )
    expected = frozen.s_x * frozen.s_w.reshape(per_column) * real + frozen.bias.reshape(per_column)
    got = layer(x).detach().numpy()
    largest = (
        np.abs(acc).max() * frozen.unit.max()
        + (macro.weight_offset + zero * macro.q_w) * sums.max()
    )
    assert np.abs(got - expected).max() <= 1e-6 * (
        np.abs(frozen.bias).max() + largest * frozen.s_x * frozen.s_w.max()
    )


@pytest.mark.parametrize("carrier", ["one pass", "torch"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 2, 4, 4), (5, 4, 9, 15), (40, 3, 33, 31)])
def test_outputs_hand_gradients_on_by_the_formula_on_every_carrier(carrier, shape, monkeypatch):
    """y * scale + offset, against float64; also from a gradient that is spread out and not in
    memory; the same bits on any number of threads."""
    if carrier == "torch":
        monkeypatch.setattr(choose, "numba_available", lambda: False)
    rng = np.random.default_rng(shape[0])
    y, given = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    scale, offset = (
        rng.uniform(0.5, 2, shape[1]).astype(np.float32),
        rng.standard_normal(shape[1]).astype(np.float32),
    )
    for gy in (torch.from_numpy(given), torch.tensor(0.5).expand(shape)):
        found = []
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            leaves = [torch.from_numpy(a).requires_grad_() for a in (y, scale, offset)]
            scaled(*leaves).backward(gy)
            found.append([leaf.grad for leaf in leaves])
        exact = gy.double().numpy()
        assert np.array_equal(found[0][0].numpy(), gy.numpy() * scale.reshape(1, -1, 1, 1))
        assert found[0][1].tolist() == pytest.approx(
            (exact * y).sum((0, 2, 3)).tolist(), rel=1e-4, abs=1e-3
        )
        assert found[0][2].tolist() == pytest.approx(
            exact.sum((0, 2, 3)).tolist(), rel=1e-5, abs=1e-3
        )
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other))


@pytest.mark.parametrize("step", [0.2, 1.0, 1.7, 63.9, 945.0])
def test_the_step_in_use_is_the_snapped_one(step):
    numbers = adc_numbers(
        torch.tensor([[step]]).double().clamp(min=1), torch.tensor([[8]]), Macro()
    )
    mult = adc.snap(max(step, 1.0), 15)
    assert numbers.mult.item() == mult and numbers.gain.item() == 1
    assert numbers.step.item() == 2**15 / mult


def test_tiles_share_a_unit_and_have_whole_gains():
    numbers = adc_numbers(
        torch.tensor([[127.0], [30.2], [1.0], [0.3]]).double(),
        torch.tensor([[8]]),
        Macro(granularity="tile"),
    )
    assert numbers.gain.ravel().tolist() == [127, 30, 1, 1] and numbers.unit.tolist() == [1.0]
    assert numbers.mult.ravel().tolist() == [adc.snap(float(s), 15) for s in (127, 30, 1, 1)]


def test_an_ideal_adc_is_the_whole_number_convolution():
    for scheme in SCHEMES.values():
        macro, g = scheme.with_ideal_adc(), GEOMETRIES["strided groups"]
        layer = layer_of(macro, g)
        x = torch.randn(2, 4, 6, 7, generator=torch.Generator().manual_seed(4))
        codes, w = pad_codes(layer.input(x), g.padding, 0), layer.weight_codes().view(6, 2, 3, 2)
        scale = (layer.input.scale * layer.weights.scale).view(1, -1, 1, 1)
        expected = torch.addcmul(
            layer.bias.view(1, -1, 1, 1), F.conv2d(codes, w, None, g.stride, 0, 1, 2), scale
        )
        assert torch.equal(layer(x), expected)


# -- noise and steps -------------------------------------------------------------------------------
def test_noise_is_drawn_in_training_only_and_repeats():
    layer = layer_of(Macro(), GEOMETRIES["conv"])
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(5))
    hard = layer.eval()(x)
    layer.relaxation = Relaxation(0.5, 3)
    assert torch.equal(layer(x), hard)
    layer.train()
    first, second = layer(x), layer(x)
    assert torch.equal(first, second) and not torch.equal(first, hard)
    layer.relaxation = Relaxation(0.5, 4)
    assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("name", ["layer", "column", "tile"])
@pytest.mark.parametrize("drawn", [None, -0.6, 0.4])
def test_a_step_s_gradient_is_that_of_the_explicit_function(name, drawn, monkeypatch):
    """Through the whole layer, with hard codes (None) and with a noise that is known; a third of
    the reads clip."""
    macro, g = Macro(granularity=name, adc_bits=3, wl=5), Geometry(2, 4, (3, 3))
    layer = layer_of(macro, g).train()
    with torch.no_grad():
        layer.log_step.copy_(
            (
                20
                + 10 * torch.rand(layer.log_step.shape, generator=torch.Generator().manual_seed(8))
            ).log()
        )
    if drawn is not None:
        monkeypatch.setattr(
            Relaxation, "noise", lambda self: Noise(np.full(1 << 17, drawn, np.float32), 1)
        )
        layer.relaxation = Relaxation(0.3, 1)
    x, w = codes_and_weights(macro, g)
    gy = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(9))
    (layer.adc.read(x, w) * gy).sum().backward()
    numbers = layer.adc.numbers()
    spec = make_spec(layer.plan, *(a.numpy() for a in (numbers.mult, numbers.zero, numbers.gain)))
    rate = (numbers.mult.double() / 2.0**macro.shift).expand(len(layer.plan.tiles), 4)
    slope_of = (
        None
        if drawn is None
        else lambda p, t: mean_slope(p * rate[t].view(1, -1, 1) + macro.zero, macro.top, 0.3)
    )
    dx, dw, dstep, _ = explicit_gradients(
        x.detach().numpy(), w.detach().numpy(), spec, gy.numpy(), drawn or 0.0, slope_of
    )
    shared = [d for d in (0, 1) if layer.log_step.shape[d] == 1]
    expected = torch.from_numpy(dstep).sum(shared, keepdim=True) * layer.log_step.detach().exp()
    assert torch.allclose(
        layer.log_step.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    for got, want in ((x.grad, dx), (w.grad, dw)):
        assert np.allclose(got.numpy(), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", ["layer", "column", "tile", "split", "serial"])
@pytest.mark.parametrize("mode", ["ste", "relaxed", "mean"])
def test_a_zero_s_gradient_is_the_sum_over_all_reads(name, mode):
    """step * (m' - 1), or for hard codes -step where a read clips; with partial sums on both clip
    edges."""
    about = (
        {"sign_scheme": "split", "codebook": "twos"}
        if name == "split"
        else {"dac_bits": 2}
        if name == "serial"
        else {"granularity": name}
    )
    macro, g = Macro(adc_bits=3, wl=5, **about), Geometry(2, 4, (3, 3))
    layer = layer_of(macro, g).train()
    layer.adc.set_zero(np.array([3, 4, 2, 5])[np.arange(layer.zero.numel()) % 4])
    layer.real_zero.requires_grad_()
    with torch.no_grad():
        layer.log_step.copy_(
            (
                10
                + 4 * torch.rand(layer.log_step.shape, generator=torch.Generator().manual_seed(8))
            ).log()
        )
    layer.relaxation = None if mode == "ste" else Relaxation(0.3, 1, mode)
    x, w = codes_and_weights(macro, g)
    gy = torch.randn(2, 4, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    y = layer.adc.read(x, w)
    (y * gy.float()).sum().backward()
    numbers, expected = (
        layer.adc.numbers(),
        torch.zeros(len(layer.plan.tiles), 4, dtype=torch.float64),
    )
    step, zero = (a.expand(expected.shape) for a in (numbers.step, numbers.zero))
    for a, b in product(
        zip(layer.plan.input_planes, split_planes(x, layer.plan.input_planes)),
        zip(layer.plan.weight_planes, split_planes(w, layer.plan.weight_planes)),
    ):
        rows = F.unfold(a[1].detach().double(), g.kernel)
        for t, (first, last) in enumerate(layer.plan.tiles):
            p = torch.einsum(
                "ok,nkl->nol", b[1].detach().double()[:, first:last], rows[:, first:last]
            )
            s, z = (table[t].view(1, -1, 1) for table in (step, zero))
            code = torch.floor(p / s + 0.5) + z
            slope = (
                ((code >= 0) & (code <= 7)).double()
                if mode == "ste"
                else mean_slope(p / s + z, 7, 0.3)
            )
            expected[t] += (a[0].factor * b[0].factor * gy.flatten(2) * s * (slope - 1)).sum((0, 2))
    expected = expected.sum_to_size(layer.zero.shape)
    assert torch.allclose(
        layer.real_zero.grad,
        expected,
        rtol=2e-3 if name == "tile" else 1e-4,
        atol=1e-4 * float(expected.abs().max()),
    )
    layer.real_zero.requires_grad_(False)
    assert torch.equal(layer.adc.read(x, w), y)


FREE = {
    "signed": {},
    "split": {"sign_scheme": "split"},
    "serial": {"dac_bits": 2},
    "columns": {"granularity": "column"},
    "split columns": {"sign_scheme": "split", "granularity": "column"},
}


@pytest.mark.parametrize("about", FREE.values(), ids=FREE)
def test_gaps_and_steps_of_free_levels_get_the_gradient_of_every_read(about, monkeypatch):
    """d/d log gap_n = gap_n times the gradients, each times its column's ratio, of all reads whose
    code lies beyond the gap, seen from the code of p = 0: + above, - below. d/d log step_o = the
    gradients of the reads of column o, each times its value."""
    monkeypatch.setattr(adc_state, "LEVEL_IMAGES", 2)
    macro, g = Macro(adc_bits=3, wl=5, levels="free", **about), Geometry(2, 4, (3, 3))
    layer = with_levels(layer_of(macro, g), 5, 400).train()
    x, w = codes_and_weights(macro, g)
    gy = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(9))
    (layer.adc.read(x, w) * gy).sum().backward()
    zero, thresholds = int(layer.zero.flatten()[0]), layer.thresholds.T.unsqueeze(2)
    assert (adc.threshold_code(0, thresholds) == zero).all() and int(layer.levels[zero]) == 0
    ratio, values = (
        (layer.unit * level_units(macro)).view(-1, 1),
        (layer.unit.view(-1, 1) * layer.levels).expand(4, -1),
    )
    expected, steps = (
        torch.zeros(macro.top, dtype=torch.float64),
        torch.zeros(1, 4, dtype=torch.float64),
    )
    for a, b in product(
        zip(layer.plan.input_planes, split_planes(x, layer.plan.input_planes)),
        zip(layer.plan.weight_planes, split_planes(w, layer.plan.weight_planes)),
    ):
        rows = F.unfold(a[1].detach().double(), g.kernel)
        for first, last in layer.plan.tiles:
            code = adc.threshold_code(
                torch.einsum(
                    "ok,nkl->nol", b[1].detach().double()[:, first:last], rows[:, first:last]
                ),
                thresholds,
            )
            grad = a[0].factor * b[0].factor * gy.flatten(2).double()
            steps += torch.stack([(grad[:, o] * values[o, code[:, o]]).sum() for o in range(4)])
            for n in range(macro.top):
                reach = (code > n).double() if n >= zero else -(code <= n).double()
                expected[n] += (grad * ratio * reach).sum()
    expected *= layer.log_gaps.detach().exp()
    assert torch.allclose(
        layer.log_gaps.grad, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    if macro.granularity == "column":
        assert torch.allclose(
            layer.log_step.grad, steps, rtol=1e-5, atol=1e-5 * float(steps.abs().max())
        )


@pytest.mark.parametrize("about", FREE.values(), ids=FREE)
def test_reads_of_free_levels_are_straight_through_between_the_end_levels(about):
    """Against float64 formulas; a good part of the reads lies beyond."""
    macro, g = Macro(adc_bits=3, wl=5, levels="free", **about), Geometry(2, 4, (3, 3))
    layer = with_levels(layer_of(macro, g), 5, 250).train()
    x, w = codes_and_weights(macro, g)
    gy = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(9))
    (layer.adc.read(x, w) * gy).sum().backward()
    lo, hi = (torch.from_numpy(ends).view(1, -1, 1) for ends in layer.adc.level_ends())
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    total, beyond = 0, []
    for a, b in product(
        zip(layer.plan.input_planes, split_planes(wide[0], layer.plan.input_planes)),
        zip(layer.plan.weight_planes, split_planes(wide[1], layer.plan.weight_planes)),
    ):
        rows = F.unfold(a[1], g.kernel)
        for first, last in layer.plan.tiles:
            p = torch.einsum("ok,nkl->nol", b[1][:, first:last], rows[:, first:last])
            inside = (p >= lo) & (p <= hi)
            beyond.append(1 - inside.double().mean())
            total = total + a[0].factor * b[0].factor * (gy.flatten(2) * p * inside).sum()
    assert 0.05 < np.mean(beyond) < 0.95
    total.backward()
    for got, expected in zip((x.grad, w.grad), (t.grad for t in wide)):
        assert torch.allclose(
            got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


def test_the_gradient_of_free_levels_is_counted_on_the_first_images():
    macro, g = Macro(adc_bits=3, wl=5, levels="free"), Geometry(2, 4, (3, 3))
    layer = with_levels(layer_of(macro, g), 5, 400).train()
    x, w = codes_and_weights(macro, g)
    first = x.detach()[:1].expand(adc_state.LEVEL_IMAGES, -1, -1, -1)
    grads = []
    for images in (first, first.repeat(3, 1, 1, 1), torch.cat([first, torch.zeros_like(first)])):
        layer.adc.read(images, w).sum().backward()
        grads.append(layer.log_gaps.grad)
        layer.log_gaps.grad = None
    assert torch.allclose(grads[1], 3 * grads[0]) and torch.allclose(grads[2], 2 * grads[0])


def test_served_levels_follow_the_learned_gaps():
    layer = layer_of(Macro(levels="free", adc_bits=2), GEOMETRIES["conv"]).train()
    layer.adc.set_levels([-24, 5, 156], [-400, 0, 84, 2400])  # eighths: -50, 0, 10.5, 300
    assert layer.adc.learned_levels().tolist() == pytest.approx([-50, 0, 10.5, 300])
    assert (layer.levels.tolist(), layer.thresholds.tolist()) == (
        [-400, 0, 84, 2400],
        [[-25, 6, 156]],
    )  # at half way, the upper of two where both are as near
    with torch.no_grad():
        layer.log_gaps[1] += log(2)
    assert layer.adc.learned_levels().tolist() == pytest.approx([-50, 0, 21, 310.5])
    assert (layer.levels.tolist(), layer.thresholds.tolist()) == (
        [-400, 0, 168, 2484],
        [[-25, 11, 166]],
    )


def test_served_thresholds_and_units_follow_the_learned_steps_of_columns():
    layer = layer_of(Macro(levels="free", adc_bits=2, granularity="column"), Geometry(1, 2)).train()
    layer.adc.set_levels([[-25, 6, 156]] * 2, [-400, 0, 84, 2400])
    with torch.no_grad():
        layer.log_step[0, 1] -= log(2)
    assert layer.adc.level_values().tolist() == [
        pytest.approx([-50, 0, 10.5, 300]),
        pytest.approx([-25, 0, 5.25, 150]),
    ]
    assert layer.thresholds.tolist() == [[-25, 6, 156], [-12, 3, 78]] and layer.levels.tolist() == [
        -400,
        0,
        84,
        2400,
    ]
    assert layer.unit.tolist() == pytest.approx([1 / 8, 1 / 16])
    assert [ends.tolist() for ends in layer.adc.level_ends()] == [[-50, -25], [300, 150]]
    assert torch.equal(layer.eval().adc.level_values(), layer.unit.view(2, 1) * layer.levels)


def test_a_state_from_before_levels_were_learned_is_read():
    layer, other = (
        layer_of(Macro(levels="free", adc_bits=2), GEOMETRIES["conv"]) for _ in range(2)
    )
    layer.adc.set_levels([-24, 5, 156], [-400, 0, 84, 2400])
    state = layer.state_dict() | {
        "zero": torch.full((1, 1), 2),
        "real_zero": torch.full((1, 1), 2.0, dtype=torch.float64),
        "thresholds": layer.thresholds[0],
    }
    other.load_state_dict(
        {name: value for name, value in state.items() if name not in ("log_gaps", "unit")}
    )
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), layer.state_dict().values())
    )


def test_a_state_from_before_columns_had_thresholds_is_read():
    """What was learned of the gaps stays, rounded or not."""
    layer, other = (
        layer_of(Macro(levels="free", adc_bits=2), GEOMETRIES["conv"]) for _ in range(2)
    )
    layer.adc.set_levels([-24, 5, 156], [-400, 0, 84, 2400])
    with torch.no_grad():
        layer.log_gaps += 1e-4
    state = layer.state_dict() | {"thresholds": layer.thresholds[0]}
    other.load_state_dict({name: value for name, value in state.items() if name != "unit"})
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), layer.state_dict().values())
    )


def test_a_state_without_a_learned_zero_is_read():
    layer, other = layer_of(Macro(), GEOMETRIES["conv"]), layer_of(Macro(), GEOMETRIES["conv"])
    layer.adc.set_zero(11)
    other.load_state_dict(
        {name: value for name, value in layer.state_dict().items() if name != "real_zero"}
    )
    assert (int(other.zero), other.real_zero.item()) == (11, 11.0)


def test_a_state_with_one_zero_for_all_groups_is_read():
    state = layer_of(Macro(), GEOMETRIES["conv"]).state_dict()
    other = layer_of(Macro(granularity="column"), GEOMETRIES["conv"])
    other.load_state_dict(
        other.state_dict()
        | {name: torch.full_like(state[name], 11) for name in ("zero", "real_zero")}
    )
    assert (
        (other.zero == 11).all()
        and (other.real_zero == 11).all()
        and other.zero.shape == group_shape(other.plan)
    )


@pytest.mark.parametrize("name", ["layer", "column", "tile"])
def test_a_step_learns_what_its_reads_say(name):
    """At equal steps, what columns or tiles learn adds up to what a step for the whole layer
    learns."""
    macro, g = Macro(granularity=name, adc_bits=3), Geometry(4, 6, (3, 3))
    layer = layer_of(macro, g)
    with torch.no_grad():
        layer.log_step.fill_(np.log(127.0))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    layer(x).square().sum().backward()
    assert layer.log_step.grad.shape == {"layer": (1, 1), "column": (1, 6), "tile": (4, 1)}[name]
    whole = layer_of(replace(macro, granularity="layer"), g)
    with torch.no_grad():
        whole.log_step.fill_(np.log(127.0))
    whole(x).square().sum().backward()
    assert layer.log_step.grad.sum().item() == pytest.approx(
        whole.log_step.grad.item(), rel=0.01
    )  # a tile's step is gain * unit, not 2**S / M


def test_a_fixed_range_is_not_learned():
    assert not layer_of(Macro(range="full"), GEOMETRIES["conv"]).log_step.requires_grad
    assert not layer_of(Macro(range="fixed", step=4), GEOMETRIES["conv"]).log_step.requires_grad
    assert not layer_of(Macro(levels="free"), GEOMETRIES["conv"]).log_step.requires_grad
    assert layer_of(
        Macro(levels="free", granularity="column"), GEOMETRIES["conv"]
    ).log_step.requires_grad
    assert layer_of(Macro(), GEOMETRIES["conv"]).log_step.requires_grad


@pytest.mark.parametrize("where", ["image", "weight"])
def test_a_value_that_is_no_number_stops_the_layer(where):
    layer = layer_of(Macro(), GEOMETRIES["conv"]).train()
    layer.relaxation = Relaxation(0.3, 1)
    x = torch.zeros(1, 3, 5, 5)
    with torch.no_grad():
        (x if where == "image" else layer.weight).view(-1)[7] = torch.nan
    with pytest.raises(CheckError) as e:
        layer(x)
    assert (
        str(e.value) == "layer: its inputs or weights are not finite numbers, so a read has "
        "no code for them; lower --lr, or check the model's weights and the "
        "images"
    )
