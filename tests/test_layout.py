"""Whatever the order of axes in a file, a network gets its own: axes are exchanged, never reshaped
into each other, up to the last integer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import rqtool
from rqtool import Data, Images, Macro, Preprocess, Recipe, checkpoint
from rqtool.errors import ConfigError, InputError
from rqtool.model.data import load_data
from rqtool.model.layout import FIRST, LAST, PLAIN, SWAPPED, laid, orders_to, views
from rqtool.program.golden import run as golden
from rqtool.program.run import Runner

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATED = Recipe(epochs=0, calibration_images=64)


class Last(nn.Module):
    """A network that takes [N, H, W, C], as converted ones do."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.conv.weight.data = torch.eye(channels).view(channels, channels, 1, 1).clone()
        self.conv.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).mean((2, 3))


def brightest(count: int, h: int = 6, w: int = 5, c: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, H, W, C], labels): the class is the brightest channel."""
    y = np.arange(count) % c
    x = np.random.default_rng(count).integers(0, 80, (count, h, w, c)).astype(np.uint8)
    x[np.arange(count), :, :, y] += 120
    return x, y


def saved(path, x: np.ndarray, y: np.ndarray, train: int) -> str:
    np.savez(path, x_train=x[:train], y_train=y[:train], x_test=x[train:], y_test=y[train:])
    return str(path)


# -- orders ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "wanted", "orders"),
    [
        ((3, 16, 16), (3, 16, 16), [PLAIN]),
        ((3, 16, 16), (16, 16, 3), [LAST]),
        ((16, 16, 2), (2, 16, 16), [FIRST]),
        ((3, 3, 3), (3, 3, 3), [PLAIN, LAST, FIRST]),
        ((1, 8, 9), (8, 9, 1), [PLAIN]),
        ((1, 8, 9), (9, 8), [SWAPPED]),
        ((8, 9), (9, 8), [SWAPPED]),
        ((1, 8, 9), (72,), [PLAIN]),
        ((3, 8, 9), (24, 9), [PLAIN]),
        ((72,), (8, 9), [PLAIN]),
    ],
)
def test_the_orders_of_a_shape(shape, wanted, orders):
    assert orders_to(shape, wanted) == orders


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((3, 16, 8), (3, 8, 16)), ((1, 8, 9), (1, 9, 8)), ((3, 16, 8), (16, 3, 8))],
)
def test_rows_never_become_columns(shape, wanted):
    with pytest.raises(InputError) as e:
        orders_to(shape, wanted)
    assert str(e.value) == (
        f"images of {'x'.join(map(str, shape))} (channels, height, width) "
        f"are not {'x'.join(map(str, wanted))}: rows and columns would "
        "change places; "
        "give the shape with its axes in their order, channels first or last"
    )


@pytest.mark.parametrize("shape", [(3, 8, 9), (1, 8, 9), (8, 9), (7,), (2, 3, 4, 5)])
def test_every_view_holds_each_value_once(shape):
    x = np.arange(2 * np.prod(shape)).reshape(2, *shape)
    for axes, view in views(shape):
        assert sorted(laid(x, axes, view).ravel()) == sorted(x.ravel()) and laid(
            x, axes, view
        ).shape == (2, *view)


def test_values_in_a_row_keep_the_order_of_the_file(tmp_path):
    x, y = brightest(9)
    images = load_data(saved(tmp_path / "last.npz", x, y, 6)).train
    assert images.shape == (3, 6, 5) and images.own == LAST and images[:2].own == LAST
    assert (images.reshaped((90,)).x == x[:6].reshape(6, 90)).all()
    assert (images.reshaped((6, 5, 3)).x == x[:6]).all()


def test_a_mean_for_each_channel_follows_the_channels():
    p = Preprocess(1.0, (1, 2, 3))
    x = np.zeros((1, 3, 2, 2))
    for axes, view in ((PLAIN, (3, 2, 2)), (LAST, (2, 2, 3)), (PLAIN, (12,)), (LAST, (12,))):
        mult, add = replace(p, axes=axes).factors(view)
        expected = laid(p.apply(x), axes, view)[0]
        assert (np.broadcast_to(np.zeros(view) * mult + add, view) == expected).all()
    assert p.factors((9, 3))[1].tolist() == [
        [-1, -2, -3]
    ]  # a signal of three channels, the time first
    with pytest.raises(
        ConfigError, match="^--mean has 3 values, but the images have 4 channels; give 1 or 4$"
    ):
        p.factors((4, 8, 8))


# -- the whole way ---------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [None, (6, 5, 3)])
@pytest.mark.parametrize("order", ["last", "first"])
def test_a_network_that_takes_channels_last(tmp_path, given, order):
    x, y = brightest(90)
    source = saved(tmp_path / "d.npz", x if order == "last" else x.transpose(0, 3, 1, 2), y, 60)
    made = rqtool.quantize(
        Last(), source, out=tmp_path / "m.rq", recipe=CALIBRATED, input_shape=given, twin=False
    )
    assert (made.float_top1, made.tuned_top1, made.agreement) == (
        100,
        100,
        100,
    ) and not made.warnings
    assert checkpoint.load(tmp_path / "m.rq").preprocess == Preprocess(axes=LAST)
    assert rqtool.evaluate(tmp_path / "m.rq", source).top1 == 100
    assert rqtool.export_onnx(tmp_path / "m.rq", data=source, images=3).report["images"] == 3


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_channels_that_are_last_have_a_mean_each(tmp_path, kind):
    """Without its mean, the third channel is always the brightest."""
    x, y = brightest(90)
    shift = np.array([0, 10, 40])
    x = (np.minimum(x.astype(int), 200) + shift).astype(kind)
    source = saved(tmp_path / "d.npz", x, y, 60)
    pixels = {"mean": tuple(shift), "std": (50.0, 60.0, 70.0), "scale": 1.0}
    macro = Macro(in_bits=8, w_bits=8, adc_bits=None)
    made = rqtool.quantize(
        Last(),
        source,
        macro,
        out=tmp_path / "m.rq",
        recipe=CALIBRATED,
        preprocess=pixels,
        twin=False,
    )
    assert (made.float_top1, made.tuned_top1, made.agreement) == (100, 100, 100)
    file = checkpoint.load(tmp_path / "m.rq")
    few = x[60:65]
    scores = Runner(file.program)(torch.from_numpy(few)).numpy()
    real = (
        Last()(
            (torch.from_numpy(few).float() - torch.from_numpy(shift).float())
            / torch.tensor([50.0, 60, 70])
        )
        .detach()
        .numpy()
    )
    assert np.abs(scores * file.program.meta["output_scale"] - real).max() < 0.02
    assert (golden(file.program, few)[file.program.output] == scores).all()
    assert rqtool.evaluate(tmp_path / "m.rq", source, adc="ideal").top1 == 100
    assert (
        rqtool.export_onnx(tmp_path / "m.rq", data=source, images=5, body="explicit").report[
            "images"
        ]
        == 5
    )
    assert rqtool.verify(tmp_path / "m.rq")["integers"] > 0


def test_two_channels_that_are_last_are_found_and_said(tmp_path):
    x, y = brightest(90, 6, 5, 2)
    model = nn.Sequential(Last(2).conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made = rqtool.quantize(
        model, saved(tmp_path / "d.npz", x, y, 60), recipe=CALIBRATED, twin=False
    )
    assert made.float_top1 == 100
    assert made.warnings == (
        "images of 6x5x2 are taken as 2x6x5, channels last, for that is what "
        "the model takes; save them in the model's order if that is not "
        "meant",
    )


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.conv.weight.data = torch.eye(3).view(3, 3, 1).clone()
        self.conv.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(2)


@pytest.mark.parametrize("given", [None, (3, 30)])
@pytest.mark.parametrize("time", ["first", "last"])
def test_signals_have_their_channels_first_or_last(tmp_path, given, time):
    x, y = brightest(90)
    x = x.reshape(90, 30, 3)
    source = saved(tmp_path / "d.npz", x if time == "first" else x.transpose(0, 2, 1), y, 60)
    made = rqtool.quantize(
        Signal(),
        source,
        out=tmp_path / "m.rq",
        recipe=CALIBRATED,
        preprocess={"mean": (0.5, 0.5, 0.5)},
        input_shape=given,
        twin=False,
    )
    assert (made.float_top1, made.tuned_top1) == (100, 100)
    assert rqtool.evaluate(tmp_path / "m.rq", source).top1 == 100


def flat(order: np.ndarray) -> nn.Module:
    """Scores are the means of the channels, for values in the order of [90] channel numbers."""
    model = nn.Sequential(nn.Linear(90, 3, bias=False))
    model[0].weight.data = torch.tensor(
        np.stack([order == c for c in range(3)]) / 30, dtype=torch.float32
    )
    return model


def test_flat_values_are_those_of_the_file(tmp_path):
    x, y = brightest(90)
    last, first = (
        saved(tmp_path / "last.npz", x, y, 60),
        saved(tmp_path / "first.npz", x.transpose(0, 3, 1, 2), y, 60),
    )
    made = rqtool.quantize(
        flat(np.tile(range(3), 30)),
        last,
        out=tmp_path / "m.rq",
        recipe=CALIBRATED,
        preprocess={"mean": (0.1, 0.2, 0.3)},
        twin=False,
    )
    assert made.float_top1 == 100 and not made.warnings
    assert (
        rqtool.evaluate(tmp_path / "m.rq", last).top1
        == rqtool.evaluate(tmp_path / "m.rq", first).top1
        == 100
    )
    made = rqtool.quantize(flat(np.repeat(range(3), 30)), last, recipe=CALIBRATED, twin=False)
    (sentence,) = [s for s in made.warnings if "channels" in s]
    assert sentence.endswith(
        "but 100.00 % with channels first; if it was trained so, save the "
        "images in that order, each in one row"
    )


def test_a_network_that_begins_flat_gets_channels_first_or_what_input_says(tmp_path):
    x, y = brightest(90)
    source, model = (
        saved(tmp_path / "d.npz", x, y, 60),
        nn.Sequential(nn.Flatten(), *flat(np.tile(range(3), 30))),
    )
    made = rqtool.quantize(model, source, recipe=CALIBRATED, twin=False)
    (sentence,) = [s for s in made.warnings if "channels" in s]
    assert sentence.endswith(
        "but 100.00 % with channels last; if it was trained so, give --input 6,5,3"
    )
    made = rqtool.quantize(model, source, recipe=CALIBRATED, input_shape=(6, 5, 3), twin=False)
    assert made.float_top1 == 100 and not made.warnings


def test_images_of_another_shape_are_no_images_for_the_file(tmp_path):
    x, y = brightest(90)
    rqtool.quantize(
        Last(),
        saved(tmp_path / "d.npz", x, y, 60),
        out=tmp_path / "m.rq",
        recipe=CALIBRATED,
        twin=False,
    )
    turned = Data("turned", None, Images(np.ascontiguousarray(x.transpose(0, 3, 2, 1)), y), 3)
    with pytest.raises(InputError) as e:
        rqtool.evaluate(tmp_path / "m.rq", turned)
    assert (
        str(e.value) == "turned: images have shape [3, 5, 6], but the model takes [6, 5, 3]; "
        "give the data set it was made for"
    )
    as_taken = Data("as taken", None, Images(x, y), 3)
    assert rqtool.evaluate(tmp_path / "m.rq", as_taken).top1 == 100


def test_channels_last_are_not_shifted():
    x, y = brightest(30)
    images = Images(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y)
    with pytest.raises(ConfigError) as e:
        rqtool.quantize(Last(), Data("d", images, None, 3), recipe=Recipe(augment="shift"))
    assert (
        str(e.value) == "--augment shift moves images with their channels first, but the "
        "model takes them last; give --augment none"
    )


def test_features_have_no_channels():
    y = np.arange(30) % 3
    data = Data("f", Images(np.random.default_rng(0).random((30, 90), np.float32), y), None, 3)
    with pytest.raises(ConfigError) as e:
        rqtool.quantize(
            flat(np.tile(range(3), 30)), data, recipe=CALIBRATED, preprocess={"mean": (1, 2, 3)}
        )
    assert str(e.value) == "--mean has 3 values, but the images have 90 channels; give 1 or 90"


@pytest.mark.parametrize("broken", [(0, 1), (2, 1, 0), "abc", 3])
def test_an_unknown_order_is_refused(broken):
    with pytest.raises(InputError, match="^the preprocessing is not readable "):
        Preprocess.from_dict({"scale": 1.0, "mean": [0], "std": [1], "axes": broken})
