"""Fused reads for CPUs, in numba: partial sums live in registers (strips.py) and never reach
memory.

    block     64 output positions (forward) or 256 (backward), flattened over (image, y, x) of one chunk of images
    chunk     some of the images, whatever the number of threads: gradients are added up and noise is counted chunk by chunk
    share     what one thread does: chunk after chunk, until none is left

Forward: im2col of a block into words, then per tile the dot products, the ADC, the sum. Backward:
the same partial sums and the same noise again, then the gradients of input, weight and step.
Partial sums are whole numbers, by 8-bit dot products where the processor has them and by float32
elsewhere; codes are exact where certify.py finds them to be the ADC's own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rqtool.kernels import blocks, strips
from rqtool.kernels.compiled import compiled, inlined
from rqtool.kernels.layout import layout_of, offsets_of, packed
from rqtool.kernels.records import adc_records, sixteen
from rqtool.kernels.spec import ReadSpec
from rqtool.kernels.strips import BLOCK, GROUPS, POSITIONS, STRIP, WORD
from rqtool.kernels.threads import chunks, next_turn, on_threads
from rqtool.kernels.vector import BYTES, DOT8, LANES

MAX_CHUNKS = 8
MOST8 = 127
DOT8_FORMS = len(strips.KINDS)  # from this form on, partial sums are 8-bit dot products
GROUP_COLUMNS = tuple(columns for _, columns in GROUPS)
MORE_ROWS = max(
    rows for rows, _ in GROUPS
)  # a step of the gradients may look at so many rows too many


# -- a chunk of images -----------------------------------------------------------------------------
@inlined
def _forward(
    x, offsets, group_size, tiles, w, adcs, draws, form, shape, images, words, rows, acc, out
):
    """Write out [N, O, L] for images[0] .. images[1].

    x: uint8, their padded codes; tiles: int64 [T, 3] (first word, words, rows); w: [groups, ..] as
    in `Layout`; adcs: ADC records [groups, T, columns padded to 4]; shape: as for `blocks.runs`.
    words, rows, acc: scratch.
    """
    size, columns = shape[0] * shape[1], out.shape[1] // w.shape[0]
    found, whole = np.empty((POSITIONS, 3), np.int64), np.empty((POSITIONS, 4), np.int64)
    n_strips, word_bytes = adcs.shape[2] // STRIP, words.shape[1] * 4
    for first in range(images[0] * size, images[1] * size, POSITIONS):
        count = min(POSITIONS, images[1] * size - first)
        n_found, n_whole = (
            blocks.runs(first, count, shape, found),
            blocks.images(first, count, size, whole),
        )
        for g in range(w.shape[0]):
            blocks.gather(
                x, g * group_size - images[0] * shape[4], offsets, shape[3], found, n_found, words
            )
            if form < DOT8_FORMS:
                strips.unweave(
                    words.ctypes.data, words.shape[0], POSITIONS // LANES, rows.ctypes.data
                )
            acc[:] = 0
            at = w[g].ctypes.data
            for t in range(tiles.shape[0]):
                word, n_words, n_rows = tiles[t]
                adc = adcs[g, t].ctypes.data
                if form >= DOT8_FORMS:
                    x_at, stride, n = words.ctypes.data + word * word_bytes, word_bytes, n_words
                else:
                    x_at, stride, n = (
                        rows.ctypes.data + WORD * word * 4 * POSITIONS,
                        4 * POSITIONS,
                        n_rows,
                    )
                strips.read(
                    form,
                    x_at,
                    stride,
                    at,
                    n,
                    adc,
                    n_strips,
                    draws.ctypes.data,
                    first,
                    acc.ctypes.data,
                )
                at += n_strips * n * 4 * STRIP
            blocks.take_out(acc, g * columns, columns, whole, n_whole, out)


@inlined
def _forward16(
    x, offsets, group_size, tiles, w, adcs, form, period, shape, images, words, acc16, acc, out
):
    """The same in 16 bits: adcs: ADC16, BUCKETS16 or LEVELS16 records [groups, 1 or T, columns
    padded to 4]; `period` tiles cannot overflow, then their sum is moved to acc int32."""
    size, columns = shape[0] * shape[1], out.shape[1] // w.shape[0]
    found, whole = np.empty((POSITIONS, 3), np.int64), np.empty((POSITIONS, 4), np.int64)
    n_strips, word_bytes = acc.shape[0] // STRIP, words.shape[1] * 4
    for first in range(images[0] * size, images[1] * size, POSITIONS):
        count = min(POSITIONS, images[1] * size - first)
        n_found, n_whole = (
            blocks.runs(first, count, shape, found),
            blocks.images(first, count, size, whole),
        )
        for g in range(w.shape[0]):
            blocks.gather(
                x, g * group_size - images[0] * shape[4], offsets, shape[3], found, n_found, words
            )
            acc[:] = 0
            at = w[g].ctypes.data
            for t in range(tiles.shape[0]):
                word, n_words, _ = tiles[t]
                x_at, adc = (
                    words.ctypes.data + word * word_bytes,
                    adcs[g, t % adcs.shape[1]].ctypes.data,
                )
                strips.read16(form, x_at, word_bytes, at, n_words, adc, n_strips, acc16.ctypes.data)
                at += n_strips * n_words * 4 * STRIP
                if (t + 1) % period == 0 or t + 1 == tiles.shape[0]:
                    strips.widen(acc16.ctypes.data, acc.shape[0], acc.ctypes.data)
            blocks.take_out(acc, g * columns, columns, whole, n_whole, out)


@inlined
def _backward(
    x,
    offsets,
    group_size,
    tiles,
    w,
    adcs,
    draws,
    form,
    shape,
    images,
    words,
    rows,
    back,
    steps,
    live,
    grad,
    d,
    drows,
    gy,
    dx,
    dw,
    sums,
):
    """Add the gradients of images[0] .. images[1] to dx (like x, float32), dw (as in `Layout`) and
    sums [groups, T, 2, padded columns].

    gy: float32 [N, O, L], the gradient of sum over tiles of step * q. Other arguments as in
    `_forward`; grad, d, drows: scratch.
    """
    size, columns = shape[0] * shape[1], gy.shape[1] // w.shape[0]
    found, whole = np.empty((BLOCK, 3), np.int64), np.empty((BLOCK, 4), np.int64)
    padded, word_bytes = adcs.shape[2], words.shape[1] * 4
    n_strips = padded // STRIP
    for first in range(images[0] * size, images[1] * size, BLOCK):
        count = min(BLOCK, images[1] * size - first)
        n_found, n_whole = (
            blocks.runs(first, count, shape, found),
            blocks.images(first, count, size, whole),
        )
        for g in range(w.shape[0]):
            blocks.gather(
                x, g * group_size - images[0] * shape[4], offsets, shape[3], found, n_found, words
            )
            strips.unweave(words.ctypes.data, words.shape[0], BLOCK // LANES, rows.ctypes.data)
            grad[:, count:] = 0
            blocks.take_in(gy, g * columns, columns, whole, n_whole, grad)
            at, done = w[g].ctypes.data, 0
            for t in range(tiles.shape[0]):
                word, n_words, n_rows = tiles[t]
                adc, sums_at = adcs[g, t].ctypes.data, sums[g, t].ctypes.data
                if form >= DOT8_FORMS:
                    x_at, stride, n = words.ctypes.data + word * word_bytes, word_bytes, n_words
                else:
                    x_at, stride, n = rows.ctypes.data + WORD * word * 4 * BLOCK, 4 * BLOCK, n_rows
                strips.slope(
                    form,
                    x_at,
                    stride,
                    at,
                    n,
                    adc,
                    n_strips,
                    draws.ctypes.data,
                    first,
                    grad.ctypes.data,
                    d.ctypes.data,
                    sums_at,
                )
                at += n_strips * n * 4 * STRIP
                while done < steps.shape[0] and steps[done, 0] == t:
                    _, byte, of, w_at, dw_at = steps[done]
                    done += 1
                    x_row, d_row = (
                        rows.ctypes.data + byte * 4 * BLOCK,
                        drows.ctypes.data + byte * 4 * BLOCK,
                    )
                    strips.grad_rows(
                        of, d.ctypes.data, back[g].ctypes.data + 4 * w_at, padded, d_row
                    )
                    strips.grad_weights(
                        of,
                        d.ctypes.data,
                        x_row,
                        padded // GROUP_COLUMNS[of],
                        dw[g].ctypes.data + 4 * dw_at,
                    )
            blocks.scatter(dx, g * group_size, offsets, live, shape[3], found, n_found, drows)


# -- a share: what one thread does -----------------------------------------------------------------
# counter: as for `next_turn`; bounds: int64 [chunks + 1], the images at which chunks begin and end;
# codes, pad: as for `blocks.fill`; room: bytes of the largest chunk; the rest as for a chunk.
# Scratch is allocated by the thread that uses it: memory next to another thread's was measured to
# cost a quarter of the speed.
@compiled
def _scratch(rows, columns, kind):
    """Zeros that start at a whole vector."""
    room = np.zeros(rows * columns + BYTES, kind)
    start = -room.ctypes.data % BYTES // room.itemsize
    return room[start : start + rows * columns].reshape(rows, columns)


@compiled
def _forward_share(
    counter, bounds, codes, pad, room, offsets, group_size, tiles, w, adcs, draws, form, shape, out
):
    words, acc = (
        _scratch(offsets.size // WORD, POSITIONS + LANES, np.int32),
        _scratch(adcs.shape[2], POSITIONS, np.float32),
    )
    rows, x = (
        _scratch(offsets.size if form < DOT8_FORMS else 0, POSITIONS, np.float32),
        np.empty(room, np.uint8),
    )
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        images = (bounds[chunk], bounds[chunk + 1])
        blocks.fill(codes, pad, images, x)
        _forward(
            x,
            offsets,
            group_size,
            tiles,
            w,
            adcs,
            draws,
            form,
            shape,
            images,
            words,
            rows,
            acc,
            out,
        )
        chunk = next_turn(counter)


@compiled
def _forward16_share(
    counter,
    bounds,
    codes,
    pad,
    room,
    offsets,
    group_size,
    tiles,
    w,
    adcs,
    form,
    period,
    shape,
    padded,
    out,
):
    words = _scratch(offsets.size // WORD, POSITIONS + LANES, np.int32)
    acc16, acc, x = (
        _scratch(padded, POSITIONS, np.int16),
        _scratch(padded, POSITIONS, np.int32),
        np.empty(room, np.uint8),
    )
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        images = (bounds[chunk], bounds[chunk + 1])
        blocks.fill(codes, pad, images, x)
        _forward16(
            x,
            offsets,
            group_size,
            tiles,
            w,
            adcs,
            form,
            period,
            shape,
            images,
            words,
            acc16,
            acc,
            out,
        )
        chunk = next_turn(counter)


@compiled
def _backward_share(
    counter,
    bounds,
    codes,
    pad,
    room,
    offsets,
    group_size,
    tiles,
    w,
    adcs,
    draws,
    form,
    shape,
    back,
    steps,
    live,
    gy,
    dx,
    dw,
    sums,
):
    padded, n_rows = adcs.shape[2], offsets.size + MORE_ROWS
    words, rows, drows = (
        _scratch(offsets.size // WORD, BLOCK + LANES, np.int32),
        _scratch(n_rows, BLOCK, np.float32),
        _scratch(n_rows, BLOCK, np.float32),
    )
    grad, d = _scratch(padded, BLOCK, np.float32), _scratch(padded, BLOCK, np.float32)
    x, own_dw, own_sums = (
        np.empty(room, np.uint8),
        _scratch(dw.shape[1], dw.shape[2], np.float32),
        np.empty(sums.shape[1:], np.float32),
    )
    dw_bytes, sums_bytes = 4 * own_dw.size, 4 * own_sums.size
    chunk = next_turn(counter)
    while chunk < bounds.size - 1:
        images = (bounds[chunk], bounds[chunk + 1])
        blocks.fill(codes, pad, images, x)
        strips.repeat(own_dw.ctypes.data, 0, dw_bytes)
        strips.repeat(own_sums.ctypes.data, 0, sums_bytes)
        _backward(
            x,
            offsets,
            group_size,
            tiles,
            w,
            adcs,
            draws,
            form,
            shape,
            images,
            words,
            rows,
            back,
            steps,
            live,
            grad,
            d,
            drows,
            gy,
            dx,
            own_dw,
            own_sums,
        )
        strips.copy(dw[chunk].ctypes.data, own_dw.ctypes.data, dw_bytes)
        strips.copy(sums[chunk].ctypes.data, own_sums.ctypes.data, sums_bytes)
        chunk = next_turn(counter)


# -- numpy in, numpy out ---------------------------------------------------------------------------
class Prepared:
    """One pair of planes of one layer, packed for the kernels: it serves any number of calls.

    weight: [O, K] whole numbers. table: which of the spec's tables is looked up, "value" (forward)
    or "slope" (backward). dot8: 8-bit dot products where the processor has them and the weights
    fit.
    """

    def __init__(
        self, weight: np.ndarray, spec: ReadSpec, table: str = "value", *, dot8: bool = True
    ) -> None:
        g = spec.geometry
        self.spec, self.layout = spec, layout_of(g.group_columns, spec.tiles, spec.order)
        self.dot8 = dot8 and DOT8 and int(np.abs(weight).max(initial=0)) <= MOST8
        self.tiles = np.column_stack(
            [self.layout.words, [stop - start for start, stop in spec.tiles]]
        )
        self.w = (
            packed(weight, spec, self.layout.dot8, np.int8)
            if self.dot8
            else packed(weight, spec, self.layout.plain, np.float32)
        )
        self.padded = -(-g.group_columns // STRIP) * STRIP
        kind, self.adcs, self.kept = adc_records(spec, table, self.padded)
        self.form = kind + DOT8_FORMS * self.dot8
        self.draws = spec.noise.draws + np.float32(0.5) if spec.noise else np.zeros(1, np.float32)
        self.sixteen = sixteen(spec, self.padded) if self.dot8 and table == "value" else None


class _Input:
    """Input codes uint8 [N, C, H, W] of a call, its padding, and what depends on their size."""

    def __init__(self, x: np.ndarray, spec: ReadSpec, pad: int) -> None:
        g, (down, right) = spec.geometry, spec.geometry.padding
        shape = (*x.shape[:2], x.shape[2] + 2 * down, x.shape[3] + 2 * right)
        image = g.channels * shape[2] * shape[3]
        self.out = replace(g, padding=(0, 0)).out_size(*shape[2:])
        self.shape = (*self.out, *g.stride, image, shape[3])
        self.bounds = chunks(len(x), self.out[0] * self.out[1], MAX_CHUNKS)
        room = int(np.diff(self.bounds).max()) * image + 2 * BYTES
        codes, offsets = (
            np.ascontiguousarray(x, np.uint8),
            offsets_of(g, spec.tiles, spec.order, *shape[2:]),
        )
        self.common = (
            np.zeros(1, np.int64),
            self.bounds,
            codes,
            (pad, down, right),
            room,
            offsets,
            image // g.groups,
        )


def forward(
    x: np.ndarray,
    weight: np.ndarray,
    spec: ReadSpec,
    threads: int,
    *,
    dot8: bool = True,
    dtype: type = np.float32,
) -> np.ndarray:
    """`run` for weights [O, K] that are used once."""
    return run(Prepared(weight, spec, dot8=dot8), x, threads, dtype=dtype)


def run(
    prepared: Prepared, x: np.ndarray, threads: int, *, pad: int = 0, dtype: type = np.float32
) -> np.ndarray:
    """acc of `dtype` [N, O, H_out, W_out] of one pair of planes: whole numbers unless the spec has
    real-valued tables.

    x: [N, C, H, W] codes 0..255; the geometry's padding is put around them, with code `pad`.
    """
    spec, given = prepared.spec, _Input(x, prepared.spec, pad)
    out = np.empty((x.shape[0], spec.geometry.columns, given.out[0] * given.out[1]), dtype)
    common, in16 = (*given.common, prepared.tiles, prepared.w), prepared.sixteen
    if in16:
        on_threads(
            _forward16_share,
            (*common, in16.adcs, in16.form, in16.period, given.shape, prepared.padded, out),
            threads,
        )
    else:
        on_threads(
            _forward_share,
            (*common, prepared.adcs, prepared.draws, prepared.form, given.shape, out),
            threads,
        )
    return out.reshape(*out.shape[:2], *given.out)


def backward(
    x: np.ndarray,
    weight: np.ndarray,
    spec: ReadSpec,
    gy: np.ndarray,
    threads: int,
    *,
    dot8: bool = True,
) -> tuple[np.ndarray, ...]:
    """(dx of the padded x, dw [O, K], dstep [T, O], dzero [T, O]), float32, for gy float32 [N, O,
    H_out, W_out]; the spec has no padding.

    dstep = sum of gy * (q - u * slope), dzero = sum of gy * (slope - 1), what the step is
    multiplied with; 0 where tables give the values.

    Partial sums and noise are computed again, so nothing is kept between the passes; the same bits
    for any number of threads.
    """
    g, prepared, given = (
        spec.geometry,
        Prepared(weight, spec, "slope", dot8=dot8),
        _Input(x, spec, 0),
    )
    flat, layout = np.ascontiguousarray(gy).reshape(*gy.shape[:2], -1), prepared.layout
    back = packed(weight, spec, layout.back, np.float32)
    dx = np.zeros(x.shape, np.float32)
    count = len(given.bounds) - 1
    dw, sums = (
        np.empty((count, g.groups, layout.dw_size), np.float32),
        np.empty((count, *prepared.adcs.shape[:2], 2, prepared.padded), np.float32),
    )
    common = (
        *given.common,
        prepared.tiles,
        prepared.w,
        prepared.adcs,
        prepared.draws,
        prepared.form,
        given.shape,
    )
    on_threads(
        _backward_share,
        (*common, back, layout.steps, layout.live, flat, dx.reshape(-1), dw, sums),
        threads,
    )
    dw, sums = sum(dw), sum(sums)  # chunk after chunk, in this order
    dstep, dzero = (
        sums[..., : g.group_columns].transpose(2, 1, 0, 3).reshape(2, len(spec.tiles), g.columns)
    )
    return dx, dw[:, layout.dw].reshape(g.columns, g.rows), dstep, dzero
