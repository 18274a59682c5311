"""Learned quantisers of inputs and weights (LSQ: Esser et al., ICLR 2020), with the scale kept as a
logarithm.

    input    x ~ s * (X - z)      X = clamp(floor(x / s + z + 1/2), 0, 2**in_bits - 1)     z = 0 for unsigned inputs
    weight   w ~ s[o] * W         W = clamp(floor(w / s[o] + 1/2), -Qw, Qw)

The functions return whole numbers as floats; rounding passes gradients straight through. A
logarithm keeps scales positive and makes an Adam step a relative change, so no gradient scaling is
needed. Rounding is half up, as in the integer program.
"""

from __future__ import annotations

import torch
from torch import nn

from rqtool.kernels import choose

MANTISSA_BITS = 10  # of the inverse of an input scale
GRID = 80  # candidate scales of a squared-error search


def round_ste(x: torch.Tensor) -> torch.Tensor:
    """floor(x + 1/2), with gradient 1."""
    return x + (torch.floor(x + 0.5) - x).detach()


def exp_scale(log_scale: torch.Tensor) -> torch.Tensor:
    return log_scale.double().exp().float()


def snap_scale(scale: torch.Tensor) -> torch.Tensor:
    """The scale next to `scale` whose inverse has a 10-bit mantissa, with gradient 1: the integer
    program then multiplies by it exactly (program/freeze.py), and what is trained is what is
    served.

    >>> float(1 / snap_scale(torch.tensor(1 / 300.2))), float(1 / snap_scale(torch.tensor(1 / 3000.9)))
    (300.0, 3000.0)
    """
    inverse = 1 / scale.detach().double()
    exponent = torch.floor(torch.log2(inverse)) - (MANTISSA_BITS - 1)
    snapped = 1 / (torch.floor(inverse * 2.0**-exponent + 0.5) * 2.0**exponent)
    return scale + (snapped.float() - scale).detach()


class _Codes(torch.autograd.Function):
    """clamp(floor(x / s + z + 1/2), 0, peak) in one pass; within range d/dx = 1 / s and d/d(log s)
    = -x / s, beyond it both are 0."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        log_scale: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        peak: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.peak = peak
        return (x / scale).add_(zero + 0.5).floor_().clamp_(0, peak)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, scale, zero = ctx.saved_tensors
        dx, total = choose.codes_gradient(x, grad, scale, -float(zero), ctx.peak - float(zero))
        return dx, -total, None, None, None


class InputQuantizer(nn.Module):
    """Codes of a layer's input: one learned scale, a fixed zero code."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.peak = (1 << bits) - 1
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int64))

    @property
    def scale(self) -> torch.Tensor:
        """s, float32, snapped."""
        return snap_scale(exp_scale(self.log_scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Whole numbers 0..peak, float32, the shape of x."""
        return _Codes.apply(x, self.log_scale, self.scale.detach(), self.zero, self.peak)

    @torch.no_grad()
    def calibrate(self, x: torch.Tensor) -> None:
        """The scale (and for inputs below zero the zero code) of least squared error on a sample of
        x."""
        values = sample(x, 1 << 16)
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        if high == low:
            high = 1.0
        whole = (high - low) / self.peak
        zeros = (
            [0]
            if low == 0
            else sorted({min(self.peak, max(1, round(-low / whole) + d)) for d in (-1, 0, 1)})
        )
        best = min(
            (
                (self._error(values, whole * f, z), whole * f, z)
                for z in zeros
                for f in torch.linspace(0.15, 1.2, GRID).tolist()
            ),
            key=lambda c: c[0],
        )
        self.log_scale.fill_(torch.tensor(best[1]).log())
        self.zero.fill_(best[2])

    def _error(self, x: torch.Tensor, scale: float, zero: int) -> float:
        q = torch.floor(x / scale + zero + 0.5).clamp(0, self.peak)
        return float(((q - zero) * scale - x).square().mean())


class WeightQuantizer(nn.Module):
    """Whole-number weights -Qw..Qw with one learned scale per column."""

    def __init__(self, peak: int, columns: int) -> None:
        super().__init__()
        self.peak = peak
        self.log_scale = nn.Parameter(torch.zeros(columns))

    @property
    def scale(self) -> torch.Tensor:
        return exp_scale(self.log_scale)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [O, K] whole numbers from the float weight [O, K]."""
        return round_ste((weight / self.scale.unsqueeze(1)).clamp(-self.peak, self.peak))

    @torch.no_grad()
    def calibrate(self, weight: torch.Tensor) -> None:
        """Per column, the scale of least squared error on the weights [O, K]."""
        largest = weight.abs().amax(1).clamp(min=1e-8) / self.peak
        best_error, best = torch.full_like(largest, torch.inf), largest.clone()
        for f in torch.linspace(0.3, 1.1, GRID).tolist():
            scale = (largest * f).unsqueeze(1)
            q = torch.floor(weight / scale + 0.5).clamp(-self.peak, self.peak)
            error = (q * scale - weight).square().mean(1)
            better = error < best_error
            best_error[better], best[better] = error[better], largest[better] * f
        self.log_scale.copy_(best.log())


def sample(x: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` values of x, evenly spaced in memory, the extremes included."""
    flat = x.detach().flatten()
    if flat.numel() <= count:
        return flat
    stride = flat.numel() // count
    return torch.cat([flat[::stride], flat.amin().view(1), flat.amax().view(1)])
