"""Where a real formula becomes whole numbers: once, for both sides.

A value between two layers is never an arbitrary real number. It lies on a grid, real = (k - zero) * scale with a whole number k, and
gets there by one requant:

    k = clamp(floor(sum_n x_n * mult_n / 2**shift + add / 2**shift), lo, hi)          x_n whole numbers; 1/2 and zero are in `add`

`requant` rounds the real factors to those multipliers. The integer program computes the line in int32 (program/freeze.py), the
network in float64, node by node, with the factors mult / 2**shift (train/served.py). There every product and partial sum is a
multiple of 2**-shift below 2**(30 - shift), so it has at most 30 bits, and float64 holds 53: both are exact, and equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.program.ir import REQUANT_BOUND

MAX_SHIFT = 30
DEAD_CHANNEL = "a channel of it hardly varies: take --range calibrated or more ADC bits where its reads all give one code, else retrain or prune that channel"
Place = tuple[str, int]  # a node of the graph and which of the things it is made from


@dataclass(frozen=True)
class Grid:
    """The values (k - zero) * scale for whole k in lo..hi."""

    scale: float
    zero: int
    lo: int
    hi: int

    def index(self, value: float) -> int:
        """The k of the grid point next to a real value, half up, within lo..hi; infinities are its ends.

        >>> grid = Grid(0.25, 3, 0, 15)
        >>> grid.index(0.0), grid.index(0.125), grid.index(-float("inf")), grid.index(6.0), grid.real(4)
        (3, 4, 0, 15, 0.25)
        """
        return int(np.clip(np.floor(value / self.scale + self.zero + 0.5), self.lo, self.hi))

    def real(self, k: int) -> float:
        return (k - self.zero) * self.scale


@dataclass(frozen=True)
class Requant:
    """clamp((sum_n x_n * mults[n] + add) >> shift, grid.lo, grid.hi); mults, add: int32 arrays that broadcast to the value's shape."""

    mults: tuple[np.ndarray, ...]
    add: np.ndarray
    shift: int
    grid: Grid

    def factor(self, n: int, unit: float = 1.0) -> np.ndarray:
        """float64: what an operand that is `unit` times x_n is multiplied by to count in steps of the grid; exact for powers of two."""
        return self.mults[n] / 2.0**self.shift / unit

    def of(self, k: int) -> int:
        """The result for one operand with one multiplier, without the clamp."""
        return (k * int(self.mults[0].flat[0]) + int(self.add.flat[0])) >> self.shift


@dataclass
class Numbers:
    """Everything about the numbers of a network that its graph and its layers do not say.

    factors: what an operand of a sum is multiplied by (a layer's accumulators are operands 0 and, with offset weights, 1 the input sum)
    rounds: the requant at whose grid the value of a node ends
    regrids: an operand that is first written to another grid
    bounds: the ends of a clamp, moved to the grid of its value
    pixels: (exponent, lo, hi) of the grid of float32 pixels, None for uint8
    """

    factors: dict[Place, np.ndarray] = field(default_factory=dict)
    rounds: dict[str, Requant] = field(default_factory=dict)
    regrids: dict[Place, tuple[np.ndarray, Requant]] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    pixels: tuple[int, int, int] | None = None


def requant(coefficients: list[np.ndarray], offset: np.ndarray, peaks: list[int], grid: Grid, name: str) -> Requant:
    """sum_n x_n * coefficients[n] + offset as whole numbers on a grid, for |x_n| <= peaks[n]; raises InputError where it reaches 2**30 steps."""
    steps = [np.asarray(c, np.float64) / grid.scale for c in coefficients]
    add = np.asarray(offset, np.float64) / grid.scale + grid.zero + 0.5
    shift = _largest_shift(steps, add, peaks, name)
    return Requant(tuple(_whole(s, shift) for s in steps), _whole(add, shift), shift, grid)


def _whole(a: np.ndarray, shift: int) -> np.ndarray:
    return np.floor(a * 2.0**shift + 0.5).astype(np.int32)


def _largest_shift(steps: list[np.ndarray], add: np.ndarray, peaks: list[int], name: str) -> int:
    """The finest shift at which sum |x|*mult + |add| stays below the requant bound."""
    reach = float(np.max(sum(np.abs(s) * p for s, p in zip(steps, peaks)) + np.abs(add)))
    room = REQUANT_BOUND - 2 - sum(peaks)  # each rounded multiplier can be half a unit larger
    if not np.isfinite(reach) or reach >= room:
        raise InputError(f"{escaped(name)}: a value reaches {reach:.3g} steps of its grid, beyond 2**30; {DEAD_CHANNEL}")
    return int(min(MAX_SHIFT, np.floor(np.log2(room / max(reach, 2.0**-MAX_SHIFT)))))
