"""The ADC as a value: its kind and its integer tables, and all that follows from them.

    class      kind       tables                                                     code of p
    Ideal      ideal      none                                                       p itself
    Uniform    uniform    mult, zero, gain [1 or T, 1 or O]; shift, top              adc.uniform_code
    Levels     free       thresholds [1 or O, top], levels [top + 1]                 adc.threshold_code

T is the number of tiles, O that of columns; an axis of length 1 is shared by all of them. `at` and
`each` give the same ADCs with tables in another shape, that of the partial sums they are to
convert. Tables are numpy int64 in here and int32 where they are stored (`consts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from rqtool.hardware import adc
from rqtool.hardware.macro import Macro

Integers = np.ndarray
NO_GAIN = np.ones((1, 1), np.int64)


def _need(fine: bool | np.bool_, what: str) -> None:
    if not fine:
        raise ValueError(what)


def _of_tile(table: Integers, tile: int, groups: int) -> Integers:
    """The entries [groups or 1, columns of a group or 1, 1, 1] that a tile uses of a table [tiles
    or 1, columns or 1]."""
    row = table[tile if table.shape[0] > 1 else 0]
    return row.reshape(groups if row.size > 1 else 1, -1, 1, 1)


@dataclass(frozen=True)
class Ideal:
    """An ADC that changes nothing: the code of a partial sum is the partial sum."""

    kind: ClassVar[str] = "ideal"
    roles: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True
    gain: ClassVar[Integers] = NO_GAIN

    @staticmethod
    def of_consts(attrs: Mapping[str, Any], consts: Mapping[str, Integers]) -> Ideal:
        """The ADC of an operation; it has no constants."""
        return Ideal()

    @staticmethod
    def belongs(attrs: Mapping[str, Any], macro: Macro) -> bool:
        """Whether the attributes are those of this kind of ADC on a macro."""
        return attrs == {"kind": "ideal"}

    @staticmethod
    def value_peak(macro: Macro) -> int:
        """The largest magnitude of a value."""
        return macro.p_max

    def attrs(self) -> dict[str, Any]:
        """What an operation says of its ADC, as JSON data."""
        return {"kind": self.kind}

    def consts(self) -> dict[str, Integers]:
        """The tables of an operation by role: none."""
        return {}

    def check(self, macro: Macro, tiles: int, columns: int) -> None:
        """Nothing can be wrong with it."""

    def at(self, tile: int, groups: int) -> Ideal:
        """The ADC itself."""
        return self

    def each(self) -> Ideal:
        """The ADC itself."""
        return self

    def code(self, p: Integers) -> Integers:
        """The partial sums as they are."""
        return p

    def value(self, code: Integers) -> Integers:
        """The codes as they are."""
        return code


@dataclass(frozen=True, eq=False)
class Uniform:
    """ADCs with equal steps. mult, zero, gain: int64 [1 or T, 1 or O]; shift, top: of all."""

    mult: Integers
    zero: Integers
    gain: Integers
    shift: int
    top: int
    kind: ClassVar[str] = "uniform"
    roles: ClassVar[tuple[str, ...]] = ("mult", "zero", "gain")
    exact: ClassVar[bool] = False

    @staticmethod
    def of_consts(attrs: Mapping[str, Any], consts: Mapping[str, Integers]) -> Uniform:
        """The ADC of an operation, from its attributes and its constants by role."""
        tables = (consts[role].astype(np.int64) for role in Uniform.roles)
        return Uniform(*tables, attrs["shift"], attrs["top"])

    @staticmethod
    def belongs(attrs: Mapping[str, Any], macro: Macro) -> bool:
        """Whether the attributes are those of this kind of ADC on a macro."""
        return attrs == {"kind": "uniform", "shift": macro.shift, "top": macro.top}

    @staticmethod
    def value_peak(macro: Macro) -> int:
        """The largest magnitude of a value."""
        return macro.top * _most_gain(macro)

    def attrs(self) -> dict[str, Any]:
        """What an operation says of its ADC, as JSON data."""
        return {"kind": self.kind, "shift": self.shift, "top": self.top}

    def consts(self) -> dict[str, Integers]:
        """The tables of an operation by role, int32."""
        return {role: getattr(self, role).astype(np.int32) for role in self.roles}

    def check(self, macro: Macro, tiles: int, columns: int) -> None:
        """Raise ValueError, with a few words, where a table has another shape or leaves its range."""
        ranges = {
            "mult": (1, (1 << macro.shift) - 1),
            "zero": (0, macro.top),
            "gain": (1, _most_gain(macro)),
        }
        for role, (lo, hi) in ranges.items():
            table = getattr(self, role)
            fits = (
                table.ndim == 2 and table.shape[0] in (1, tiles) and table.shape[1] in (1, columns)
            )
            _need(fits, f"its {role} has shape {list(table.shape)}")
            _need(
                lo <= int(table.min()) and int(table.max()) <= hi, f"its {role} leaves {lo}..{hi}"
            )
        _need(np.all(self.mult & 1), "its mult is even somewhere")

    def at(self, tile: int, groups: int) -> Uniform:
        """The ADCs of a tile, for partial sums [N, groups, columns of a group, H, W]."""
        tables = {role: _of_tile(getattr(self, role), tile, groups) for role in self.roles}
        return replace(self, **tables)

    def each(self) -> Uniform:
        """The G different places of the tables one below the other, tables [G, 1]: for partial sums
        [P] or [G, P]."""
        spread = np.broadcast_arrays(self.mult, self.zero, self.gain)
        return Uniform(*(a.reshape(-1, 1) for a in spread), self.shift, self.top)

    def code(self, p: Integers) -> Integers:
        """The code of each partial sum, in the shape that p and the tables broadcast to."""
        return adc.uniform_code(p, self.mult, self.shift, self.zero, self.top)

    def codes(self, p_min: int, p_max: int) -> Integers:
        """int64 [G, P]: the code of every partial sum, by each of the G ADCs."""
        return self.each().code(np.arange(p_min, p_max + 1))

    def value(self, code: Integers) -> Integers:
        """What the digital side adds up for each code."""
        return adc.uniform_value(code, self.zero, self.gain)

    @property
    def thresholds(self) -> Integers:
        """int64 [.., top], after the shape of the tables: the smallest p of each code but 0."""
        mult, zero = np.broadcast_arrays(self.mult, self.zero)
        return np.stack(adc.uniform_thresholds(mult, self.shift, zero, self.top), -1)

    def clip_bounds(self) -> list[tuple[int, int]]:
        """(lowest, highest) partial sum that does not clip, for each of the G places."""
        one = self.each()
        rows = zip(one.thresholds[:, 0].tolist(), one.mult[:, 0].tolist())
        return [adc.clip_bounds(row, 2.0**self.shift / mult) for row, mult in rows]


def _most_gain(macro: Macro) -> int:
    return adc.MAX_GAIN if macro.granularity == "tile" else 1


@dataclass(frozen=True, eq=False)
class Levels:
    """ADCs with free thresholds and levels. thresholds: int64 [1 or O, top], ascending; levels:
    int64 [top + 1], the same for all."""

    thresholds: Integers
    levels: Integers
    kind: ClassVar[str] = "free"
    roles: ClassVar[tuple[str, ...]] = ("thresholds", "levels")
    exact: ClassVar[bool] = False
    gain: ClassVar[Integers] = NO_GAIN

    @staticmethod
    def of_consts(attrs: Mapping[str, Any], consts: Mapping[str, Integers]) -> Levels:
        """The ADC of an operation, from its constants by role."""
        return Levels(*(consts[role].astype(np.int64) for role in Levels.roles))

    @staticmethod
    def belongs(attrs: Mapping[str, Any], macro: Macro) -> bool:
        """Whether the attributes are those of this kind of ADC on a macro."""
        return attrs["kind"] == "free"

    @staticmethod
    def value_peak(macro: Macro) -> int:
        """The largest magnitude of a value."""
        return adc.FREE_LEVEL_PEAK

    @property
    def top(self) -> int:
        """The highest code."""
        return len(self.levels) - 1

    def attrs(self) -> dict[str, Any]:
        """What an operation says of its ADC, as JSON data."""
        return {"kind": self.kind}

    def consts(self) -> dict[str, Integers]:
        """The tables of an operation by role, int32."""
        return {role: getattr(self, role).astype(np.int32) for role in self.roles}

    def check(self, macro: Macro, tiles: int, columns: int) -> None:
        """Raise ValueError, with a few words, where a table has another shape or leaves its range."""
        rows, levels = self.thresholds, self.levels
        _need(
            rows.ndim == 2 and rows.shape[0] in (1, columns),
            f"its thresholds have shape {list(rows.shape)}",
        )
        _need(
            rows.shape[1] == macro.top and levels.shape == (macro.top + 1,),
            "its thresholds and levels are not one code book",
        )
        _need(np.all(np.diff(rows, axis=1) >= 0), "its thresholds do not ascend")
        _need(
            int(np.abs(levels).max()) <= adc.FREE_LEVEL_PEAK,
            f"its levels pass {adc.FREE_LEVEL_PEAK}",
        )

    def at(self, tile: int, groups: int) -> Levels:
        """The ADCs of a tile, for partial sums [N, groups, columns of a group, H, W]; all tiles
        have the same."""
        columns = [_of_tile(column[None], tile, groups) for column in self.thresholds.T]
        return replace(self, thresholds=np.stack(columns, -1))

    def each(self) -> Levels:
        """The G rows of thresholds one below the other, [G, 1, top]: for partial sums [P] or
        [G, P]."""
        return replace(self, thresholds=self.thresholds[:, None])

    def code(self, p: Integers) -> Integers:
        """The code of each partial sum, in the shape that p and the tables broadcast to."""
        return adc.threshold_code(p, np.moveaxis(self.thresholds, -1, 0))

    def codes(self, p_min: int, p_max: int) -> Integers:
        """int64 [G, P]: the code of every partial sum, by each of the G ADCs."""
        lo = int(np.clip(self.thresholds.min(), p_min + 1, p_max + 1)) - 1
        hi = int(np.clip(self.thresholds.max(), lo, p_max))
        # beyond both codes stay as they are, and most sums of a large array lie there
        code = self.each().code(np.arange(lo, hi + 1))
        return np.pad(code, ((0, 0), (lo - p_min, p_max - hi)), mode="edge")

    def value(self, code: Integers) -> Integers:
        """What the digital side adds up for each code."""
        return adc.level_value(code, self.levels)


Converter = Uniform | Levels | Ideal
KINDS: dict[str, type[Converter]] = {c.kind: c for c in (Ideal, Uniform, Levels)}


def of_macro(macro: Macro) -> type[Converter]:
    """The kind of ADC that a macro has.

    >>> of_macro(Macro()).kind, of_macro(Macro(levels="free")).kind, of_macro(Macro(adc_bits=None)).kind
    ('uniform', 'free', 'ideal')
    """
    if macro.ideal:
        return Ideal
    return Levels if macro.levels == "free" else Uniform


def from_consts(attrs: Mapping[str, Any], consts: Mapping[str, Integers]) -> Converter:
    """The ADC of an operation from what `attrs` and `consts` gave, or a file holds; raises KeyError
    for a kind that is unknown and for a table that is missing."""
    return KINDS[attrs["kind"]].of_consts(attrs, consts)
