"""Requantisation of whole numbers in one pass over memory."""

from __future__ import annotations

import numpy as np

from rqtool.kernels.compiled import compiled
from rqtool.kernels.threads import chunks, next_turn, on_threads


@compiled
def _requant(xs, mults, add, shift, lo, hi, images, out):
    """out [N, rows, L] = clamp((add + sum of x * mult) >> shift, lo, hi) for images[0] ..
    images[1]; mults, add: int32 [.., rows]."""
    for n in range(images[0], images[1]):
        for c in range(out.shape[1]):
            target = out[n, c]
            if len(xs) == 1:
                x, m, a = xs[0][n, c], mults[0, c], add[c]
                for i in range(target.size):
                    target[i] = min(max((x[i] * m + a) >> shift, lo), hi)
            elif len(xs) == 2:
                x, y, m, k, a = xs[0][n, c], xs[1][n, c], mults[0, c], mults[1, c], add[c]
                for i in range(target.size):
                    target[i] = min(max((x[i] * m + y[i] * k + a) >> shift, lo), hi)
            else:
                for i in range(target.size):
                    total = add[c]
                    for j in range(len(xs)):
                        total += xs[j][n, c, i] * mults[j, c]
                    target[i] = min(max(total >> shift, lo), hi)


@compiled
def _wide(xs, mults, add, scale, lo, hi, images, out):
    """The same with sums of up to 52 bits: in float64, which is exact there; mults, add: float64
    [.., rows]; scale: 2**-shift."""
    for n in range(images[0], images[1]):
        for c in range(out.shape[1]):
            target = out[n, c]
            if len(xs) == 1:
                x, m, a = xs[0][n, c], mults[0, c], add[c]
                for i in range(target.size):
                    target[i] = min(max(np.floor((x[i] * m + a) * scale), lo), hi)
            else:
                for i in range(target.size):
                    total = add[c]
                    for j in range(len(xs)):
                        total += xs[j][n, c, i] * mults[j, c]
                    target[i] = min(max(np.floor(total * scale), lo), hi)


@compiled
def _share_wide(counter, bounds, xs, mults, add, scale, lo, hi, out):
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        _wide(xs, mults, add, scale, lo, hi, (bounds[chunk], bounds[chunk + 1]), out)
        chunk = next_turn(counter)


@compiled
def _share(counter, bounds, xs, mults, add, shift, lo, hi, out):
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        _requant(xs, mults, add, shift, lo, hi, (bounds[chunk], bounds[chunk + 1]), out)
        chunk = next_turn(counter)


def requant(
    xs: list[np.ndarray],
    mults: list[np.ndarray],
    add: np.ndarray,
    shift: int,
    lo: int,
    hi: int,
    dtype: type,
    threads: int,
) -> np.ndarray:
    """[N, ..] of `dtype`: clamp((add + sum of x * mult) >> shift, lo, hi) in int32, which must not
    overflow.

    xs: whole numbers [N, ..] that broadcast to one shape; mults, add: int32 arrays that broadcast
    to one sample of it. Where `add` is int64, no sum may reach 2**52, and the x may be int64.
    """
    wide = add.dtype == np.int64
    real, kind = (np.float64, np.result_type(np.int32, *xs)) if wide else (np.int32, np.int32)
    shape, consts = np.broadcast_shapes(*(x.shape for x in xs)), [*mults, add]
    axes = max([0, *(axis + 1 for a in consts for axis, size in enumerate(a.shape) if size > 1)])
    rows = int(np.prod(shape[1 : axes + 1]))
    table = np.stack(
        [
            np.broadcast_to(a, (*shape[1 : axes + 1], *(1,) * (len(shape) - 1 - axes))).reshape(
                rows
            )
            for a in consts
        ]
    ).astype(real)
    flat = tuple(
        np.require(np.broadcast_to(x, shape), kind, ["C", "W"]).reshape(shape[0], rows, -1)
        for x in xs
    )
    out = np.empty(flat[0].shape, dtype)
    whole = [real(n) for n in (2.0**-shift if wide else shift, lo, hi)]
    bounds = chunks(shape[0], out[0].size, threads)
    on_threads(
        _share_wide if wide else _share,
        (np.zeros(1, np.int64), bounds, flat, table[:-1], table[-1], *whole, out),
        threads,
    )
    return out.reshape(shape)
