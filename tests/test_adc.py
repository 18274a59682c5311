"""The ADC in all its forms, every partial sum tried: exact fractions, thresholds, integers,
float32, numpy and torch."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rqtool.hardware import adc


class Spec(NamedTuple):
    """One uniform ADC in front of an array whose partial sums reach +-bound."""

    bits: int
    codebook: str
    bound: int
    mult: int

    @property
    def shift(self) -> int:
        return adc.shift_for(self.bound)

    @property
    def zero(self) -> int:
        return adc.default_zero(self.bits, self.codebook)

    @property
    def top(self) -> int:
        return adc.top_code(self.bits, self.codebook)

    @property
    def step(self) -> Fraction:
        return Fraction(1 << self.shift, self.mult)


BOUNDS = (9, 81, 945, 5355, 16383, 16384, 30000)  # 16384 is the first with a shift above 15
BOOKS = [
    (bits, book)
    for bits in range(1, 9)
    for book in adc.CODEBOOKS
    if (bits, book) != (1, "sign-magnitude")
]


def mults(bits: int, book: str, bound: int) -> list[int]:
    """Full scale, a third of it, step 1, and odd numbers that no step asked for."""
    shift = adc.shift_for(bound)
    full = adc.full_scale_step(
        -bound, bound, adc.default_zero(bits, book), adc.top_code(bits, book)
    )
    strange = [((bits * 7919 + bound) * n) % (1 << shift) | 1 for n in (1, 3, 11, 29, 101)]
    return [
        int(adc.snap(full, shift)),
        int(adc.snap(max(1.0, full / 3), shift)),
        (1 << shift) - 1,
        *strange,
    ]


SPECS = [
    Spec(bits, book, bound, mult)
    for bits, book in BOOKS
    for bound in BOUNDS
    if adc.float32_exact(bound, adc.shift_for(bound), bits)
    for mult in dict.fromkeys(mults(bits, book, bound))
]
WIDE = [
    Spec(1, "twos", 100_000, 77),
    Spec(2, "twos", 250_000, 4097),
    Spec(3, "sign-magnitude", 131_072, 35_001),
    Spec(4, "unsigned", 140_000, 1),
]


def exact_thresholds(s: Spec) -> tuple[int, ...]:
    """From the meaning alone: code j starts half a step below its own value, and p is a whole
    number."""
    return tuple(
        math.ceil((Fraction(j - s.zero) - Fraction(1, 2)) * s.step) for j in range(1, s.top + 1)
    )


def all_p(s: Spec) -> np.ndarray:
    return np.arange(-s.bound, s.bound + 1)


def exact_codes(s: Spec) -> np.ndarray:
    """The number of exact thresholds that are <= p, for every p."""
    return np.searchsorted(np.array(exact_thresholds(s)), all_p(s), side="right")


def test_the_grid_is_wide():
    assert len(SPECS) > 1000
    assert {adc.shift_for(s.bound) for s in SPECS + WIDE} == {15, 16, 18, 19}
    assert {s.bits for s in SPECS} == set(range(1, 9))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_form_gives_every_code(bits):
    for s in [s for s in SPECS + WIDE if s.bits == bits]:
        p, codes = all_p(s), exact_codes(s)
        assert adc.uniform_thresholds(s.mult, s.shift, s.zero, s.top) == exact_thresholds(s), s
        assert np.array_equal(adc.uniform_code(p, s.mult, s.shift, s.zero, s.top), codes), s
        floats = adc.uniform_code_float(
            p.astype(np.float32), np.float32(s.mult), s.shift, np.float32(s.zero), s.top
        )
        assert floats.dtype == np.float32 and np.array_equal(floats, codes), s
        tp, tcodes = torch.from_numpy(p), torch.from_numpy(codes)
        assert torch.equal(adc.uniform_code(tp, s.mult, s.shift, s.zero, s.top), tcodes), s
        tfloats = adc.uniform_code_float(
            tp.float(), torch.tensor(float(s.mult)), s.shift, torch.tensor(float(s.zero)), s.top
        )
        assert tfloats.dtype == torch.float32 and torch.equal(tfloats, tcodes.float()), s


@pytest.mark.parametrize("s", [s for s in SPECS if s.bound == 945][::4], ids=str)
def test_counting_thresholds_and_rounding_fractions_agree(s):
    """`round` of a Fraction is half-to-even: it agrees with half-up only because no partial sum is
    on a tie."""
    thresholds, codes = exact_thresholds(s), exact_codes(s)
    assert np.array_equal(adc.threshold_code(all_p(s), thresholds), codes)
    assert torch.equal(
        adc.threshold_code(torch.from_numpy(all_p(s)), thresholds), torch.from_numpy(codes)
    )
    rounded = [max(0, min(round(int(p) / s.step) + s.zero, s.top)) for p in all_p(s)]
    assert rounded == codes.tolist()
    assert [adc.uniform_code(int(p), s.mult, s.shift, s.zero, s.top) for p in all_p(s)] == rounded


def test_int32_holds_the_canonical_gain():
    for s in [s for s in SPECS if s.shift == adc.Q15]:
        assert np.array_equal(
            adc.uniform_code(
                all_p(s).astype(np.int32), np.int32(s.mult), s.shift, np.int32(s.zero), s.top
            ),
            exact_codes(s),
        ), s
        assert torch.equal(
            adc.uniform_code(
                torch.from_numpy(all_p(s)).int(), s.mult, s.shift, s.zero, s.top
            ).long(),
            torch.from_numpy(exact_codes(s)),
        ), s


def test_no_partial_sum_is_on_a_tie():
    for s in SPECS + WIDE:
        assert not ((all_p(s) * s.mult) % (1 << s.shift) == 1 << (s.shift - 1)).any(), s


def test_an_even_mult_would_have_ties():
    assert (8 * 2048) % (1 << 15) == 1 << 14  # p = 8 at step 16: why M is odd


def test_codes_rise_with_p_from_zero_and_stay_in_range():
    for s in SPECS + WIDE:
        codes = exact_codes(s)
        assert (np.diff(codes) >= 0).all() and codes.min() >= 0 and codes.max() <= s.top
        assert codes[s.bound] == s.zero, s


def test_the_symmetric_code_book_is_odd_around_zero():
    for s in [s for s in SPECS + WIDE if s.codebook == "sign-magnitude"]:
        values = adc.uniform_value(exact_codes(s), s.zero)
        assert np.array_equal(values, -values[::-1]), s


def test_truth_table_of_the_docstring():
    table = {
        **dict.fromkeys(range(-40, -6), 0),
        **dict.fromkeys(range(-6, -2), 1),
        **dict.fromkeys(range(-2, 3), 2),
        **dict.fromkeys(range(3, 40), 3),
    }
    assert {p: adc.uniform_code(p, 8191, 15, 2, 3) for p in table} == table
    assert {p: adc.threshold_code(p, (-6, -2, 3)) for p in table} == table
    assert adc.uniform_thresholds(8191, 15, 2, 3) == (-6, -2, 3)


def test_mult_and_zero_broadcast_over_columns():
    p = np.array([[-5, 0, 9], [9, 9, 9]])
    mult, zero = np.array([32767, 8191, 4095]), np.array([8, 2, 0])
    assert adc.uniform_code(p, mult, 15, zero, 15).tolist() == [[3, 2, 1], [15, 4, 1]]


@given(st.floats(0.25, 2.0**20), st.integers(15, 22))
def test_snap_is_the_nearest_odd_number_in_range(step, shift):
    mult = adc.snap(step, shift)
    assert mult == int(mult) and int(mult) % 2 == 1 and 1 <= mult < 2**shift
    wished = min(max(2.0**shift / step, 1.0), 2.0**shift - 1)
    assert abs(mult - wished) <= 1.0


def test_snap_is_the_same_in_numpy_and_torch():
    steps = np.array([0.5, 1.0, 2.5, 7.25, 64.0, 135.0, 40000.0])
    mult = np.array([32767.0, 32767.0, 13107.0, 4519.0, 513.0, 243.0, 1.0])
    assert np.array_equal(adc.snap(steps, 15), mult)
    assert torch.equal(adc.snap(torch.from_numpy(steps), 15), torch.from_numpy(mult))
    assert torch.equal(
        adc.snap(torch.from_numpy(steps).float(), 15), torch.from_numpy(mult).float()
    )


@pytest.mark.parametrize("mult", [1, 3, 243, 4519, 16383, 32765, 32767])
def test_snap_gives_a_representable_step_back(mult):
    assert adc.snap(2.0**15 / mult, 15) == mult


@given(st.integers(0, 20000), st.integers(0, 20000), st.integers(0, 8), st.integers(0, 8))
def test_full_scale_step_is_the_smallest_that_holds_both_ends(below, above, down, up):
    step = adc.full_scale_step(-below, above, down, down + up)
    assert step >= 1
    assert down == 0 or step * down >= below * (1 - 1e-15)
    assert up == 0 or step * up >= above * (1 - 1e-15)
    assert step == 1 or step in [n / d for n, d in ((below, down), (above, up)) if d]


def test_full_scale_of_one_code_side_ignores_the_other():
    assert adc.full_scale_step(-945, 945, 8, 15) == 135.0
    assert adc.full_scale_step(0, 945, 0, 15) == 63.0
    assert adc.full_scale_step(-9, 9, 1, 1) == 9.0
    assert adc.full_scale_step(-3, 3, 8, 15) == 1.0


def test_clip_bounds_give_the_end_codes_cells_one_step_wide():
    assert adc.clip_bounds((-6, -2, 3), 4.0) == (-10, 6)
    for s in [s for s in SPECS if s.bound == 945]:
        thresholds = exact_thresholds(s)
        low, high = adc.clip_bounds(thresholds, float(s.step))
        assert thresholds[0] - low == high - thresholds[-1] + 1 == max(1, round(float(s.step)))


@given(st.lists(st.integers(-32767, 32767), min_size=2, max_size=16).map(sorted))
def test_level_value_is_the_table(levels):
    codes = np.arange(len(levels))
    assert adc.level_value(codes, levels).tolist() == levels
    assert adc.level_value(torch.from_numpy(codes), levels).tolist() == levels
    assert [adc.level_value(c, levels) for c in range(len(levels))] == levels


def test_free_thresholds_that_coincide_skip_a_code():
    assert [adc.threshold_code(p, (0, 0, 5)) for p in (-1, 0, 4, 5)] == [0, 2, 2, 3]


def test_uniform_value_of_a_tile_gain():
    assert adc.uniform_value(np.array([0, 8, 15]), 8, 3).tolist() == [-24, 0, 21]


@pytest.mark.parametrize(
    ("book", "codes", "zeros"),
    [
        ("twos", [1, 3, 15, 255], [1, 2, 8, 128]),
        ("sign-magnitude", [0, 2, 14, 254], [0, 1, 7, 127]),
        ("unsigned", [1, 3, 15, 255], [0] * 4),
    ],
)
def test_code_books(book, codes, zeros):
    assert [adc.top_code(bits, book) for bits in (1, 2, 4, 8)] == codes
    assert [adc.default_zero(bits, book) for bits in (1, 2, 4, 8)] == zeros


def test_shift_and_float32_bounds():
    assert [adc.shift_for(p) for p in (0, 9, 16383, 16384, 32767, 32768)] == [
        15,
        15,
        15,
        16,
        16,
        17,
    ]
    assert adc.float32_exact(16383, 15, 8) and not adc.float32_exact(16384, 15, 4)
    assert adc.float32_exact(32767, 16, 7) and not adc.float32_exact(32767, 16, 8)
