"""Where each weight and each row goes in what the kernels read: index arrays, made once a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rqtool.kernels.spec import ReadSpec
from rqtool.kernels.strips import GROUPS, STRIP, WORD
from rqtool.kernels.vector import BYTES, LANES
from rqtool.mapping.plan import Geometry


@dataclass(frozen=True)
class Layout:
    """How one group's [columns, K] weights are packed; index K * columns stands for a zero.

    words: int64 [T, 2], first word and words of each tile; rows: int64 [4 * words], the row of the
    group in each byte (a row that only fills a word repeats another one); live: int64 [K], the byte
    of each row. dot8, plain: weight index of each packed byte or float of `read`; back: the same
    for the gradient of rows; dw: [columns, K], the place of each weight's gradient. steps: int64
    [.., 5], the gradients' steps: (tile, first byte, size of GROUPS, start in back, start in dw).
    """

    words: np.ndarray
    rows: np.ndarray
    live: np.ndarray
    dot8: np.ndarray
    plain: np.ndarray
    back: np.ndarray
    dw: np.ndarray
    dw_size: int
    steps: np.ndarray


@lru_cache(maxsize=256)
def layout_of(
    columns: int, tiles: tuple[tuple[int, int], ...], order: tuple[int, ...] | None = None
) -> Layout:
    """The layout of a group with so many columns, these (start, stop) tiles and the rows in this
    order, as in `Plan`."""
    k_rows, padded = tiles[-1][1], -(-columns // STRIP) * STRIP
    index = np.full((padded, k_rows + 1), columns * k_rows)
    row_at = np.arange(k_rows) if order is None else np.array(order)
    index[:columns, :k_rows] = np.arange(columns * k_rows).reshape(columns, k_rows)[:, row_at]
    words, rows, dot8, plain, back, steps, dw = (
        [],
        [],
        [],
        [],
        [],
        [],
        np.zeros((padded, k_rows), np.int64),
    )
    at_word = at_back = at_dw = 0
    for t, (start, stop) in enumerate(tiles):
        n_words = -(-(stop - start) // WORD)
        bytes_of = np.concatenate(
            [np.arange(start, stop), np.full(n_words * WORD - (stop - start), k_rows)]
        )
        words.append((at_word, n_words))
        rows.append(row_at[np.minimum(bytes_of, stop - 1)])
        dot8.append(
            index[:, bytes_of].reshape(-1, STRIP, n_words, WORD).transpose(0, 2, 1, 3).ravel()
        )
        plain.append(
            index[:, start:stop].reshape(-1, STRIP, stop - start).transpose(0, 2, 1).ravel()
        )
        row = start
        while row < stop:
            size = 0 if stop - row >= GROUPS[0][0] else 1
            n, wide = GROUPS[size]
            of_step = np.concatenate(
                [np.arange(row, min(row + n, stop)), np.full(max(0, row + n - stop), k_rows)]
            )
            steps.append((t, at_word * WORD + row - start, size, at_back, at_dw))
            back.append(index[:, of_step].ravel())
            lanes = -(-n * wide // LANES) * LANES
            place = (
                at_dw
                + np.arange(padded)[:, None] // wide * lanes
                + np.arange(padded)[:, None] % wide * n
                + np.arange(n)[None]
            )
            dw[:, row_at[row : min(row + n, stop)]] = place[:, : min(n, stop - row)]
            at_back, at_dw, row = at_back + padded * n, at_dw + padded // wide * lanes, row + n
        at_word += n_words
    rows = np.concatenate(rows)
    live = np.concatenate(
        [WORD * first + np.arange(stop - start) for (first, _), (start, stop) in zip(words, tiles)]
    )
    return Layout(
        np.array(words),
        rows,
        live,
        np.concatenate(dot8),
        np.concatenate(plain),
        np.concatenate(back),
        dw[:columns],
        at_dw,
        np.array(steps),
    )


@lru_cache(maxsize=256)
def offsets_of(
    geometry: Geometry,
    tiles: tuple[tuple[int, int], ...],
    order: tuple[int, ...] | None,
    height: int,
    width: int,
) -> np.ndarray:
    """int64 [4 * words]: where the row of each byte starts in an image of the padded [C, height,
    width], counted from the group's first channel."""
    (kh, kw), (dh, dw) = geometry.kernel, geometry.dilation
    channel, place = np.divmod(layout_of(geometry.group_columns, tiles, order).rows, kh * kw)
    return channel * height * width + place // kw * dh * width + place % kw * dw


def packed(weight: np.ndarray, spec: ReadSpec, index: np.ndarray, dtype: type) -> np.ndarray:
    """[groups, ..] of `dtype` from the whole-number weight [O, K]."""
    g = spec.geometry
    flat = np.zeros((g.groups, g.group_columns * g.rows + 1), dtype)
    flat[:, :-1] = weight.reshape(g.groups, -1)
    return aligned(np.take(flat, index, axis=1))


def aligned(a: np.ndarray) -> np.ndarray:
    """A copy that starts at a whole vector."""
    out = scratch(a.shape, a.dtype)
    out[...] = a
    return out


def scratch(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that start at a whole vector."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(count + BYTES, np.uint8)
    start = -raw.ctypes.data % BYTES
    return raw[start : start + count].view(dtype).reshape(shape)
