"""Errors of losses by hand: two networks on the same images, and means over seeds."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqtool.train.paired import Loss, Seeds, over_seeds, paired, student


def hits(lost: int, gained: int, both: int, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images that only the first network gets right, only the second, both, neither."""
    counts = (lost, gained, both, neither)
    return tuple(
        np.repeat(right, counts)
        for right in ([True, False, True, False], [False, True, True, False])
    )


def test_ten_lost_and_six_gained_of_a_hundred_by_hand():
    """mean(d) = .04, mean(d**2) = .16: se = 100 sqrt((.16 - .0016) / 100) = 3.98."""
    loss = paired(*hits(10, 6, 80, 4))
    assert loss.points == 4.0 and loss.se == pytest.approx(3.979949748426482, rel=1e-12)
    assert loss.interval == pytest.approx((4 - 1.959964 * 3.97994975, 4 + 1.959964 * 3.97994975))
    assert loss.significance == pytest.approx(1.00503781526)


def test_the_error_is_that_of_the_mean_of_one_number_per_image():
    a, b = hits(7, 2, 30, 11)
    d = a.astype(float) - b
    assert paired(a, b).se == pytest.approx(100 * d.std() / math.sqrt(len(d)), rel=1e-12)


def test_it_is_mcnemar_s_where_the_square_of_the_mean_is_left_out():
    loss, n = paired(*hits(30, 10, 960)), 1000
    mcnemar = (30 - 10) ** 2 / (30 + 10)
    under_no_difference = loss.se**2 + loss.points**2 / n
    assert loss.points**2 / under_no_difference == pytest.approx(mcnemar, rel=1e-12)


def test_images_that_both_get_right_or_wrong_do_not_count():
    """The unpaired error of the same two figures is four times as large."""
    loss, unpaired = (
        paired(*hits(20, 10, 870, 100)),
        100 * math.sqrt((0.89 * 0.11 + 0.88 * 0.12) / 1000),
    )
    assert paired(*hits(20, 10, 100, 870)) == loss
    assert (loss.points, round(loss.se, 3), round(unpaired, 2)) == (1.0, 0.547, 1.43)


def test_where_no_image_differs_the_error_is_not_zero():
    """The rule of three: none of 200 images, so fewer than 3 in 200 with 95 % confidence."""
    assert paired(*hits(0, 0, 150, 50)) == Loss(0.0, 0.5, (-1.5, 1.5))
    assert paired(*hits(0, 0, 2, 0)) == Loss(0.0, 50.0, (-100.0, 100.0))


def test_where_every_image_differs_it_is_not_zero_either():
    assert paired(*hits(10, 0, 0)) == Loss(100.0, 10.0, (70.0, 100.0))
    assert paired(*hits(0, 10, 0)) == Loss(-100.0, 10.0, (-100.0, -70.0))


def test_one_image_is_one_standard_error():
    loss = paired(*hits(1, 0, 999))
    assert (
        loss.points == 0.1
        and loss.se == pytest.approx(0.1, rel=1e-3)
        and 1 < loss.significance < 1.001
    )


@pytest.mark.parametrize(("a", "b"), [((3,), (4,)), ((2, 2), (2, 2)), ((0,), (0,))])
def test_arrays_that_do_not_belong_together(a, b):
    with pytest.raises(ValueError, match="^hits must be two arrays of the same length, not "):
        paired(np.zeros(a, bool), np.zeros(b, bool))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_other_way_round_is_the_negative(pairs):
    a, b = (np.array(side, bool) for side in zip(*pairs))
    there, back = paired(a, b), paired(b, a)
    assert there.points == -back.points and there.se == back.se > 0
    assert there.interval[0] <= there.points <= there.interval[1]
    assert there.interval == (-back.interval[1], -back.interval[0])


def test_three_seeds_by_hand():
    """sd = .2, se = .2 / sqrt(3), t = 4.3027."""
    found = over_seeds([0.1, 0.3, 0.5])
    assert found.mean == pytest.approx(0.3) and found.se == pytest.approx(0.11547005383792515)
    assert found.interval == pytest.approx((0.3 - 4.3027 * 0.11547005, 0.3 + 4.3027 * 0.11547005))


def test_one_seed_says_nothing_about_others():
    assert over_seeds([0.7]) == Seeds(0.7, None, None)
    with pytest.raises(statistics.StatisticsError):
        over_seeds([])


def test_seeds_that_agree_have_no_interval():
    """Two runs that lose exactly as much do not show that every run will."""
    assert over_seeds([0.25, 0.25]) == Seeds(0.25, 0.0, None)


def test_student_s_t_goes_on_where_the_table_ends():
    """2.0395 for 31, 2.0003 for 60 and 1.9840 for 100 degrees of freedom."""
    assert [student(n) for n in (1, 30)] == [12.7062, 2.0423]
    assert [student(n) for n in (31, 60, 100)] == pytest.approx([2.0395, 2.0003, 1.9840], abs=1e-4)
    assert all(student(n) > student(n + 1) for n in range(1, 50))
