"""Where a real formula becomes whole numbers: once, for both sides.

A value between two layers is never an arbitrary real number. It lies on a grid, real = (k - zero) *
scale with a whole number k, and gets there by one requant:

    k = clamp(floor(sum_n x_n * mult_n / 2**shift + add / 2**shift), lo, hi)          x_n whole numbers; 1/2 and zero are in `add`

`requant` rounds the real factors to those multipliers. The integer program computes the line in
int32 (program/freeze.py), the network in float64, node by node, with the factors mult / 2**shift
(train/served.py). There every product and partial sum is a multiple of 2**-shift below 2**(30 -
shift), so it has at most 30 bits, and float64 holds 53: both are exact, and equal.

Where 30 bits leave the multipliers so few bits that their rounding could move a value by more than
the grid shows, the sum gets 52 bits (`add` is then int64): float64 still holds every product and
partial sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.program.ir import INT32, MAX_SHIFT, MAX_WIDE_SHIFT, REQUANT_BOUND, WIDE_BOUND

COUNT_BOUND = 1 << 44  # steps of its grid that a value may reach before it is clamped
SEEN_STEP, SEEN_SHARE = (
    2.0**-6,
    2.0**-15,
)  # rounded multipliers may move a value by so many steps, or by so much of the grid's span
DEAD_CHANNEL = (
    "a channel of it hardly varies: take --range calibrated or more ADC "
    "bits where its reads all give one code, else retrain or prune that "
    "channel"
)
Place = tuple[str, int]  # a node of the graph and which of the things it is made from


@dataclass(frozen=True)
class Grid:
    """The values (k - zero) * scale for whole k in lo..hi."""

    scale: float
    zero: int
    lo: int
    hi: int

    def index(self, value: float) -> int:
        """The k of the grid point next to a real value, half up, within lo..hi; infinities are its
        ends.

        >>> grid = Grid(0.25, 3, 0, 15)
        >>> grid.index(0.0), grid.index(0.125), grid.index(-float("inf")), grid.index(6.0), grid.real(4)
        (3, 4, 0, 15, 0.25)
        """
        return int(np.clip(np.floor(value / self.scale + self.zero + 0.5), self.lo, self.hi))

    def real(self, k: int) -> float:
        return (k - self.zero) * self.scale


@dataclass(frozen=True)
class Requant:
    """clamp((sum_n x_n * mults[n] + add) >> shift, grid.lo, grid.hi); mults: int32 arrays that
    broadcast to the value's shape; add: the same, int64 where the sum needs more than 30 bits."""

    mults: tuple[np.ndarray, ...]
    add: np.ndarray
    shift: int
    grid: Grid

    def factor(self, n: int, unit: float = 1.0) -> np.ndarray:
        """float64: what an operand that is `unit` times x_n is multiplied by to count in steps of
        the grid; exact for powers of two."""
        return self.mults[n] / 2.0**self.shift / unit

    def of(self, k: int) -> int:
        """The result for one operand with one multiplier, without the clamp."""
        return (k * int(self.mults[0].flat[0]) + int(self.add.flat[0])) >> self.shift


@dataclass
class Numbers:
    """Everything about the numbers of a network that its graph and its layers do not say.

    factors: what an operand of a sum is multiplied by (a layer's accumulators are operands 0 and,
    with offset weights, 1 the input sum) rounds: the requant at whose grid the value of a node ends
    regrids: an operand that is first written to another grid bounds: the ends of a clamp, moved to
    the grid of its value pixels: (exponent, lo, hi) of the grid of float32 pixels, None for uint8
    """

    factors: dict[Place, np.ndarray] = field(default_factory=dict)
    rounds: dict[str, Requant] = field(default_factory=dict)
    regrids: dict[Place, tuple[np.ndarray, Requant]] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    pixels: tuple[int, int, int] | None = None


def requant(
    coefficients: list[np.ndarray], offset: np.ndarray, peaks: list[int], grid: Grid, name: str
) -> Requant:
    """sum_n x_n * coefficients[n] + offset as whole numbers on a grid, for |x_n| <= peaks[n]: in 30
    bits where those do, else in 52.

    Raises InputError where it reaches 2**44 steps.
    """
    steps = [np.asarray(c, np.float64) / grid.scale for c in coefficients]
    add = np.asarray(offset, np.float64) / grid.scale + grid.zero + 0.5
    reach = float(np.max(sum(np.abs(s) * p for s, p in zip(steps, peaks)) + np.abs(add)))
    if not reach < COUNT_BOUND:
        raise InputError(
            f"{escaped(name)}: a value reaches {reach:.3g} steps of its grid, "
            f"beyond 2**44; {DEAD_CHANNEL}"
        )
    shift, kind = _largest_shift(reach, REQUANT_BOUND, peaks, MAX_SHIFT), np.int32
    if shift is None or _moved(steps, peaks, shift) > max(
        SEEN_STEP, (grid.hi - grid.lo) * SEEN_SHARE
    ):
        shift, kind = _wide_shift(reach, steps, peaks), np.int64
    return Requant(
        tuple(_whole(s, shift, np.int32) for s in steps), _whole(add, shift, kind), shift, grid
    )


def _whole(a: np.ndarray, shift: int, kind: type) -> np.ndarray:
    return np.floor(a * 2.0**shift + 0.5).astype(kind)


def _largest_shift(reach: float, bound: int, peaks: list[int], most: int) -> int | None:
    """The finest shift at which sum |x|*mult + |add| stays below a bound, where there is one."""
    room = bound - 2 - sum(peaks)  # each rounded multiplier can be half a unit larger
    return (
        int(min(most, np.floor(np.log2(room / max(reach, 2.0**-most))))) if reach < room else None
    )


def _wide_shift(reach: float, steps: list[np.ndarray], peaks: list[int]) -> int:
    """The same for 52 bits, with multipliers that fit int32."""
    largest = max(float(np.abs(s).max()) for s in steps)
    fitting = np.floor(np.log2((INT32 - 1) / max(largest, 2.0**-MAX_WIDE_SHIFT)))
    return int(min(_largest_shift(reach, WIDE_BOUND, peaks, MAX_WIDE_SHIFT), fitting))


def _moved(steps: list[np.ndarray], peaks: list[int], shift: int) -> float:
    """How many steps the rounding of the multipliers can move a value, at most."""
    return float(
        np.max(
            sum(
                np.abs(np.floor(s * 2.0**shift + 0.5) / 2.0**shift - s) * p
                for s, p in zip(steps, peaks)
            )
        )
    )
