"""What looks like a mistake is said at once and kept in the result; what cannot be right is
refused."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import rqtool
from rqtool import Data, Images, Preprocess, Recipe, checkpoint
from rqtool.cli.main import run
from rqtool.errors import ConfigError, InputError
from rqtool.jobs import suspicions
from rqtool.jobs.alarms import Alarms

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATED = Recipe(epochs=0, calibration_images=64)


def images(count: int, seed: int = 0, classes: int = 4) -> Images:
    """[n, 1, 8, 8], grey values around a level for each class."""
    y = np.arange(count) % classes
    noise = np.random.default_rng([seed, count]).integers(0, 25, (count, 1, 8, 8))
    return Images((noise + 60 * y[:, None, None, None]).astype(np.uint8), y)


def levels(scale: float, mean: float, std: float) -> nn.Module:
    """A network that knows the class from the mean of an image, for pixels of this scale, mean and
    std: the nearest of four levels."""
    centres = torch.tensor([(60 * k + 12) * scale for k in range(4)]).sub(mean).div(std)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model[1].weight.data = (centres[:, None] / 64).expand(4, 64).clone()
    model[1].bias.data = -centres.square() / 2
    return model


DATA = Data("levels", images(400), images(200, 1), 4)


class Told:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def stage(self, name, total):
        said = [""]

        def done(n=1, note=""):
            said[0] = note or said[0]

        yield done
        self.lines.append(f"{name}: {said[0]}")

    def warn(self, sentence):
        self.lines.append(f"warning: {sentence}")


def warnings_of(model: nn.Module, data: Data = DATA, **given) -> tuple[str, ...]:
    return rqtool.quantize(model, data, recipe=CALIBRATED, twin=False, **given).warnings


# -- accuracy --------------------------------------------------------------------------------------
def test_a_network_and_data_that_belong_together_cause_no_word():
    told = Told()
    result = rqtool.quantize(
        levels(1 / 255, 0, 1), DATA, recipe=CALIBRATED, twin=False, progress=told
    )
    assert (result.float_top1, result.warnings) == (100, ())
    assert "float model: top-1 100.00 %" in told.lines


@pytest.mark.parametrize(
    ("scale", "mean", "std"),
    [(1 / 255, 0.5, 0.5), (1 / 255, 0.1307, 0.3081), (1.0, 0, 1)],
    ids=["from -1 to 1", "MNIST", "from 0 to 255"],
)
def test_forgotten_pixels_are_named(scale, mean, std):
    """Several readings may be right on all images; each of them is a way out."""
    told = Told()
    result = rqtool.quantize(
        levels(scale, mean, std), DATA, recipe=CALIBRATED, twin=False, progress=told
    )
    (sentence,) = [s for s in result.warnings if "with the pixels as they are given" in s]
    first = (
        r"on 400 training images the float model has top-1 ([\d.]+) % with "
        r"the pixels as they are given, but ([\d.]+) % with (.+)"
    )
    found = re.fullmatch(first + "; if it was trained so, give (.+)", sentence)
    assert found and float(found[1]) <= 75 and float(found[2]) == 100
    flags = dict(zip(*[iter(found[4].split())] * 2))
    pixels = {
        key[2:]: float(v) if key == "--scale" else tuple(map(float, v.split(",")))
        for key, v in flags.items()
    }
    assert (
        rqtool.quantize(
            levels(scale, mean, std), DATA, recipe=CALIBRATED, twin=False, preprocess=pixels
        ).float_top1
        == 100
    )
    assert told.lines.index(f"warning: {sentence}") < told.lines.index("calibration: ")
    assert not warnings_of(
        levels(scale, mean, std), preprocess={"scale": scale, "mean": (mean,), "std": (std,)}
    )


def test_floats_from_0_to_255_for_a_network_of_0_to_1():
    wide = Data(
        "levels", *(Images(p.x.astype(np.float32), p.y) for p in (DATA.train, DATA.test)), 4
    )
    (sentence,) = [s for s in warnings_of(levels(1 / 255, 0, 1), wide) if "as they are given" in s]
    assert sentence.endswith(
        "but 100.00 % with values from 0 to 1; if it was trained so, give --scale 0.0039215686"
    )


def test_floats_from_0_to_1_that_are_scaled_once_more():
    unit = Data(
        "levels", *(Images((p.x / 255).astype(np.float32), p.y) for p in (DATA.train, DATA.test)), 4
    )
    sentence = warnings_of(levels(1 / 255, 0, 1), unit, preprocess={"scale": 1 / 255})[0]
    assert sentence == (
        "levels: pixels from 0 to 0.8 are all within 0.0031 of each other "
        "for the network (--scale 0.00392157); "
        "give the --scale that the model was trained with, for example 1.25"
    )


def test_a_network_at_chance():
    model = levels(1 / 255, 0, 1)
    model[1].weight.data.zero_()
    sentences = warnings_of(model)
    assert sentences == (
        "the float model has top-1 25.00 % on 200 images, no better than "
        "always naming the most frequent class (25.00 %); "
        "check that weights, --arch, labels and pixels (--mean, --std, --scale) belong together",
    )
    y = np.array([0] * 90 + [1] * 10)
    assert "always naming the most frequent class (90.00 %)" in suspicions.of_chance(92.0, y, 2)[0]
    assert (
        suspicions.of_chance(99.0, y, 2) == []
        and suspicions.of_chance(50.0, np.arange(1000) % 10, 10) == []
    )


def test_calibration_that_mends_too_much():
    assert suspicions.of_gain(23.55, 55.45, 1000) == [
        "the calibrated network has top-1 55.45 %, the float model only "
        "23.55 % (1000 images): calibration mends what came in wrong; "
        "check pixels (--mean, --std, --scale), weights and batch norm statistics"
    ]
    assert (
        suspicions.of_gain(85.0, 86.0, 1000)
        == suspicions.of_gain(100, 100, 10)
        == suspicions.of_gain(0, 0, 10)
        == []
    )


def test_images_on_their_side_are_noticed():
    """Half images: bright above or below; the file has them transposed."""
    y = np.arange(300) % 2
    x = np.random.default_rng(0).integers(0, 80, (300, 8, 8)).astype(np.uint8)
    for place, label in zip(x, y):
        place[:, 4 * label : 4 * label + 4] += 120
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    above = torch.zeros(8, 8).index_fill(0, torch.arange(4), 1.0).flatten()
    model[1].weight.data = torch.stack([above, 1 - above])
    data = Data("halves", Images(x[:200, None], y[:200]), Images(x[200:, None], y[200:]), 2)
    (sentence,) = [s for s in warnings_of(model, data) if "exchanged" in s]
    assert sentence.endswith(
        "but 100.00 % with rows and columns exchanged; if it was trained so, "
        "save the images in that order"
    )


def test_better_is_beyond_chance():
    right = np.arange(512) % 2 == 0
    assert suspicions.better(right, {"all": np.ones(512, bool), "same": right}) == "all"
    assert suspicions.better(right, {"one more": right | (np.arange(512) == 1)}) is None
    assert suspicions.better(right, {}) is None


# -- labels and images -----------------------------------------------------------------------------
def test_labels_from_one_are_refused(tmp_path):
    data = replace(
        DATA,
        train=Images(DATA.train.x, DATA.train.y + 1),
        test=Images(DATA.test.x, DATA.test.y + 1),
        classes=5,
    )
    sentence = (
        "levels: labels run from 1 to 4, but the model's 4 classes are "
        "numbered from 0; subtract 1 from the labels"
    )
    with pytest.raises(InputError) as e:
        rqtool.quantize(levels(1 / 255, 0, 1), data, recipe=CALIBRATED)
    assert str(e.value) == sentence
    rqtool.quantize(
        levels(1 / 255, 0, 1), DATA, out=tmp_path / "m.rq", recipe=CALIBRATED, twin=False
    )
    with pytest.raises(InputError) as e:
        rqtool.evaluate(tmp_path / "m.rq", data)
    assert str(e.value) == sentence


def test_labels_of_one_class():
    test = Images(DATA.test.x, DATA.test.y * 0 + 3)
    assert (
        "levels: all 200 test images have the label 3; check the labels, or "
        "give images of every class" in warnings_of(levels(1 / 255, 0, 1), replace(DATA, test=test))
    )


def test_classes_that_are_missing():
    known = DATA.train.y != 2
    data = replace(DATA, train=Images(DATA.train.x[known], DATA.train.y[known]))
    assert warnings_of(levels(1 / 255, 0, 1), data) == (
        "levels: 1 of the model's 4 classes has no training image (2); check "
        "that the data set is the one the model was trained for",
    )
    assert suspicions.of_labels("d", "val", np.arange(30) % 3, 1000) == [
        "d: 997 of the model's 1000 classes have no val image (3, 4, 5, 6, 7 "
        "and 992 more); check that the data set is the one the model was "
        "trained for"
    ]


def test_images_without_a_picture():
    x = DATA.train.x.copy()
    x[[3, 8]] = 9
    assert warnings_of(levels(1 / 255, 0, 1), replace(DATA, train=Images(x, DATA.train.y))) == (
        "levels: 2 of 400 training images have the same value everywhere; "
        "check how the images were made, or leave them out",
    )
    assert suspicions.of_constant("d", "test", np.zeros((3, 1), np.uint8)) == []


def test_images_that_are_in_both_parts():
    x = DATA.test.x.copy()
    x[:2] = DATA.train.x[:2]
    assert warnings_of(levels(1 / 255, 0, 1), replace(DATA, test=Images(x, DATA.test.y))) == (
        "levels: 2 of 200 test images are training images too, so that top-1 "
        "also counts what was learnt by heart; leave them out of one part",
    )


# -- too few images --------------------------------------------------------------------------------
def features(count: int) -> Data:
    y = np.arange(count) % 2
    x = (np.random.default_rng(0).integers(0, 100, (count, 16)) + 100 * y[:, None]).astype(np.uint8)
    return Data("few", Images(x, y), Images(x, y), 2)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize(
    ("count", "held", "sentence"),
    [
        (
            1,
            None,
            "few: has 1 training image, of which 1 is held out; batch norm needs "
            "two to measure a variance, so give at least 3",
        ),
        (
            2,
            None,
            "few: has 2 training images, of which 1 is held out; batch norm "
            "needs two to measure a variance, so give at least 3",
        ),
        (
            6,
            5,
            "few: has 6 training images, of which 5 are held out; batch norm "
            "needs two to measure a variance, so give at least 7",
        ),
    ],
)
def test_too_few_images_are_refused(count, held, sentence):
    with pytest.raises(InputError) as e:
        rqtool.quantize(normed(), features(count), recipe=Recipe(epochs=0, held_out=held))
    assert str(e.value) == sentence


def test_three_images_are_enough_for_batch_norm_and_two_without():
    assert (
        rqtool.quantize(normed(), features(3), recipe=Recipe(epochs=1), twin=False).train_images
        == 2
    )
    assert (
        rqtool.quantize(
            nn.Linear(16, 2), features(2), recipe=Recipe(epochs=1), twin=False
        ).train_images
        == 1
    )
    with pytest.raises(InputError) as e:
        rqtool.quantize(nn.Linear(16, 2), features(1), recipe=CALIBRATED)
    assert (
        str(e.value) == "few: has 1 training image, of which 1 is held out; one is needed to "
        "calibrate on, so give at least 2"
    )


# -- the shell -------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """train and val folders of class folders, images of many sizes, a network for 8x8 pixels."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part, n in (("train", 20), ("val", 10)):
        for k in (0, 1):
            (tmp_path / "ds" / part / "ab"[k]).mkdir(parents=True)
            for i in range(n):
                size = random.integers(8, 20, 2)
                pixels = (random.integers(0, 100, size) + 120 * k).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "ds" / part / "ab"[k] / f"{i}.png")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    model[1].weight.data = torch.stack([-torch.ones(64), torch.ones(64)])
    model[1].bias.data = torch.tensor([0.45 * 64, -0.45 * 64])
    torch.save(model, "m.pt")
    return tmp_path


