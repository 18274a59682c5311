"""Plans: every row is read once, bounds are met and never passed, costs by hand."""

from __future__ import annotations

import json
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rqtool.errors import ConfigError
from rqtool.hardware.macro import PACKS, SIGN_SCHEMES, Macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.mapping.planes import extract


@st.composite
def geometries(draw) -> Geometry:
    groups = draw(st.integers(1, 4))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    return Geometry(
        groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 9)), kernel, groups=groups
    )


@st.composite
def macros(draw) -> Macro:
    scheme = draw(st.sampled_from(SIGN_SCHEMES))
    w_bits, in_bits = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    return Macro(
        wl=draw(st.integers(1, 64)), io=draw(st.integers(1, 16)), w_bits=w_bits, in_bits=in_bits, sign_scheme=scheme,
        dac_bits=draw(st.integers(1, in_bits)), cell_bits=draw(st.integers(1, w_bits - (scheme != "offset"))),
        adc_bits=draw(st.none() | st.integers(1, 4)), pack=draw(st.sampled_from(PACKS)),
    )  # fmt: skip


@st.composite
def plans(draw) -> Plan:
    geometry, macro = draw(geometries()), draw(macros())
    if macro.pack == "kernels" and macro.wl < prod(geometry.kernel):
        geometry = Geometry(geometry.channels, geometry.columns, groups=geometry.groups)
    return Plan.make("layer", geometry, macro)


# -- tiles -----------------------------------------------------------------------------------------
@given(plans())
def test_every_row_of_every_group_is_read_once_by_each_pair_of_planes(plan):
    assert [k for start, stop in plan.tiles for k in range(start, stop)] == list(
        range(plan.geometry.rows)
    )


@given(plans())
def test_no_tile_is_empty_or_longer_than_the_wordlines(plan):
    assert all(0 < stop - start <= plan.macro.wl for start, stop in plan.tiles)
    assert len({stop - start for start, stop in plan.tiles[:-1]}) <= 1


@given(plans())
def test_whole_kernels_are_never_cut(plan):
    if plan.macro.pack == "kernels":
        assert all(start % prod(plan.geometry.kernel) == 0 for start, _ in plan.tiles)


@given(plans())
def test_reads_are_counted_one_by_one(plan):
    g = plan.geometry
    reads = sum(
        1
        for _ in product(
            range(g.groups),
            plan.tiles,
            range(g.group_columns),
            plan.input_planes,
            plan.weight_planes,
        )
    )
    assert plan.reads_per_position == reads
    assert plan.tile_count == g.groups * len(plan.tiles)
    assert plan.reads_per_mac == reads / (g.rows * g.columns)


@given(plans())
def test_io_changes_cycles_and_nothing_else(plan):
    one = Plan.make("layer", plan.geometry, Macro(**{**plan.macro.to_dict(), "io": 1}))
    assert (one.tiles, one.acc_bound, one.reads_per_position) == (
        plan.tiles,
        plan.acc_bound,
        plan.reads_per_position,
    )
    assert one.cycles_per_position == one.reads_per_position  # one column at a time: a cycle a read
    assert (
        one.cycles_per_position / plan.macro.io
        <= plan.cycles_per_position
        <= one.cycles_per_position
    )


@pytest.mark.parametrize(
    ("rows", "fields", "tiles"),
    [
        (18, {}, ((0, 9), (9, 18))),
        (20, {}, ((0, 9), (9, 18), (18, 20))),
        (5, {}, ((0, 5),)),
        (5, {"wl": 1}, ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))),
    ],
)
def test_tiles_by_hand(rows, fields, tiles):
    assert Plan.make("fc", Geometry(rows, 1), Macro(**fields)).tiles == tiles


def test_rows_and_kernels_differ_where_a_kernel_does_not_fill_the_wordlines():
    g = Geometry(4, 1, (3, 3))
    assert Plan.make("c", g, Macro(wl=16)).tiles == ((0, 16), (16, 32), (32, 36))
    assert Plan.make("c", g, Macro(wl=16, pack="kernels")).tiles == (
        (0, 9),
        (9, 18),
        (18, 27),
        (27, 36),
    )
    assert Plan.make("c", g, Macro(wl=20, pack="kernels")).tiles == ((0, 18), (18, 36))
    assert (
        Plan.make("c", g, Macro(wl=9)).tiles == Plan.make("c", g, Macro(wl=9, pack="kernels")).tiles
    )


# -- bounds ----------------------------------------------------------------------------------------
@given(plans())
def test_partial_sums_reach_their_bounds_and_never_pass_them(plan):
    """Rows are independent, so the extremes of a full tile are wl times the extremes of one row,
    over all weights and inputs."""
    m = plan.macro
    for (i, a), (j, b) in product(enumerate(plan.input_planes), enumerate(plan.weight_planes)):
        row = [
            extract(w, b) * extract(x, a)
            for w in range(-m.q_w, m.q_w + 1)
            for x in range(m.q_x + 1)
        ]
        assert plan.p_bounds(i, j) == (m.wl * min(row), m.wl * max(row))


