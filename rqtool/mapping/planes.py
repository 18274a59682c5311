"""Planes: the (factor, integer matrix) parts that weights and inputs are read in.

    w = sum_j b_j * W_j - offset        x = sum_i a_i * X_i

Sign schemes, bit slices of `cell_bits` and bit-serial steps of `dac_bits` are all the same thing
here: data in these two sums. The lines work on Python ints, numpy arrays and torch integer tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rqtool.hardware.macro import Macro


@dataclass(frozen=True)
class Plane:
    """One part of a number: `factor` times the `bits` bits above `shift` of what `part` selects.

    part: "all" (signed magnitude, or an unsigned input), "positive", "negative" (one polarity),
    "offset" (w + 2**(w_bits-1)).
    """

    factor: int
    part: str
    shift: int
    bits: int
    offset: int = 0

    @property
    def peak(self) -> int:
        """The largest magnitude this plane can hold."""
        return (1 << self.bits) - 1


def slices(total_bits: int, slice_bits: int) -> list[tuple[int, int]]:
    """(shift, bits) of each slice, lowest first; the last one may be short.

    >>> slices(4, 4), slices(3, 2)
    ([(0, 4)], [(0, 2), (2, 1)])
    """
    return [(s, min(slice_bits, total_bits - s)) for s in range(0, total_bits, slice_bits)]


def weight_planes(macro: Macro) -> tuple[Plane, ...]:
    """The J weight planes of a macro.

    >>> [p.factor for p in weight_planes(Macro(sign_scheme="split", cell_bits=2))]
    [1, 4, -1, -4]
    """
    parts = {
        "signed": [(1, "all")],
        "split": [(1, "positive"), (-1, "negative")],
        "offset": [(1, "offset")],
    }[macro.sign_scheme]
    cut = slices(macro.magnitude_bits, macro.cell_bits)
    return tuple(
        Plane(sign << s, part, s, bits, macro.weight_offset)
        for sign, part in parts
        for s, bits in cut
    )


def input_planes(macro: Macro) -> tuple[Plane, ...]:
    """The I input planes (bit-serial steps) of a macro.

    >>> [p.factor for p in input_planes(Macro(dac_bits=1))]
    [1, 2, 4, 8]
    """
    return tuple(Plane(1 << s, "all", s, bits) for s, bits in slices(macro.in_bits, macro.dac_bits))


def extract(q: Any, plane: Plane) -> Any:
    """The integer matrix of one plane, in the type and shape of `q` (weights -Qw..Qw or input codes
    0..Qx).

    q: any integer type that holds its values plus `plane.offset` (for 8-bit weights with an offset:
    int16 or wider).

    >>> [extract(-6, p) for p in weight_planes(Macro(cell_bits=1))]
    [0, -1, -1]
    >>> [extract(-6, p) for p in weight_planes(Macro(sign_scheme="offset"))]
    [2]
    """
    if plane.part == "offset":
        return ((q + plane.offset) >> plane.shift) & plane.peak
    magnitude = (abs(q) >> plane.shift) & plane.peak
    if plane.part == "positive":
        return (q > 0) * magnitude
    if plane.part == "negative":
        return (q < 0) * magnitude
    return (q > 0) * magnitude - (q < 0) * magnitude
