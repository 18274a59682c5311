"""What every job begins with: the model and the data, read, checked against each other and split; the kernels, compiled."""

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
from rqtool.jobs.alarms import Alarms
from rqtool.kernels import choose
from rqtool.kernels.spec import Tables, make_spec
from rqtool.mapping.plan import Geometry, Plan
from rqtool.model.capture import capture
from rqtool.model.data import Data, Images, Preprocess, held_out, load_data, subset
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
    """Make the fused kernels ready in a stage of their own: numba compiles them on first use (seconds) and keeps them for later runs."""
    if not choose.numba_available():
        return
    plan, one = Plan.make("one read", Geometry(1, 1), Macro()), np.ones((1, 1), np.int64)
    hard, x, n = make_spec(plan, one, one, one), torch.ones(1, 1, 1, 1), torch.ones(1, dtype=torch.int32)
    row, slope = np.zeros((1, 1), np.int64), np.ones((1, plan.macro.p_max - plan.macro.p_min + 1), np.float32)
    noisy = replace(hard, tables=Tables(plan.macro.p_min, row, slope), noise=Relaxation(1.0, 0).noise())
    calls = [lambda: certified(plan, one, one), lambda: choose.Exact(x[0, 0], hard, plan, True)(x, 0)]
    calls += [lambda xs=xs, kind=kind: choose.requant(xs, [n] * len(xs), n, 0, 0, 1, kind) for xs in ((x.int(),), (x.int(),) * 2) for kind in (torch.uint8, torch.int32)]
    if training:
        calls += [lambda spec=spec: choose.Fused.forward(x, x[0, 0], spec) for spec in (hard, noisy)]
        calls += [lambda: choose.Fused.backward(x, x[0, 0], hard, x), lambda: choose.codes_gradient(x, x, n[0], 0, 1)]
        wide = x.expand(1, 1, choose.VECTOR, 1)
        calls += [lambda: choose.outputs_gradient(wide, wide, x[0, 0, 0])]
    with progress.stage("kernels (compiled on first use)", len(calls)) as done:
        for call in calls:
            call()
            done()


def read_data(data: str | Data, unsplit: str = "test") -> Data:
    """The data set itself, or the one that a text names; unsplit: what its images are for, where it is not split."""
    return load_data(data, unsplit) if isinstance(data, str) else data


def fit(model: nn.Module, data: Data, input_shape: tuple[int, ...] | None) -> tuple[Network, Data]:
    """The captured model, and the data in the shape it takes.

    Without a given shape the images are tried as they are, then as signals (an axis of one channel dropped), then flat; the
    error of the first try is the one a user sees.
    """
    shape = data.train.shape
    tries = [input_shape] if input_shape else [shape, *([shape[1:]] if len(shape) == 3 and shape[0] == 1 else []), (prod(shape),)]
    reasons = []
    for candidate in dict.fromkeys(tries):
        parts = {name: images and images.reshaped(candidate) for name, images in (("train", data.train), ("test", data.test))}
        try:
            return capture(model, candidate), replace(data, **parts)
        except InputError as e:
            reasons.append(e)
    raise reasons[0]


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
    """Read and capture the model, read the data, and split it; raises InputError where they do not fit together."""
    with progress.stage("reading", 2) as done:
        data = read_data(data, unsplit="train")
        if data.train is None:
            raise InputError(f"{escaped(data.name)}: has no training images to calibrate on; give a data set with a training part (x_train, y_train)")
        for sentence in data.notes:
            alarms.say(sentence)
        done()
        network, data = fit(load_model(model, arch, weights=weights, prefix=prefix, say=alarms.say), data, input_shape)
        done()
    _check_classes(network, data)
    check_augment(network, recipe)
    if not isinstance(preprocess, Preprocess):
        preprocess = replace(Preprocess.of(data.train), **(preprocess or {}))
    return split(network, data, recipe, preprocess)


