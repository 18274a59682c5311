"""Augmentation: every image is a shifted, perhaps mirrored copy of itself, as its seed says and
nothing else."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from test_finetune import HELD, RECIPE, TRAIN, WORST, started
from torch.nn import functional as F

from rqtool.train import finetune as module
from rqtool.train.augment import augmented, largest_shift
from rqtool.train.finetune import finetune


def images(n: int, size: int = 8) -> torch.Tensor:
    """Different values everywhere, none of them 0."""
    return torch.arange(1.0, n * 3 * size * size + 1).view(n, 3, size, size)


def candidates(
    image: torch.Tensor, most: int, flip: bool
) -> dict[tuple[int, int, bool], torch.Tensor]:
    """Every way in which an image [C, H, W] may have been moved, one by one."""
    padded, (_, height, width) = F.pad(image, (most,) * 4), image.shape
    moved = {
        (dy, dx, False): padded[:, dy : dy + height, dx : dx + width]
        for dy, dx in product(range(2 * most + 1), repeat=2)
    }
    return moved | (
        {(dy, dx, True): m.flip(-1) for (dy, dx, _), m in moved.items()} if flip else {}
    )


@pytest.mark.parametrize("size", [8, 30])
@pytest.mark.parametrize("kind", ["shift", "shift-flip"])
def test_every_image_is_moved_by_itself(kind, size):
    x, most = images(300, size), largest_shift(size, size)
    moved = augmented(x, kind, (5, 7))
    assert moved.shape == x.shape and moved.dtype == x.dtype and moved.is_contiguous()
    found = []
    for before, after in zip(x, moved):
        (how,) = [
            key
            for key, m in candidates(before, most, kind == "shift-flip").items()
            if torch.equal(m, after)
        ]
        found.append(how)
    assert {dy for dy, _, _ in found} == {dx for _, dx, _ in found} == set(range(2 * most + 1))
    assert (
        0.35 < np.mean([flipped for *_, flipped in found]) < 0.65
        if kind == "shift-flip"
        else not any(f for *_, f in found)
    )


def test_none_leaves_them_as_they_are():
    x = images(2)
    assert augmented(x, "none", (0, 0)) is x


def test_the_same_seed_moves_the_same_way_on_any_number_of_threads():
    x, before = images(64), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = augmented(x, "shift-flip", (3, 4))
        torch.set_num_threads(2)
        assert torch.equal(augmented(x, "shift-flip", (3, 4)), one)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(augmented(x, "shift-flip", (3, 5)), one) and not torch.equal(
        augmented(x, "shift-flip", (4, 4)), one
    )


def test_only_training_batches_are_moved(monkeypatch):
    seen = []
    right = module.augmented
    monkeypatch.setattr(
        module,
        "augmented",
        lambda x, kind, seed: seen.append((len(x), kind, seed)) or right(x, kind, seed),
    )
    finetune(
        started(), TRAIN, HELD, module.replace(RECIPE, epochs=2, augment="shift", seed=6), WORST
    )
    assert seen == [(32, "shift", (6, step)) for step in range(20)]
