"""Fused reads for CPUs, in numba: partial sums live in registers (strips.py) and never reach memory.

    block     64 output positions (forward) or 256 (backward), flattened over (image, y, x) of one chunk of images
    chunk     a share of the images; a fixed one where gradients are added up, so that they do not depend on the number of threads

Forward: im2col of a block into words, then per tile the dot products, the ADC, the sum. Backward: the same partial sums and the same
noise again, then the gradients of input, weight and step. Partial sums are whole numbers, by 8-bit dot products where the processor has
them and by float32 elsewhere; codes are exact where `codes` and `codes16` give the ADC's own (program/run.py certifies it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numba import njit

from rqtool.kernels import strips, vector
from rqtool.kernels.layout import layout_of, offsets_of, packed, scratch
from rqtool.kernels.spec import ReadSpec, Tables
from rqtool.kernels.strips import ADC, ADC16, BLOCK, BUCKETS, BUCKETS16, FREE_BITS, GROUPS, HARD, LEVELS16, NOISY, POSITIONS, STRIP, TABLE, WORD
from rqtool.kernels.threads import each
from rqtool.kernels.vector import BYTES, DOT8, LANES

MAX_CHUNKS = 8
SHARE_MACS = 70_000_000  # half a millisecond or more, against some tens of microseconds that a share costs
MOST8, MOST15 = 127, 32767
SHIFT16 = 15  # of the 16-bit form
FREE_FORM = 2  # of strips.read16, where forms for free levels begin
BUCKET_MULTS = np.unique((32767 / np.geomspace(1, 4096, 160)).astype(np.int64))  # of the coarse ADCs that are tried, wide codes first
DOT8_FORMS = len(strips.KINDS)  # from this form on, partial sums are 8-bit dot products
GROUP_COLUMNS = tuple(columns for _, columns in GROUPS)

_FAST = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
EMITTERS = (Path(__file__), Path(strips.__file__), Path(vector.__file__))


def compiled(function):
    """numba.njit, with a cache that is made anew when a file that emits code changes: numba itself watches only the function's own."""
    try:
        made = njit(cache=True, **_FAST)(function)
    except RuntimeError:  # no folder to keep compiled code in
        return njit(**_FAST)(function)
    stamps = tuple(path.stat() for path in EMITTERS)
    made._cache._cache_file._source_stamp = tuple(n for s in stamps for n in (s.st_mtime, s.st_size))
    return made


# -- a block of positions ------------------------------------------------------------------------------------------------
@compiled
def _runs(first, count, shape, found):
    """Runs of positions within one output row: rows of `found` are (start in x, position in the block, length); how many.

    shape: (height and width of the output, stride down and right, elements of an image and of a row of x).
    """
    height, width, down, right, image_size, row_size = shape
    n_found = done = 0
    while done < count:
        image, rest = divmod(first + done, height * width)
        y, x = divmod(rest, width)
        length = min(width - x, count - done)
        found[n_found, 0] = image * image_size + y * down * row_size + x * right
        found[n_found, 1] = done
        found[n_found, 2] = length
        n_found += 1
        done += length
    return n_found


@compiled
def _gather(x, channel, offsets, step, found, n_found, words):
    """im2col of a block: words int32 [words, positions + slack] from x uint8, rows of which advance by `step`."""
    stride = words.shape[1] * 4
    for s in range(n_found):
        start, at, length = channel + found[s, 0], found[s, 1], found[s, 2]
        steps = (length + LANES - 1) // LANES
        if step <= 2:
            strips.weave(step - 1, x.ctypes.data + start, offsets.ctypes.data, words.shape[0], steps, words.ctypes.data + 4 * at, stride)
        else:
            for k in range(words.shape[0]):
                for i in range(length):
                    word = np.uint32(0)
                    for j in range(WORD):
                        word |= np.uint32(x[start + offsets[WORD * k + j] + i * step]) << np.uint32(8 * j)
                    words[k, at + i] = np.int32(word)


@compiled
def _scatter(dx, channel, offsets, live, step, found, n_found, drows):
    """The transpose of `_gather`: live rows of gradients added into dx."""
    for k in live:
        for s in range(n_found):
            start, at, length = channel + found[s, 0] + offsets[k], found[s, 1], found[s, 2]
            if step == 1:
                strips.add_run(dx.ctypes.data + 4 * start, drows.ctypes.data + 4 * (k * BLOCK + at), length)
            else:
                for i in range(length):
                    dx[start + i * step] += drows[k, at + i]