def split(network: Network, data: Data, recipe: Recipe, preprocess: Preprocess) -> Job:
    """The job, with the held-out images that the recipe's seed draws."""
    mult, add = preprocess.affine(data.train.shape[0])
    count = recipe.held_out or min(HELD_OUT_PEAK, max(1, len(data.train) // 10))
    rest, held = held_out(data.train, count, recipe.seed)
    feeds = (Feed(images, mult, add) for images in (rest, held, held if data.test is None else data.test))
    whole = data.train.x.dtype == np.uint8
    return Job(network, *feeds, "held-out" if data.test is None else "test", preprocess, Norm(mult, add), whole, data.classes)


def sample(network: Network, feed: Feed) -> torch.Tensor:
    """The first images of a feed, real-valued: those that clip rates are measured on."""
    return feed.real(slice(fitting_network(network, TABLE_IMAGES)))


def _check_classes(network: Network, data: Data) -> None:
    scores = network.graph.shape(network.graph.output)
    if len(scores) != 1:
        raise InputError(f"the model gives an output of shape {list(scores)} per image; rqtool measures class scores, one number per class")
    if data.classes > scores[0]:
        raise InputError(f"{escaped(data.name)}: labels go up to {data.classes - 1}, but the model scores {scores[0]} classes; give the data set the model was trained for")


def check_task(network: Network, data: str, labels: Feed, top1: float, task: str | None) -> None:
    """Refuse what is no classifier: a float network that gives more scores than there are labels, or as many as it takes numbers (an
    autoencoder), and does no better than chance. task "classify" says that it is one all the same."""
    if task not in (None, "classify"):
        raise ConfigError(f"--task {escaped(task)} is not known; leave it out, or give classify")
    if task == "classify":
        return
    graph = network.graph
    scores, takes = graph.shape(graph.output)[0], graph.input_shape
    counts = np.bincount(labels.images.y)
    classes, share = int((counts > 0).sum()), counts.max() / counts.sum()
    rebuilds = takes == (scores,) or prod(takes) == scores
    chance = 100 * (share + 2 * float(np.sqrt(share * (1 - share) / counts.sum())))
    if (rebuilds and scores > classes) or ((rebuilds or scores > classes) and top1 <= chance):
        like = "as many as it takes, as an autoencoder does" if rebuilds else "more than there are labels"
        raise InputError(
            f"{escaped(data)}: the model gives {scores} numbers, {like}, and names the right one of {classes} labels for {top1:.2f} % of the images, "
            "so it looks like no classifier; give --task classify if it is one, or the data and --mean and --std it was trained with"
        )


def check_augment(network: Network, recipe: Recipe) -> None:
    """Refuse to move what is no image."""
    if recipe.augment != "none" and len(network.graph.input_shape) != 3:
        raise ConfigError(f"--augment {recipe.augment} moves images, but the model takes shape {list(network.graph.input_shape)}; give --augment none")


# -- the images for a .rq file -----------------------------------------------------------------------------------------
def images_for(saved: Checkpoint, data: str | Data, limit: int | None) -> tuple[Images, str]:
    """(test images of a data set, or its only ones, for the program; which part they are). limit: a random subset of so many."""
    data = read_data(data)
    images = fitting_images(saved, data, data.test if data.test is not None else data.train)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    return (images if limit is None else subset(images, limit, seed=0)), "test" if data.test is not None else "train"


def fitting_images(saved: Checkpoint, data: Data, images: Images) -> Images:
    """Images of a data set in the shape the program takes; raises InputError where they are not what it was made for."""
    wanted = saved.program.tensors[saved.program.input]
    if prod(images.shape) == prod(wanted.shape):
        images = images.reshaped(wanted.shape)
    if images.shape != wanted.shape:
        raise InputError(f"{escaped(data.name)}: images have shape {list(images.shape)}, but the model takes {list(wanted.shape)}; give the data set it was made for")
    if str(images.x.dtype) != wanted.dtype:
        raise InputError(f"{escaped(data.name)}: images are {images.x.dtype}, but the model takes {wanted.dtype}; give pixels in the form it was quantized with")
    if data.classes > saved.network.graph.shape(saved.network.graph.output)[0]:
        raise InputError(f"{escaped(data.name)}: labels go up to {data.classes - 1}, but the model scores {saved.classes} classes; give the data set the model was trained for")
    return images


def sample_images(saved: Checkpoint, data: str | Data | None, count: int) -> np.ndarray:
    """`count` images for the program, [count, ...]: of a data set, or random ones where it is None."""
    if count < 1:
        raise ConfigError(f"--images must be at least 1, not {count}")
    if data is not None:
        return images_for(saved, data, count)[0].x
    spec, random = saved.program.tensors[saved.program.input], np.random.default_rng(0)
    if spec.dtype == "uint8":
        return random.integers(0, 256, (count, *spec.shape), dtype=np.uint8)
    return random.normal(0, saved.peaks[saved.network.graph.input] / 3, (count, *spec.shape)).astype(np.float32)
