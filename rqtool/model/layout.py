"""Which axis of an image is which, and how images [C, H, W] become what a network takes: axes are
exchanged, never reshaped into each other.

An order of axes says where the axes of an image (C, H, W) go: (1, 2, 0) has the channels last. A
signal (C, L) counts as (1, C, L).
"""

from __future__ import annotations

import math

import numpy as np

from rqtool.errors import InputError

Axes = tuple[int, int, int]
Shape = tuple[int, ...]

PLAIN: Axes = (0, 1, 2)
LAST: Axes = (1, 2, 0)  # H, W, C
FIRST: Axes = (2, 0, 1)  # for images whose channels are last, though they were read as first
SWAPPED: Axes = (0, 2, 1)  # signals: L, C for C, L or the other way round
ORDERS = (PLAIN, LAST, FIRST, SWAPPED)


def by(shape: Shape) -> str:
    """
    >>> by((3, 8, 9))
    '3x8x9'
    """
    return "x".join(map(str, shape)) or "a single number"


def laid(x: np.ndarray, axes: Axes, shape: Shape) -> np.ndarray:
    """Images [N, ...] with their axes in another order, each then in `shape`; the array itself
    where nothing changes.

    >>> laid(np.arange(6).reshape(1, 3, 1, 2), LAST, (1, 2, 3)).tolist()
    [[[[0, 2, 4], [1, 3, 5]]]]
    """
    if axes != PLAIN and x.ndim in (3, 4):
        x = x.reshape(len(x), *_three(x.shape[1:])).transpose(0, *(a + 1 for a in axes))
    return np.ascontiguousarray(x.reshape(len(x), *shape))


def views(shape: Shape, own: Axes = PLAIN) -> list[tuple[Axes, Shape]]:
    """What an image of `shape` may be for a network, the likeliest first: (order of its axes,
    shape).

    own: the order of axes in the file; flat images keep it.
    """
    flat = (math.prod(shape),)
    if len(shape) == 1:
        return [(PLAIN, shape), (PLAIN, (1, *shape))]
    if len(shape) not in (2, 3):
        return [(PLAIN, shape), (PLAIN, flat)]
    c, h, w = _three(shape)
    signals = [(PLAIN, (h, w)), (SWAPPED, (w, h)), (PLAIN, (1, h, w))] if c == 1 else []
    images = [(LAST, (h, w, c)), *([(FIRST, (w, c, h))] if c > 1 else [])]
    return list(dict.fromkeys([(PLAIN, shape), *signals, *images, (own, flat)]))


def orders_to(shape: Shape, wanted: Shape, own: Axes = PLAIN) -> list[Axes]:
    """The orders of axes in which an image of `shape` can be `wanted`, the likeliest first; a shape
    that only has as many values takes them in the file's order.

    Raises InputError where the number of values differs, and where only an exchange that no network
    asks for would do.
    """
    if math.prod(shape) != math.prod(wanted):
        raise InputError(
            f"images of {by(shape)} cannot be seen as {by(wanted)}: "
            f"{math.prod(shape)} values are not {math.prod(wanted)}"
        )
    if len(shape) not in (2, 3) or len(wanted) == 1:
        return [own if len(shape) == 3 else PLAIN]
    found = [
        a for a in ORDERS if _may(a, shape, wanted) and _long(_permuted(shape, a)) == _long(wanted)
    ]
    if not found and sorted(_long(shape)) == sorted(_long(wanted)):
        raise InputError(
            f"images of {by(shape)} (channels, height, width) are not "
            f"{by(wanted)}: rows and columns would change places; "
            "give the shape with its axes in their order, channels first or last"
        )
    return found or [own]


def other_orders(shape: Shape, axes: Axes) -> list[Axes]:
    """The orders beside `axes` that put the values of an image of `shape` into other places, as
    other tools would."""
    if len(shape) not in (2, 3) or min(_three(shape)[1:]) == 1:
        return []
    likely = (PLAIN, SWAPPED) if _three(shape)[0] == 1 else (PLAIN, LAST, SWAPPED)
    return [a for a in likely if a != axes]


def channel_axis(axes: Axes, shape: Shape, channels: int) -> int:
    """The axis of a network's input that holds the channels, for `channels` values of one each (1:
    one for all)."""
    axis = len(shape) - 1 if axes == LAST and len(shape) == 3 else 0
    if channels in (1, shape[axis]):
        return axis
    return next((a for a, n in enumerate(shape) if n == channels), axis)


def _three(shape: Shape) -> Shape:
    return (1,) * (3 - len(shape)) + tuple(shape)


def _permuted(shape: Shape, axes: Axes) -> Shape:
    return tuple(_three(shape)[a] for a in axes)


def _long(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _may(axes: Axes, shape: Shape, wanted: Shape) -> bool:
    """Whether an order makes sense: height and width are exchanged only for signals, and one
    channel has no other place."""
    grey = _three(shape)[0] == 1
    if axes == SWAPPED:
        return grey and not (len(wanted) == 3 and wanted[0] == 1 and len(shape) == 3)
    return axes == PLAIN or not grey
