"""Real networks whose batch norm was folded by hand, as deployed ones come: nothing may be lost by
it. Data sorted by class, and 8 bits behind an ideal ADC, neither."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_real import CIFAR_MEAN, CIFAR_STD, experiments, reference_models_importable  # noqa: F401

import rqtool
from rqtool.model.data import load_data

RECIPE = rqtool.Recipe(epochs=0, calibration_images=128, norm_images=256, held_out=250)
EIGHT = rqtool.Macro(in_bits=8, w_bits=8, adc_bits=None)


def folded(model: torch.nn.Module) -> torch.nn.Module:
    """The same function without its batch norms."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    try:
        return importlib.import_module("networks").fold(model)
    finally:
        sys.path.remove(str(REPOSITORY / "tools"))


def trained(factory: str, weights: Path) -> torch.nn.Module:
    model = getattr(importlib.import_module("reference_models"), factory)()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


@pytest.fixture(scope="module")
def cifar(shared_data: Callable[[str], Path], experiments) -> rqtool.Data:  # noqa: F811
    with np.load(shared_data("cifar10_jpeg75.npz")) as z:
        parts = {
            s: rqtool.Images(
                experiments.decode(z[f"{s}_jpeg"], z[f"{s}_offsets"][: n + 1]),
                z[f"{s}_labels"][:n].astype(np.int64),
            )
            for s, n in {"train": 1500, "test": 1000}.items()
        }
    return rqtool.Data("cifar", parts["train"], parts["test"], 10)


def top1(model: torch.nn.Module, data: rqtool.Data, **given) -> tuple[float, float]:
    """(float, calibrated) top-1."""
    about = {"recipe": RECIPE, "twin": False, **given}
    result = rqtool.quantize(model, data, **about)
    return result.float_top1, result.tuned_top1


def chance(percent: float, images: int) -> float:
    """Half a point, or two standard errors of a difference: one code that a rounding of float32
    moves is the start of many in a deep network."""
    return max(0.5, 2 * (2 * percent * (100 - percent) / images) ** 0.5)


def test_lenet_loses_nothing_by_folding(shared_data, shared_model):
    data = load_data(str(shared_data("mnist.npz")))
    data = rqtool.Data("mnist", data.train[:1500], data.test[:1500], 10)
    model = trained("lenet_bn", shared_model("lenetbn_mnist.pt"))
    whole, bare = (top1(m, data) for m in (model, folded(model)))
    assert whole[0] == bare[0] and bare[1] >= whole[1] - chance(whole[1], 1500)


def test_resnet_20_loses_nothing_by_folding(shared_model, cifar):
    model = trained("resnet20", shared_model("resnet20_cifar10jpeg_finetuned.pt"))
    pixels = rqtool.Preprocess(mean=CIFAR_MEAN, std=CIFAR_STD)
    whole, bare = (top1(m, cifar, preprocess=pixels) for m in (model, folded(model)))
    assert whole[0] == bare[0] and bare[1] >= whole[1] - chance(whole[1], 1000)


def test_resnet_20_at_8_bits_is_the_float_network(shared_model, cifar):
    """On training images that are sorted by class."""
    train = cifar.train[np.argsort(cifar.train.y, kind="stable")]
    model = trained("resnet20", shared_model("resnet20_cifar10jpeg_finetuned.pt"))
    pixels = rqtool.Preprocess(mean=CIFAR_MEAN, std=CIFAR_STD)
    real, found = top1(model, replace(cifar, train=train), macro=EIGHT, preprocess=pixels)
    assert abs(found - real) <= 0.3
