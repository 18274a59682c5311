"""What every job begins with: the model and the data, read, checked against each other and split;
the kernels, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rqtool.checkpoint import Checkpoint
from rqtool.errors import ConfigError, InputError, escaped
from rqtool.hardware.macro import Macro
from rqtool.jobs import suspicions
from rqtool.jobs.alarms import Alarms
from rqtool.jobs.trials import tried
from rqtool.kernels import choose
from rqtool.kernels.spec import Tables, make_spec
from rqtool.mapping.plan import Geometry, Plan
from rqtool.model.capture import capture
from rqtool.model.data import (
    Data,
    Images,
    Preprocess,
    has_class_folders,
    held_out,
    load_data,
    subset,
)
from rqtool.model.folders import Sizing
from rqtool.model.layout import LAST, PLAIN, Axes, orders_to, views
from rqtool.model.load import load_model
from rqtool.model.network import Network
from rqtool.program.freeze import Norm
from rqtool.program.run import certified
from rqtool.train.finetune import Feed, Recipe, fitting_network
from rqtool.train.relax import Relaxation
from rqtool.train.stages import Job

HELD_OUT_PEAK = 5000
TABLE_IMAGES = 128  # images behind clip rates


class Silent:
    """A progress that says nothing."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda n=1, note="": None


def ready_kernels(progress: Any, training: bool) -> None:
    """Make the fused kernels ready in a stage of their own: numba compiles them on first use
    (seconds) and keeps them for later runs."""
    if not choose.numba_available():
        return
    plan, one = Plan.make("one read", Geometry(1, 1), Macro()), np.ones((1, 1), np.int64)
    hard, x, n = (
        make_spec(plan, one, one, one),
        torch.ones(1, 1, 1, 1),
        torch.ones(1, dtype=torch.int32),
    )
    row, slope = (
        np.zeros((1, 1), np.int64),
        np.ones((1, plan.macro.p_max - plan.macro.p_min + 1), np.float32),
    )
    noisy = replace(
        hard, tables=Tables(plan.macro.p_min, row, slope), noise=Relaxation(1.0, 0).noise()
    )
    calls = [
        lambda: certified(plan, one, one),
        lambda: choose.Exact(x[0, 0], hard, plan, True)(x, 0),
    ]
    calls += [
        lambda xs=xs, kind=kind: choose.requant(xs, [n] * len(xs), n, 0, 0, 1, kind)
        for xs in ((x.int(),), (x.int(),) * 2)
        for kind in (torch.uint8, torch.int32)
    ]
    if training:
        calls += [
            lambda spec=spec: choose.Fused.forward(x, x[0, 0], spec) for spec in (hard, noisy)
        ]
        calls += [
            lambda: choose.Fused.backward(x, x[0, 0], hard, x),
            lambda: choose.codes_gradient(x, x, n[0], 0, 1),
        ]
        wide = x.expand(1, 1, choose.VECTOR, 1)
        calls += [lambda: choose.outputs_gradient(wide, wide, x[0, 0, 0])]
    with progress.stage("kernels (compiled on first use)", len(calls)) as done:
        for call in calls:
            call()
            done()


def read_data(data: str | Data, unsplit: str = "test", sizing: Sizing = Sizing()) -> Data:
    """The data set itself, or the one that a text names; unsplit: what its images are for, where it
    is not split; sizing: how image files come to one size."""
    return load_data(data, unsplit, sizing) if isinstance(data, str) else data


def fit(
    model: nn.Module, data: Data, input_shape: tuple[int, ...] | None
) -> tuple[Network, Data, Axes]:
    """The captured model, the data in the shape it takes, and the order of axes that took them
    there.

    Without a given shape the images are tried as they are, as signals (an axis of one channel
    dropped), with the channels last, and then flat; the error of the first try is the one a user
    sees.
    """
    shape, own = data.train.shape, data.train.own
    tries = (
        [(a, input_shape) for a in orders_to(shape, input_shape, own)[:1]]
        if input_shape
        else views(shape, own)
    )
    reasons = []
    for axes, view in tries:
        try:
            return capture(model, view), laid_data(data, axes, view), axes
        except InputError as e:
            reasons.append(e)
    raise reasons[0]


def laid_data(data: Data, axes: Axes, shape: tuple[int, ...]) -> Data:
    """The data set with its images' axes in this order, each image then in `shape`."""
    parts = {
        name: images and images.laid(axes, shape)
        for name, images in (("train", data.train), ("test", data.test))
    }
    return replace(data, **parts)


