"""What is measured of a network: top-1 of its integer program, that of the network in floating
point, and how its ADCs are used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from rqtool.model.data import Images
from rqtool.model.network import Network
from rqtool.program.ir import Program
from rqtool.program.run import Runner
from rqtool.train.finetune import EVAL_BATCH, HELD_VALUES, Feed, fitting, fitting_network
from rqtool.train.histogram import partial_sum_histogram
from rqtool.train.layers import ReadLayer
from rqtool.train.rewrite import read_layers
from rqtool.train.served import Served


def predictions(
    program: Program, images: Images, done: Callable[[int], None] = lambda n: None
) -> np.ndarray:
    """int64 [N]: the class with the largest score in the integer program, the first one on a tie.
    done(n) after each n images."""
    runner, parts, size = (
        Runner(program),
        [],
        fitting([t.shape for t in program.tensors.values()], EVAL_BATCH),
    )
    for at in range(0, len(images), size):
        x = torch.from_numpy(np.ascontiguousarray(images.x[at : at + size]))
        parts.append(runner(x).argmax(1).numpy())
        done(len(x))
    return np.concatenate(parts)


def real_predictions(served: Served, images: Images) -> np.ndarray:
    """The same by the network itself, node by node in floating point."""
    size = fitting_network(served, EVAL_BATCH, HELD_VALUES // 2)  # open sums are float64
    parts = (
        torch.from_numpy(np.ascontiguousarray(images.x[at : at + size]))
        for at in range(0, len(images), size)
    )
    return np.concatenate([served(x).argmax(1).numpy() for x in parts])


@torch.no_grad()
def hits(network: Network, feed: Feed, done: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """bool [N]: whether the largest score is the label's, in eval mode; done(n) after each n
    images."""
    network.eval()
    parts, size = [], fitting_network(network, EVAL_BATCH)
    for at in range(0, len(feed), size):
        labels = feed.labels(slice(at, at + size))
        parts.append((network(feed.real(slice(at, at + size))).argmax(1) == labels).numpy())
        done(len(labels))
    return np.concatenate(parts)


def percent(hits: np.ndarray) -> float:
    return 100 * float(np.mean(hits))


@contextmanager
def ideal_adcs(network: Network, names: Collection[str]) -> Iterator[None]:
    """Within: the layers `names` are read by ideal ADCs, all others by their own; afterwards all
    are as before."""
    layers = read_layers(network)
    before = {name: layer.ideal_adc for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.ideal_adc = name in names
        yield
    finally:
        for name, layer in layers.items():
            layer.ideal_adc = before[name]


def clip_rate(histogram: np.ndarray, layer: ReadLayer) -> float:
    """The share of reads whose partial sum lies beyond full scale; histogram as from
    `partial_sum_histogram`."""
    bounds = layer.adc.clip_bounds()
    p = np.arange(layer.plan.macro.p_min, layer.plan.macro.p_max + 1)
    clipped = sum(int(row[(p < lo) | (p > hi)].sum()) for row, (lo, hi) in zip(histogram, bounds))
    return clipped / max(1, int(histogram.sum()))


@contextmanager
def watched(
    network: Network, watch: Callable[[str, ReadLayer, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Within: watch(name, layer, padded input codes, weights) sees each call of a layer."""
    layers = read_layers(network)
    for name, layer in layers.items():
        layer.watch = partial(watch, name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.watch = None


@torch.no_grad()
def layer_table(network: Network, x: torch.Tensor) -> list[dict[str, Any]]:
    """One row per layer on the macro: its cost for one image (as Plan.cost), input and step in numbers, clip
    rate on real-valued inputs x."""
    rows: dict[str, dict[str, Any]] = {}

    def watch(name: str, layer: ReadLayer, codes: torch.Tensor, weight: torch.Tensor) -> None:
        rows[name] = _row(layer, codes, weight)

    with watched(network, watch):
        network.eval()(x)
    shapes = {n.name: n.shape for n in network.graph.convs()}
    return [
        {**layer.plan.cost(prod(shapes[name]) // layer.plan.geometry.columns), **rows[name]}
        for name, layer in read_layers(network).items()
        if not layer.plan.digital
    ]


def _row(layer: ReadLayer, codes: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {
        "input_scale": float(layer.input.scale),
        "input_zero": int(layer.input.zero),
    }
    row |= layer.adc.figures()
    if layer.adc.exact:
        return row | {"clip_rate": 0.0}
    histogram = partial_sum_histogram(codes, weight, layer.plan)
    return row | {"clip_rate": clip_rate(histogram, layer)}
