"""What every carrier of the reads gets: one layer's geometry, tiles and ADC, as arrays per (tile,
column).

u   = p * rate                      rate = mult / 2**shift, exact in float32
q   = clamp(floor(u + 1/2 + noise), lo, hi)       lo = -zero, hi = top - zero
acc = sum over tiles of gain * q                  or of value[row, p - p_min] where `tables` are given
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rqtool.hardware.converter import Converter, Levels, Uniform
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
    their own step); p_peak: no partial sum is larger. order: as in `Plan`. adc: the integers that
    the arrays and tables are made of; None where they are those of no ADC."""

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
    adc: Converter | None = None

    @property
    def values(self) -> np.ndarray | None:
        """The table that reads look their values up in; None where they are computed."""
        return self.tables and self.tables.value

    @property
    def slopes(self) -> np.ndarray | None:
        """The table that the backward pass looks slopes up in; None where they are computed."""
        return self.tables and self.tables.slope


def over_reads(table: np.ndarray, plan: Plan) -> np.ndarray:
    """A [1 or T, 1 or O] table spread to its own float32 [T, O]."""
    shape = (len(plan.tiles), plan.geometry.columns)
    return np.broadcast_to(np.asarray(table, dtype=np.float32), shape).copy()


def read_spec(plan: Plan, adc: Uniform | Levels) -> ReadSpec:
    """The spec of a layer's ADCs."""
    return SPECS[type(adc)](plan, adc)


def uniform_spec(plan: Plan, adc: Uniform) -> ReadSpec:
    """The spec of ADCs with equal steps."""
    rate = adc.mult / 2.0**adc.shift  # exact in float32: mult < 2**S <= 2**22
    arrays = (over_reads(a, plan) for a in (rate, -adc.zero, adc.top - adc.zero, adc.gain))
    return ReadSpec(plan.geometry, plan.tiles, *arrays, p_peak(plan), order=plan.order, adc=adc)


def make_spec(plan: Plan, mult: np.ndarray, zero: np.ndarray, gain: np.ndarray) -> ReadSpec:
    """The same from [1 or T, 1 or O] arrays of whole numbers, on the plan's macro."""
    tables = (np.asarray(a).astype(np.int64) for a in (mult, zero, gain))
    return uniform_spec(plan, Uniform(*tables, plan.macro.shift, plan.macro.top))


def p_peak(plan: Plan) -> int:
    """The largest magnitude of a partial sum."""
    return max(-plan.macro.p_min, plan.macro.p_max)


def inside_spec(plan: Plan, lo: np.ndarray | int, hi: np.ndarray | int) -> ReadSpec:
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
        p_peak(plan),
        order=plan.order,
    )


def level_spec(plan: Plan, adc: Levels, code: np.ndarray | None = None) -> ReadSpec:
    """The spec of ADCs with free levels; code: its `codes`, where they are known."""
    code = adc.codes(plan.macro.p_min, plan.macro.p_max) if code is None else code
    row = np.broadcast_to(np.arange(len(code)), (len(plan.tiles), plan.geometry.columns)).copy()
    tables = Tables(plan.macro.p_min, row, None, adc.levels.astype(np.float32)[code])
    return replace(inside_spec(plan, 0, 0), tables=tables, adc=adc)


def free_level_spec(plan: Plan, thresholds: np.ndarray, levels: np.ndarray) -> ReadSpec:
    """The same from thresholds [1 or O, top] and levels [top + 1], integers."""
    return level_spec(plan, Levels(np.asarray(thresholds), np.asarray(levels)))


SPECS: dict[type, Callable[[Plan, Any], ReadSpec]] = {Uniform: uniform_spec, Levels: level_spec}
