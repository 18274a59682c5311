"""An ADC as the kernels read it: one record of numbers for each group, tile and column, in the form that is fastest for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rqtool.kernels.spec import ReadSpec, Tables
from rqtool.kernels.strips import ADC, ADC16, BUCKETS, BUCKETS16, FREE_BITS, HARD, LEVELS16, NOISY, TABLE

MOST15 = 32767
SHIFT16 = 15  # of the 16-bit form
FREE_FORM = 2  # of strips.read16, where forms for free levels begin
BUCKET_MULTS = np.unique((32767 / np.geomspace(1, 4096, 160)).astype(np.int64))  # of the coarse ADCs that are tried, wide codes first


def adc_records(spec: ReadSpec, table: str, padded: int) -> tuple[int, np.ndarray, np.ndarray | None]:
    """(kind, ADC records [groups, T, padded], the array whose addresses they hold)."""
    g, tables = spec.geometry, spec.tables
    records = np.zeros((g.groups, len(spec.tiles), padded), ADC)
    part = records[:, :, : g.group_columns]
    spread = lambda a: np.asarray(a).reshape(len(spec.tiles), g.groups, -1).transpose(1, 0, 2)  # noqa: E731
    for name in ("rate", "lo", "hi", "gain"):
        part[name] = spread(getattr(spec, name))
    chosen = None if tables is None else getattr(tables, table)
    if chosen is not None:
        chosen = np.ascontiguousarray(chosen, np.float32)
        records["table"] = chosen.ctypes.data - 4 * tables.p_min
        part["table"] += 4 * chosen.shape[1] * spread(tables.row)
    if spec.noise is not None:
        part["key"] = spread(_keys(spec))
    kind = NOISY if spec.noise is not None and not (table == "value" and chosen is not None) else HARD if chosen is None else TABLE
    return kind, records, chosen


def _keys(spec: ReadSpec) -> np.ndarray:
    """int64 [T, O]: a hash of the seed, the tile and the column."""
    tile, column = (np.arange(n, dtype=np.uint64) for n in spec.rate.shape)
    with np.errstate(over="ignore"):
        h = np.uint64(spec.noise.seed) + tile * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30)))[:, None] + column[None] * np.uint64(0xBF58476D1CE4E5B9)
        return (h ^ (h >> np.uint64(27))).astype(np.int64)


@dataclass(frozen=True)
class Sixteen:
    """A call in 16 bits. adcs: records [groups, T, ..]; form: of strips.read16; period: tiles whose values add up in 16 bits."""

    adcs: np.ndarray
    form: int
    period: int


def sixteen(spec: ReadSpec, padded: int) -> Sixteen | None:
    """None where 16 bits are too few for a multiplier, a partial sum or a value."""
    if spec.p_peak >= MOST15 or spec.noise is not None:
        return None
    return _uniform16(spec, padded) if spec.tables is None else _free16(spec) if spec.tables.value is not None else None


def _uniform16(spec: ReadSpec, padded: int) -> Sixteen | None:
    g, mult = spec.geometry, spec.rate.astype(np.float64) * 2.0**SHIFT16
    most = float(np.max(np.maximum(np.abs(spec.lo), np.abs(spec.hi)) * np.abs(spec.gain), initial=1))
    if most > MOST15 or not np.array_equal(mult, np.floor(mult)) or mult.max() > MOST15:
        return None
    records = np.zeros((g.groups, len(spec.tiles), padded), ADC16)
    for name, a in (("mult", mult), ("lo", spec.lo), ("hi", spec.hi), ("gain", spec.gain)):
        records[:, :, : g.group_columns][name] = a.reshape(len(spec.tiles), g.groups, -1).transpose(1, 0, 2)
    return Sixteen(records, int(np.any(spec.gain != 1)), int(MOST15 // most))


def _free16(spec: ReadSpec) -> Sixteen | None:
    """For one table of whole numbers with few steps; found from the table itself."""
    found = levels16(spec.tables)
    if not found or np.any(spec.gain != 1):
        return None
    form, record = found[0]
    most = max(1, int(np.abs(spec.tables.value).max()))
    return Sixteen(np.broadcast_to(record, (spec.geometry.groups, len(spec.tiles), 1)).copy(), FREE_FORM + form, MOST15 // most)


def levels16(tables: Tables) -> list[tuple[int, np.ndarray]]:
    """(number in strips.FREE16, its record [1]) for each form, the fastest first, that the one row of a value table may take; none where
    it has too many steps or values beyond 16 bits."""
    value = tables.value[0]
    steps = np.flatnonzero(np.diff(value)) + 1
    if len(tables.value) > 1 or len(steps) >= 1 << FREE_BITS[-1] or np.any(value != np.floor(value)) or np.abs(value).max() > MOST15:
        return []
    thresholds, levels = steps + tables.p_min, value[np.concatenate([[0], steps])]
    bucketed = _buckets(thresholds, levels)
    return [*([] if bucketed is None else [(0, bucketed)]), _halved(thresholds, levels)]


def _halved(thresholds: np.ndarray, levels: np.ndarray) -> tuple[int, np.ndarray]:
    """(form, LEVELS16 record [1]): thresholds [n] halved as often as levels [n + 1] ask for."""
    record = np.zeros(1, LEVELS16)
    record["thresholds"] = MOST15  # larger than any partial sum
    record["thresholds"][0, 1 : len(levels)] = thresholds
    record["levels"][0, : len(levels)] = levels
    return next(n for n, bits in enumerate(FREE_BITS, 1) if len(levels) <= 1 << bits), record


def _buckets(thresholds: np.ndarray, levels: np.ndarray) -> np.ndarray | None:
    """A BUCKETS16 record [1]: a uniform ADC of 32 codes, none of which has two of the thresholds [n] within; None where there is none.
    Its lowest code holds the first threshold and all below, so that the others reach as far up as they can."""
    mult = BUCKET_MULTS[:, None]
    code = lambda p: (p * mult + (1 << SHIFT16 - 1)) >> SHIFT16  # noqa: E731
    below, at = code(thresholds - 1), code(thresholds)
    lo = at[:, min(1, len(thresholds) - 1), None] - 1 if len(thresholds) else np.zeros_like(mult)
    below, at = (np.clip(bucket, lo, lo + BUCKETS - 1) for bucket in (below, at))
    inside = below == at  # not at the beginning of a bucket
    crowded = (inside[:, :-1] & (at[:, :-1] == at[:, 1:])).any(1)
    if crowded.all():
        return None
    n = int(crowded.argmin())
    record, at, inside, buckets = np.zeros(1, BUCKETS16), at[n], inside[n], lo[n] + np.arange(BUCKETS)
    record["mult"], record["lo"], record["hi"] = mult[n], buckets[0], buckets[-1]
    held = np.array([((at == bucket) & inside).any() for bucket in buckets])
    first = np.searchsorted(at, buckets, "right") - held  # the code of a bucket's first partial sum
    record["threshold"][0, buckets % BUCKETS] = np.append(thresholds, MOST15)[np.where(held, first, len(thresholds))]
    record["below"][0, buckets % BUCKETS], record["above"][0, buckets % BUCKETS] = levels[first], levels[first + held]
    return record
