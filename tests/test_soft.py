"""The soft modes: their closed forms, gradients against explicit float64 autograd, and Gumbel
samples that follow the codes' probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_reads import GEOMETRIES, layer_of
from test_relax import TAUS, probabilities
from torch import nn

from rqtool.hardware.macro import Macro
from rqtool.kernels import reference
from rqtool.kernels.spec import Tables, inside_spec
from rqtool.mapping.plan import Geometry, Plan
from rqtool.train import soft
from rqtool.train.reads import split_planes, unpadded
from rqtool.train.relax import Relaxation, mean_code, mean_slope
from rqtool.train.soft import log_probability, mean_table, nearest_codes

pytestmark = pytest.mark.usefixtures("one_thread")


# -- mean: the table -------------------------------------------------------------------------------
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    "macro",
    [
        Macro(wl=2, in_bits=3),
        Macro(wl=2, in_bits=3, adc_bits=1),
        Macro(wl=2, in_bits=3, codebook="sign-magnitude"),
    ],
    ids=Macro.describe,
)
def test_the_table_and_its_gradients_are_the_closed_forms(macro, tau):
    """At every partial sum, those exactly on both clip edges (u = -1/2 and u = top + 1/2, steps of
    2) among them."""
    plan = Plan.make("layer", Geometry(1, 3), macro)
    p = torch.arange(macro.p_min, macro.p_max + 1).double()
    for size in (2.0, 1.0, 7.25):
        step, zero = (
            torch.full((1, 1), size, dtype=torch.float64, requires_grad=True),
            torch.full((1, 1), float(macro.zero), dtype=torch.float64, requires_grad=True),
        )
        value, slope = mean_table(step, zero, plan, tau)
        u = p / size + macro.zero
        m, m1 = mean_code(u, macro.top, tau), mean_slope(u, macro.top, tau)
        assert torch.allclose(
            value[0], size * (m - macro.zero), rtol=0, atol=1e-12
        ) and torch.equal(slope[0], m1)
        jacobian = [torch.autograd.grad(v, (step, zero), retain_graph=True) for v in value[0]]
        assert torch.allclose(
            torch.stack([d for d, _ in jacobian]).flatten(),
            (m - macro.zero) - (u - macro.zero) * m1,
            rtol=1e-9,
            atol=1e-11,
        )
        assert torch.allclose(
            torch.stack([d for _, d in jacobian]).flatten(), size * (m1 - 1), rtol=1e-9, atol=1e-11
        )


def test_the_gradient_of_a_table_counts_its_look_ups(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_VALUES", 500)  # several chunks
    plan = Plan.make("layer", Geometry(4, 6, (3, 2), groups=2), Macro(wl=4, in_bits=2, w_bits=3))
    rng = np.random.default_rng(0)
    x, w, gy = (
        rng.integers(0, 4, (5, 4, 7, 6)),
        rng.integers(-3, 4, (6, 12)),
        rng.standard_normal((5, 6, 5, 5)),
    )
    row = rng.integers(0, 3, (len(plan.tiles), 6))
    span = plan.macro.p_max - plan.macro.p_min + 1
    value = rng.standard_normal((3, span)).astype(np.float32)
    spec = unpadded(
        replace(
            inside_spec(plan, 0, 0),
            tables=Tables(plan.macro.p_min, row, np.zeros_like(value), value),
        )
    )
    got = reference.table_gradient(
        *(torch.from_numpy(a).float() for a in (x, w)), spec, torch.from_numpy(gy).float()
    )
    expected = np.zeros((3, span))
    for n, o, y0, x0 in np.ndindex(5, 6, 5, 5):
        rows = x[n, 2 * (o // 3) : 2 * (o // 3) + 2, y0 : y0 + 3, x0 : x0 + 2].reshape(-1)
        for t, (a, b) in enumerate(plan.tiles):
            expected[row[t, o], w[o, a:b] @ rows[a:b] - plan.macro.p_min] += gy[n, o, y0, x0]
    assert got.dtype == torch.float64 and np.allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


# -- mean: a layer ---------------------------------------------------------------------------------
MACROS = {
    "layer": Macro(wl=5, adc_bits=3),
    "column": Macro(wl=5, adc_bits=3, granularity="column"),
    "tile": Macro(wl=5, adc_bits=3, granularity="tile"),
    "split": Macro(wl=5, adc_bits=2, sign_scheme="split"),
    "offset slices": Macro(wl=5, adc_bits=3, sign_scheme="offset", cell_bits=2),
    "serial": Macro(wl=5, adc_bits=3, dac_bits=2),
    "fixed": Macro(wl=5, adc_bits=3, range="fixed", step=20.0),
}


def explicit_mean(
    layer, x: torch.Tensor, w: torch.Tensor, log_step: torch.Tensor, tau: float
) -> torch.Tensor:
    """What `layer.read` gives in mode `mean`, float64 under plain autograd: planes, tiles and
    sigmoids one by one."""
    plan, numbers = layer.plan, layer.adc.numbers()
    macro, g, y = plan.macro, plan.geometry, 0
    real = log_step.exp()
    step = (real + (numbers.step - real).detach()).expand(len(plan.tiles), g.columns)
    planes = [(a.factor * b.factor, a, b) for a in plan.input_planes for b in plan.weight_planes]
    xs, ws = split_planes(x, plan.input_planes), split_planes(w, plan.weight_planes)
    for factor, a, b in planes:
        rows = nn.functional.unfold(
            xs[plan.input_planes.index(a)], g.kernel, g.dilation, 0, g.stride
        )
        for t, (first, last) in enumerate(plan.tiles):
            p = torch.einsum(
                "ok,nkl->nol", ws[plan.weight_planes.index(b)][:, first:last], rows[:, first:last]
            )
            s = step[t].view(1, -1, 1)
            y = y + factor * s * (mean_code(p / s + macro.zero, macro.top, tau) - macro.zero)
    y = y.unflatten(2, g.out_size(*x.shape[2:]))
    return (
        y - macro.weight_offset * layer.input_sum(x.float()).double() if macro.weight_offset else y
    )


def went_through(macro: Macro, g: Geometry, relaxation: Relaxation) -> tuple:
    """(layer, codes x, weights w, a gradient float64 [3, 4, 4, 5], the reads y) after both passes."""
    layer = layer_of(macro, g).train()
    layer.relaxation = relaxation
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.integers(0, macro.q_x + 1, (3, 2, 6, 7))).float().requires_grad_()
    w = torch.from_numpy(rng.integers(-macro.q_w, macro.q_w + 1, (4, 18))).float().requires_grad_()
    gy = torch.from_numpy(rng.standard_normal((3, 4, 4, 5)))
    y = layer.adc.read(x, w)
    (y * gy.float()).sum().backward()
    return layer, x, w, gy, y


@pytest.mark.parametrize("tau", [0.1, 0.3])
@pytest.mark.parametrize("name", MACROS)
def test_a_layer_s_reads_and_gradients_are_those_of_plain_autograd(name, tau):
    macro, g = MACROS[name], Geometry(2, 4, (3, 3))
    layer, x, w, gy, y = went_through(macro, g, Relaxation(tau, 1, "mean"))
    wide = [a.detach().double().requires_grad_() for a in (x, w, layer.log_step)]
    expected = explicit_mean(layer, *wide, tau)
    (expected * gy).sum().backward()
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-3)
    for got, want in zip((x, w), wide):
        assert torch.allclose(
            got.grad.double(), want.grad, rtol=1e-4, atol=1e-4 * float(want.grad.abs().max())
        )
    if macro.range == "calibrated":
        assert torch.allclose(
            layer.log_step.grad,
            wide[2].grad,
            rtol=1e-4,
            atol=1e-4 * float(wide[2].grad.abs().max()),
        )
    else:
        assert layer.log_step.grad is None


@pytest.mark.parametrize("mode", ["mean", "gumbel"])
def test_soft_codes_are_for_training_only(mode):
    layer = layer_of(Macro(), GEOMETRIES["conv"])
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(5))
    hard = layer.eval()(x)
    layer.relaxation = Relaxation(0.3, 3, mode)
    assert torch.equal(layer(x), hard)
    layer.train()
    first = layer(x)
    assert torch.equal(layer(x), first) and not torch.equal(first, hard)
    assert (first - hard).abs().mean() < 0.5 * hard.abs().mean()
    layer.relaxation = replace(layer.relaxation, seed=4)
    assert torch.equal(layer(x), first) == (mode == "mean")


# -- gumbel ----------------------------------------------------------------------------------------
def gumbel_code(
    u: torch.Tensor, top: int, tau: float, noise: torch.Tensor, temperature: float = soft.LAMBDA
) -> torch.Tensor:
    """The definition: a soft code [..] for u [..]; noise: Gumbel, [.., as many as there are nearest
    codes]."""
    codes = nearest_codes(u, top)
    return (
        ((log_probability(u, codes, top, tau)[0] + noise) / temperature).softmax(-1) * codes
    ).sum(-1)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("top", [1, 3, 4, 14])
def test_log_probabilities_are_those_of_the_relaxed_adc(top, tau):
    codes = torch.arange(top + 1.0, dtype=torch.float64)
    for u in np.linspace(-2, top + 2, 37):
        at = torch.tensor(u, requires_grad=True)
        got, lean = log_probability(at, codes, top, tau)
        assert np.allclose(
            got.detach().exp().numpy(), probabilities(u, top, tau), rtol=1e-7, atol=1e-12
        )
        assert np.allclose(
            lean.detach(),
            [torch.autograd.grad(value, at, retain_graph=True)[0] for value in got],
            rtol=1e-9,
            atol=1e-9,
        )


def test_log_probabilities_stay_finite_far_away():
    u = torch.tensor([-80.0, 90.0])
    assert all(torch.isfinite(a).all() for a in log_probability(u, nearest_codes(u, 15), 15, 0.08))


@pytest.mark.parametrize("u", [-1.0, 0.3, 6.5, 7.1, 15.2])
def test_cold_samples_are_drawn_with_the_codes_probabilities(u):
    """Nearly without temperature a soft code is a whole one; at tau 0.3 the 5 nearest codes have
    all but 0.1 % of the probability."""
    n = 200_000
    noise = torch.stack(
        [soft.LAMBDA * soft.gumbel_draws()[k * 50_000 : k * 50_000 + n] for k in range(5)], -1
    ).double()
    code = gumbel_code(torch.full((n,), u, dtype=torch.float64), 15, 0.3, noise, temperature=1e-4)
    assert ((code - code.round()).abs() < 1e-3).double().mean() > 0.998
    counts, wanted = (
        np.bincount(code.round().long().numpy(), minlength=16),
        n * probabilities(u, 15, 0.3),
    )
    assert (np.abs(counts - wanted) < 6 * np.sqrt(wanted) + 0.001 * n).all()


class Recorded(soft.GumbelTiles):
    """The tiles, with the noise that each of them took: float64 [groups, columns of a group, n * L,
    5] by (tile, chunk)."""

    taken: dict = {}

    def softmax(self, p, t, chunk):
        at, weights = super().softmax(p, t, chunk)
        scores = torch.stack([score.take(at) for score in self.spec.tables.scores], -1).double()
        self.taken[t, chunk] = soft.LAMBDA * (
            torch.stack(weights, -1).double().log() - scores
        )  # up to what all five share
        return at, weights


@pytest.mark.parametrize("tau", [0.15, 0.3])
@pytest.mark.parametrize("name", MACROS)
def test_gumbel_reads_and_gradients_are_those_of_plain_autograd(name, tau, monkeypatch):
    """Chunks with their own noise; the explicit form takes the noise that was drawn, in float64,
    through softmax and autograd."""
    monkeypatch.setattr(reference, "TILE_VALUES", 100)
    monkeypatch.setattr(soft, "GumbelTiles", Recorded)
    macro, g = (
        replace(MACROS[name], dac_bits=None, cell_bits=None, sign_scheme="signed", codebook="twos"),
        Geometry(2, 4, (3, 3)),
    )
    layer, x, w, gy, y = went_through(macro, g, Relaxation(tau, 1, "gumbel"))
    xs, ws, log_step = (a.detach().double().requires_grad_() for a in (x, w, layer.log_step))
    numbers, real = layer.adc.numbers(), log_step.exp()
    step, out = (real + (numbers.step - real).detach()).expand(len(layer.plan.tiles), 4), 0
    rows = nn.functional.unfold(xs, g.kernel)
    for t, (first, last) in enumerate(layer.plan.tiles):
        noise = torch.cat(
            [
                Recorded.taken[t, chunk].squeeze(0).unflatten(1, (-1, 20)).movedim(1, 0)
                for chunk in range(3)
            ]
        )
        s = step[t].view(1, -1, 1)
        out = out + s * (
            gumbel_code(
                torch.einsum("ok,nkl->nol", ws[:, first:last], rows[:, first:last]) / s
                + macro.zero,
                macro.top,
                tau,
                noise,
            )
            - macro.zero
        )
    (out * gy.flatten(2)).sum().backward()
    assert torch.allclose(y.double().flatten(2), out, rtol=1e-4, atol=2e-3)
    for got, want in (
        (x.grad, xs.grad),
        (w.grad, ws.grad),
        *([(layer.log_step.grad, log_step.grad)] if macro.range == "calibrated" else []),
    ):
        assert want.abs().sum() > 0 and torch.allclose(
            got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max())
        )
