"""An ADC as the kernels read it: one record of numbers for each group, tile and column, in the form
that is fastest for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rqtool.hardware.converter import Levels, Uniform
from rqtool.kernels.spec import ReadSpec
from rqtool.kernels.strips import (
    ADC,
    ADC16,
    BUCKETS,
    BUCKETS16,
    FREE_BITS,
    HARD,
    LEVELS16,
    NOISY,
    TABLE,
)

MOST15 = 32767
SHIFT16 = 15  # of the 16-bit form
FREE_FORM = 2  # of strips.read16, where forms for free levels begin
BUCKET_MULTS = np.unique(
    (32767 / np.geomspace(1, 4096, 160)).astype(np.int64)
)  # of the coarse ADCs that are tried, wide codes first


def adc_records(
    spec: ReadSpec, table: str, padded: int
) -> tuple[int, np.ndarray, np.ndarray | None]:
    """(kind, ADC records [groups, T, padded], the array whose addresses they hold)."""
    g, tables = spec.geometry, spec.tables
    records = np.zeros((g.groups, len(spec.tiles), padded), ADC)
    part = records[:, :, : g.group_columns]
    spread = lambda a: np.asarray(a).reshape(len(spec.tiles), g.groups, -1).transpose(1, 0, 2)  # noqa: E731
    for name in ("rate", "lo", "hi", "gain"):
        part[name] = spread(getattr(spec, name))
    chosen = tables and getattr(tables, table)
    if chosen is not None:
        chosen = np.ascontiguousarray(chosen, np.float32)
        records["table"] = chosen.ctypes.data - 4 * tables.p_min
        part["table"] += 4 * chosen.shape[1] * spread(tables.row)
    if spec.noise is not None:
        part["key"] = spread(_keys(spec))
    kind = (
        NOISY
        if spec.noise is not None and not (table == "value" and chosen is not None)
        else HARD
        if chosen is None
        else TABLE
    )
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
    """A call in 16 bits. adcs: records [groups, 1 or T, padded columns]; form: of strips.read16;
    period: tiles whose values add up in 16 bits."""

    adcs: np.ndarray
    form: int
    period: int


def sixteen(spec: ReadSpec, padded: int) -> Sixteen | None:
    """None where 16 bits are too few for a multiplier, a partial sum or a value."""
    form = FORMS16.get(type(spec.adc))
    if form is None or spec.p_peak >= MOST15 or spec.noise is not None:
        return None
    return form(spec, padded)


def _uniform16(spec: ReadSpec, padded: int) -> Sixteen | None:
    g, mult, gain = spec.geometry, spec.adc.mult, spec.adc.gain
    lo, hi = -spec.adc.zero, spec.adc.top - spec.adc.zero
    most = int(np.max(np.maximum(np.abs(lo), np.abs(hi)) * gain, initial=1))
    if spec.adc.shift != SHIFT16 or most > MOST15 or mult.max() > MOST15:
        return None
    tables = {"mult": mult, "lo": lo, "hi": hi, "gain": gain}
    records = np.zeros((g.groups, len(spec.tiles), padded), ADC16)
    for name, table in tables.items():
        spread = np.broadcast_to(table, (len(spec.tiles), g.columns))
        by_group = spread.reshape(len(spec.tiles), g.groups, -1).transpose(1, 0, 2)
        records[:, :, : g.group_columns][name] = by_group
    return Sixteen(records, int(np.any(gain != 1)), MOST15 // most)


def _free16(spec: ReadSpec, padded: int) -> Sixteen | None:
    """For levels with few steps. All tiles use the same records."""
    g, found = spec.geometry, levels16(spec)
    if not found:
        return None
    form, rows = found[0]
    spread = np.broadcast_to(rows, g.columns).reshape(g.groups, 1, -1)
    records = np.zeros((g.groups, 1, padded), rows.dtype)
    records[:, :, : g.group_columns] = spread
    return Sixteen(records, FREE_FORM + form, MOST15 // max(1, int(np.abs(spec.values).max())))


FORMS16: dict[type, Callable[[ReadSpec, int], Sixteen | None]] = {
    Uniform: _uniform16,
    Levels: _free16,
}


def levels16(spec: ReadSpec) -> list[tuple[int, np.ndarray]]:
    """(number in strips.FREE16, its records [rows]) for each form, the fastest first, that all rows
    of thresholds may take; none where one has too many steps or levels beyond 16 bits."""
    if np.abs(spec.values).max() > MOST15:
        return []
    p_min, adc = spec.tables.p_min, spec.adc
    p_max = p_min + spec.values.shape[1] - 1
    rows = [_steps(thresholds, adc.levels, p_min, p_max) for thresholds in adc.thresholds]
    most = max(len(levels) for _, levels in rows)
    if most > 1 << FREE_BITS[-1]:
        return []
    halvings = next(n for n, bits in enumerate(FREE_BITS, 1) if most <= 1 << bits)
    bucketed = _bucketed(rows)
    return [
        *([] if bucketed is None else [(0, bucketed)]),
        (halvings, np.concatenate([_halved(*row) for row in rows])),
    ]


def _steps(
    thresholds: np.ndarray, levels: np.ndarray, p_min: int, p_max: int
) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds [n], levels [n + 1]) of those thresholds at which the level of some partial sum
    p_min .. p_max changes."""
    within = np.unique(thresholds[(thresholds > p_min) & (thresholds <= p_max)])
    reached = np.concatenate([[p_min], within])
    value = levels[np.searchsorted(thresholds, reached, side="right")]
    changes = np.diff(value) != 0
    return within[changes], value[np.concatenate([[True], changes])]


