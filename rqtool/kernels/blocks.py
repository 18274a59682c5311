"""Codes and gradients in and out of blocks of output positions: im2col, its transpose, and plain
copies; compiled, for kernels/cpu.py."""

from __future__ import annotations

import numpy as np

from rqtool.kernels import strips
from rqtool.kernels.compiled import compiled
from rqtool.kernels.strips import BLOCK, WORD
from rqtool.kernels.vector import LANES


@compiled
def runs(first, count, shape, found):
    """Runs of positions within one output row: rows of `found` are (start in x, position in the
    block, length); how many.

    shape: (height and width of the output, stride down and right, elements of an image and of a row
    of x).
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
def gather(x, channel, offsets, step, found, n_found, words):
    """im2col of a block: words int32 [words, positions + slack] from x uint8, rows of which advance
    by `step`."""
    stride = words.shape[1] * 4
    for s in range(n_found):
        start, at, length = channel + found[s, 0], found[s, 1], found[s, 2]
        steps = (length + LANES - 1) // LANES
        if step <= 2:
            strips.weave(
                step - 1,
                x.ctypes.data + start,
                offsets.ctypes.data,
                words.shape[0],
                steps,
                words.ctypes.data + 4 * at,
                stride,
            )
        else:
            for k in range(words.shape[0]):
                for i in range(length):
                    word = np.uint32(0)
                    for j in range(WORD):
                        word |= np.uint32(x[start + offsets[WORD * k + j] + i * step]) << np.uint32(
                            8 * j
                        )
                    words[k, at + i] = np.int32(word)


@compiled
def scatter(dx, channel, offsets, live, step, found, n_found, drows):
    """The transpose of `gather`: live rows of gradients added into dx."""
    for k in live:
        for s in range(n_found):
            start, at, length = channel + found[s, 0] + offsets[k], found[s, 1], found[s, 2]
            if step == 1:
                strips.add_run(
                    dx.ctypes.data + 4 * start, drows.ctypes.data + 4 * (k * BLOCK + at), length
                )
            else:
                for i in range(length):
                    dx[start + i * step] += drows[k, at + i]


@compiled
def images(first, count, size, found):
    """Runs of positions within one image: rows of `found` are (image, position in it, position in
    the block, length); how many."""
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
def take_out(acc, column, columns, found, n_found, out):
    """Copy the columns of a block to out [N, O, L], from `column` on."""
    for s in range(n_found):
        at, start = found[s, 1], found[s, 2]
        for i in range(columns):
            target = out[found[s, 0], column + i]
            for j in range(found[s, 3]):
                target[at + j] = acc[i, start + j]


@compiled
def take_in(gy, column, columns, found, n_found, grad):
    """The way back: columns of gy [N, O, L] into a block."""
    for s in range(n_found):
        at, start = found[s, 1], found[s, 2]
        for i in range(columns):
            source = gy[found[s, 0], column + i]
            for j in range(found[s, 3]):
                grad[i, start + j] = source[at + j]


@compiled
def fill(codes, pad, images, x):
    """Write images[0] .. images[1] of codes uint8 [N, C, H, W] into x one after another; pad:
    (code, rows above and below, columns beside).

    What is left of x becomes 0, a code like any other: sixteen positions may be read where one is
    left.
    """
    value, down, right = pad
    width = codes.shape[3] + 2 * right
    size = codes.shape[1] * (codes.shape[2] + 2 * down) * width
    source, target, total = (
        codes[images[0]].ctypes.data,
        x.ctypes.data,
        (images[1] - images[0]) * size,
    )
    strips.repeat(target + total, 0, x.size - total)
    if down == 0 and right == 0:
        strips.copy(target, source, total)
        return
    strips.repeat(target, value, total)
    target += down * width + right
    for _ in range((images[1] - images[0]) * codes.shape[1]):
        for _ in range(codes.shape[2]):
            strips.copy(target, source, codes.shape[3])
            source, target = source + codes.shape[3], target + width
        target += 2 * down * width
