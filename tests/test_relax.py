"""The relaxed ADC: closed forms against Monte Carlo and numeric derivatives, and samples that
follow exactly the codes' probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rqtool.hardware.macro import Macro
from rqtool.kernels import cpu
from rqtool.kernels.spec import make_spec
from rqtool.mapping.plan import Geometry, Plan
from rqtool.train.relax import (
    NOISE_DRAWS,
    NOISE_TAIL,
    Relaxation,
    mean_code,
    mean_slope,
    slope_tables,
)

TAUS = (0.08, 0.3, 1.0)


def probabilities(u: float, top: int, tau: float) -> np.ndarray:
    """P(code = 0 .. top), float64, from P(code >= j) = sigmoid((u - j + 1/2) / tau)."""
    at_least = 1 / (1 + np.exp(-(u - np.arange(1, top + 1) + 0.5) / tau))
    return -np.diff(np.concatenate([[1.0], at_least, [0.0]]))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("top", [1, 3, 14, 15])
def test_the_mean_is_that_of_the_probabilities(top, tau):
    for u in np.linspace(-4, top + 4, 41):
        assert mean_code(torch.tensor(u), top, tau).item() == pytest.approx(
            np.arange(top + 1) @ probabilities(u, top, tau), abs=1e-12
        )


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("u", [-2.0, 0.0, 0.4, 0.5, 6.2, 14.9, 15.0, 18.0])
def test_the_mean_is_that_of_many_samples(u, tau):
    r = np.random.default_rng(0).random(400_000)
    codes = np.clip(np.floor(u + tau * np.log(r / (1 - r)) + 0.5), 0, 15)
    error = 5 * max(codes.std(), 0.02) / np.sqrt(r.size)
    assert (
        abs(codes.mean() - mean_code(torch.tensor(u, dtype=torch.float64), 15, tau).item()) < error
    )


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("u", [-0.5, 0.0, 0.5, 6.2, 14.5, 15.5])
def test_slope_and_variance_are_those_of_many_samples(u, tau):
    """The slope by the score of the noise, which knows nothing of sigmoids: d E[code] / du = E[code
    * (2 r - 1)] / tau."""
    r = np.random.default_rng(1).random(400_000)
    codes = np.clip(np.floor(u + tau * np.log(r / (1 - r)) + 0.5), 0, 15)
    terms = (codes - codes.mean()) * (2 * r - 1) / tau
    assert abs(
        terms.mean() - mean_slope(torch.tensor(u, dtype=torch.float64), 15, tau).item()
    ) < 5 * max(terms.std(), 0.02) / np.sqrt(r.size)
    chances, k = probabilities(u, 15, tau), np.arange(16)
    variance = chances @ k**2 - (chances @ k) ** 2
    fourth = chances @ (k - chances @ k) ** 4
    assert abs(codes.var() - variance) < 5 * max(np.sqrt(fourth), 0.02) / np.sqrt(r.size)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("top", [1, 3, 15])
def test_the_slope_is_the_derivative_of_the_mean(top, tau):
    u = torch.linspace(-3, top + 3, 997, dtype=torch.float64)
    h = 1e-5
    numeric = (mean_code(u + h, top, tau) - mean_code(u - h, top, tau)) / (2 * h)
    assert (mean_slope(u, top, tau) - numeric).abs().max() < 1e-7


def test_far_outside_the_end_codes_take_everything():
    u = torch.tensor([-50.0, 65.0], dtype=torch.float64)
    assert mean_code(u, 15, 0.3).tolist() == pytest.approx([0, 15], abs=1e-12)
    assert mean_slope(u, 15, 0.3).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_warm_noise_makes_the_slope_the_straight_through_one():
    inside = torch.linspace(3, 12, 500, dtype=torch.float64)
    assert (mean_slope(inside, 15, 0.3) - 1).abs().max() < 0.065
    assert (mean_slope(inside, 15, 0.08) - 1).abs().max() > 1  # spikes: the reason to finish hard


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    ("weight", "code"), [(-7, 15), (-1, 5), (0, 0), (1, 3), (1, 15), (2, 10), (7, 7), (7, 15)]
)
def test_drawn_codes_have_the_probabilities_of_the_page(weight, code, tau):
    """One partial sum, 65,536 reads of it: the kernel's count of every code, and that of the plain
    formula, within 5 sigma of P(code)."""
    mult, zero, top, n = 513, 8, 15, 65_536
    plan = Plan.make("layer", Geometry(9, 4), Macro())
    noise = Relaxation(tau, 11).noise()
    spec = make_spec(plan, np.array([[mult]]), np.array([[zero]]), np.ones((1, 1)))
    spec = replace(spec, noise=noise)
    u = 9 * weight * code * mult / 2**15
    wanted = n * probabilities(u + zero, top, tau)
    sigma = np.sqrt(wanted * (1 - wanted / n)) + 1
    read = (
        cpu.forward(np.full((1, 9, 128, 128), code, np.float32), np.full((4, 9), weight), spec, 1)
        + zero
    )
    drawn = np.clip(np.floor(u + zero + 0.5 + noise.draws[:NOISE_DRAWS]), 0, top)
    # a kernel's block takes 256 draws in a row, so some are taken again: its counts spread more
    # than independent ones
    for codes, spread in ((drawn, 1), (read, 2)):
        counts = np.bincount(codes.astype(np.int64).ravel(), minlength=top + 1)
        assert counts.shape == (top + 1,) and (np.abs(counts - wanted) < 5 * spread * sigma).all()


def test_noise_is_float32_logistic_and_repeats():
    noise = Relaxation(0.3, 4).noise()
    assert noise.draws.dtype == np.float32 and noise.draws.shape == (NOISE_DRAWS + NOISE_TAIL,)
    assert np.array_equal(noise.draws, Relaxation(0.3, 4).noise().draws)
    assert not np.array_equal(noise.draws, Relaxation(0.3, 5).noise().draws)
    share = [(noise.draws < 0.3 * np.log(q / (1 - q))).mean() for q in (0.01, 0.25, 0.5, 0.9)]
    assert share == pytest.approx([0.01, 0.25, 0.5, 0.9], abs=0.01)
    assert np.isfinite(noise.draws).all()


def test_slope_tables_hold_one_row_for_each_step():
    mult, zero = torch.tensor([[513], [8191]]), torch.tensor([[8]])
    tables = slope_tables(mult, zero, 15, 15, 0.3, -945, 945)
    assert (
        tables.slope.shape == (2, 1891)
        and tables.slope.dtype == np.float32
        and tables.p_min == -945
        and tables.value is None
    )
    assert tables.row.tolist() == [[0], [1]]
    for row, m in enumerate((513, 8191)):
        expected = mean_slope(torch.arange(-945, 946).double() * m / 2**15 + 8, 15, 0.3)
        assert np.array_equal(tables.slope[row], expected.float().numpy())
