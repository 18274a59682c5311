"""What runs sixteen positions at a time: one tile of a block, as LLVM written out by vector.py.
kernels/cpu.py calls these.

    strip     4 columns x 64 positions of one tile, 16 vectors of partial sums that never leave the registers
    word      four rows of a tile as the four bytes of an int32; a tile ends in rows of weight 0

Partial sums come from 8-bit dot products of words (dot8) or, on any processor, from float32 rows.
Addresses and strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numba.core import cgutils

from rqtool.kernels.vector import (
    BYTES,
    F32,
    F32S,
    I8,
    I16,
    I32,
    I32S,
    I64,
    LANES,
    PACKED,
    Emitter,
    emitted,
    one_of,
)

POSITIONS = 64  # of a strip
VECTORS = POSITIONS // LANES
STRIP = 4  # columns
BLOCK = 256  # positions of a backward block
WORD = 4  # rows
KERNEL_WORDS = 3  # of a 3x3 kernel in a read, the tile that most macros have
NOISE_MASK = 65535
GROUPS = (
    (9, 2),
    (3, 4),
)  # (rows, columns) of one step of a gradient: as many as registers hold, then what is left of a tile

ADC = np.dtype(
    [("rate", "f4"), ("lo", "f4"), ("hi", "f4"), ("gain", "f4"), ("table", "i8"), ("key", "i8")]
)  # of one column in one tile
LEVELS16 = np.dtype(
    [("thresholds", "i2", 32), ("levels", "i2", 32)]
)  # free levels: code n and above from thresholds[n] on
FREE_BITS = (2, 3, 4, 5)  # how often thresholds are halved
BUCKETS = 2 * LANES  # as many 16-bit numbers as a register holds
BUCKETS16 = np.dtype(
    [
        ("mult", "i2"),
        ("lo", "i2"),
        ("hi", "i2"),
        ("gain", "i2"),
        *((name, "i2", BUCKETS) for name in ("threshold", "below", "above")),
    ]
)
ADC16 = np.dtype([("mult", "i2"), ("lo", "i2"), ("hi", "i2"), ("gain", "i2")])
FIELD = {name: ADC.fields[name][1] for name in ADC.names}  # where each is in a record


# -- one strip: partial sums -----------------------------------------------------------------------
def _strip_sums(e: Emitter, x, stride, w, count, dot8: bool) -> list:
    """STRIP x VECTORS vectors: sum over k < count of x[k] * w[k], int32 words (dot8) or float32
    rows; x[k] is `stride` bytes long."""
    kind = I32 if dot8 else F32
    sums = [[e.variable(e.constant(kind, 0)) for _ in range(VECTORS)] for _ in range(STRIP)]

    def add(k) -> None:
        row, weights = e.at(x, (k, stride)), e.at(w, (k, 4 * STRIP))
        xs = [e.load(e.at(row, BYTES * v), kind, LANES) for v in range(VECTORS)]
        for c in range(STRIP):
            weight = e.splat(e.load(e.at(weights, 4 * c), kind))
            for v in range(VECTORS):
                old = e.get(sums[c][v])
                e.put(e.dot8(old, xs[v], weight) if dot8 else e.fma(xs[v], weight, old), sums[c][v])

    usual = KERNEL_WORDS if dot8 else WORD * KERNEL_WORDS - 3
    with e.b.if_else(e.b.icmp_signed("==", count, I64(usual))) as (unrolled, loop):
        with unrolled:
            for k in range(usual):
                add(k)
        with loop, e.times(count) as k:
            add(k)
    return [[e.get(s) for s in column] for column in sums]


def _both(e: Emitter, total, dot8: bool, need_whole: bool) -> tuple:
    """A vector of partial sums as (float32, int32 or None)."""
    if dot8:
        return e.b.sitofp(total, F32S), total
    return total, e.b.fptosi(total, I32S) if need_whole else None


@dataclass(frozen=True)
class _Adc:
    """The ADC of one column in one tile, in registers."""

    rate: object
    lo: object
    hi: object
    gain: object
    table: object
    noise: object  # address of the draws of this strip

    @staticmethod
    def load(e: Emitter, record, draws, first) -> _Adc:
        """From an ADC record; `first` is the number of the strip's first position, it picks the
        draws."""
        rate, lo, hi, gain = (
            e.splat(e.load(e.at(record, FIELD[name]), F32)) for name in ("rate", "lo", "hi", "gain")
        )
        table, key = (e.load(e.at(record, FIELD[name]), I64) for name in ("table", "key"))
        return _Adc(
            rate,
            lo,
            hi,
            gain,
            table,
            None if draws is None else e.at(draws, (4, _start(e, key, first))),
        )


def _start(e: Emitter, key, first):
    """Where in the draws a strip's noise starts: a hash of its column, tile and seed (the key) and
    its first position."""
    h = e.b.add(key, e.b.mul(first, I64(0x94D049BB133111EB - (1 << 64))))
    h = e.b.xor(h, e.b.lshr(h, I64(31)))
    h = e.b.mul(h, I64(0xD6E8FEB86659FD93 - (1 << 64)))
    return e.b.and_(e.b.lshr(h, I64(32)), I64(NOISE_MASK))


def _raw_code(e: Emitter, p, adc: _Adc, v: int):
    """floor(p * rate + 1/2) as float32, or with the draws (which hold the 1/2) in place of it."""
    half = (
        e.constant(F32, 0.5)
        if adc.noise is None
        else e.load(e.at(adc.noise, BYTES * v), F32, LANES)
    )
    return e.floor(e.fma(p, adc.rate, half))


# -- one tile: all strips --------------------------------------------------------------------------
def _reader(dot8: bool, kind: str):
    """A body that adds one tile's reads to acc float32 [columns][POSITIONS]; kind: hard, noisy or
    table."""

    def read_tile(e, x, stride, w, count, adcs, strips, draws, first, acc):
        with e.times(strips) as s:
            weights = e.at(w, (e.b.mul(s, count), 4 * STRIP))
            sums = _strip_sums(e, x, stride, weights, count, dot8)
            for c in range(STRIP):
                column = e.at(acc, (s, STRIP * 4 * POSITIONS), c * 4 * POSITIONS)
                adc = _Adc.load(
                    e,
                    e.at(adcs, (s, STRIP * ADC.itemsize), c * ADC.itemsize),
                    draws if kind == "noisy" else None,
                    first,
                )
                for v in range(VECTORS):
                    p, whole = _both(e, sums[c][v], dot8, kind == "table")
                    q = (
                        e.gather(adc.table, whole)
                        if kind == "table"
                        else e.clamp(_raw_code(e, p, adc, v), adc.lo, adc.hi)
                    )
                    place = e.at(column, BYTES * v)
                    e.store(e.fma(q, adc.gain, e.load(place, F32, LANES)), place)

    return read_tile


def _load16(e: Emitter, record) -> list:
    """(mult, lo, hi, gain) of an ADC16 record, 32 lanes each."""
    return [e.splat(e.load(e.at(record, 2 * n), I16, align=2), 2 * LANES) for n in range(4)]


def _code16(e: Emitter, a, b, adc: list):
    """The codes less the zero of two int32 vectors of partial sums, int16 in the order of `pack16`."""
    return e.clamp16(e.scale15(e.pack16(a, b), adc[0]), adc[1], adc[2])


def _load_levels(e: Emitter, record, bits: int) -> tuple:
    """(the thresholds that each of `bits` halvings compares with, the levels), by index: from a
    LEVELS16 record.

    The index of a code is what it lacks to the highest one, so that each halving takes something
    away: LLVM makes one masked operation of that, and two of putting a bit in."""
    thresholds, levels = (e.load(e.at(record, BYTES * n), I16, 2 * LANES) for n in range(2))
    full, lanes = (1 << bits) - 1, range(2 * LANES)
    above = [
        e.shuffle(thresholds, thresholds, [(full - n) % (full + 1) | 1 << bit for n in lanes])
        for bit in range(bits - 1, -1, -1)
    ]
    return above, e.shuffle(levels, levels, [(full - n) % (full + 1) for n in lanes])


def _level16(e: Emitter, a, b, tables: tuple):
    """The levels of two int32 vectors of partial sums, in the order of `pack16`."""
    p, (above, levels) = e.pack16(a, b), tables
    index = e.constant(I16, (1 << len(above)) - 1, 2 * LANES)
    for n, thresholds in enumerate(above):
        bit = 1 << (len(above) - 1 - n)
        edge = (
            e.pick16(thresholds, index)
            if n
            else e.shuffle(thresholds, thresholds, [2 * bit - 1] * 2 * LANES)
        )
        index = e.b.select(
            e.b.icmp_signed(">=", p, edge), e.b.sub(index, e.constant(I16, bit, 2 * LANES)), index
        )
    return e.pick16(levels, index)


def _load_buckets(e: Emitter, record) -> tuple:
    """(the coarse ADC; the threshold in every bucket, the levels below and above it) of a BUCKETS16
    record."""
    return _load16(e, record), *(
        e.load(e.at(record, BUCKETS16.fields[name][1]), I16, BUCKETS, align=2)
        for name in ("threshold", "below", "above")
    )


def _bucket16(e: Emitter, a, b, tables: tuple):
    """The same by buckets: a uniform ADC of 32 codes says which threshold is near, and only that
    one is compared with.

    A code picks its table entry modulo 32, as the look-up does by itself."""
    (mult, lo, hi, _), threshold, below, above = tables
    p = e.pack16(a, b)
    bucket = e.clamp16(e.scale15(p, mult), lo, hi)
    return e.b.select(
        e.b.icmp_signed(">=", p, e.pick16(threshold, bucket)),
        e.pick16(above, bucket),
        e.pick16(below, bucket),
    )


def _gained16(e: Emitter, a, b, adc: list):
    return e.b.mul(_code16(e, a, b, adc), adc[3])


def _reader16(record: np.dtype, load: Callable, convert: Callable):
    """The same in whole numbers of 16 bits: acc int16 [columns][POSITIONS], in the order of
    `pack16`.

    load(e, address of a column's record); convert(e, a, b, what it gave)."""

    def read_tile(e, x, stride, w, count, adcs, strips, acc):
        with e.times(strips) as s:
            sums = _strip_sums(e, x, stride, e.at(w, (e.b.mul(s, count), 4 * STRIP)), count, True)
            for c in range(STRIP):
                adc = load(e, e.at(adcs, (s, STRIP * record.itemsize), c * record.itemsize))
                for h in range(VECTORS // 2):
                    q = convert(e, sums[c][2 * h], sums[c][2 * h + 1], adc)
                    e.add_to(
                        e.at(acc, (s, STRIP * 2 * POSITIONS), c * 2 * POSITIONS + BYTES * h), q
                    )

    return read_tile


@emitted
def widen(e, acc16, columns, acc):
    """acc int32 [columns][POSITIONS] += acc16, in the order of positions; acc16 = 0."""
    order = [PACKED.index(n) for n in range(2 * LANES)]
    with e.times(e.b.mul(columns, I64(VECTORS // 2))) as n:
        source = e.at(acc16, (n, BYTES))
        packed = e.load(source, I16, 2 * LANES)
        for half in range(2):
            part = e.shuffle(packed, packed, order[LANES * half : LANES * (half + 1)])
            e.add_to(e.at(acc, (n, 2 * BYTES), BYTES * half), e.b.sext(part, I32S))
        e.store(e.constant(I16, 0, 2 * LANES), source)


def _sloper(dot8: bool, kind: str):
    """A body for one tile of a block: d [columns][BLOCK] = gradient of the partial sums; sums
    [2][columns] += gy * (q - u * slope), the gradient of the step, and gy * (slope - 1), that of
    the zero in units of the step.

    kind: hard (straight through: 1 inside, 0 where the code clips), noisy (exact slope from a
    table, the forward pass's draws) or table (the same without a step to learn, and no sums).
    """

    def slope_tile(e, x, stride, w, count, adcs, strips, draws, first, grad, d, sums):
        with e.times(strips) as s:
            weights, records = (
                e.at(w, (e.b.mul(s, count), 4 * STRIP)),
                e.at(adcs, (s, STRIP * ADC.itemsize)),
            )
            totals = [e.variable(e.constant(F32, 0.0)) for _ in range(2 * STRIP)]
            with e.times(BLOCK // POSITIONS) as n:
                partial = _strip_sums(e, e.at(x, (n, 4 * POSITIONS)), stride, weights, count, dot8)
                for c in range(STRIP):
                    adc = _Adc.load(
                        e,
                        e.at(records, c * ADC.itemsize),
                        draws if kind == "noisy" else None,
                        e.at(first, (n, POSITIONS)),
                    )
                    row = e.at(I64(0), (s, STRIP * 4 * BLOCK), c * 4 * BLOCK, (n, 4 * POSITIONS))
                    for v in range(VECTORS):
                        gy, place = (
                            e.load(e.at(grad, row, BYTES * v), F32, LANES),
                            e.at(d, row, BYTES * v),
                        )
                        terms = _slope(
                            e,
                            _both(e, partial[c][v], dot8, kind != "hard"),
                            gy,
                            adc,
                            v,
                            kind,
                            place,
                        )
                        for total, term in zip(totals[c::STRIP], terms):
                            e.put(e.b.fadd(e.get(total), term), total)
            if kind != "table":
                found = e.sum_lanes([e.get(t) for t in totals])
                for n in range(2):
                    place = e.at(sums, (s, 4 * STRIP), (strips, n * 4 * STRIP))
                    e.add_to(
                        place, e.shuffle(found, found, list(range(n * STRIP, (n + 1) * STRIP)))
                    )

    return slope_tile


def _slope(e: Emitter, sums: tuple, gy, adc: _Adc, v: int, kind: str, place) -> tuple:
    """Store d = gy * slope; the terms (gy * (q - u * slope), d - gy) of the sums, none for tables."""
    p, whole = sums
    if kind == "table":
        e.store(e.b.fmul(gy, e.gather(adc.table, whole)), place)
        return ()
    raw = _raw_code(e, p, adc, v)
    q = e.clamp(raw, adc.lo, adc.hi)
    d = (
        e.b.select(e.b.fcmp_ordered("==", q, raw), gy, e.constant(F32, 0.0))
        if kind == "hard"
        else e.b.fmul(gy, e.gather(adc.table, whole))
    )
    e.store(d, place)
    return e.b.fsub(e.b.fmul(gy, q), e.b.fmul(e.b.fmul(p, adc.rate), d)), e.b.fsub(d, gy)


# -- one tile: gradients of rows and weights -------------------------------------------------------
def _grad_rows(rows: int):
    """drows [rows][BLOCK] = w.T @ d, for `rows` rows: w float32 [columns][rows], d
    [columns][BLOCK]."""
    vectors = 2 if rows > 4 else 4

    def grad_rows(e, d, w, columns, drows):
        with e.times(BLOCK // (vectors * LANES)) as n:
            at = e.at(I64(0), (n, BYTES * vectors))
            sums = [[e.variable(e.constant(F32, 0.0)) for _ in range(vectors)] for _ in range(rows)]
            with e.times(columns) as c:
                column = e.at(d, at, (c, 4 * BLOCK))
                ds = [e.load(e.at(column, BYTES * v), F32, LANES) for v in range(vectors)]
                for r in range(rows):
                    weight = e.splat(e.load(e.at(w, (c, 4 * rows), 4 * r), F32))
                    for v in range(vectors):
                        e.put(e.fma(ds[v], weight, e.get(sums[r][v])), sums[r][v])
            for r in range(rows):
                for v in range(vectors):
                    e.store(e.get(sums[r][v]), e.at(drows, at, r * 4 * BLOCK, BYTES * v))

    return grad_rows


def _grad_weights(rows: int, columns: int):
    """dw [sets of columns][lanes] += d @ x.T for `rows` rows x [rows][..]: lane column * rows +
    row, in whole vectors."""
    vectors = -(-rows * columns // LANES)

    def grad_weights(e, d, x, sets, dw):
        with e.times(sets) as s:
            sums = [e.variable(e.constant(F32, 0.0)) for _ in range(rows * columns)]
            with e.times(BLOCK // LANES) as n:
                ds = [
                    e.load(e.at(d, (s, columns * 4 * BLOCK), c * 4 * BLOCK, (n, BYTES)), F32, LANES)
                    for c in range(columns)
                ]
                for r in range(rows):
                    row = e.load(e.at(x, r * 4 * BLOCK, (n, BYTES)), F32, LANES)
                    for c in range(columns):
                        place = sums[c * rows + r]
                        e.put(e.fma(ds[c], row, e.get(place)), place)
            for v in range(vectors):
                total = e.sum_lanes([e.get(place) for place in sums[LANES * v : LANES * (v + 1)]])
                e.add_to(e.at(dw, (s, vectors * BYTES), v * BYTES), total)

    return grad_weights


# -- im2col ----------------------------------------------------------------------------------------
def _weaver(step: int):
    """A body: words [words][..] at `out` from a run of positions, sixteen at a time, of rows that
    advance by `step` bytes."""

    def weave(e, x, offsets, words, steps, out, stride):
        with e.times(words) as k:
            sources = [
                e.at(x, e.load(e.at(offsets, (k, 8 * WORD), 8 * j), I64)) for j in range(WORD)
            ]
            with e.times(steps) as n:
                rows = [
                    e.load(e.at(source, (n, LANES * step)), I8, LANES * step, align=1)
                    for source in sources
                ]
                rows = [e.shuffle(r, r, list(range(0, LANES * step, step))) for r in rows]
                pairs = [
                    e.shuffle(a, b, list(range(2 * LANES))) for a, b in zip(rows[::2], rows[1::2])
                ]
                woven = e.shuffle(
                    *pairs, [p + LANES * j for p in range(LANES) for j in range(WORD)]
                )
                e.store(e.b.bitcast(woven, I32S), e.at(out, (k, stride), (n, BYTES)))

    return weave


@emitted
def unweave(e, words, count, vectors, rows):
    """float32 rows [WORD * count][16 * vectors] from words [count][16 * vectors + SLACK]."""
    with e.times(count) as k:
        with e.times(vectors) as n:
            word = e.load(
                e.at(words, (e.b.mul(k, e.b.add(vectors, I64(1))), BYTES), (n, BYTES)), I32, LANES
            )
            for j in range(WORD):
                byte = e.b.and_(e.b.lshr(word, e.constant(I32, 8 * j)), e.constant(I32, 255))
                place = e.at(
                    rows,
                    (e.b.mul(e.b.add(e.b.mul(k, I64(WORD)), I64(j)), vectors), BYTES),
                    (n, BYTES),
                )
                e.store(e.b.uitofp(byte, F32S), place)


@emitted
def add_run(e, target, source, count):
    """float32 target[0 .. count) += source, sixteen at a time; the last lanes are masked."""
    lanes = e.numbers()
    with e.times(e.b.sdiv(e.b.add(count, I64(LANES - 1)), I64(LANES))) as n:
        left = e.b.trunc(e.b.sub(count, e.b.mul(n, I64(LANES))), I32)
        mask = e.b.icmp_signed("<", lanes, e.splat(left))
        old, new = (e.masked_load(e.at(a, (n, BYTES)), mask) for a in (target, source))
        e.masked_store(e.b.fadd(old, new), e.at(target, (n, BYTES)), mask)


@emitted
def copy(e, target, source, count):
    """memory[target .. target + count) = memory[source ..), bytes."""
    cgutils.raw_memcpy(
        e.b, *(e.b.inttoptr(a, cgutils.voidptr_t) for a in (target, source)), count, 1
    )


@emitted
def repeat(e, target, byte, count):
    """memory[target .. target + count) = byte."""
    cgutils.memset(e.b, e.b.inttoptr(target, cgutils.voidptr_t), count, e.b.trunc(byte, I8))


HARD, NOISY, TABLE = range(3)
KINDS = ("hard", "noisy", "table")
FORMS = [
    (dot8, kind) for dot8 in (False, True) for kind in KINDS
]  # form = KIND, or KIND + 3 for 8-bit dot products
read = emitted(one_of([_reader(*form) for form in FORMS]))
slope = emitted(one_of([_sloper(*form) for form in FORMS]))
FREE16 = [
    (BUCKETS16, _load_buckets, _bucket16),
    *((LEVELS16, partial(_load_levels, bits=bits), _level16) for bits in FREE_BITS),
]
read16 = emitted(
    one_of(
        [
            _reader16(*form)
            for form in ((ADC16, _load16, _code16), (ADC16, _load16, _gained16), *FREE16)
        ]
    )
)
grad_rows = emitted(one_of([_grad_rows(rows) for rows, _ in GROUPS]))
grad_weights = emitted(one_of([_grad_weights(*group) for group in GROUPS]))
weave = emitted(one_of([_weaver(1), _weaver(2)]))


# -- certification ---------------------------------------------------------------------------------
@emitted
def convert(e, p, vectors, record, out):
    """float32 code - zero of float32 partial sums, through the lines that every strip runs."""
    adc = _Adc.load(e, record, None, None)
    with e.times(vectors) as n:
        sums = e.load(e.at(p, (n, BYTES)), F32, LANES)
        e.store(e.clamp(_raw_code(e, sums, adc, 0), adc.lo, adc.hi), e.at(out, (n, BYTES)))


@emitted
def convert16(e, p, vectors, record, out):
    """The same in 16 bits: int32 partial sums, int32 codes."""
    with e.times(vectors) as n:
        sums = e.load(e.at(p, (n, BYTES)), I32, LANES)
        q = _code16(e, sums, sums, _load16(e, record))
        e.store(
            e.b.sext(e.shuffle(q, q, [PACKED.index(lane) for lane in range(LANES)]), I32S),
            e.at(out, (n, BYTES)),
        )


def _converter16(load: Callable, convert: Callable) -> Callable:
    def convert_tile(e, p, vectors, record, out):
        tables = load(e, record)
        with e.times(vectors) as n:
            sums = e.load(e.at(p, (n, BYTES)), I32, LANES)
            q = convert(e, sums, sums, tables)
            e.store(
                e.b.sext(e.shuffle(q, q, [PACKED.index(lane) for lane in range(LANES)]), I32S),
                e.at(out, (n, BYTES)),
            )

    return convert_tile


convert_levels16 = emitted(
    one_of([_converter16(*form) for _, *form in FREE16])
)  # the levels of int32 partial sums, int32
