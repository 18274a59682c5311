"""What a data set or an accuracy looks like when something was forgotten: each function gives
sentences that name the way out, or none.

Nothing is mended here in silence: what looks wrong may be meant.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.model.data import Data, Images, Preprocess
from rqtool.model.layout import FIRST, LAST, PLAIN, SWAPPED, Axes, Shape, by

ERRORS = 2.0  # standard errors that chance hardly makes
BEST_ERRORS = 3.0  # the same for the best of a dozen candidates
CLEAR = 3.0  # points of top-1 below which another reading of the pixels is not worth a word
SHOWN = 5  # classes named in one sentence
DARK = 0.02  # real pixels that are all closer together than this are hardly what a network was trained on
BLOCK = 1 << 24  # bytes of images that are looked at together

KNOWN_NORMS = {
    "values from 0 to 1": ((0.0,), (1.0,)),
    "values from -1 to 1": ((0.5,), (0.5,)),
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's mean and std": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "MNIST's mean and std": ((0.1307,), (0.3081,)),
    "Fashion-MNIST's mean and std": ((0.2860,), (0.3530,)),
}  # of pixels from 0 to 1


# -- labels ----------------------------------------------------------------------------------------
def check_labels(data: Data, scores: int) -> None:
    """Raise InputError where labels are beyond the scores of the model."""
    if data.classes <= scores:
        return
    lowest = min(int(part.y.min()) for part in (data.train, data.test) if part is not None)
    if lowest == 1 and data.classes == scores + 1:
        raise InputError(
            f"{escaped(data.name)}: labels run from 1 to {scores}, but the "
            f"model's {scores} classes are numbered from 0; subtract 1 from the "
            "labels"
        )
    raise InputError(
        f"{escaped(data.name)}: labels go up to {data.classes - 1}, but the "
        f"model scores {scores} classes; give the data set the model was "
        "trained for"
    )


def of_labels(name: str, part: str, y: np.ndarray, scores: int) -> list[str]:
    """Labels of one class only, or classes of the model that never occur. part: "training" or what
    is measured on."""
    counts = np.bincount(y, minlength=scores)
    missing, where = np.flatnonzero(counts == 0), f"{escaped(name)}: "
    if scores > 1 and len(missing) == scores - 1:
        return [
            f"{where}all {len(y)} {part} images have the label {y[0]}; check the "
            "labels, or give images of every class"
        ]
    if not len(missing):
        return []
    listed = ", ".join(map(str, missing[:SHOWN])) + (
        f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    )
    classes = (
        f"{len(missing)} of the model's {scores} classes have"
        if len(missing) > 1
        else f"1 of the model's {scores} classes has"
    )
    return [
        f"{where}{classes} no {part} image ({listed}); check that the data "
        "set is the one the model was trained for"
    ]


# -- images ----------------------------------------------------------------------------------------
def of_constant(name: str, part: str, x: np.ndarray) -> list[str]:
    """Images of a single value."""
    if x[0].size == 1:
        return []
    rows = max(1, BLOCK // x[0].nbytes)
    flat = (x[at : at + rows].reshape(-1, x[0].size) for at in range(0, len(x), rows))
    count = sum(int((block == block[:, :1]).all(1).sum()) for block in flat)
    if not count:
        return []
    images = (
        f"{count} of {len(x)} {part} images have"
        if count > 1
        else f"1 of {len(x)} {part} images has"
    )
    return [
        f"{escaped(name)}: {images} the same value everywhere; check how the "
        "images were made, or leave them out"
    ]


def of_shared(name: str, part: str, train: np.ndarray, test: np.ndarray) -> list[str]:
    """Images to measure on that are training images too, to the last bit."""
    known = set(_digests(train))
    count = sum(digest in known for digest in _digests(test))
    if not count:
        return []
    images = (
        f"{count} of {len(test)} {part} images are"
        if count > 1
        else f"1 of {len(test)} {part} images is"
    )
    return [
        f"{escaped(name)}: {images} training images too, so that top-1 also "
        "counts what was learnt by heart; leave them out of one part"
    ]


def _digests(x: np.ndarray) -> Iterable[bytes]:
    return (hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in x)


def of_data(data: Data, scores: int) -> list[str]:
    """What a data set makes one suspect, for a model of so many scores."""
    found = []
    for part, images in (("training", data.train), (data.part, data.test)):
        if images is not None:
            found += [
                *of_labels(data.name, part, images.y, scores),
                *of_constant(data.name, part, images.x),
            ]
    if data.train is not None and data.test is not None:
        found += of_shared(data.name, data.part, data.train.x, data.test.x)
    return found


def of_range(name: str, images: Images, preprocess: Preprocess) -> list[str]:
    """Pixels that are nearly one value for the network, or from 0 to 255 where floats are taken as
    they are."""
    low, high = float(images.x.min()), float(images.x.max())
    spread = (high - low) * preprocess.scale / min(preprocess.std)
    if high > low and spread < DARK:
        return [
            f"{escaped(name)}: pixels from {low:g} to {high:g} are all within "
            f"{spread:.2g} of each other for the network (--scale "
            f"{preprocess.scale:.6g}); "
            "give the --scale that the model was trained with, for example "
            f"{1 / max(abs(low), abs(high)):.6g}"
        ]
    return []


def of_axes(shape: Shape, axes: Axes, view: Shape) -> list[str]:
    """Axes that were exchanged though the data set gave no reason."""
    if axes not in (FIRST, SWAPPED):
        return []
    what = "channels last" if axes == FIRST else "both axes exchanged"
    return [
        f"images of {by(shape)} are taken as {by(view)}, {what}, for that is "
        "what the model takes; save them in the model's order if that is not "
        "meant"
    ]


# -- accuracies ------------------------------------------------------------------------------------
def of_chance(top1: float, y: np.ndarray, scores: int) -> list[str]:
    """A float model that is no better than naming a class at random, or always the same."""
    if scores < 2:
        return []
    counts = np.bincount(y)
    often, labels = 100 * counts.max() / len(y), int((counts > 0).sum())
    classifier = (
        f"it gives {scores} scores for {labels} label{'s' * (labels > 1)}, so that it may be no "
        "classifier; "
        if scores > labels
        else ""
    )
    for chance, guess in (
        (often, "always naming the most frequent class"),
        (100 / scores, "naming a class at random"),
    ):
        if top1 <= chance + ERRORS * math.sqrt(chance * (100 - chance) / len(y)):
            return [
                f"the float model has top-1 {top1:.2f} % on {len(y)} images, no "
                f"better than {guess} ({chance:.2f} %); {classifier}"
                "check that weights, --arch, labels and pixels (--mean, --std, "
                "--scale) belong together"
            ]
    return []


def of_gain(float_top1: float, top1: float, images: int) -> list[str]:
    """A calibrated network that is better than the float model it comes from."""
    error = math.sqrt(sum(p * (100 - p) for p in (float_top1, top1)) / images)
    if top1 - float_top1 <= ERRORS * error or top1 <= float_top1:
        return []
    return [
        f"the calibrated network has top-1 {top1:.2f} %, the float model "
        f"only {float_top1:.2f} % ({images} images): calibration mends what "
        "came in wrong; "
        "check pixels (--mean, --std, --scale), weights and batch norm statistics"
    ]


def pixel_candidates(images: Images, given: Preprocess, channels: int) -> dict[str, Preprocess]:
    """{what pixels may be worth: the preprocessing} for networks whose training is not known, but
    for `given` itself.

    Whole numbers count from 0 to 255, others too where one is above 1.5. The last candidate has the
    mean and std of these images.
    """
    x = images.x
    scale = 1 / 255 if x.dtype == np.uint8 or float(x.max()) > 1.5 else 1.0
    norms = {name: norm for name, norm in KNOWN_NORMS.items() if len(norm[0]) in (1, channels)}
    if x.ndim == 4 and x.shape[1] == channels:
        mean, std = (
            tuple(float(f"{v:.4g}") for v in getattr(x, what)((0, 2, 3), np.float64) * scale)
            for what in ("mean", "std")
        )
        norms["the mean and std of the training images"] = (mean, tuple(max(v, 1e-3) for v in std))
    raw = (
        {}
        if scale == 1
        else {"values from 0 to 255": replace(given, scale=1.0, mean=(0.0,), std=(1.0,))}
    )
    found = {
        name: replace(given, scale=scale, mean=mean, std=std) for name, (mean, std) in norms.items()
    } | raw
    return {
        name: p
        for name, p in found.items()
        if (p.scale, p.mean, p.std) != (given.scale, given.mean, given.std)
    }


def better(hits: np.ndarray, others: Mapping[str, np.ndarray]) -> str | None:
    """The name of the best of other answers on the same images, where it is clearly better than
    `hits` (bool [N]): by more than BEST_ERRORS standard errors of the difference and more than
    CLEAR points; None where none is."""
    if not others:
        return None
    name = max(others, key=lambda n: others[n].sum())
    difference = 100 * (others[name].astype(float) - hits)
    return (
        name
        if difference.mean() > max(CLEAR, BEST_ERRORS * difference.std() / math.sqrt(len(hits)))
        else None
    )


def of_pixels(
    given: Preprocess,
    right: np.ndarray,
    candidates: Mapping[str, Preprocess],
    others: Mapping[str, np.ndarray],
) -> list[str]:
    """Pixels that the network knows better under another mean, std or scale. right, others: bool
    [N], on the same training images, with the pixels of `given` and of each candidate."""
    name = better(right, others)
    if name is None:
        return []
    return [
        f"on {len(right)} training images the float model has top-1 "
        f"{_percent(right)} % with the pixels as they are given, but "
        f"{_percent(others[name])} % with {name}; "
        f"if it was trained so, give {flags(candidates[name], given)}"
    ]


def flags(p: Preprocess, given: Preprocess) -> str:
    """The options that make `given` the preprocessing `p`.

    >>> flags(Preprocess(1.0, (0.5,), (0.25,)), Preprocess(1.0, (0.5,)))
    '--std 0.25'
    """
    values = {
        "mean": ",".join(f"{v:g}" for v in p.mean),
        "std": ",".join(f"{v:g}" for v in p.std),
        "scale": f"{p.scale:.8g}",
    }
    return " ".join(
        f"--{name} {value}"
        for name, value in values.items()
        if getattr(p, name) != getattr(given, name)
    )


def of_order(
    right: np.ndarray, others: Mapping[Axes, np.ndarray], shape: Shape, view: Shape
) -> list[str]:
    """A network that takes the same values in another order, and knows them better so. right,
    others: bool [N], on the same training images, with their axes as they are and in each order."""
    axes = better(right, others)
    if axes is None:
        return []
    names = {PLAIN: "channels first", LAST: "channels last", SWAPPED: "rows and columns exchanged"}
    wanted = tuple(shape[a] for a in axes)
    way = f"give --input {','.join(map(str, wanted))}"
    if axes == SWAPPED or len(view) == 1 or len(set(shape)) == 1:
        way = "save the images in that order" + (", each in one row" if len(view) == 1 else "")
    return [
        f"on {len(right)} training images the float model has top-1 "
        f"{_percent(right)} % with their values in the order they are taken "
        "in, "
        f"but {_percent(others[axes])} % with {names[axes]}; if it was trained so, {way}"
    ]


def _percent(hits: np.ndarray) -> str:
    return f"{100 * hits.mean():.2f}"
