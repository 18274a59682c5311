"""Fused reads for CPUs, in numba: partial sums live in a 4-column strip of 256 positions and never reach memory.

    block     256 output positions, flattened over (image, y, x) of one chunk of images
    strip     4 columns x 256 positions of partial sums of one tile
    chunk     a fixed share of the images, so that results do not depend on the number of threads

Forward: im2col of a block, then per tile and strip the dot products, the ADC, the sum. Backward: the same partial sums and
the same noise again, then the gradients of input, weight and step. Everything is float32 arithmetic on whole numbers, exact
where `certified` says so.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numba import njit

from rqtool.kernels.spec import ReadSpec

BLOCK = 256
STRIP = 4
CHUNK_ROWS = 3  # rows of a tile taken at once
MAX_CHUNKS = 8
NOISE_MASK = 65535

_FAST = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy", "fastmath": {"contract", "nsz", "nnan", "reassoc"}}
HALF = np.float32(0.5)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


# -- a block of positions --------------------------------------------------------------------------------------------
@njit(**_FAST)
def _segments(first, count, height, width, stride, found):
    """Runs of positions within one output row: rows of `found` are (image, y, x of the input, length); how many."""
    n_found = 0
    done = 0
    while done < count:
        image, rest = divmod(first + done, height * width)
        y, x = divmod(rest, width)
        length = min(width - x, count - done)
        found[n_found, 0] = image
        found[n_found, 1] = y * stride[0]
        found[n_found, 2] = x * stride[1]
        found[n_found, 3] = length
        n_found += 1
        done += length
    return n_found


@njit(**_FAST)
def _gather(x, channel, geo, found, n_found, rows):
    """im2col of a block: rows [K + .., BLOCK] from the padded x [N, C, H, W]; geo is (channels, kh, kw, dh, dw, sw)."""
    channels, kh, kw, dh, dw, sw = geo
    k = 0
    for c in range(channel, channel + channels):
        for ky in range(kh):
            for kx in range(kw):
                row = rows[k]
                k += 1
                at = 0
                for s in range(n_found):
                    length = found[s, 3]
                    source = x[found[s, 0], c, found[s, 1] + ky * dh]
                    x0 = found[s, 2] + kx * dw
                    if sw == 1:
                        for i in range(length):
                            row[at + i] = source[x0 + i]
                    else:
                        for i in range(length):
                            row[at + i] = source[x0 + i * sw]
                    at += length


@njit(**_FAST)
def _scatter(dx, channel, geo, found, n_found, rows):
    """The transpose of `_gather`: rows of gradients added into the padded dx."""
    channels, kh, kw, dh, dw, sw = geo
    k = 0
    for c in range(channel, channel + channels):
        for ky in range(kh):
            for kx in range(kw):
                row = rows[k]
                k += 1
                at = 0
                for s in range(n_found):
                    length = found[s, 3]
                    target = dx[found[s, 0], c, found[s, 1] + ky * dh]
                    x0 = found[s, 2] + kx * dw
                    if sw == 1:
                        for i in range(length):
                            target[x0 + i] += row[at + i]
                    else:
                        for i in range(length):
                            target[x0 + i * sw] += row[at + i]
                    at += length


@njit(**_FAST)
def _move(image_columns, first, count, size, column, strip, inward):
    """Copy one column of a block between [N, O, L] and a strip row, in either direction."""
    done = 0
    while done < count:
        image, at = divmod(first + done, size)
        length = min(size - at, count - done)
        plane = image_columns[image, column]
        if inward:
            for i in range(length):
                strip[done + i] = plane[at + i]
        else:
            for i in range(length):
                plane[at + i] = strip[done + i]
        done += length


# -- one tile, four columns ------------------------------------------------------------------------------------------
@njit(**_FAST)
def _partial_sums(p, x, w, start):
    """p [4, BLOCK] = w [4, rows] @ x [start : start + rows, BLOCK], three rows at a time."""
    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
    for k in range(0, w.shape[1], CHUNK_ROWS):
        a0, a1, a2 = w[0, k], w[0, k + 1], w[0, k + 2]
        b0, b1, b2 = w[1, k], w[1, k + 1], w[1, k + 2]
        c0, c1, c2 = w[2, k], w[2, k + 1], w[2, k + 2]
        d0, d1, d2 = w[3, k], w[3, k + 1], w[3, k + 2]
        x0, x1, x2 = x[start + k], x[start + k + 1], x[start + k + 2]
        if k == 0:
            for i in range(BLOCK):
                p0[i] = a0 * x0[i] + a1 * x1[i] + a2 * x2[i]
                p1[i] = b0 * x0[i] + b1 * x1[i] + b2 * x2[i]
                p2[i] = c0 * x0[i] + c1 * x1[i] + c2 * x2[i]
                p3[i] = d0 * x0[i] + d1 * x1[i] + d2 * x2[i]
        else:
            for i in range(BLOCK):
                p0[i] += a0 * x0[i] + a1 * x1[i] + a2 * x2[i]
                p1[i] += b0 * x0[i] + b1 * x1[i] + b2 * x2[i]
                p2[i] += c0 * x0[i] + c1 * x1[i] + c2 * x2[i]
                p3[i] += d0 * x0[i] + d1 * x1[i] + d2 * x2[i]


@njit(**_FAST)
def _convert(acc, p, rate, lo, hi, gain):
    """acc += gain * clamp(floor(p * rate + 1/2), lo, hi), all float32 [BLOCK]."""
    for i in range(BLOCK):
        q = np.floor(p[i] * rate + HALF)
        q = q if q > lo else lo
        q = q if q < hi else hi
        acc[i] += gain * q


@njit(**_FAST)
def _convert_noisy(acc, p, rate, lo, hi, gain, noise):
    """The same with noise[at : at + BLOCK] codes, the 1/2 within, added before the thresholds."""
    for i in range(BLOCK):
        q = np.floor(p[i] * rate + noise[i])
        q = q if q > lo else lo
        q = q if q < hi else hi
        acc[i] += gain * q


@njit(**_FAST)
def _convert_table(acc, p, value, p_min):
    """acc += value[p - p_min]."""
    for i in range(BLOCK):
        acc[i] += value[np.uint32(p[i] - p_min)]


@njit(**_FAST)
def _slope_hard(d, p, gy, rate, lo, hi):
    """Straight-through: d = gy where the code does not clip, else 0; returns sum gy * (q - u * slope), the gradient of the step."""
    total = ZERO
    for i in range(BLOCK):
        u = p[i] * rate
        raw = np.floor(u + HALF)
        q = raw if raw > lo else lo
        q = q if q < hi else hi
        inside = ONE if q == raw else ZERO
        d[i] = gy[i] * inside
        total += gy[i] * (q - u * inside)
    return total


@njit(**_FAST)
def _slope_table(d, p, gy, slope, p_min):
    """d = gy * slope[p]."""
    for i in range(BLOCK):
        d[i] = gy[i] * slope[np.uint32(p[i] - p_min)]


@njit(**_FAST)
def _slope_noisy(d, p, gy, rate, lo, hi, slope, p_min, noise):
    """Hard sample, exact slope: d = gy * slope[p]; returns sum gy * (q - u * slope[p]) with the forward pass's noise.

    Two loops: the look-up does not vectorise, and would keep the rest from it."""
    _slope_table(d, p, gy, slope, p_min)
    total = ZERO
    for i in range(BLOCK):
        u = p[i] * rate
        q = np.floor(u + noise[i])
        q = q if q > lo else lo
        q = q if q < hi else hi
        total += gy[i] * q - u * d[i]
    return total


@njit(**_FAST)
def _grad_x(dx, w, d, start):
    """dx [start : start + rows, BLOCK] += w.T [rows, 4] @ d [4, BLOCK]."""
    d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
    for k in range(0, w.shape[1], CHUNK_ROWS):
        a0, a1, a2 = w[0, k], w[0, k + 1], w[0, k + 2]
        b0, b1, b2 = w[1, k], w[1, k + 1], w[1, k + 2]
        c0, c1, c2 = w[2, k], w[2, k + 1], w[2, k + 2]
        e0, e1, e2 = w[3, k], w[3, k + 1], w[3, k + 2]
        x0, x1, x2 = dx[start + k], dx[start + k + 1], dx[start + k + 2]
        for i in range(BLOCK):
            x0[i] += a0 * d0[i] + b0 * d1[i] + c0 * d2[i] + e0 * d3[i]
            x1[i] += a1 * d0[i] + b1 * d1[i] + c1 * d2[i] + e1 * d3[i]
            x2[i] += a2 * d0[i] + b2 * d1[i] + c2 * d2[i] + e2 * d3[i]


@njit(**_FAST)
def _grad_w(dw, x, d, start):
    """dw [4, rows] += d [4, BLOCK] @ x [start : start + rows, BLOCK].T"""
    d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
    for k in range(dw.shape[1]):
        row = x[start + k]
        s0 = s1 = s2 = s3 = ZERO
        for i in range(BLOCK):
            s0 += d0[i] * row[i]
            s1 += d1[i] * row[i]
            s2 += d2[i] * row[i]
            s3 += d3[i] * row[i]
        dw[0, k] += s0
        dw[1, k] += s1
        dw[2, k] += s2
        dw[3, k] += s3


@njit(**_FAST)
def _noise_at(seed, tile, column, first):
    """Where in the draws a read's noise starts: a hash of (seed, tile, column, first position of the block)."""
    h = np.uint64(seed) + np.uint64(tile) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(30))) + np.uint64(column) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) + np.uint64(first) * np.uint64(0x94D049BB133111EB)
    h = (h ^ (h >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
    return np.int64((h >> np.uint64(32)) & np.uint64(NOISE_MASK))


# -- a chunk of images -----------------------------------------------------------------------------------------------
@njit(**_FAST)
def _forward(x, w, starts, adc, tables, noise, seed, shape, geo, stride, images, out):
    """Write out [N, O, L] for images[0] .. images[1].

    w: float32 [groups, T, columns padded to 4, rows padded to 3]; adc: (rate, lo, hi, gain) float32 [T, O];
    tables: (row int64 [T, O], value float32 [rows, P], p_min), value empty when codes are computed;
    noise: float32, empty for none; shape: (K, height, width of the output); geo: see `_gather`.
    """
    k_rows, height, width = shape
    groups, n_tiles, padded, _ = w.shape
    columns = out.shape[1] // groups
    rate, lo, hi, gain = adc
    table_row, value, p_min = tables
    rows = np.zeros((k_rows + w.shape[3], BLOCK), np.float32)
    acc = np.empty((padded, BLOCK), np.float32)
    p = np.empty((STRIP, BLOCK), np.float32)
    found = np.empty((BLOCK, 4), np.int64)
    size = height * width
    for first in range(images[0] * size, images[1] * size, BLOCK):
        count = min(BLOCK, images[1] * size - first)
        n_found = _segments(first, count, height, width, stride, found)
        for g in range(groups):
            _gather(x, g * geo[0], geo, found, n_found, rows)
            acc[:] = ZERO
            for t in range(n_tiles):
                for strip in range(0, columns, STRIP):
                    _partial_sums(p, rows, w[g, t, strip : strip + STRIP], starts[t])
                    for i in range(min(STRIP, columns - strip)):
                        o = g * columns + strip + i
                        if value.size:
                            _convert_table(acc[strip + i], p[i], value[table_row[t, o]], p_min)
                        elif noise.size:
                            at = _noise_at(seed, t, o, first)
                            _convert_noisy(acc[strip + i], p[i], rate[t, o], lo[t, o], hi[t, o], gain[t, o], noise[at : at + BLOCK])
                        else:
                            _convert(acc[strip + i], p[i], rate[t, o], lo[t, o], hi[t, o], gain[t, o])
            for i in range(columns):
                _move(out, first, count, size, g * columns + i, acc[i], False)


@njit(**_FAST)
def _backward(x, w, starts, adc, tables, noise, seed, shape, geo, stride, images, gy, dx, dw, dstep):
    """Add the gradients of images[0] .. images[1] to dx (padded input), dw (packed like w) and dstep [T, O].

    gy: float32 [N, O, L], the gradient of sum over tiles of step * q. tables: (row, slope [rows, P], p_min); slope empty for the
    straight-through estimator. Other arguments as in `_forward`.
    """
    k_rows, height, width = shape
    groups, n_tiles, padded, _ = w.shape
    columns = gy.shape[1] // groups
    rate, lo, hi, _ = adc
    table_row, slope, p_min = tables
    rows = np.zeros((k_rows + w.shape[3], BLOCK), np.float32)
    drows = np.empty((k_rows + w.shape[3], BLOCK), np.float32)
    grad = np.zeros((padded, BLOCK), np.float32)
    p = np.empty((STRIP, BLOCK), np.float32)
    d = np.zeros((STRIP, BLOCK), np.float32)
    found = np.empty((BLOCK, 4), np.int64)
    size = height * width
    for first in range(images[0] * size, images[1] * size, BLOCK):
        count = min(BLOCK, images[1] * size - first)
        n_found = _segments(first, count, height, width, stride, found)
        for g in range(groups):
            _gather(x, g * geo[0], geo, found, n_found, rows)
            drows[:] = ZERO
            for i in range(columns):
                grad[i, count:] = ZERO
                _move(gy, first, count, size, g * columns + i, grad[i], True)
            for t in range(n_tiles):
                for strip in range(0, columns, STRIP):
                    part = w[g, t, strip : strip + STRIP]
                    _partial_sums(p, rows, part, starts[t])
                    for i in range(STRIP):
                        o = g * columns + min(strip + i, columns - 1)  # a padded column has weight 0 and gradient 0
                        if noise.size:
                            at = _noise_at(seed, t, o, first)
                            ds = _slope_noisy(d[i], p[i], grad[strip + i], rate[t, o], lo[t, o], hi[t, o], slope[table_row[t, o]], p_min, noise[at : at + BLOCK])
                        elif slope.size:
                            _slope_table(d[i], p[i], grad[strip + i], slope[table_row[t, o]], p_min)
                            ds = ZERO
                        else:
                            ds = _slope_hard(d[i], p[i], grad[strip + i], rate[t, o], lo[t, o], hi[t, o])
                        dstep[t, o] += ds
                    _grad_x(drows, part, d, starts[t])
                    _grad_w(dw[g, t, strip : strip + STRIP], rows, d, starts[t])
            _scatter(dx, g * geo[0], geo, found, n_found, drows)


# -- numpy in, numpy out ---------------------------------------------------------------------------------------------
@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rqtool-reads")


def _each_chunk(task, images: int, positions: int, threads: int) -> list:
    """task((first image, last image)) for a split that depends on the shapes alone, in order; on `threads` threads."""
    chunks = max(1, min(MAX_CHUNKS, images, images * positions // BLOCK))
    bounds = [images * i // chunks for i in range(chunks + 1)]
    pairs = list(zip(bounds, bounds[1:]))
    if threads == 1 or chunks == 1:
        return [task(pair) for pair in pairs]
    return list(_pool(threads).map(task, pairs))


def _pack(weight: np.ndarray, spec: ReadSpec) -> np.ndarray:
    """float32 [groups, T, columns padded to 4, rows padded to 3] from the integer weight [O, K]."""
    g = spec.geometry
    longest = max(stop - start for start, stop in spec.tiles)
    shape = (g.groups, len(spec.tiles), -(-g.group_columns // STRIP) * STRIP, -(-longest // CHUNK_ROWS) * CHUNK_ROWS)
    packed = np.zeros(shape, np.float32)
    by_group = weight.reshape(g.groups, g.group_columns, g.rows)
    for t, (start, stop) in enumerate(spec.tiles):
        packed[:, t, : g.group_columns, : stop - start] = by_group[:, :, start:stop]
    return packed


def _unpack(packed: np.ndarray, spec: ReadSpec) -> np.ndarray:
    """The transpose of `_pack`: float32 [O, K]."""
    g = spec.geometry
    weight = np.empty((g.groups, g.group_columns, g.rows), np.float32)
    for t, (start, stop) in enumerate(spec.tiles):
        weight[:, :, start:stop] = packed[:, t, : g.group_columns, : stop - start]
    return weight.reshape(g.columns, g.rows)


_NO_FLOATS = np.empty(0, np.float32)
_NO_TABLE = np.empty((0, 0), np.float32)
_NO_ROWS = np.empty((0, 0), np.int64)


def _arguments(spec: ReadSpec, table: str, height: int, width: int) -> tuple:
    g, tables, noise = spec.geometry, spec.tables, spec.noise
    chosen = getattr(tables, table) if tables else None
    return (
        np.array([start for start, _ in spec.tiles], np.int64),
        (spec.rate, spec.lo, spec.hi, spec.gain),
        (tables.row, chosen, np.float32(tables.p_min)) if chosen is not None else (_NO_ROWS, _NO_TABLE, ZERO),
        noise.draws + HALF if noise else _NO_FLOATS,  # one sum in each pass, so that no compiler can round the two differently
        noise.seed if noise else 0,
        (g.rows, height, width),
        (g.channels // g.groups, *g.kernel, *g.dilation, g.stride[1]),
        g.stride,
    )


def forward(x: np.ndarray, weight: np.ndarray, spec: ReadSpec, threads: int) -> np.ndarray:
    """acc float32 [N, O, H_out, W_out] of one pair of planes: whole numbers unless `spec` has real-valued tables.

    x: float32 [N, C, H, W] codes, already padded. weight: [O, K] whole numbers.
    """
    height, width = _out_size(x, spec)
    out = np.empty((x.shape[0], spec.geometry.columns, height * width), np.float32)
    packed, arguments = _pack(weight, spec), _arguments(spec, "value", height, width)
    _each_chunk(lambda images: _forward(x, packed, *arguments, images, out), x.shape[0], height * width, threads)
    return out.reshape(*out.shape[:2], height, width)


def backward(x: np.ndarray, weight: np.ndarray, spec: ReadSpec, gy: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx of the padded x, dw [O, K], dstep [T, O]), float32, for gy float32 [N, O, H_out, W_out].

    Partial sums and noise are computed again, so nothing is kept between the passes; the same bits for any number of threads.
    """
    height, width = _out_size(x, spec)
    flat = np.ascontiguousarray(gy).reshape(*gy.shape[:2], -1)
    packed, arguments = _pack(weight, spec), _arguments(spec, "slope", height, width)
    dx = np.zeros_like(x)

    def task(images):
        dw, dstep = np.zeros_like(packed), np.zeros_like(spec.rate)
        _backward(x, packed, *arguments, images, flat, dx, dw, dstep)
        return dw, dstep

    parts = _each_chunk(task, x.shape[0], height * width, threads)
    dw, dstep = (sum(part[n] for part in parts) for n in range(2))
    return dx, _unpack(dw, spec), dstep


def _out_size(x: np.ndarray, spec: ReadSpec) -> tuple[int, int]:
    return replace(spec.geometry, padding=(0, 0)).out_size(x.shape[2], x.shape[3])


def codes(p: np.ndarray, rate: float, lo: float, hi: float) -> np.ndarray:
    """code - zero of float32 partial sums through the very lines the kernel runs: what certification compares."""
    padded = np.zeros(-(-p.size // BLOCK) * BLOCK, np.float32)
    padded[: p.size] = p
    out = np.zeros_like(padded)
    for at in range(0, padded.size, BLOCK):
        _convert(out[at : at + BLOCK], padded[at : at + BLOCK], np.float32(rate), np.float32(lo), np.float32(hi), ONE)
    return out[: p.size]
