"""How the reads of one layer lie in the file: the channels of each tile, the cells of each read,
the constants of its ADC.

    read        R = groups x tiles x weight planes x columns of a group, in this order (the last runs fastest)
    channels    each tile takes `span` neighbouring channels of its group; cells of rows outside the tile hold 0
    cells       [R, span, kh, kw]: the weights as the macro holds them, one plane of one tile of one column per entry

One grouped convolution (group = groups x tiles) over the gathered channels then gives every partial
sum of an input plane. Where rows are taken in an order of their own, each place counts as a channel
with a 1x1 kernel, and the gathered channels are the taps of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.hardware import adc
from rqtool.hardware.converter import Converter, Uniform
from rqtool.hardware.macro import Macro
from rqtool.mapping.cells import cells
from rqtool.mapping.plan import Geometry, Plan
from rqtool.program.ir import Op, Program

PAIR_PEAK = 32767  # two products are added in 16 bits by x86 processors without 8-bit dot products
GAIN_RANGE = (-128, 127)  # of a uint8 with zero point 128
CERTIFY_BLOCK = 1 << 22  # partial sums tried at once


@dataclass(frozen=True)
class Layout:
    """One reads operation, ready to be written down."""

    program: Program
    op: Op

    @cached_property
    def plan(self) -> Plan:
        return self.program.plan(self.op)

    @property
    def geometry(self) -> Geometry:
        return self.plan.geometry

    @property
    def macro(self) -> Macro:
        """The layer's own macro."""
        return self.plan.macro

    @cached_property
    def adc(self) -> Converter:
        """The ADCs of its reads."""
        return self.program.adc(self.op)

    # -- rows and channels -------------------------------------------------------------------------
    @cached_property
    def tiles(self) -> int:
        """Tiles of one group."""
        return len(self.plan.tiles)

    @property
    def planes(self) -> int:
        """J, weight planes."""
        return len(self.plan.weight_planes)

    @property
    def reads(self) -> int:
        """R, reads per position and input plane."""
        return self.plan.tile_count * self.planes * self.geometry.group_columns

    @property
    def ordered(self) -> bool:
        """Whether rows are taken in an order of their own."""
        return self.plan.order is not None

    @property
    def kernel(self) -> tuple[int, int]:
        """The kernel of the convolution that reads the gathered channels."""
        return (1, 1) if self.ordered else self.geometry.kernel

    @cached_property
    def span(self) -> int:
        """Channels that the widest tile touches."""
        taps = prod(self.kernel)
        return max((stop - 1) // taps - start // taps + 1 for start, stop in self.plan.tiles)

    @cached_property
    def first_channel(self) -> tuple[int, ...]:
        """The first of the `span` channels of each tile, counted within the group."""
        taps = prod(self.kernel)
        return tuple(
            min(start // taps, self.geometry.rows // taps - self.span)
            for start, _ in self.plan.tiles
        )

    @cached_property
    def channels(self) -> np.ndarray:
        """int64 [groups * tiles * span]: what the convolution takes, see `gathered`."""
        return gathered(self.geometry, self.first_channel, self.span, self.plan.order)

    @cached_property
    def gathers(self) -> bool:
        """Whether the channels must be reordered or repeated; not when tiles and channels coincide."""
        return not np.array_equal(
            self.channels,
            np.arange(self.geometry.channels * prod(self.geometry.kernel) // prod(self.kernel)),
        )

    # -- cells -------------------------------------------------------------------------------------
    @cached_property
    def values(self) -> np.ndarray:
        """int16 [R, span, kh, kw]: what each cell contributes per input code."""
        g, (kh, kw) = self.geometry, self.kernel
        weight = self.program.const(self.op, "weight").astype(np.int16).reshape(g.columns, g.rows)
        held = np.stack(cells(self.plan, weight), 1)
        held = held.reshape(g.groups, g.group_columns, self.planes, g.rows)
        if self.ordered:
            held = held[..., list(self.plan.order)]
        values = np.zeros(
            (g.groups, self.tiles, self.planes, g.group_columns, self.span * kh * kw), np.int16
        )
        for t, (start, stop) in enumerate(self.plan.tiles):
            at = start - self.first_channel[t] * kh * kw
            part = held[..., start:stop].transpose(0, 2, 1, 3)
            values[:, t, :, :, at : at + stop - start] = part
        return values.reshape(self.reads, self.span, kh, kw)

    @cached_property
    def cell_zero(self) -> int | None:
        """The zero point of uint8 cells, or None for int8 ones: where int8 cannot hold a value, or
        a pair of products could saturate."""
        peak_x, peak_w = (
            max(p.peak for p in self.plan.input_planes),
            int(np.abs(self.values).max(initial=0)),
        )
        if 2 * peak_x * peak_w <= PAIR_PEAK and peak_w <= 127:
            return None
        return 0 if self.values.min() >= 0 else 128

    @cached_property
    def cells(self) -> np.ndarray:
        """int8 or uint8 [R, span, kh, kw], see `cell_zero`."""
        return (
            self.values.astype(np.int8)
            if self.cell_zero is None
            else (self.values + self.cell_zero).astype(np.uint8)
        )

    # -- the ADC -----------------------------------------------------------------------------------
    def per_read(self, table: np.ndarray) -> np.ndarray:
        """int32 [1] where all reads share it, else [R], from a table [tiles or 1, columns or 1]."""
        return by_read(table, self.geometry.groups, self.tiles, self.planes, self.geometry.columns)

    def thresholds_per_read(self, rows: np.ndarray) -> np.ndarray:
        """int32 [top, 1 or R] from thresholds [columns or 1, top], see `thresholds_by_read`."""
        g = self.geometry
        return thresholds_by_read(rows, g.groups, self.tiles, self.planes, g.columns)

    @cached_property
    def gain(self) -> np.ndarray:
        """int32 [R]: the gain of each read times the factor of its weight plane."""
        gain = self.per_read(self.adc.gain)
        factor = np.array([p.factor for p in self.plan.weight_planes], np.int32)[:, None]
        shape = (self.plan.tile_count, self.planes, self.geometry.group_columns)
        return (
            (np.broadcast_to(gain, self.reads).reshape(shape) * factor).reshape(-1).astype(np.int32)
        )

    @cached_property
    def tile_gain(self) -> np.ndarray | None:
        """int32 [groups or 1, 1, tiles * planes] where the columns of a group share their gains and
        8 bits hold them, else None."""
        gain = self.gain.reshape(
            self.geometry.groups, self.tiles * self.planes, self.geometry.group_columns
        )
        if (
            (gain != gain[:, :, :1]).any()
            or gain.min() < GAIN_RANGE[0]
            or gain.max() > GAIN_RANGE[1]
        ):
            return None
        rows = gain[:, None, :, 0]
        return rows[:1] if (rows == rows[:1]).all() else rows

    @cached_property
    def p_range(self) -> tuple[int, int]:
        """The smallest and largest partial sum any read of this layer can give."""
        pairs = [
            self.plan.p_bounds(i, j)
            for i in range(len(self.plan.input_planes))
            for j in range(self.planes)
        ]
        return min(lo for lo, _ in pairs), max(hi for _, hi in pairs)

    @cached_property
    def steps(self) -> np.ndarray:
        """int64 [n, 2]: the distinct (mult, zero) of this layer's reads, which are uniform, sorted."""
        one = self.adc.each()
        return np.unique(np.concatenate([one.mult, one.zero], 1), axis=0)

    @cached_property
    def requantises(self) -> bool:
        """Whether the requantisation of a QLinearConv is this ADC: uniform, one zero, and certified
        over every partial sum."""
        if not isinstance(self.adc, Uniform) or np.unique(self.adc.zero).size > 1:
            return False
        peak, top, shift = max(abs(p) for p in self.p_range), self.adc.top, self.adc.shift
        exact = adc.float32_exact(peak, shift, top.bit_length()) and top <= 255
        return exact and not differing_codes(self.steps, self.p_range, shift, top)


def gathered(
    geometry: Geometry, first_channel: Sequence[int], span: int, order: Sequence[int] | None
) -> np.ndarray:
    """int64 [groups * tiles * span]: the input channels in the order in which the convolution takes
    them; with an `order` of the rows, the index (tap, channel) of what each place takes, where taps
    are counted (ky, kx).

    >>> gathered(Geometry(2, 1, (1, 2)), [0, 2], 2, None), gathered(Geometry(2, 1, (1, 2)), [0, 2], 2, [0, 3, 2, 1])
    (array([0, 1, 2, 3]), array([0, 3, 1, 2]))
    """
    taken, group = (
        np.array(first_channel)[:, None] + np.arange(span),
        geometry.channels // geometry.groups,
    )
    if order is not None:
        channel, tap = np.divmod(np.array(order), prod(geometry.kernel))
        taken = (tap * geometry.channels + channel)[taken]
    return (np.arange(geometry.groups)[:, None, None] * group + taken).reshape(-1)


def by_read(table: np.ndarray, groups: int, tiles: int, planes: int, columns: int) -> np.ndarray:
    """int32 [1] where all reads share it, else [R] in the order of the reads, from a table [tiles
    or 1, columns or 1].

    >>> by_read(np.array([[1, 2], [3, 4]]), groups=2, tiles=2, planes=1, columns=2)
    array([1, 3, 2, 4], dtype=int32)
    """
    if (table == table.flat[0]).all():
        return table.reshape(-1)[:1].astype(np.int32)
    full = (
        np.broadcast_to(table, (tiles, columns))
        .reshape(tiles, groups, 1, columns // groups)
        .transpose(1, 0, 2, 3)
    )
    return (
        np.broadcast_to(full, (groups, tiles, planes, columns // groups))
        .reshape(-1)
        .astype(np.int32)
    )


def thresholds_by_read(
    rows: np.ndarray, groups: int, tiles: int, planes: int, columns: int
) -> np.ndarray:
    """int32 [top, 1] where all reads share them, else [top, R] in the order of the reads, from
    thresholds [1 or columns, top].

    >>> thresholds_by_read(np.array([[-3, 2], [-9, 5]]), groups=2, tiles=2, planes=1, columns=2).tolist()
    [[-3, -3, -9, -9], [2, 2, 5, 5]]
    """
    return np.stack(
        np.broadcast_arrays(
            *(by_read(column[None], groups, tiles, planes, columns) for column in rows.T)
        )
    )


def requantised(
    p: np.ndarray, mult: np.ndarray, shift: int, zero: np.ndarray, top: int
) -> np.ndarray:
    """The codes that QLinearConv and Clip compute, step by step in float32: int64, the broadcast
    shape of p, mult and zero."""
    scale = mult.astype(np.float32) / np.float32(1 << shift)
    rounded = np.rint(p.astype(np.float32) * scale).astype(np.int64) + zero
    return rounded.clip(0, 255).clip(0, top)


def differing_codes(steps: np.ndarray, p_range: tuple[int, int], shift: int, top: int) -> int:
    """How many of all possible partial sums get another code from `requantised` than from the ADC's
    definition.

    steps: int64 [n, 2], (mult, zero) pairs. Every integer of p_range is tried with every pair.
    """
    domain = np.arange(p_range[0], p_range[1] + 1, dtype=np.int64)
    block = max(1, CERTIFY_BLOCK // domain.size)
    wrong = 0
    for start in range(0, len(steps), block):
        mult, zero = steps[start : start + block, :1], steps[start : start + block, 1:]
        wrong += int(
            (
                requantised(domain, mult, shift, zero, top)
                != adc.uniform_code(domain, mult, shift, zero, top)
            ).sum()
        )
    return wrong


def refuse_wide_inputs(layout: Layout) -> None:
    """Raise InputError where a layer's input codes do not fit the bits that the macro drives:
    planes would drop the rest."""
    tensor, macro = layout.program.tensors[layout.op.inputs[0]], layout.macro
    if (
        tensor.lo is None
        or tensor.lo < 0
        or tensor.hi > macro.q_x
        or not 0 <= layout.op.attrs["pad"] <= macro.q_x
    ):
        raise InputError(
            f"{escaped(layout.op.attrs['layer'])}: its input reaches "
            f"{tensor.lo}..{tensor.hi}, but the macro drives codes "
            f"0..{macro.q_x}; "
            f"requantise the input first or raise --in-bits"
        )