def _halved(thresholds: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """A LEVELS16 record [1] of thresholds [n] and levels [n + 1], for any number of halvings that
    is enough for them."""
    record = np.zeros(1, LEVELS16)
    record["thresholds"] = MOST15  # larger than any partial sum
    record["thresholds"][0, 1 : len(levels)] = thresholds
    record["levels"][0, : len(levels)] = levels
    return record


def _bucketed(rows: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray | None:
    """BUCKETS16 records [rows] of (thresholds, levels), those of equally many thresholds at once;
    None where a row has none."""
    counts, records = (
        np.array([len(thresholds) for thresholds, _ in rows]),
        np.zeros(len(rows), BUCKETS16),
    )
    for count in np.unique(counts):
        which = np.flatnonzero(counts == count)
        found = _buckets(*(np.stack(part) for part in zip(*(rows[n] for n in which))))
        if found is None:
            return None
        records[which] = found
    return records


def _buckets(thresholds: np.ndarray, levels: np.ndarray) -> np.ndarray | None:
    """BUCKETS16 records [R]: for each row a uniform ADC of 32 codes, none of which has two of the
    thresholds [R, n] within; None where a row has none. Its lowest code holds the first threshold
    and all below, so that the others reach as far up as they can."""
    mult, rows, count = BUCKET_MULTS[:, None, None], np.arange(len(thresholds)), thresholds.shape[1]
    code = lambda p: (p * mult + (1 << SHIFT16 - 1)) >> SHIFT16  # noqa: E731
    below, at = code(thresholds - 1), code(thresholds)  # [mults, R, n]
    lo = (
        at[:, :, min(1, count - 1), None] - 1
        if count
        else np.zeros((len(mult), len(rows), 1), np.int64)
    )
    below, at = (np.clip(bucket, lo, lo + BUCKETS - 1) for bucket in (below, at))
    inside = below == at  # not at the beginning of a bucket
    crowded = (inside[:, :, :-1] & (at[:, :, :-1] == at[:, :, 1:])).any(2)
    if crowded.all(0).any():
        return None
    n = crowded.argmin(0)
    at, inside, buckets = at[n, rows, None], inside[n, rows, None], lo[n, rows] + np.arange(BUCKETS)
    held = ((at == buckets[:, :, None]) & inside).any(2)
    first = (at <= buckets[:, :, None]).sum(2) - held  # the code of a bucket's first partial sum
    records = np.zeros(len(rows), BUCKETS16)
    records["mult"], records["lo"], records["hi"] = BUCKET_MULTS[n], buckets[:, 0], buckets[:, -1]
    entries = {
        "threshold": (
            np.pad(thresholds, ((0, 0), (0, 1)), constant_values=MOST15),
            np.where(held, first, count),
        ),
        "below": (levels, first),
        "above": (levels, first + held),
    }
    for name, (table, index) in entries.items():
        np.put_along_axis(records[name], buckets % BUCKETS, np.take_along_axis(table, index, 1), 1)
    return records