def prepare(
    model: str | Path | nn.Module,
    data: str | Data,
    arch: str | None,
    recipe: Recipe,
    preprocess: Preprocess | dict[str, Any] | None,
    input_shape: tuple[int, ...] | None,
    progress: Any,
    alarms: Alarms,
    weights: str | None = None,
    prefix: str | None = None,
) -> Job:
    """Read and capture the model, read the data, and split it; raises InputError where they do not
    fit together."""
    pixels = (
        preprocess
        if isinstance(preprocess, Preprocess)
        else replace(Preprocess(), **(preprocess or {}))
    )
    with progress.stage("reading", 2) as done:
        check_sizing(data, pixels.sizing)
        data = read_data(data, "train", pixels.sizing)
        alarms.say_all(data.notes)
        if data.train is None:
            raise InputError(
                f"{escaped(data.name)}: has no training images to calibrate on; give "
                "a data set with a training part (x_train, y_train)"
            )
        done()
        network, fitted, axes = fit(
            load_model(model, arch, weights=weights, prefix=prefix, say=alarms.say),
            data,
            input_shape,
        )
        done()
    _check_classes(network, data)
    if not isinstance(preprocess, Preprocess):
        preprocess = replace(Preprocess.of(data.train), **(preprocess or {}))
    preprocess = replace(preprocess, axes=axes)
    check_pixels(preprocess, data.train.shape, fitted.train.shape)
    check_augment(network, recipe, axes)
    scores = network.graph.shape(network.graph.output)[0]
    alarms.say_all(suspicions.of_axes(data.train.shape, axes, fitted.train.shape))
    alarms.say_all(suspicions.of_data(data, scores))
    alarms.say_all(suspicions.of_range(data.name, data.train, preprocess))
    job = split(network, fitted, recipe, preprocess)
    alarms.say_all(tried(network, data.train, fitted.train.shape, preprocess, recipe.seed))
    return job


def check_sizing(data: str | Data, sizing: Sizing) -> None:
    """Refuse to resize what is no folder of image files."""
    if sizing != Sizing() and not (isinstance(data, str) and has_class_folders(data)):
        flag = "--resize" if sizing.resize is not None else "--crop"
        name = data.name if isinstance(data, Data) else data
        raise ConfigError(
            f"{flag} is for folders of image files, but {escaped(name)} holds "
            "arrays; leave it out, and resize the arrays themselves"
        )


def check_pixels(preprocess: Preprocess, shape: tuple[int, ...], view: tuple[int, ...]) -> None:
    """Refuse a mean or std for each channel where images of `shape`, taken as `view`, have another
    number of channels."""
    given = max(len(preprocess.mean), len(preprocess.std))
    if len(view) == 1 and given not in (1, view[0]):
        preprocess.affine(shape[0])
    preprocess.factors(view)


