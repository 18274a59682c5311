"""--pack spread: which rows meet in a read. Whatever order is chosen, the layer computes the same; this asks whether it is a good one."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rqtool.hardware.macro import Macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.model.capture import capture
from rqtool.train import spread
from rqtool.train.calibrate import calibrate
from rqtool.train.histogram import partial_sum_histogram
from rqtool.train.rewrite import read_layers, rewrite
from rqtool.train.spread import least_meeting, spread_order


def within_tiles(meeting: np.ndarray, sizes: list[int], order) -> float:
    tile = np.repeat(np.arange(len(sizes)), sizes)
    placed = meeting[np.ix_(order, order)]
    return float(placed[tile[:, None] == tile].sum())


def symmetric(seed: int, n: int) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((n, n))
    return a + a.T


# -- the search ------------------------------------------------------------------------------------
def test_by_hand():
    """Rows 0 and 1 rise together (5), 0 and 2 cancel (-4); two tiles of two rows."""
    meeting = np.array([[9, 5, -4, 0], [5, 9, 0, -1], [-4, 0, 9, 2], [0, -1, 2, 9]], float)
    assert least_meeting(meeting, np.array([2, 2])).tolist() == [1, 3, 0, 2]


@given(st.integers(0, 1 << 32), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_it_is_an_order_and_no_exchange_of_two_rows_makes_it_better(seed, sizes):
    n = sum(sizes)
    meeting = symmetric(seed, n)
    order = least_meeting(meeting, np.array(sizes))
    assert sorted(order) == list(range(n))
    least = within_tiles(meeting, sizes, order)
    assert least <= within_tiles(meeting, sizes, np.arange(n)) + 1e-9
    for i in range(n):
        for k in range(i):
            changed = order.copy()
            changed[[i, k]] = changed[[k, i]]
            assert least <= within_tiles(meeting, sizes, changed) + 1e-6


def test_it_is_close_to_the_best_of_all_orders():
    for seed in range(20):
        meeting = symmetric(seed, 6)
        every = [within_tiles(meeting, [3, 3], list(order)) for order in permutations(range(6))]
        found = within_tiles(meeting, [3, 3], least_meeting(meeting, np.array([3, 3])))
        assert found <= min(every) + 0.35 * (max(every) - min(every))


def test_where_nothing_can_be_won_rows_stay_in_order():
    assert least_meeting(np.ones((7, 7)), np.array([3, 3, 1])).tolist() == list(range(7))
    assert least_meeting(np.zeros((4, 4)), np.array([4])).tolist() == list(range(4))


# -- a layer ---------------------------------------------------------------------------------------
def layer_inputs(g: Geometry, seed: int = 0, size: tuple[int, int] = (9, 8), images: int = 6):
    """Codes that neighbours share, as in pictures, and weights."""
    rng = np.random.default_rng(seed)
    smooth = rng.random((images, g.channels, 1, 1)) + 0.3 * rng.random((images, g.channels, *size))
    return torch.from_numpy(np.floor(11 * smooth)).float(), torch.from_numpy(
        rng.integers(-7, 8, (g.columns, g.rows))
    ).float()


def mean_square(codes, weight, plan) -> float:
    counts = partial_sum_histogram(codes, weight, plan).sum(0)
    return counts @ np.arange(plan.macro.p_min, plan.macro.p_max + 1) ** 2 / counts.sum()


GEOMETRIES = {
    "conv": Geometry(6, 8, (3, 3)), "strided": Geometry(5, 4, (3, 2), (2, 1), dilation=(1, 2)), "groups": Geometry(8, 6, (3, 3), groups=2),
    "conv1d": Geometry(7, 5, (1, 3), kind="conv1d"), "pointwise": Geometry(30, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize(
    "macro",
    [
        Macro(pack="spread"),
        Macro(pack="spread", wl=16),
        Macro(pack="spread", wl=4, sign_scheme="split"),
    ],
    ids=Macro.describe,
)
def test_partial_sums_get_smaller(name, macro):
    g = GEOMETRIES[name]
    codes, weight = layer_inputs(g)
    plan = Plan.make("layer", g, macro)
    order = spread_order(codes, weight, plan)
    assert sorted(order) == list(range(g.rows))
    spread_out, in_order = (
        mean_square(codes, weight, p) for p in (Plan.make("layer", g, macro, order), plan)
    )
    assert spread_out <= in_order
    if name == "conv" and macro.wl == 9:
        assert spread_out < 0.7 * in_order


def test_one_tile_stays_in_order():
    g = Geometry(4, 4, (3, 3), groups=4)
    assert spread_order(*layer_inputs(g), Plan.make("layer", g, Macro(pack="spread"))) == tuple(
        range(9)
    )


def test_many_rows_are_searched_in_parts(monkeypatch):
    g = Geometry(40, 6)
    codes, weight = layer_inputs(g, size=(5, 5))
    plan = Plan.make("layer", g, Macro(pack="spread"))
    whole = spread_order(codes, weight, plan)
    monkeypatch.setattr(spread, "SEARCHED", 15)
    parts = spread_order(codes, weight, plan)
    assert sorted(parts) == list(range(40)) and parts != whole
    least, between, in_order = (
        mean_square(codes, weight, Plan.make("layer", g, Macro(pack="spread"), order))
        for order in (whole, parts, None)
    )
    assert least <= between < in_order


def test_images_and_positions_are_left_out_evenly(monkeypatch):
    g = GEOMETRIES["conv"]
    codes, weight = layer_inputs(g, images=40)
    monkeypatch.setattr(spread, "ROW_VALUES", 20 * 54 * 42)
    monkeypatch.setattr(spread, "POSITIONS", 200)
    rows = spread._rows(codes, Plan.make("layer", g, Macro(pack="spread")))
    assert rows.shape == (1, 54, 168)  # 20 images of 42 positions, every fifth
    whole = nn.functional.unfold(codes[::2], g.kernel).permute(1, 0, 2).flatten(1)
    assert torch.equal(rows[0], whole[:, ::5])


# -- a network -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    return capture(model, (3, 6, 6))


def test_calibration_chooses_the_order_and_a_state_keeps_it(small_model):
    network, again = (rewrite(small_model, Macro(pack="spread")) for _ in range(2))
    x = torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    calibrate(network, x, small_model)
    orders = {name: layer.plan.order for name, layer in read_layers(network).items()}
    assert all(
        sorted(order) == list(range(len(order))) and order != tuple(range(len(order)))
        for order in orders.values()
    )
    again.load_state_dict(network.state_dict())
    assert {name: layer.plan.order for name, layer in read_layers(again).items()} == orders
    assert torch.equal(again.eval()(x), network.eval()(x))


def test_an_ideal_adc_takes_rows_in_order_and_computes_the_same(small_model):
    x = torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    networks = [
        rewrite(small_model, Macro(adc_bits=None, pack=pack)) for pack in ("rows", "spread")
    ]
    for network in networks:
        calibrate(network, x, small_model)
    assert torch.equal(*(network.eval()(x) for network in networks))
    assert all(
        layer.order.tolist() == list(range(layer.plan.geometry.rows))
        for layer in read_layers(networks[1]).values()
    )


def test_the_same_images_give_the_same_order_on_any_number_of_threads(small_model):
    x, orders = torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(1)), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        network = rewrite(small_model, Macro(pack="spread"))
        calibrate(network, x, small_model)
        orders.append([layer.plan.order for layer in read_layers(network).values()])
    torch.set_num_threads(before)
    assert orders[0] == orders[1]