@compiled
def _images(first, count, size, found):
    """Runs of positions within one image: rows of `found` are (image, position in it, position in the block, length); how many."""
    n_found = done = 0
    while done < count:
        image, at = divmod(first + done, size)
        length = min(size - at, count - done)
        found[n_found, 0] = image
        found[n_found, 1] = at
        found[n_found, 2] = done
        found[n_found, 3] = length
        n_found += 1
        done += length
    return n_found


@compiled
def _take_out(acc, column, columns, found, n_found, out):
    """Copy the columns of a block to out [N, O, L], from `column` on."""
    for s in range(n_found):
        at, start = found[s, 1], found[s, 2]
        for i in range(columns):
            target = out[found[s, 0], column + i]
            for j in range(found[s, 3]):
                target[at + j] = acc[i, start + j]


@compiled
def _take_in(gy, column, columns, found, n_found, grad):
    """The way back: columns of gy [N, O, L] into a block."""
    for s in range(n_found):
        at, start = found[s, 1], found[s, 2]
        for i in range(columns):
            source = gy[found[s, 0], column + i]
            for j in range(found[s, 3]):
                grad[i, start + j] = source[at + j]


# -- a chunk of images -----------------------------------------------------------------------------------------------
@compiled
def _forward(x, offsets, group_size, tiles, w, adcs, draws, form, shape, images, words, rows, acc, out):
    """Write out [N, O, L] for images[0] .. images[1].

    x: uint8, all of it; tiles: int64 [T, 3] (first word, words, rows); w: [groups, ..] as in `Layout`; adcs: ADC records
    [groups, T, columns padded to 4]; shape: as for `_runs`. words, rows, acc: scratch.
    """
    size, columns = shape[0] * shape[1], out.shape[1] // w.shape[0]
    found, whole = np.empty((POSITIONS, 3), np.int64), np.empty((POSITIONS, 4), np.int64)
    n_strips, word_bytes = adcs.shape[2] // STRIP, words.shape[1] * 4
    for first in range(images[0] * size, images[1] * size, POSITIONS):
        count = min(POSITIONS, images[1] * size - first)
        n_found, n_whole = _runs(first, count, shape, found), _images(first, count, size, whole)
        for g in range(w.shape[0]):
            _gather(x, g * group_size, offsets, shape[3], found, n_found, words)
            if form < DOT8_FORMS:
                strips.unweave(words.ctypes.data, words.shape[0], POSITIONS // LANES, rows.ctypes.data)
            acc[:] = 0
            at = w[g].ctypes.data
            for t in range(tiles.shape[0]):
                word, n_words, n_rows = tiles[t]
                adc = adcs[g, t].ctypes.data
                if form >= DOT8_FORMS:
                    x_at, stride, n = words.ctypes.data + word * word_bytes, word_bytes, n_words
                else:
                    x_at, stride, n = rows.ctypes.data + WORD * word * 4 * POSITIONS, 4 * POSITIONS, n_rows
                strips.read(form, x_at, stride, at, n, adc, n_strips, draws.ctypes.data, first, acc.ctypes.data)
                at += n_strips * n * 4 * STRIP
            _take_out(acc, g * columns, columns, whole, n_whole, out)


@compiled
def _forward16(x, offsets, group_size, tiles, w, adcs, form, period, shape, images, words, acc16, acc, out):
    """The same in 16 bits: adcs: ADC16, BUCKETS16 or LEVELS16 records [groups, T, ..]; `period` tiles cannot overflow, then their sum is moved to acc int32."""
    size, columns = shape[0] * shape[1], out.shape[1] // w.shape[0]
    found, whole = np.empty((POSITIONS, 3), np.int64), np.empty((POSITIONS, 4), np.int64)
    n_strips, word_bytes = acc.shape[0] // STRIP, words.shape[1] * 4
    for first in range(images[0] * size, images[1] * size, POSITIONS):
        count = min(POSITIONS, images[1] * size - first)
        n_found, n_whole = _runs(first, count, shape, found), _images(first, count, size, whole)
        for g in range(w.shape[0]):
            _gather(x, g * group_size, offsets, shape[3], found, n_found, words)
            acc[:] = 0
            at = w[g].ctypes.data
            for t in range(tiles.shape[0]):
                word, n_words, _ = tiles[t]
                x_at, adc = words.ctypes.data + word * word_bytes, adcs[g, t].ctypes.data
                strips.read16(form, x_at, word_bytes, at, n_words, adc, n_strips, acc16.ctypes.data)
                at += n_strips * n_words * 4 * STRIP
                if (t + 1) % period == 0 or t + 1 == tiles.shape[0]:
                    strips.widen(acc16.ctypes.data, acc.shape[0], acc.ctypes.data)
            _take_out(acc, g * columns, columns, whole, n_whole, out)


@compiled
def _backward(x, offsets, group_size, tiles, w, adcs, draws, form, shape, images, words, rows, back, steps, live, grad, d, drows, gy, dx, dw, sums):
    """Add the gradients of images[0] .. images[1] to dx (like x, float32), dw (as in `Layout`) and sums [groups, T, 2, padded columns].

    gy: float32 [N, O, L], the gradient of sum over tiles of step * q. Other arguments as in `_forward`; grad, d, drows: scratch.
    """
    size, columns = shape[0] * shape[1], gy.shape[1] // w.shape[0]
    found, whole = np.empty((BLOCK, 3), np.int64), np.empty((BLOCK, 4), np.int64)
    padded, word_bytes = adcs.shape[2], words.shape[1] * 4
    n_strips = padded // STRIP
    for first in range(images[0] * size, images[1] * size, BLOCK):
        count = min(BLOCK, images[1] * size - first)
        n_found, n_whole = _runs(first, count, shape, found), _images(first, count, size, whole)
        for g in range(w.shape[0]):
            _gather(x, g * group_size, offsets, shape[3], found, n_found, words)
            strips.unweave(words.ctypes.data, words.shape[0], BLOCK // LANES, rows.ctypes.data)
            grad[:, count:] = 0
            _take_in(gy, g * columns, columns, whole, n_whole, grad)
            at, done = w[g].ctypes.data, 0
            for t in range(tiles.shape[0]):
                word, n_words, n_rows = tiles[t]
                adc, sums_at = adcs[g, t].ctypes.data, sums[g, t].ctypes.data
                if form >= DOT8_FORMS:
                    x_at, stride, n = words.ctypes.data + word * word_bytes, word_bytes, n_words
                else:
                    x_at, stride, n = rows.ctypes.data + WORD * word * 4 * BLOCK, 4 * BLOCK, n_rows
                strips.slope(form, x_at, stride, at, n, adc, n_strips, draws.ctypes.data, first, grad.ctypes.data, d.ctypes.data, sums_at)
                at += n_strips * n * 4 * STRIP
                while done < steps.shape[0] and steps[done, 0] == t:
                    _, byte, of, w_at, dw_at = steps[done]
                    done += 1
                    x_row, d_row = rows.ctypes.data + byte * 4 * BLOCK, drows.ctypes.data + byte * 4 * BLOCK
                    strips.grad_rows(of, d.ctypes.data, back[g].ctypes.data + 4 * w_at, padded, d_row)
                    strips.grad_weights(of, d.ctypes.data, x_row, padded // GROUP_COLUMNS[of], dw[g].ctypes.data + 4 * dw_at)
            _scatter(dx, g * group_size, offsets, live, shape[3], found, n_found, drows)


# -- numpy in, numpy out ---------------------------------------------------------------------------------------------
def _each_chunk(task, images: int, positions: int, threads: int, chunks: int = MAX_CHUNKS) -> list:
    """task((first image, last image)) for up to `chunks` shares of the images, in order; on `threads` threads."""
    chunks = max(1, min(chunks, images, images * positions // BLOCK))
    bounds = [images * i // chunks for i in range(chunks + 1)]
    return each(task, list(zip(bounds, bounds[1:])), threads)


def _shares(macs: int, threads: int) -> int:
    """How many shares a forward pass is cut into: several for each thread, so that none waits long for another at the end, but none small."""
    return 1 if threads == 1 else threads * max(1, min(4, macs // (threads * SHARE_MACS)))


class Prepared:
    """One pair of planes of one layer, packed for the kernels: it serves any number of calls.

    weight: [O, K] whole numbers. table: which of the spec's tables is looked up, "value" (forward) or "slope" (backward).
    dot8: 8-bit dot products where the processor has them and the weights fit.
    """

    def __init__(self, weight: np.ndarray, spec: ReadSpec, table: str = "value", *, dot8: bool = True) -> None:
        g = spec.geometry
        self.spec, self.layout = spec, layout_of(g.group_columns, spec.tiles, spec.order)
        self.dot8 = dot8 and DOT8 and int(np.abs(weight).max(initial=0)) <= MOST8
        self.tiles = np.column_stack([self.layout.words, [stop - start for start, stop in spec.tiles]])
        self.w = packed(weight, spec, self.layout.dot8, np.int8) if self.dot8 else packed(weight, spec, self.layout.plain, np.float32)
        self.padded = -(-g.group_columns // STRIP) * STRIP
        kind, self.adcs, self.kept = _adcs(spec, table, self.padded)
        self.form = kind + DOT8_FORMS * self.dot8
        self.draws = spec.noise.draws + np.float32(0.5) if spec.noise else np.zeros(1, np.float32)
        self.sixteen = _sixteen(spec, self.padded) if self.dot8 and table == "value" else None

    def words(self, positions: int) -> np.ndarray:
        return scratch((len(self.layout.rows) // WORD, positions + LANES), np.int32)

    def rows(self, positions: int) -> np.ndarray:
        return scratch((len(self.layout.rows) + max(n for n, _ in GROUPS), positions), np.float32)


class _Input:
    """Input codes uint8 [N, C, H, W] of a call with their padding, and what depends on their size."""

    def __init__(self, x: np.ndarray, spec: ReadSpec, pad: int) -> None:
        g, (down, right) = spec.geometry, spec.geometry.padding
        self.codes, self.pad = x, pad
        shape = (*x.shape[:2], x.shape[2] + 2 * down, x.shape[3] + 2 * right)
        image = g.channels * shape[2] * shape[3]
        self.flat = np.zeros(x.shape[0] * image + 2 * BYTES, np.uint8)  # sixteen positions may be read where one is left
        self.whole = self.flat[: x.shape[0] * image].reshape(shape)
        self.inner = self.whole[:, :, down : down + x.shape[2], right : right + x.shape[3]]
        self.out = replace(g, padding=(0, 0)).out_size(*shape[2:])
        self.shape = (*self.out, *g.stride, image, shape[3])
        self.offsets = offsets_of(g, spec.tiles, spec.order, *shape[2:])
        self.group_size = image // g.groups

    def fill(self, images: tuple[int, int]) -> None:
        """Write the codes of some images, so that each thread does its own. What is not written yet is 0, a code like any other."""
        part = slice(*images)
        if self.pad:
            self.whole[part] = self.pad
        self.inner[part] = self.codes[part]


def _adcs(spec: ReadSpec, table: str, padded: int) -> tuple[int, np.ndarray, np.ndarray | None]:
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
class _Sixteen:
    """A call in 16 bits. adcs: records [groups, T, ..]; form: of strips.read16; period: tiles whose values add up in 16 bits."""

    adcs: np.ndarray
    form: int
    period: int


def _sixteen(spec: ReadSpec, padded: int) -> _Sixteen | None:
    """None where 16 bits are too few for a multiplier, a partial sum or a value."""
    if spec.p_peak >= MOST15 or spec.noise is not None:
        return None
    return _uniform16(spec, padded) if spec.tables is None else _free16(spec) if spec.tables.value is not None else None


def _uniform16(spec: ReadSpec, padded: int) -> _Sixteen | None:
    g, mult = spec.geometry, spec.rate.astype(np.float64) * 2.0**SHIFT16
    most = float(np.max(np.maximum(np.abs(spec.lo), np.abs(spec.hi)) * np.abs(spec.gain), initial=1))
    if most > MOST15 or not np.array_equal(mult, np.floor(mult)) or mult.max() > MOST15:
        return None
    records = np.zeros((g.groups, len(spec.tiles), padded), ADC16)
    for name, a in (("mult", mult), ("lo", spec.lo), ("hi", spec.hi), ("gain", spec.gain)):
        records[:, :, : g.group_columns][name] = a.reshape(len(spec.tiles), g.groups, -1).transpose(1, 0, 2)
    return _Sixteen(records, int(np.any(spec.gain != 1)), int(MOST15 // most))


def _free16(spec: ReadSpec) -> _Sixteen | None:
    """For one table of whole numbers with few steps; found from the table itself."""
    found = levels16(spec.tables)
    if not found or np.any(spec.gain != 1):
        return None
    form, record = found[0]
    most = max(1, int(np.abs(spec.tables.value).max()))
    return _Sixteen(np.broadcast_to(record, (spec.geometry.groups, len(spec.tiles), 1)).copy(), FREE_FORM + form, MOST15 // most)


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


def forward(x: np.ndarray, weight: np.ndarray, spec: ReadSpec, threads: int, *, dot8: bool = True, dtype: type = np.float32) -> np.ndarray:
    """`run` for weights [O, K] that are used once."""
    return run(Prepared(weight, spec, dot8=dot8), x, threads, dtype=dtype)


def run(prepared: Prepared, x: np.ndarray, threads: int, *, pad: int = 0, dtype: type = np.float32) -> np.ndarray:
    """acc of `dtype` [N, O, H_out, W_out] of one pair of planes: whole numbers unless the spec has real-valued tables.

    x: [N, C, H, W] codes 0..255; the geometry's padding is put around them, with code `pad`.
    """
    spec, given = prepared.spec, _Input(x, prepared.spec, pad)
    out = np.empty((x.shape[0], spec.geometry.columns, given.out[0] * given.out[1]), dtype)

    def task(images):
        given.fill(images)
        words, acc = prepared.words(POSITIONS), (prepared.padded, POSITIONS)
        common, sixteen = (given.flat, given.offsets, given.group_size, prepared.tiles, prepared.w), prepared.sixteen
        if sixteen:
            _forward16(*common, sixteen.adcs, sixteen.form, sixteen.period, given.shape, images, words, scratch(acc, np.int16), scratch(acc, np.int32), out)
        else:
            rows = prepared.rows(0 if prepared.dot8 else POSITIONS)
            _forward(*common, prepared.adcs, prepared.draws, prepared.form, given.shape, images, words, rows, scratch(acc, np.float32), out)

    # images do not meet in a forward pass, so any split gives the same numbers; but noise goes with the blocks of both passes
    positions = given.out[0] * given.out[1]
    shares = MAX_CHUNKS if spec.noise else _shares(out.size * spec.geometry.rows, threads)
    _each_chunk(task, x.shape[0], positions, threads, shares)
    return out.reshape(*out.shape[:2], *given.out)


def backward(x: np.ndarray, weight: np.ndarray, spec: ReadSpec, gy: np.ndarray, threads: int, *, dot8: bool = True) -> tuple[np.ndarray, ...]:
    """(dx of the padded x, dw [O, K], dstep [T, O], dzero [T, O]), float32, for gy float32 [N, O, H_out, W_out]; the spec has no padding.

    dstep = sum of gy * (q - u * slope), dzero = sum of gy * (slope - 1), what the step is multiplied with; 0 where tables give the values.

    Partial sums and noise are computed again, so nothing is kept between the passes; the same bits for any number of threads.
    """
    g, prepared, given = spec.geometry, Prepared(weight, spec, "slope", dot8=dot8), _Input(x, spec, 0)
    flat, layout = np.ascontiguousarray(gy).reshape(*gy.shape[:2], -1), prepared.layout
    back = packed(weight, spec, layout.back, np.float32)
    dx = np.zeros(x.shape, np.float32)

    def task(images):
        given.fill(images)
        dw, sums = scratch((g.groups, layout.dw_size), np.float32), scratch((*prepared.adcs.shape[:2], 2, prepared.padded), np.float32)
        grad, d = (scratch((prepared.padded, BLOCK), np.float32) for _ in range(2))
        _backward(
            given.flat, given.offsets, given.group_size, prepared.tiles, prepared.w, prepared.adcs, prepared.draws, prepared.form, given.shape, images,
            prepared.words(BLOCK), prepared.rows(BLOCK), back, layout.steps, layout.live, grad, d, prepared.rows(BLOCK), flat, dx.reshape(-1), dw, sums,
        )  # fmt: skip
        return dw, sums

    parts = _each_chunk(task, x.shape[0], given.out[0] * given.out[1], threads)
    dw, sums = (sum(part[n] for part in parts) for n in range(2))
    dstep, dzero = sums[..., : g.group_columns].transpose(2, 1, 0, 3).reshape(2, len(spec.tiles), g.columns)
    return dx, dw[:, layout.dw].reshape(g.columns, g.rows), dstep, dzero


# -- requantisation ----------------------------------------------------------------------------------------------------
@compiled
def _requant(xs, mults, add, shift, lo, hi, images, out):
    """out [N, rows, L] = clamp((add + sum of x * mult) >> shift, lo, hi) for images[0] .. images[1]; mults, add: int32 [.., rows]."""
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


def requant(xs: list[np.ndarray], mults: list[np.ndarray], add: np.ndarray, shift: int, lo: int, hi: int, dtype: type, threads: int) -> np.ndarray:
    """[N, ..] of `dtype`: clamp((add + sum of x * mult) >> shift, lo, hi) in int32, which must not overflow.

    xs: whole numbers [N, ..] that broadcast to one shape; mults, add: int32 arrays that broadcast to one sample of it.
    """
    shape, consts = np.broadcast_shapes(*(x.shape for x in xs)), [*mults, add]
    axes = max([0, *(axis + 1 for a in consts for axis, size in enumerate(a.shape) if size > 1)])
    rows = int(np.prod(shape[1 : axes + 1]))
    table = np.stack([np.broadcast_to(a, (*shape[1 : axes + 1], *(1,) * (len(shape) - 1 - axes))).reshape(rows) for a in consts]).astype(np.int32)
    flat = tuple(np.require(np.broadcast_to(x, shape), np.int32, ["C", "W"]).reshape(shape[0], rows, -1) for x in xs)
    out = np.empty(flat[0].shape, dtype)
    whole = [np.int32(n) for n in (shift, lo, hi)]
    _each_chunk(lambda images: _requant(flat, table[:-1], table[-1], *whole, images, out), shape[0], out[0].size, threads, threads)
    return out.reshape(shape)


# -- certification -----------------------------------------------------------------------------------------------------
@compiled
def _convert(p, record, out):
    strips.convert(p.ctypes.data, p.size // LANES, record.ctypes.data, out.ctypes.data)


@compiled
def _convert16(p, record, out):
    strips.convert16(p.ctypes.data, p.size // LANES, record.ctypes.data, out.ctypes.data)


@compiled
def _convert_levels16(p, record, form, out):
    strips.convert_levels16(form, p.ctypes.data, p.size // LANES, record.ctypes.data, out.ctypes.data)


def codes(p: np.ndarray, rate: float, lo: float, hi: float) -> np.ndarray:
    """float32 code - zero of whole-number partial sums through the very lines the kernels run: what certification compares."""
    record = np.zeros(1, ADC)
    record["rate"], record["lo"], record["hi"] = rate, lo, hi
    return _through(_convert, p, record, np.float32)


def codes16(p: np.ndarray, mult: int, lo: int, hi: int) -> np.ndarray:
    """The same, int32, through the lines of the 16-bit form; for a shift of 15 and |p| < 2**15, on processors with 8-bit dot products."""
    record = np.zeros(1, ADC16)
    record["mult"], record["lo"], record["hi"] = mult, lo, hi
    return _through(_convert16, p, record, np.int32)


def every_code(p: np.ndarray, mult: int, shift: int, lo: int, hi: int) -> list[np.ndarray]:
    """code - zero of whole-number partial sums p, once by each form that a read with this multiplier may take on this processor."""
    found = [codes(p, mult / 2.0**shift, lo, hi)]
    if DOT8 and shift == SHIFT16 and np.abs(p).max() < MOST15:
        found.append(codes16(p, mult, lo, hi))
    return found


def every_level(p: np.ndarray, tables: Tables) -> list[np.ndarray]:
    """The table's value of whole-number partial sums p through the 16-bit forms that may be taken."""
    found = levels16(tables) if DOT8 and np.abs(p).max() < MOST15 else []
    return [_through(lambda p, record, out, form=form: _convert_levels16(p, record, form, out), p, record, np.int32) for form, record in found]


def _through(convert, p: np.ndarray, record: np.ndarray, dtype: type) -> np.ndarray:
    padded = scratch((-(-p.size // LANES) * LANES,), dtype)
    padded[: p.size] = p
    out = np.empty_like(padded)
    convert(padded, record, out)
    return out[: p.size]