def split(network: Network, data: Data, recipe: Recipe, preprocess: Preprocess) -> Job:
    """The job, with the held-out images that the recipe's seed draws."""
    count = recipe.held_out or min(HELD_OUT_PEAK, max(1, len(data.train) // 10))
    check_enough(network, data, count)
    mult, add = preprocess.factors(data.train.shape)
    rest, held = held_out(data.train, count, recipe.seed)
    feeds = (
        Feed(images, mult, add) for images in (rest, held, held if data.test is None else data.test)
    )
    whole = data.train.x.dtype == np.uint8
    return Job(
        network,
        *feeds,
        "held-out" if data.test is None else data.part,
        preprocess,
        Norm(mult, add),
        whole,
        data.classes,
    )


def check_enough(network: Network, data: Data, held: int) -> None:
    """Refuse so few training images that nothing is left to calibrate on, or that batch norm sees
    one number of a channel at a time."""
    narrow = any(n.op == "batch_norm" and prod(n.shape[1:]) == 1 for n in network.graph.nodes)
    least = 2 if narrow else 1
    if len(data.train) < least + 1 or held < len(data.train) < least + held:
        why = (
            "batch norm needs two to measure a variance"
            if narrow
            else "one is needed to calibrate on"
        )
        images = f"{len(data.train)} training image{'' if len(data.train) == 1 else 's'}"
        raise InputError(
            f"{escaped(data.name)}: has {images}, of which {held} "
            f"{'is' if held == 1 else 'are'} held out; {why}, so give at least "
            f"{least + held}"
        )


def sample(network: Network, feed: Feed) -> torch.Tensor:
    """Some images of a feed, real-valued: those that clip rates are measured on."""
    return feed.real(feed.sample(fitting_network(network, TABLE_IMAGES)))


def _check_classes(network: Network, data: Data) -> None:
    scores = network.graph.shape(network.graph.output)
    if len(scores) != 1:
        raise InputError(
            f"the model gives an output of shape {list(scores)} per image; "
            "rqtool measures class scores, one number per class"
        )
    suspicions.check_labels(data, scores[0])


def check_task(network: Network, data: str, labels: Feed, top1: float, task: str | None) -> None:
    """Refuse what gives back as many numbers as it takes, as an autoencoder does, where it has more
    scores than there are labels or does no better than chance. task "classify" says that it is a
    classifier all the same."""
    if task not in (None, "classify"):
        raise ConfigError(f"--task {escaped(task)} is not known; leave it out, or give classify")
    graph = network.graph
    scores = graph.shape(graph.output)[0]
    if task == "classify" or prod(graph.input_shape) != scores:
        return
    counts = np.bincount(labels.images.y)
    classes, share = int((counts > 0).sum()), counts.max() / counts.sum()
    chance = 100 * (share + 2 * float(np.sqrt(share * (1 - share) / counts.sum())))
    if scores > classes or top1 <= chance:
        raise InputError(
            f"{escaped(data)}: the model gives {scores} numbers, as many as it "
            "takes, as an autoencoder does, and names the right one of "
            f"{classes} labels for "
            f"{top1:.2f} % of the images, so it looks like no classifier; give "
            "--task classify if it is one"
        )


def check_augment(network: Network, recipe: Recipe, axes: Axes = PLAIN) -> None:
    """Refuse to move what is no image, or has its rows elsewhere."""
    if recipe.augment != "none" and len(network.graph.input_shape) != 3:
        raise ConfigError(
            f"--augment {recipe.augment} moves images, but the model takes shape "
            f"{list(network.graph.input_shape)}; give --augment none"
        )
    if recipe.augment != "none" and axes == LAST:
        raise ConfigError(
            f"--augment {recipe.augment} moves images with their channels first, "
            "but the model takes them last; give --augment none"
        )


# -- the images for a .rq file ---------------------------------------------------------------------
def images_for(
    saved: Checkpoint, data: str | Data, limit: int | None, alarms: Alarms
) -> tuple[Images, str]:
    """(the images of a data set to measure on, or its only ones, for the program; which part they
    are). limit: a random subset of so many. alarms: is told what of the data set is not read."""
    data = read_data(data, sizing=saved.preprocess.sizing)
    alarms.say_all(data.notes)
    images = fitting_images(saved, data, data.test if data.test is not None else data.train)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    return (
        images if limit is None else subset(images, limit, seed=0)
    ), data.part if data.test is not None else "train"


def fitting_images(saved: Checkpoint, data: Data, images: Images) -> Images:
    """Images of a data set in the shape the program takes; raises InputError where they are not
    what it was made for."""
    wanted, scores = (
        saved.program.tensors[saved.program.input],
        saved.network.graph.shape(saved.network.graph.output)[0],
    )
    axes = axes_for(images.shape, wanted.shape, saved.preprocess.axes)
    if axes is None:
        raise InputError(
            f"{escaped(data.name)}: images have shape {list(images.shape)}, but "
            f"the model takes {list(wanted.shape)}; give the data set it was "
            "made for"
        )
    images = images.laid(axes, wanted.shape)
    if str(images.x.dtype) != wanted.dtype:
        raise InputError(
            f"{escaped(data.name)}: images are {images.x.dtype}, but the model "
            f"takes {wanted.dtype}; give pixels in the form it was quantized "
            "with"
        )
    suspicions.check_labels(data, scores)
    return images


def axes_for(shape: tuple[int, ...], wanted: tuple[int, ...], axes: Axes) -> Axes | None:
    """The order of axes in which images of `shape` become what a program takes: the one it was made
    with, or for images that are already as the program takes them their own; None where there is
    none."""
    try:
        possible = orders_to(shape, wanted, axes)
    except InputError:
        return None
    return axes if axes in possible else possible[0]


def sample_images(
    saved: Checkpoint, data: str | Data | None, count: int, progress: Any = None
) -> np.ndarray:
    """`count` images for the program, [count, ...]: of a data set, or random ones where it is None."""
    if count < 1:
        raise ConfigError(f"--images must be at least 1, not {count}")
    if data is not None:
        return images_for(saved, data, count, Alarms(progress))[0].x
    spec, random = saved.program.tensors[saved.program.input], np.random.default_rng(0)
    if spec.dtype == "uint8":
        return random.integers(0, 256, (count, *spec.shape), dtype=np.uint8)
    return random.normal(
        0, saved.peaks[saved.network.graph.input] / 3, (count, *spec.shape)
    ).astype(np.float32)
