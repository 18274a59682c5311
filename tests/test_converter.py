"""The ADC as a value: codes and values of every partial sum are those of hardware/adc.py, whatever
the shape of its tables, and it is the same again after a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rqtool.hardware import adc
from rqtool.hardware.converter import (
    KINDS,
    Converter,
    Ideal,
    Levels,
    Uniform,
    from_consts,
    of_macro,
)
from rqtool.hardware.macro import Macro

TILES, GROUPS, COLUMNS = 3, 2, 4
SHAPES = [(1, 1), (1, COLUMNS), (TILES, 1), (TILES, COLUMNS)]


def uniform(rng: np.random.Generator, top: int = 15, shift: int = 15) -> Uniform:
    """Any mult, zero and gain, each in a shape of its own."""
    shapes = [SHAPES[rng.integers(len(SHAPES))] for _ in range(3)]
    mult = 2 * rng.integers(0, 1 << (shift - 1), shapes[0]) + 1
    zero = rng.integers(0, top + 1, shapes[1])
    return Uniform(mult, zero, rng.integers(1, 128, shapes[2]), shift, top)


def levels(rng: np.random.Generator, top: int = 15) -> Levels:
    """Any thresholds, for all columns or for each, some of them beyond the partial sums."""
    rows = int(rng.choice([1, COLUMNS]))
    low, high = np.sort(rng.integers(-400, 401, 2))
    thresholds = np.sort(rng.integers(low, high + 1, (rows, top)), 1)
    return Levels(thresholds, rng.integers(-999, 1000, top + 1))


def partial_sums(p_min: int = -300, p_max: int = 300) -> np.ndarray:
    """Every partial sum in every column: int64 [1, groups, columns of a group, 1, P]."""
    p = np.arange(p_min, p_max + 1)
    return np.broadcast_to(p, (1, GROUPS, COLUMNS // GROUPS, 1, len(p)))


def entry(table: np.ndarray, tile: int, column: int) -> int:
    """What a tile and a column use of a [1 or T, 1 or O] table."""
    return int(np.broadcast_to(table, (TILES, COLUMNS))[tile, column])


@settings(max_examples=60)
@given(st.integers(0, 1 << 32))
def test_a_uniform_adc_is_the_definition_in_every_tile_and_column(seed):
    rng = np.random.default_rng(seed)
    one, p = uniform(rng, int(rng.integers(1, 256))), partial_sums()
    for tile in range(TILES):
        here = one.at(tile, GROUPS)
        code = here.code(p)
        value = here.value(code)
        for column in range(COLUMNS):
            mult, zero, gain = (
                entry(table, tile, column) for table in (one.mult, one.zero, one.gain)
            )
            at = 0, *divmod(column, COLUMNS // GROUPS), 0
            expected = [
                adc.uniform_code(n, mult, one.shift, zero, one.top) for n in range(-300, 301)
            ]
            assert code[at].tolist() == expected
            assert value[at].tolist() == [adc.uniform_value(c, zero, gain) for c in expected]


@settings(max_examples=60)
@given(st.integers(0, 1 << 32))
def test_free_levels_are_the_definition_in_every_tile_and_column(seed):
    rng = np.random.default_rng(seed)
    one, p = levels(rng, int(rng.integers(1, 64))), partial_sums()
    for tile in range(TILES):
        here = one.at(tile, GROUPS)
        code = here.code(p)
        value = here.value(code)
        for column in range(COLUMNS):
            row = one.thresholds[column % len(one.thresholds)].tolist()
            at = 0, *divmod(column, COLUMNS // GROUPS), 0
            expected = [adc.threshold_code(n, row) for n in range(-300, 301)]
            assert code[at].tolist() == expected
            assert value[at].tolist() == [adc.level_value(c, one.levels) for c in expected]


def test_an_ideal_adc_changes_nothing():
    p = partial_sums()
    assert np.array_equal(Ideal().at(2, GROUPS).code(p), p)
    assert np.array_equal(Ideal().each().value(p), p)
    assert Ideal().exact and not Uniform.exact and not Levels.exact


@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.sampled_from([uniform, levels]))
def test_codes_of_all_adcs_are_those_of_their_thresholds(seed, make):
    one = make(np.random.default_rng(seed))
    found, rows = one.codes(-300, 300), one.each().thresholds[:, 0].tolist()
    assert found.dtype == np.int64 and found.shape == (len(rows), 601)
    for row, code in zip(rows, found.tolist(), strict=True):
        assert len(row) == one.top
        assert code == [adc.threshold_code(p, row) for p in range(-300, 301)]


@settings(max_examples=40)
@given(st.integers(0, 1 << 32))
def test_clip_bounds_are_the_definition(seed):
    one = uniform(np.random.default_rng(seed))
    each = one.each()
    expected = [
        adc.clip_bounds(
            adc.uniform_thresholds(mult, one.shift, zero, one.top), 2.0**one.shift / mult
        )
        for mult, zero in zip(each.mult[:, 0].tolist(), each.zero[:, 0].tolist(), strict=True)
    ]
    assert one.clip_bounds() == expected


def fields(one: Converter) -> dict:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(one).items()
    }


@settings(max_examples=40)
@given(st.integers(0, 1 << 32))
def test_a_file_gives_the_same_adc_again(seed):
    rng = np.random.default_rng(seed)
    for one in (uniform(rng), levels(rng), Ideal()):
        consts, attrs = one.consts(), json.loads(json.dumps(one.attrs()))
        assert tuple(consts) == one.roles and attrs["kind"] == one.kind
        assert all(table.dtype == np.int32 for table in consts.values())
        again = from_consts(attrs, consts)
        assert type(again) is type(one) and fields(again) == fields(one)


@pytest.mark.parametrize(
    ("macro", "kind", "attrs", "peak"),
    [
        (Macro(), Uniform, {"kind": "uniform", "shift": 15, "top": 15}, 15),
        (Macro(granularity="tile"), Uniform, {"kind": "uniform", "shift": 15, "top": 15}, 1905),
        (Macro(levels="free"), Levels, {"kind": "free"}, 32767),
        (Macro(adc_bits=None), Ideal, {"kind": "ideal"}, 945),
    ],
    ids=["layer", "tile", "free", "ideal"],
)
def test_a_macro_has_one_kind(macro, kind, attrs, peak):
    assert of_macro(macro) is kind and KINDS[attrs["kind"]] is kind
    assert kind.belongs(attrs, macro) and not kind.belongs({"kind": "measured"}, macro)
    assert kind.value_peak(macro) == peak


MULT = np.array([[513]])


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"mult": MULT[0]}, "its mult has shape [1]"),
        ({"zero": np.zeros((2, 1), int)}, "its zero has shape [2, 1]"),
        ({"gain": np.ones((1, 3), int)}, "its gain has shape [1, 3]"),
        ({"mult": MULT - 513}, "its mult leaves 1..32767"),
        ({"mult": MULT - 1}, "its mult is even somewhere"),
        ({"zero": MULT}, "its zero leaves 0..15"),
        ({"gain": MULT}, "its gain leaves 1..1"),
    ],
)
def test_tables_of_a_uniform_adc_are_checked(tables, sentence):
    good = {"mult": MULT, "zero": np.full((1, 4), 8), "gain": np.ones((1, 1), int)}
    attrs = {"kind": "uniform", "shift": 15, "top": 15}
    from_consts(attrs, good).check(Macro(), TILES, COLUMNS)
    with pytest.raises(ValueError) as caught:
        from_consts(attrs, good | tables).check(Macro(), TILES, COLUMNS)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"thresholds": np.arange(15)}, "its thresholds have shape [15]"),
        ({"thresholds": np.zeros((3, 15), int)}, "its thresholds have shape [3, 15]"),
        (
            {"thresholds": np.zeros((1, 14), int)},
            "its thresholds and levels are not one code book",
        ),
        ({"levels": np.zeros(15, int)}, "its thresholds and levels are not one code book"),
        ({"thresholds": -np.arange(15)[None]}, "its thresholds do not ascend"),
        ({"levels": np.full(16, -32768)}, "its levels pass 32767"),
    ],
)
def test_tables_of_free_levels_are_checked(tables, sentence):
    macro = Macro(levels="free", granularity="column")
    good = {"thresholds": np.zeros((COLUMNS, 15), int), "levels": np.arange(16)}
    from_consts({"kind": "free"}, good).check(macro, TILES, COLUMNS)
    with pytest.raises(ValueError) as caught:
        from_consts({"kind": "free"}, good | tables).check(macro, TILES, COLUMNS)
    assert str(caught.value) == sentence


def test_a_kind_that_is_unknown_and_a_table_that_is_missing_are_key_errors():
    with pytest.raises(KeyError):
        from_consts({"kind": "measured"}, {})
    with pytest.raises(KeyError):
        from_consts({"kind": "free"}, {"levels": np.arange(16)})
