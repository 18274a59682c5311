"""A float network tried on a few training images as other tools would have given them to it: other
pixels, another order of axes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rqtool.jobs import suspicions
from rqtool.mapping.plan import Geometry
from rqtool.model.data import Images, Preprocess, subset
from rqtool.model.layout import other_orders
from rqtool.model.network import Network
from rqtool.train.finetune import EVAL_BATCH, Feed, fitting_network

IMAGES, LEAST_IMAGES = 512, 32  # how many are tried
WORK = 40e9  # multiply-accumulates of all trials together: a second or two


def tried(
    network: Network, images: Images, view: tuple[int, ...], preprocess: Preprocess, seed: int
) -> list[str]:
    """What other readings of the training images, [N, C, H, W] as the data set has them, say about
    the one that is used: a sentence for each that is clearly better. view: one input of the
    network."""
    channels = images.shape[0] if len(images.shape) == 3 else 1
    pixels = suspicions.pixel_candidates(images, preprocess, channels)
    orders = {
        axes: replace(preprocess, axes=axes) for axes in other_orders(images.shape, preprocess.axes)
    }
    images = subset(images, _count(network, 1 + len(pixels) + len(orders)), seed)
    right = hits(network, images, view, preprocess)
    found = (
        {name: hits(network, images, view, p) for name, p in candidates.items()}
        for candidates in (pixels, orders)
    )
    by_pixels, by_orders = found
    return [
        *suspicions.of_pixels(preprocess, right, pixels, by_pixels),
        *suspicions.of_order(right, by_orders, images.shape, view),
    ]


@torch.no_grad()
def hits(
    network: Network, images: Images, view: tuple[int, ...], preprocess: Preprocess
) -> np.ndarray:
    """bool [N]: whether the largest score is the label's, for images as the data set has them."""
    seen = images.laid(preprocess.axes, view)
    feed = Feed(seen, *preprocess.factors(view))
    network.eval()
    found = [
        network(x).argmax(1).numpy() for x in feed.batches(fitting_network(network, EVAL_BATCH))
    ]
    return np.concatenate(found) == seen.y


def _count(network: Network, trials: int) -> int:
    """Images for so many trials: fewer where the network is large."""
    macs = sum(n.shape and _macs(n) for n in network.graph.convs())
    return int(min(IMAGES, max(LEAST_IMAGES, WORK / max(1, macs * trials))))


def _macs(node) -> int:
    """Multiply-accumulates of a layer for one image."""
    g = Geometry.from_dict(node.attrs["geometry"])
    outputs = int(np.prod(node.shape))
    return outputs * (g.channels // g.groups) * g.kernel[0] * g.kernel[1]
