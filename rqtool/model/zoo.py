"""The networks that have a name of their own, for `--arch NAME`. Each takes float32 [N, C, H, W] of
the shape it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU, halving: [N, channels_in, H, W] -> [N, channels_out, H //
    2, W // 2]."""
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


def demo() -> nn.Module:
    """Three 3x3 convolutions with batch norm and a linear layer: 29,178 parameters, 1,924,992 MACs
    an image.

    >>> sum(p.numel() for p in demo().parameters())
    29178
    """
    return nn.Sequential(
        *_block(1, 16), *_block(16, 32), *_block(32, 64), nn.Flatten(), nn.Linear(64 * 3 * 3, 10)
    )


def lenet() -> nn.Module:
    """LeNet-5 (LeCun et al. 1998, figure 2) with ReLU and max pooling in place of its squashing and
    averaging: 61,706 parameters.

    >>> sum(p.numel() for p in lenet().parameters())
    61706
    """
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A named network: calling the entry builds it, with fresh weights."""

    factory: Callable[[], nn.Module]
    shape: tuple[int, int, int]  # C, H, W of one input
    about: str

    def __call__(self) -> nn.Module:
        return self.factory()


ZOO = {
    "demo": Entry(demo, (1, 28, 28), "three convolutions and a linear layer for 28x28 grey images"),
    "lenet": Entry(lenet, (1, 28, 28), "LeNet-5 with ReLU and max pooling"),
}
