"""Learned quantisers: whole numbers to the last bit, half up, gradients straight through, scales of
least squared error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rqtool.kernels import choose
from rqtool.train.quantizers import (
    MANTISSA_BITS,
    InputQuantizer,
    WeightQuantizer,
    round_ste,
    sample,
    snap_scale,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def input_quantizer(bits: int, scale: float, zero: int = 0) -> InputQuantizer:
    q = InputQuantizer(bits)
    with torch.no_grad():
        q.log_scale.fill_(float(np.log(scale)))
        q.zero.fill_(zero)
    return q


# -- rounding --------------------------------------------------------------------------------------
@given(st.floats(-300, 300, width=32))
def test_rounding_gives_whole_numbers_exactly(x):
    rounded = round_ste(torch.tensor(x)).item()
    assert rounded == int(rounded)
    assert abs(rounded - np.floor(np.float64(x) + 0.5)) <= (
        abs(abs(x) - 0.5) < 1e-6
    )  # float32 cannot see beside one half


def test_halves_round_up_and_gradients_pass():
    x = torch.tensor([-1.5, -0.5, -0.2, 0.49, 0.5, 1.5, 2.5]).requires_grad_()
    y = round_ste(x)
    y.backward(torch.arange(7.0))
    assert y.tolist() == [-1, 0, 0, 0, 1, 2, 3]
    assert x.grad.tolist() == list(range(7))


# -- scales ----------------------------------------------------------------------------------------
@given(st.floats(-12, 12))
def test_a_snapped_scale_has_a_ten_bit_inverse(log_scale):
    scale = torch.tensor(np.exp(log_scale), dtype=torch.float32)
    snapped = snap_scale(scale)
    assert snapped.item() == pytest.approx(scale.item(), rel=2.0**-MANTISSA_BITS)
    mantissa, _ = np.frexp(1 / snapped.double().item())
    assert (
        abs(mantissa * 2**MANTISSA_BITS - round(mantissa * 2**MANTISSA_BITS))
        < 2**MANTISSA_BITS * 2.0**-23
    )
    assert torch.equal(snap_scale(snapped), snapped)


def test_snapping_hands_the_gradient_on():
    scale = torch.tensor(0.3).requires_grad_()
    (3 * snap_scale(scale)).backward()
    assert scale.grad.item() == 3


# -- inputs ----------------------------------------------------------------------------------------
def test_input_codes_by_hand():
    q = input_quantizer(4, 0.5)
    assert q(torch.tensor([-1.0, 0.0, 0.24, 0.25, 0.75, 7.4, 99.0])).tolist() == [
        0,
        0,
        0,
        1,
        2,
        15,
        15,
    ]
    q = input_quantizer(4, 0.5, zero=6)
    assert q(torch.tensor([-9.0, -3.0, -0.25, 0.0, 0.25, 4.5])).tolist() == [0, 0, 6, 6, 7, 15]


def test_input_gradients_stop_where_codes_clip():
    q = input_quantizer(2, 1.0)
    x = torch.tensor([-0.6, 0.2, 2.9, 3.4]).requires_grad_()
    (q(x) * q.scale).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    # d(scale * code) / d log scale = code - x inside, the end code where it clips
    assert q.log_scale.grad.item() == pytest.approx(0 + (0 - 0.2) + (3 - 2.9) + 3, abs=1e-6)


@pytest.mark.parametrize("carrier", ["one pass", "torch"])
@pytest.mark.parametrize("shape", [(1,), (63,), (3, 5, 7), (4, 16, 33, 31)])
def test_input_gradients_are_those_of_the_formula_on_every_carrier(carrier, shape, monkeypatch):
    """Numbers exactly on both edges are inside, their neighbours beyond are not; the same bits on
    any number of threads."""
    if carrier == "torch":
        monkeypatch.setattr(choose, "numba_available", lambda: False)
    rng, scale, zero, peak = np.random.default_rng(len(shape)), np.float32(0.25), 3, 15
    edges = np.float32(
        [
            -3 * scale,
            12 * scale,
            np.nextafter(-3 * scale, np.float32(-9)),
            np.nextafter(12 * scale, np.float32(9)),
            0,
            -9,
            9,
        ]
    )
    x = np.where(
        rng.random(shape) < 0.3, rng.choice(edges, shape), rng.uniform(-2, 5, shape)
    ).astype(np.float32)
    grad = rng.standard_normal(shape).astype(np.float32)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(
            choose.codes_gradient(
                torch.from_numpy(x), torch.from_numpy(grad), torch.tensor(scale), -zero, peak - zero
            )
        )
    dx, total = found[0]
    u = x.astype(np.float64) / scale
    inside = (u >= -zero) & (u <= peak - zero)
    assert dx.dtype == torch.float32 and np.array_equal(
        dx.numpy(), np.where(inside, grad / scale, 0)
    )
    assert total.item() == pytest.approx(float((grad * u)[inside].sum()), rel=1e-5, abs=1e-3)
    assert all(torch.equal(dx, a) and torch.equal(total, b) for a, b in found)


def error(x: torch.Tensor, scale: float, zero: int, peak: int) -> float:
    code = np.clip(np.floor(x.double().numpy() / scale + zero + 0.5), 0, peak)
    return float(np.mean(((code - zero) * scale - x.double().numpy()) ** 2))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "uniform", "signed", "skewed"])
def test_calibrated_inputs_have_about_the_least_error_of_all_scales(bits, kind):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(bits))
    x = {
        "relu": x.clamp(min=0),
        "uniform": torch.rand(3000),
        "signed": x,
        "skewed": (x + 1.5).clamp(min=-0.4),
    }[kind]
    q = InputQuantizer(bits)
    q.calibrate(x)
    assert int(q.zero) == 0 if x.min() >= 0 else 1 <= int(q.zero) <= q.peak
    span = float(x.clamp(min=0).max() - x.clamp(max=0).min())
    best = min(error(x, s, int(q.zero), q.peak) for s in np.linspace(0.1, 1.3, 500) * span / q.peak)
    assert error(x, q.scale.item(), int(q.zero), q.peak) <= 1.1 * best


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(10),
        torch.ones(1),
        torch.full((4,), -2.0),
        torch.tensor([0.0, 1e-20]),
        torch.tensor([1e20, 0.0]),
    ],
)
@pytest.mark.parametrize("bits", [1, 4])
def test_degenerate_inputs_calibrate_to_finite_scales(x, bits):
    q = InputQuantizer(bits)
    q.calibrate(x)
    codes = q(x)
    assert torch.isfinite(q.scale) and q.scale > 0
    assert ((codes >= 0) & (codes <= q.peak)).all() and torch.equal(codes, codes.round())


def test_a_sample_keeps_the_extremes():
    x = torch.arange(100_001.0).flip(0)
    assert sample(x, 1000).numel() <= 1100
    assert {0.0, 100_000.0} <= set(sample(x, 1000).tolist())
    assert torch.equal(sample(x[:50].view(5, 10), 1000), x[:50])


# -- weights ---------------------------------------------------------------------------------------
def test_weight_codes_are_whole_and_within_the_peak():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    for peak in (1, 3, 7, 127):
        q = WeightQuantizer(peak, 6)
        q.calibrate(weight)
        codes = q(weight)
        assert torch.equal(codes, codes.round()) and codes.abs().max() <= peak


def test_calibrated_weights_have_about_the_least_error_of_all_scales():
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[0.01], [1.0], [30.0], [1.0], [1.0]]
    )
    q = WeightQuantizer(7, 5)
    q.calibrate(weight)
    for row, scale in zip(weight, q.scale.detach()):
        largest = float(row.abs().max()) / 7
        errors = [
            float((torch.floor(row / s + 0.5).clamp(-7, 7) * s - row).square().mean())
            for s in np.linspace(0.2, 1.2, 1000) * largest
        ]
        assert float(
            (torch.floor(row / scale + 0.5).clamp(-7, 7) * scale - row).square().mean()
        ) <= 1.02 * min(errors)


def test_a_column_of_zeros_stays_zero():
    weight = torch.zeros(2, 9)
    weight[1, 3] = 2.0
    q = WeightQuantizer(7, 2)
    q.calibrate(weight)
    assert torch.isfinite(q.scale).all() and q(weight)[0].abs().sum() == 0 and q(weight)[1, 3] > 0


def test_weight_gradients_stop_where_codes_clip():
    q = WeightQuantizer(1, 1)
    with torch.no_grad():
        q.log_scale.zero_()
    w = torch.tensor([[-3.0, -0.4, 0.6, 1.4]]).requires_grad_()
    q(w).sum().backward()
    assert w.grad.tolist() == [[0, 1, 1, 0]]
