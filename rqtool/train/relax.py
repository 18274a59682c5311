"""The relaxed ADC: logistic noise before the thresholds, and the exact slope of what it makes of a
partial sum.

    P(code >= j) = sigmoid((u - j + 1/2) / tau)        u = p / step + zero, tau in codes
    m(u)  = E[code] = sum_j P(code >= j)                all tail mass in the end codes, as a real ADC saturates
    m'(u) = (1 / tau) * sum_j s_j * (1 - s_j)

The forward pass draws a code exactly: clamp(round(u + tau * logit(r)), 0, top) with r uniform, one
random number a read. Its gradient is that of the mean: m' for the partial sum, (q - zero) - (u -
zero) * m' for the step (the noise does not scale with the step, so it stays out of p / step). `ste`
is the same with no noise and a slope of 1 inside, 0 where the code clips. The forward passes of
`mean` and `gumbel` are soft (train/soft.py): m(u) itself, and a weighted mean of codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rqtool.kernels.spec import Noise, Tables

MODES = ("relaxed", "ste", "mean", "gumbel")
NOISE_DRAWS = 1 << 16
SEEDS = 1 << 46  # every carrier's arithmetic on seeds stays within 63 bits
NOISE_TAIL = 256  # a block reads this many draws from any start


@dataclass(frozen=True)
class Relaxation:
    """One training step's noise: temperature in codes, a seed, and the mode that makes something of
    both."""

    tau: float
    seed: int
    mode: str = "relaxed"

    def noise(self) -> Noise:
        """float32 logistic draws, the same for the same seed."""
        r = np.random.default_rng(self.seed).random(NOISE_DRAWS + NOISE_TAIL)
        r = np.clip(r, 1e-7, 1 - 1e-7)
        return Noise((self.tau * np.log(r / (1 - r))).astype(np.float32), self.seed % SEEDS)


def mean_code(u: torch.Tensor, top: int, tau: float) -> torch.Tensor:
    """m(u): the expected code, in u's dtype."""
    return sum(torch.sigmoid((u - j + 0.5) / tau) for j in range(1, top + 1))


def mean_slope(u: torch.Tensor, top: int, tau: float) -> torch.Tensor:
    """m'(u) = d mean_code / d u."""
    total = torch.zeros_like(u)
    for j in range(1, top + 1):
        s = torch.sigmoid((u - j + 0.5) / tau)
        total += s * (1 - s)
    return total / tau


def slope_tables(
    mult: torch.Tensor, zero: torch.Tensor, shift: int, top: int, tau: float, p_min: int, p_max: int
) -> Tables:
    """The slope of every partial sum p_min..p_max, one row per (tile, column) group; mult and zero
    are [1 or T, 1 or O]."""
    groups = torch.broadcast_shapes(mult.shape, zero.shape)
    rate = (mult.double() / 2.0**shift).expand(groups).reshape(-1, 1)
    u = torch.arange(p_min, p_max + 1).double() * rate + zero.double().expand(groups).reshape(-1, 1)
    rows = np.arange(rate.numel(), dtype=np.int64).reshape(groups)
    return Tables(p_min, rows, mean_slope(u, top, tau).float().numpy())
