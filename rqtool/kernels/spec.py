"""What every carrier of the reads gets: one layer's geometry, tiles and ADC, as arrays per (tile,
column).

u   = p * rate                      rate = mult / 2**shift
q   = clamp(floor(u + 1/2 + noise), lo, hi)       lo = -zero, hi = top - zero
acc = sum over tiles of gain * q                  or of value[row, p - p_min] where `tables` are given
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rqtool.hardware import adc
from rqtool.mapping.plan import Geometry, Plan


@dataclass(frozen=True)
class Tables:
    """Per-p tables for what arithmetic cannot say: float32 [rows, P]; `row` int64 [T, O] picks one;
    index is p - p_min.

    value: what a read adds, or None to compute it. slope: d value / d p of the backward pass, None
    where no such pass looks it up.
    """

    p_min: int
    row: np.ndarray
    slope: np.ndarray | None
    value: np.ndarray | None = None


@dataclass(frozen=True)
class Noise:
    """Logistic noise in codes, regenerated from indices: float32 [65536 + block] draws and the seed
    that picks offsets in it."""

    draws: np.ndarray
    seed: int


@dataclass(frozen=True)
class ReadSpec:
    """One pair of planes of one layer. rate, lo, hi, gain: float32 [T, O] (gain 1 unless tiles have
    their own step); p_peak: no partial sum is larger. order: as in `Plan`."""

    geometry: Geometry
    tiles: tuple[tuple[int, int], ...]
    rate: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    gain: np.ndarray
    p_peak: int
    tables: Tables | None = None
    noise: Noise | None = None
    order: tuple[int, ...] | None = None


def over_reads(table: np.ndarray, plan: Plan) -> np.ndarray:
    """A [1 or T, 1 or O] table spread to its own float32 [T, O]."""
    shape = (len(plan.tiles), plan.geometry.columns)
    return np.broadcast_to(np.asarray(table, dtype=np.float32), shape).copy()


def make_spec(
    plan: Plan,
    mult: np.ndarray,
    zero: np.ndarray,
    gain: np.ndarray,
    *,
    tables: Tables | None = None,
    noise: Noise | None = None,
) -> ReadSpec:
    """The spec of a uniform ADC: mult, zero, gain are [1 or T, 1 or O] arrays of whole numbers."""
    rate = (
        np.asarray(mult, dtype=np.float64) / 2.0**plan.macro.shift
    )  # exact in float32: mult < 2**S <= 2**22
    zero = np.asarray(zero)
    arrays = (over_reads(a, plan) for a in (rate, -zero, plan.macro.top - zero, gain))
    p_peak = max(-plan.macro.p_min, plan.macro.p_max)
    return ReadSpec(
        plan.geometry, plan.tiles, *arrays, p_peak, tables=tables, noise=noise, order=plan.order
    )


def inside_spec(plan: Plan, lo: np.ndarray, hi: np.ndarray) -> ReadSpec:
    """The spec of q = clamp(p, lo, hi), whole numbers [1 or O]: its slope is 1 from lo to hi and 0
    beyond. For the backward pass of ADCs whose values are looked up: hard codes need no table
    there."""
    rate, lo, hi, gain = (over_reads(a, plan) for a in (1, lo, hi, 1))
    return ReadSpec(
        plan.geometry,
        plan.tiles,
        rate,
        lo,
        hi,
        gain,
        max(-plan.macro.p_min, plan.macro.p_max),
        order=plan.order,
    )


def level_codes(plan: Plan, thresholds: np.ndarray) -> np.ndarray:
    """int64 [1 or O, P]: the code of every partial sum by thresholds [1 or O, top], one ADC for the
    layer or one for each column."""
    p_min, p_max = plan.macro.p_min, plan.macro.p_max
    lo = int(np.clip(thresholds.min(), p_min + 1, p_max + 1)) - 1
    hi = int(
        np.clip(thresholds.max(), lo, p_max)
    )  # beyond both codes stay as they are, and most sums of a large array lie there
    code = adc.threshold_code(np.arange(lo, hi + 1), thresholds.T[:, :, None])
    return np.pad(code, ((0, 0), (lo - p_min, p_max - hi)), mode="edge")


def free_level_spec(plan: Plan, thresholds: np.ndarray, levels: np.ndarray) -> ReadSpec:
    """The spec of ADCs with free levels: thresholds [1 or O, top] and levels [top + 1], integers."""
    return level_spec(plan, level_codes(plan, thresholds), levels)


def level_spec(plan: Plan, code: np.ndarray, levels: np.ndarray) -> ReadSpec:
    """The same from the codes, as `level_codes` gives them."""
    row = np.broadcast_to(np.arange(len(code)), (len(plan.tiles), plan.geometry.columns)).copy()
    one = np.ones((1, 1))
    return make_spec(
        plan,
        one,
        one,
        one,
        tables=Tables(plan.macro.p_min, row, None, levels.astype(np.float32)[code]),
    )