@given(plans())
def test_the_macro_s_range_is_the_widest_of_the_pairs(plan):
    bounds = [
        plan.p_bounds(i, j)
        for i in range(len(plan.input_planes))
        for j in range(len(plan.weight_planes))
    ]
    assert (min(lo for lo, _ in bounds), max(hi for _, hi in bounds)) == (
        plan.macro.p_min,
        plan.macro.p_max,
    )


@given(plans())
def test_the_accumulator_bound_holds_the_worst_values(plan):
    m = plan.macro
    worst = m.p_max if m.ideal else max(m.zero, m.top - m.zero)
    factors = sum(abs(a.factor * b.factor) for a in plan.input_planes for b in plan.weight_planes)
    assert len(plan.tiles) * factors * worst <= plan.acc_bound < 2**31


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({}, 64 * 15),
        ({"sign_scheme": "split"}, 64 * 2 * 15),
        ({"dac_bits": 2}, 64 * 5 * 15),
        ({"granularity": "tile"}, 64 * 15 * 127),
        ({"levels": "free"}, 64 * 32767),
        ({"adc_bits": None}, 64 * 945),
    ],
)
def test_accumulator_bounds_by_hand(fields, bound):
    assert Plan.make("conv", Geometry(64, 64, (3, 3)), Macro(**fields)).acc_bound == bound


# -- costs by hand ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("geometry", "fields", "tiles", "reads", "cycles", "reads_per_mac"),
    [
        (Geometry(64, 64, (3, 3)), {}, 64, 4096, 512, 1 / 9),
        (Geometry(64, 64, (3, 3)), {"wl": 128}, 5, 320, 40, 320 / 36864),
        (Geometry(64, 64, (3, 3)), {"sign_scheme": "split"}, 64, 8192, 1024, 2 / 9),
        (Geometry(64, 64, (3, 3)), {"dac_bits": 1, "cell_bits": 1}, 64, 49152, 6144, 12 / 9),
        (Geometry(64, 64, (3, 3), groups=64), {}, 64, 64, 64, 1 / 9),
        (Geometry(8, 12, (1, 1), groups=2), {"wl": 3}, 4, 24, 4, 0.5),
        (Geometry(784, 10, kind="linear"), {}, 88, 880, 176, 880 / 7840),
        (Geometry(1, 1), {}, 1, 1, 1, 1.0),
    ],
)
def test_costs_by_hand(geometry, fields, tiles, reads, cycles, reads_per_mac):
    plan = Plan.make("layer", geometry, Macro(**fields))
    assert (
        plan.tile_count,
        plan.reads_per_position,
        plan.cycles_per_position,
        plan.reads_per_mac,
    ) == (tiles, reads, cycles, reads_per_mac)


def test_cost_is_plain_data():
    cost = Plan.make("conv1", Geometry(3, 16, (3, 3)), Macro()).cost(1024)
    assert json.loads(json.dumps(cost)) == cost
    assert cost == {
        "layer": "conv1", "kind": "conv2d", "kernel": [3, 3], "groups": 1, "rows": 27, "columns": 16, "tiles": 3, "input_planes": 1, "weight_planes": 1,
        "p_min": -945, "p_max": 945, "acc_bound": 45, "positions": 1024, "macs": 442368, "reads": 49152, "reads_per_mac": 1 / 9, "cycles": 6144,
    }  # fmt: skip


# -- geometry --------------------------------------------------------------------------------------
@given(st.data())
def test_output_sizes_are_those_of_torch(data):
    pair = lambda lo, hi: data.draw(st.tuples(st.integers(lo, hi), st.integers(lo, hi)))  # noqa: E731
    kernel, stride, padding, dilation = pair(1, 5), pair(1, 3), pair(0, 3), pair(1, 2)
    size = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, pair(0, 9)))
    y = torch.nn.functional.conv2d(
        torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel), None, stride, padding, dilation
    )
    assert Geometry(1, 1, kernel, stride, padding, dilation).out_size(*size) == tuple(y.shape[2:])


@given(geometries())
def test_a_geometry_comes_back_from_json(geometry):
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


# -- refusals --------------------------------------------------------------------------------------
def test_a_kernel_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError) as caught:
        Plan.make("conv1", Geometry(3, 8, (5, 5)), Macro(wl=9, pack="kernels"))
    assert (
        str(caught.value) == "conv1: --pack kernels needs a whole kernel of 25 rows in a read, "
        "but only 9 wordlines are on; use --pack rows or --wl 25"
    )


def test_an_accumulator_beyond_32_bits_is_refused():
    macro = Macro(wl=4096, in_bits=8, w_bits=8, adc_bits=None)
    with pytest.raises(ConfigError) as caught:
        Plan.make("fc", Geometry(17 * 4096, 1), macro)
    assert (
        str(caught.value) == "fc: the accumulator can reach 2255032320, beyond 32 bits; lower "
        "--in-bits, --w-bits or --adc-bits"
    )
    assert Plan.make("fc", Geometry(16 * 4096, 1), macro).acc_bound == 2122383360
