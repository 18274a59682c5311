"""What calibration makes good: columns give what the float network's give, whatever the network,
its norms and the order of its data."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rqtool
from rqtool.mapping.plan import Geometry
from rqtool.model.capture import capture
from rqtool.model.data import Data, Images
from rqtool.train.calibrate import calibrate, fit_norm
from rqtool.train.equalise import depthwise_pairs, equalised
from rqtool.train.finetune import Feed, Recipe
from rqtool.train.layers import ColumnNorm
from rqtool.train.rewrite import read_layers, rewrite
from rqtool.train.rounding import Moments, moments, rounded

EIGHT = rqtool.Macro(in_bits=8, w_bits=8, adc_bits=None)


# -- one norm --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("times", "slope"), [(1, 37 / 30), (1000, 8.51 / 5.01)])
def test_a_norm_fitted_by_hand(times, slope):
    """y = 0, 2, 4, 6 (mean 3, variance 5), want = 10, 13, 17, 20 (mean 15, covariance 8.5). The slope
    1 that it had counts as 8 positions: (8.5 + 2 * 5) / (3 * 5) where there are 4 of them, and
    (8.5 + .002 * 5) / (1.002 * 5) where there are 4,000."""
    y, want = (
        torch.tensor([[0.0, 2, 4, 6], [10.0, 13, 17, 20]]).repeat(1, times).view(2, -1, 1, 1, 1)
    )
    norm = nn.BatchNorm2d(1, eps=0).eval()
    fit_norm(norm, y, want)
    expected = [15 - 3 * slope, 15 - slope, 15 + slope, 15 + 3 * slope]
    assert norm(y).flatten()[:4].tolist() == pytest.approx(expected, abs=1e-4)
    assert (norm.running_mean.item(), norm.running_var.item(), norm.bias.item()) == (3, 5, 15)


def test_a_channel_that_does_not_vary_keeps_its_slope():
    y = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]).view(3, 2, 1, 1)
    norm = ColumnNorm(2, static=False).eval()
    fit_norm(norm, y, torch.full_like(y, 7.0))
    assert norm(y / norm.unit.float())[:, 0].flatten().tolist() == pytest.approx(
        [5, 7, 9], abs=1e-5
    )
    assert norm(y / norm.unit.float())[:, 1].flatten().tolist() == [7, 7, 7]


@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_a_column_s_unit_makes_any_scale_alike(seed, size):
    """eps is small beside outputs of any size."""
    torch.manual_seed(seed)
    y = size * (torch.randn(50, 3, 2, 2) + torch.randn(3, 1, 1))
    norm = ColumnNorm(3, static=False).eval()
    fit_norm(norm, y, y)
    assert torch.allclose(norm(y / norm.unit.float()), y, rtol=1e-4, atol=1e-4 * size)


def test_a_norm_gives_the_same_in_training_on_the_images_it_was_fitted_to():
    """Batch statistics instead of the kept ones do not change the function, so the float model's
    are not lost when training begins."""
    torch.manual_seed(0)
    y, want = torch.randn(64, 4, 3, 3), torch.randn(64, 4, 3, 3)
    norm = nn.BatchNorm2d(4)
    fit_norm(norm.eval(), y, 0.3 * want + y)
    assert torch.allclose(deepcopy(norm).train()(y), norm.eval()(y), atol=1e-5)


# -- weights ---------------------------------------------------------------------------------------
def test_weights_are_rounded_for_their_sum():
    """Two inputs that are always equal: .5 + .5 is one whole weight, not two that were rounded up."""
    gram = torch.ones(1, 2, 2, dtype=torch.float64)
    weight = torch.tensor([[[0.5, 1.0], [0.5, -3.0]]], dtype=torch.float64)
    whole, scale = rounded(Moments(gram, gram @ weight, 1000), weight, 3)
    assert (whole * scale).sum(1).flatten().tolist() == pytest.approx([1, -2], abs=0.05)


def test_moments_are_those_of_all_positions():
    torch.manual_seed(0)
    g = Geometry(4, 6, kernel=(3, 3), stride=(2, 1), groups=2)
    x, y = torch.randint(0, 16, (10, 4, 7, 6)).float(), torch.randn(10, 6, 3, 4)
    found = moments(x, y, g, slice(None))
    u = (
        nn.functional.unfold(x, (3, 3), stride=(2, 1))
        .view(10, 2, 18, 12)
        .permute(1, 2, 0, 3)
        .reshape(2, 18, -1)
        .double()
    )
    v = y.view(10, 2, 3, 12).permute(1, 2, 0, 3).reshape(2, 3, -1).double()
    u, v = u - u.mean(2, keepdim=True), v - v.mean(2, keepdim=True)
    assert torch.allclose(found.gram, u @ u.transpose(1, 2) / 120, atol=1e-4)
    assert torch.allclose(found.cross, u @ v.transpose(1, 2) / 120, atol=1e-4)


@pytest.mark.parametrize("rows", [9, 3000])
@torch.no_grad()
def test_rounded_weights_are_whole_and_give_a_better_output(rows):
    """Also where there are too many rows to round them together."""
    torch.manual_seed(0)
    network = capture(nn.Sequential(nn.Flatten(), nn.Linear(rows, 4)), (1, 1, rows))
    x = torch.rand(300, 1, 1, rows) @ torch.eye(rows).roll(1, 0).add(torch.eye(rows)) / 2
    errors = {}
    for rounding in ("nearest", "learned"):
        ours = rewrite(network, rqtool.Macro(adc_bits=None, w_bits=3, in_bits=8))
        calibrate(ours, x, network, rounding=rounding)
        codes = read_layers(ours)["1"].weight_codes()
        assert torch.equal(codes, codes.round()) and codes.abs().max() <= 3
        errors[rounding] = float((ours.eval()(x) - network.eval()(x)).square().mean())
    assert errors["learned"] < errors["nearest"]


# -- networks --------------------------------------------------------------------------------------
def lights(y: np.ndarray, seed: int) -> Images:
    """Class 0: brightness 60 to 85, class 1: 95 to 120."""
    g = np.random.default_rng(seed)
    level = np.where(y == 0, g.integers(60, 86, len(y)), g.integers(95, 121, len(y)))
    return Images(
        (level[:, None, None, None] + g.integers(-4, 5, (len(y), 1, 8, 8))).astype(np.uint8),
        y.astype(np.int64),
    )


def brightness() -> nn.Module:
    """Batch norm centred on 90, and its sign: every exact 8-bit version names 100 % rightly."""
    m = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()
    with torch.no_grad():
        m[0].weight.fill_(1)
        m[0].bias.zero_()
        m[1].running_mean.fill_(90 / 255)
        m[1].running_var.fill_((20 / 255) ** 2)
        m[3].weight[0], m[3].weight[1] = -1 / 64, 1 / 64
        m[3].bias.zero_()
    return m


TEST = lights(np.arange(400) % 2, 1)


def test_the_float_model_s_statistics_are_not_thrown_away():
    train = lights((np.arange(400) % 10 != 0) * 1, 0)
    result = rqtool.quantize(
        brightness(), Data("few", train, TEST, 2), EIGHT, recipe=Recipe(epochs=0), twin=False
    )
    assert (result.float_top1, result.tuned_top1) == (100, 100)


def test_sorted_images_are_as_good_as_shuffled_ones():
    train = lights(np.arange(6000) % 2, 0)
    for part in (train, train[np.argsort(train.y, kind="stable")]):
        result = rqtool.quantize(
            brightness(),
            Data("some", part, TEST, 2),
            EIGHT,
            recipe=Recipe(epochs=0, held_out=200),
            twin=False,
        )
        assert (result.float_top1, result.tuned_top1) == (100, 100)


@given(
    st.integers(0, 1000), st.lists(st.integers(1, 30), min_size=2, max_size=5), st.integers(1, 60)
)
@settings(max_examples=50, deadline=None)
def test_a_sample_is_drawn_from_all_images_and_is_even_over_classes(seed, counts, count):
    """No class is more than one image ahead of another that still has some; no image comes twice; a
    seed draws the same; a part is a start."""
    y = np.repeat(np.arange(len(counts)), counts)
    feed = Feed(Images(np.zeros((len(y), 1), np.uint8), y), np.ones(1), np.zeros(1))
    drawn = feed.sample(count, seed)
    assert len(drawn) == len(set(drawn)) == min(count, len(y))
    assert np.array_equal(drawn, feed.sample(count, seed)) and np.array_equal(
        drawn[:5], feed.sample(min(5, count), seed)
    )
    found = np.bincount(y[drawn], minlength=len(counts))
    open_classes = [n for n, most in zip(found, counts) if n < most]
    assert not open_classes or max(found) - min(open_classes) <= 1


def test_the_order_of_the_data_does_not_choose_the_sample():
    """Sorted by class or not: each class is drawn from end to end."""
    y = np.repeat(np.arange(4), 500)
    feed = Feed(Images(np.zeros((2000, 1), np.uint8), y), np.ones(1), np.zeros(1))
    places = feed.sample(400, 3) % 500
    assert 200 < places.mean() < 300 and places.min() < 25 and places.max() > 475


# -- batch norm folded away ------------------------------------------------------------------------
def block(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


@torch.no_grad()
def test_a_network_with_its_batch_norm_folded_is_as_near_to_float():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *block(8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *block(8),
        nn.Flatten(),
        nn.Linear(8 * 64, 5),
    )
    for m in model:
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.2, 2)
            nn.init.normal_(m.bias, 0, 0.3)
    x = torch.rand(200, 1, 10, 10)
    model.train()(x)
    model.eval()
    folded = nn.utils.fusion.fuse_conv_bn_eval
    parts, at = [], 0
    while at < len(model):
        pair = isinstance(model[at], nn.Conv2d)
        parts.append(folded(model[at], model[at + 1]) if pair else model[at])
        at += 1 + pair
    errors = []
    for version in (model, nn.Sequential(*parts)):
        network = capture(version, (1, 10, 10))
        ours = rewrite(network, rqtool.Macro())
        calibrate(ours, x, network)
        want = network.eval()(x)
        errors.append(float((ours.eval()(x) - want).square().mean() / want.var()))
    assert errors[1] < 1.25 * errors[0]


# -- depthwise layers ------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_channels_before_a_depthwise_layer_are_made_alike(norm):
    """The function stays; ranges that differed by 1,000 are within a factor of 2."""
    torch.manual_seed(0)
    sizes = torch.logspace(-1.5, 1.5, 8)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).eval()
    weight = model[1 if norm else 0].weight
    weight.mul_(sizes.view(-1, *(1,) * (weight.dim() - 1)))
    x = torch.randn(50, 2, 10, 10)
    network = capture(model, (2, 10, 10))
    ours = equalised(network, x, 15)
    ranges = []
    for version in (network, ours):
        version(x, lambda name, value: ranges.append(value) if "max_pool" in name else None)
    before, after = (value.amax((0, 2, 3)) for value in ranges)
    alive = before > 0
    before, after = before[alive], after[alive]
    assert before.max() / before.min() > 100 and after.max() / after.min() < 4
    assert torch.allclose(ours(x), network(x), rtol=1e-4, atol=1e-4)
    assert [(a.op, b.op) for a, b in depthwise_pairs(network.graph)] == [
        ("batch_norm" if norm else "conv", "conv")
    ]


@torch.no_grad()
def test_a_channel_that_others_see_or_that_is_clamped_stays():
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 4, 1)
            self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2))
            self.d = nn.Linear(4 * 16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            z = y + self.b(y)
            return self.d(self.c(nn.functional.relu6(z)).flatten(1))

    network = capture(Seen().eval(), (2, 4, 4))
    assert depthwise_pairs(network.graph) == []
    assert equalised(network, torch.randn(5, 2, 4, 4), 15) is network
