"""The backward pass of an input quantiser in one pass over memory (train/quantizers.py has the formulas)."""

from __future__ import annotations

import numpy as np

from rqtool.kernels.compiled import compiled
from rqtool.kernels.threads import next_turn, on_threads

SUMS = 64  # running sums of a chunk, for whole vectors
MAX_CHUNKS = 16
SMALLEST = 1 << 14  # numbers of a chunk


@compiled
def _gradient(x, grad, scale, low, high, dx, sums):
    """dx = grad / scale where low <= x / scale <= high, else 0; sums [SUMS] gain what grad * x / scale is there, number by number in turn."""
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
def _share(counter, bounds, x, grad, edges, dx, totals):
    scale, low, high = edges
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        a, b = bounds[chunk], bounds[chunk + 1]
        sums = np.zeros(SUMS, np.float32)
        _gradient(x[a:b], grad[a:b], scale, low, high, dx[a:b], sums)
        totals[chunk] = sums.astype(np.float64).sum()
        chunk = next_turn(counter)


def gradient(x: np.ndarray, grad: np.ndarray, scale: float, low: float, high: float, threads: int) -> tuple[np.ndarray, float]:
    """(dx, sum of grad * u) over the numbers with low <= u <= high, u = x / scale; dx = grad / scale there, 0 elsewhere.

    x, grad, dx: float32 of one shape. The same bits for any number of threads.
    """
    flat, towards = (np.ascontiguousarray(a).reshape(-1) for a in (x, grad))
    count = max(1, min(MAX_CHUNKS, flat.size // SMALLEST))
    dx, totals, edges = np.empty(flat.size, np.float32), np.zeros(count), tuple(np.float32(v) for v in (scale, low, high))
    on_threads(_share, (np.zeros(1, np.int64), flat.size * np.arange(count + 1) // count, flat, towards, edges, dx, totals), threads)
    return dx.reshape(x.shape), float(totals.sum())