def test_val_folders_and_sizes_from_the_shell(folder, capsys):
    line = ["quantize", "m.pt", "--data", "ds", "--epochs", "0", "--no-twin"]
    assert run(line) == 3
    assert capsys.readouterr().err.endswith("give images of one size, or --resize N and --crop N\n")
    assert run([*line, "--resize", "8", "--crop", "8"]) == 0
    captured = capsys.readouterr()
    assert "20 val images" in captured.out and "warning" not in captured.err
    assert re.search(r"^float model: [\d.]+ s, top-1 100\.00 %$", captured.err, re.MULTILINE)
    assert checkpoint.load("m.rq").preprocess == Preprocess(resize=8, crop=8)
    (folder / "ds" / "notes.txt").write_text("x")
    assert run(["eval", "m.rq", "--data", "ds", "--json"]) == 0
    captured = capsys.readouterr()
    assert '"measured_on": "val"' in captured.out and '"top1": 100.0' in captured.out
    assert run(["inspect", "m.rq"]) == 0
    assert re.search(r"^images +resize 8, crop 8$", capsys.readouterr().out, re.MULTILINE)
    assert run(["train", "m.rq", "--data", "ds", "--epochs", "0", "--out", "t.rq"]) == 0
    assert "val images" in capsys.readouterr().out


