"""Augmentation of small images in training batches: each one shifted a little, or also mirrored, as
its seed says."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

AUGMENTS = ("none", "shift", "shift-flip")
SMALL = 28  # images up to this size are shifted by 2 pixels at most, larger ones by 4


def largest_shift(height: int, width: int) -> int:
    """Pixels in each direction.

    >>> largest_shift(28, 28), largest_shift(32, 32)
    (2, 4)
    """
    return 2 if min(height, width) <= SMALL else 4


def augmented(x: torch.Tensor, kind: str, seed: tuple[int, ...]) -> torch.Tensor:
    """Real-valued images [N, C, H, W], moved image by image; the same for the same seed on any
    number of threads.

    What moves in from outside is the real value 0, with which convolutions pad too.

    >>> x = torch.arange(1.0, 10).view(1, 1, 3, 3)
    >>> augmented(x, "shift", (0, 8)).long().tolist()
    [[[[0, 0, 0], [2, 3, 0], [5, 6, 0]]]]
    """
    if kind == "none":
        return x
    n, _, height, width = x.shape
    rng, most = np.random.default_rng(seed), largest_shift(height, width)
    down, right = rng.integers(0, 2 * most + 1, (2, n, 1))
    rows, columns = down + np.arange(height), right + np.arange(width)
    if kind == "shift-flip":
        columns = np.where(rng.integers(0, 2, (n, 1)) == 1, columns[:, ::-1], columns)
    padded, images = F.pad(x, (most,) * 4), torch.arange(n).view(n, 1, 1)
    moved = padded[
        images, :, torch.from_numpy(rows).unsqueeze(2), torch.from_numpy(columns).unsqueeze(1)
    ]  # [N, H, W, C]
    return moved.permute(0, 3, 1, 2).contiguous()
