"""Plans: which rows meet in a read, and what that costs. The only room that divides rows by
wordlines.

rows of a group   0 1 2 ... K-1        in order (channel, ky, kx)
tiles             [0..8] [9..17] ...   at most `wl` rows each, never across a convolution group
reads             tiles x columns x input planes x weight planes, per output position
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from rqtool.errors import ConfigError
from rqtool.hardware.converter import of_macro
from rqtool.hardware.macro import Macro
from rqtool.mapping.planes import Plane, input_planes, weight_planes


@dataclass(frozen=True)
class Geometry:
    """The shape of a layer, always as a 2-d convolution: conv1d has height 1, linear a 1x1 kernel.

    channels: input channels C; columns: output channels O; the other pairs are (vertical,
    horizontal).
    """

    channels: int
    columns: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    kind: str = "conv2d"  # conv1d | conv2d | linear: how a person would call it

    @property
    def rows(self) -> int:
        """K, the rows of one group: C / groups * kh * kw."""
        return self.channels // self.groups * prod(self.kernel)

    @property
    def group_columns(self) -> int:
        """Columns of one group."""
        return self.columns // self.groups

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Output height and width for an input of that size.

        >>> Geometry(1, 1, (3, 3), (2, 2), (1, 1)).out_size(16, 15)
        (8, 8)
        """
        sizes = zip((height, width), self.kernel, self.stride, self.padding, self.dilation)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @staticmethod
    def from_dict(d: dict[str, Any]) -> Geometry:
        return Geometry(**{k: tuple(v) if isinstance(v, list) else v for k, v in d.items()})


@dataclass(frozen=True)
class Plan:
    """The reads of one layer on one macro.

    tiles: (start, stop) places of each tile of a group; every group has the same ones. order: the
    row at each place, where calibration chose (`--pack spread`); None: rows in order, the place is
    the row. digital: the layer is kept off the macro, and its work is MACs, not reads.

    >>> plan = Plan.make("conv", Geometry(64, 64, (3, 3), padding=(1, 1)), Macro(wl=128))
    >>> plan.tiles[:2], len(plan.tiles), plan.reads_per_mac
    (((0, 128), (128, 256)), 5, 0.008680555555555556)
    """

    name: str
    geometry: Geometry
    macro: Macro
    tiles: tuple[tuple[int, int], ...]
    input_planes: tuple[Plane, ...]
    weight_planes: tuple[Plane, ...]
    order: tuple[int, ...] | None = None
    digital: bool = False

    @staticmethod
    def make(
        name: str,
        geometry: Geometry,
        macro: Macro,
        order: tuple[int, ...] | None = None,
        digital: bool = False,
    ) -> Plan:
        """The plan of a layer; raises ConfigError where the macro cannot hold it."""
        plan = Plan(
            name,
            geometry,
            macro,
            _tiles(name, geometry, macro),
            input_planes(macro),
            weight_planes(macro),
            order,
            digital,
        )
        if plan.acc_bound >= 1 << 31:
            raise ConfigError(
                f"{name}: the accumulator can reach {plan.acc_bound}, beyond 32 bits; "
                + (
                    "leave it out of --keep"
                    if digital
                    else "lower --in-bits, --w-bits or --adc-bits"
                )
            )
        return plan

    def rows_of(self, tile: int) -> tuple[int, ...]:
        """The rows that meet in a read of a tile."""
        places = range(*self.tiles[tile])
        return tuple(places if self.order is None else (self.order[k] for k in places))

    # -- bounds ------------------------------------------------------------------------------------
    def p_bounds(self, i: int, j: int) -> tuple[int, int]:
        """The smallest and largest partial sum of input plane i and weight plane j, over `wl` rows."""
        weight = self.weight_planes[j]
        peak_w = min(weight.peak, self.macro.q_w + self.macro.weight_offset)
        peak = self.macro.wl * self.input_planes[i].peak * peak_w
        return (-peak if weight.part == "all" else 0), peak

    @property
    def value_peak(self) -> int:
        """The largest magnitude one read can add to an accumulator, before the factors of its
        planes."""
        return of_macro(self.macro).value_peak(self.macro)

    @cached_property
    def acc_bound(self) -> int:
        """A proven bound of |acc|: tiles x the factors of the planes x the largest value of a read."""
        factors = sum(
            abs(i.factor * j.factor) for i in self.input_planes for j in self.weight_planes
        )
        return len(self.tiles) * factors * self.value_peak

    # -- cost --------------------------------------------------------------------------------------
    @property
    def tile_count(self) -> int:
        """Tiles of all groups."""
        return len(self.tiles) * self.geometry.groups

    @property
    def reads_per_position(self) -> int:
        """ADC conversions for one output position, over all columns and planes."""
        return (
            len(self.tiles)
            * self.geometry.columns
            * len(self.input_planes)
            * len(self.weight_planes)
        )

    @property
    def macs_per_position(self) -> int:
        return self.geometry.rows * self.geometry.columns

    @property
    def reads_per_mac(self) -> float:
        """Conversions per multiply-accumulate; 1/wl when tiles are full and nothing is sliced."""
        return self.reads_per_position / self.macs_per_position

    @property
    def cycles_per_position(self) -> int:
        """Macro cycles for one output position: `io` columns (of every weight plane) are read at
        once."""
        columns = self.geometry.group_columns * len(self.weight_planes)
        return self.tile_count * len(self.input_planes) * -(-columns // self.macro.io)

    def off_macro(self, positions: int) -> dict[str, Any]:
        """What a kept layer costs for `positions` output positions: plain data."""
        return {"layer": self.name, "macs": self.macs_per_position * positions}

    def cost(self, positions: int) -> dict[str, Any]:
        """What `rqtool plan` prints for `positions` output positions: plain data."""
        g = self.geometry
        return {
            "layer": self.name, "kind": g.kind, "kernel": list(g.kernel), "groups": g.groups, "rows": g.rows, "columns": g.columns,
            "tiles": self.tile_count, "input_planes": len(self.input_planes), "weight_planes": len(self.weight_planes),
            "p_min": self.macro.p_min, "p_max": self.macro.p_max, "acc_bound": self.acc_bound, "positions": positions,
            "macs": self.macs_per_position * positions, "reads": self.reads_per_position * positions,
            "reads_per_mac": self.reads_per_mac, "cycles": self.cycles_per_position * positions,
        }  # fmt: skip


def _tiles(name: str, geometry: Geometry, macro: Macro) -> tuple[tuple[int, int], ...]:
    kernel_rows = prod(geometry.kernel)
    size = macro.wl if macro.pack != "kernels" else macro.wl // kernel_rows * kernel_rows
    if size == 0:
        raise ConfigError(
            f"{name}: --pack kernels needs a whole kernel of {kernel_rows} rows "
            f"in a read, but only {macro.wl} wordlines are on; "
            f"use --pack rows or --wl {kernel_rows}"
        )
    return tuple((k, min(k + size, geometry.rows)) for k in range(0, geometry.rows, size))