def test_what_is_not_read_is_a_warning(folder, capsys):
    (folder / "ds" / "train" / "a" / "notes.txt").write_text("x")
    assert (
        run(
            [
                "quantize",
                "m.pt",
                "--data",
                "ds",
                "--epochs",
                "0",
                "--no-twin",
                "--resize",
                "8",
                "--crop",
                "8",
            ]
        )
        == 0
    )
    assert (
        "warning: ds/train: 1 file in class folders is not read, being no image ("
        in capsys.readouterr().err
    )
    assert run(["eval", "m.rq", "--data", "ds"]) == 0
    assert (
        "warning: ds/train: 1 file in class folders is not read, being no image ("
        in capsys.readouterr().err
    )


def test_only_image_files_are_resized(folder):
    np.savez("d.npz", x=DATA.train.x, y=DATA.train.y)
    with pytest.raises(ConfigError) as e:
        rqtool.quantize("m.pt", "d.npz", preprocess={"crop": 8})
    assert (
        str(e.value) == "--crop is for folders of image files, but d.npz holds arrays; leave "
        "it out, and resize the arrays themselves"
    )


def test_a_sentence_is_said_once():
    told = Told()
    alarms = Alarms(told)
    alarms.say_all(["a", "b", "a"])
    alarms.say("b")
    assert alarms.sentences == ["a", "b"] and told.lines == ["warning: a", "warning: b"]
