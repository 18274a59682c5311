"""Backward passes of what stands around the reads (train/quantizers.py and train/reads.py have the
formulas), each in one pass over memory.

Sums are kept in 64 lanes, so that whole vectors are added, and per chunk of the work, so that they
are the same on any number of threads.
"""

from __future__ import annotations

import numpy as np

from rqtool.kernels.compiled import compiled
from rqtool.kernels.threads import next_turn, on_threads

SUMS = 64
MAX_CHUNKS = 16
SMALLEST = 1 << 14  # numbers of a chunk


def _bounds(items: int, numbers: int) -> np.ndarray:
    """int64 [chunks + 1]: where chunks of `items` items begin and end, of `numbers` numbers in all."""
    count = max(1, min(MAX_CHUNKS, items, numbers // SMALLEST))
    return items * np.arange(count + 1) // count


# -- input codes -----------------------------------------------------------------------------------
@compiled
def _codes(x, grad, scale, low, high, dx, sums):
    """dx = grad / scale where low <= x / scale <= high, else 0; sums [SUMS] gain what grad * x /
    scale is there."""
    whole = x.size // SUMS * SUMS
    for at in range(0, whole, SUMS):
        for lane in range(SUMS):
            u, g = x[at + lane] / scale, grad[at + lane]
            g = g if low <= u <= high else np.float32(0)
            dx[at + lane] = g / scale
            sums[lane] += g * u
    for i in range(whole, x.size):
        u, g = x[i] / scale, grad[i]
        g = g if low <= u <= high else np.float32(0)
        dx[i] = g / scale
        sums[i - whole] += g * u


@compiled
def _codes_share(counter, bounds, x, grad, edges, dx, totals):
    scale, low, high = edges
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        a, b = bounds[chunk], bounds[chunk + 1]
        sums = np.zeros(SUMS, np.float32)
        _codes(x[a:b], grad[a:b], scale, low, high, dx[a:b], sums)
        totals[chunk] = sums.astype(np.float64).sum()
        chunk = next_turn(counter)


def codes(
    x: np.ndarray, grad: np.ndarray, scale: float, low: float, high: float, threads: int
) -> tuple[np.ndarray, float]:
    """(dx, sum of grad * u) over the numbers with low <= u <= high, u = x / scale; dx = grad /
    scale there, 0 elsewhere.

    x, grad, dx: float32 of one shape.
    """
    flat, towards = (np.ascontiguousarray(a).reshape(-1) for a in (x, grad))
    bounds, dx = _bounds(flat.size, flat.size), np.empty(flat.size, np.float32)
    totals, edges = np.zeros(len(bounds) - 1), tuple(np.float32(v) for v in (scale, low, high))
    on_threads(
        _codes_share, (np.zeros(1, np.int64), bounds, flat, towards, edges, dx, totals), threads
    )
    return dx.reshape(x.shape), float(totals.sum())


# -- scaled outputs --------------------------------------------------------------------------------
@compiled
def _outputs(gy, v, scale, dy, plain, weighted):
    """dy [L] = gy * scale; plain, weighted [SUMS] gain gy and gy * v."""
    whole = gy.size // SUMS * SUMS
    for at in range(0, whole, SUMS):
        for lane in range(SUMS):
            g = gy[at + lane]
            dy[at + lane] = g * scale
            plain[lane] += g
            weighted[lane] += g * v[at + lane]
    for i in range(whole, gy.size):
        dy[i] = gy[i] * scale
        plain[i - whole] += gy[i]
        weighted[i - whole] += gy[i] * v[i]


@compiled
def _outputs_share(counter, bounds, gy, v, scale, dy, totals):
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        sums = np.zeros((2, scale.size, SUMS), np.float32)
        for n in range(bounds[chunk], bounds[chunk + 1]):
            for o in range(scale.size):
                _outputs(gy[n, o], v[n, o], scale[o], dy[n, o], sums[0, o], sums[1, o])
        for part in range(2):
            for o in range(scale.size):
                totals[chunk, part, o] = sums[part, o].astype(np.float64).sum()
        chunk = next_turn(counter)


def outputs(
    gy: np.ndarray, v: np.ndarray, scale: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gy * scale, sum of gy, sum of gy * v), the sums float64 [O] over all but the columns; gy, v:
    float32 [N, O, ..], scale: float32 [O]."""
    rows = [np.ascontiguousarray(a).reshape(*gy.shape[:2], -1) for a in (gy, v)]
    bounds, dy = _bounds(len(gy), gy.size), np.empty(rows[0].shape, np.float32)
    totals = np.zeros((len(bounds) - 1, 2, gy.shape[1]))
    on_threads(
        _outputs_share,
        (np.zeros(1, np.int64), bounds, *rows, np.ascontiguousarray(scale), dy, totals),
        threads,
    )
    plain, weighted = totals.sum(0)
    return dy.reshape(gy.shape), plain, weighted


# -- tables of values ------------------------------------------------------------------------------
@compiled
def count(p, grad, row, p_min, total):
    """total float64 [rows, P] gains, at the row int64 [T, O] and the partial sum of each read, its
    gradient: p float32 [n, groups, T, columns of a group, L] with grad float32 [n, O, L]. One after
    another, on one thread."""
    images, groups, tiles, columns, positions = p.shape
    for n in range(images):
        for g in range(groups):
            for t in range(tiles):
                for c in range(columns):
                    o = g * columns + c
                    place = total[row[t, o]]
                    for at in range(positions):
                        place[int(p[n, g, t, c, at]) - p_min] += grad[n, o, at]
