"""The whole job on real weights and real data, where they lie beside the repository; small enough
to run every time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

import rqtool
from rqtool import checkpoint
from rqtool.export.onnx import to_onnx
from rqtool.export.verify import verify
from rqtool.model.data import load_data

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATE_ONLY = rqtool.Recipe(epochs=0, calibration_images=128, norm_images=512, held_out=250)


@pytest.fixture(autouse=True)
def reference_models_importable(
    shared_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(shared_model("reference_models.py").parent))


@pytest.fixture(scope="module")
def experiments() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "experiments_for_real", REPOSITORY / "tools" / "experiments.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiments_for_real"] = module
    sys.path.insert(0, str(REPOSITORY / "tools"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REPOSITORY / "tools"))
    return module


def proved(path: Path, images: np.ndarray) -> int:
    """How many integers of the exported program were compared with golden and found equal, in torch
    and onnxruntime."""
    program = checkpoint.load(path).program
    return verify(
        to_onnx(program), program, images, batches=(1, 5), levels=("disabled", "all")
    ).integers


def test_lenet_on_mnist(
    shared_data: Callable[[str], Path], shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = load_data(str(shared_data("mnist.npz")))
    part = rqtool.Data("mnist", data.train[:1500], data.test[:1000], 10)
    out = tmp_path / "lenet.rq"
    result = rqtool.quantize(
        shared_model("lenetbn_mnist.pt"),
        part,
        arch="reference_models:lenet_bn",
        out=out,
        recipe=CALIBRATE_ONLY,
        twin=False,
    )
    assert result.float_top1 > 99 and result.tuned_top1 > 98.5 and result.agreement == 100
    assert rqtool.evaluate(out, part).top1 == result.tuned_top1
    assert proved(out, part.test.x[:8]) > 8 * 50_000


def test_resnet_20_on_cifar(
    shared_data: Callable[[str], Path],
    shared_model: Callable[[str], Path],
    tmp_path: Path,
    experiments: ModuleType,
) -> None:
    with np.load(shared_data("cifar10_jpeg75.npz")) as z:
        counts = {"train": 800, "test": 300}
        parts = {
            s: rqtool.Images(
                experiments.decode(z[f"{s}_jpeg"], z[f"{s}_offsets"][: n + 1]),
                z[f"{s}_labels"][:n].astype(np.int64),
            )
            for s, n in counts.items()
        }
    data, out = rqtool.Data("cifar", parts["train"], parts["test"], 10), tmp_path / "resnet.rq"
    preprocess = rqtool.Preprocess(mean=CIFAR_MEAN, std=CIFAR_STD)
    result = rqtool.quantize(
        shared_model("resnet20_cifar10jpeg_finetuned.pt"),
        data,
        arch="reference_models:resnet20",
        out=out,
        recipe=CALIBRATE_ONLY,
        preprocess=preprocess,
        twin=False,
    )
    assert result.float_top1 > 80 and result.tuned_top1 > 60 and result.agreement == 100
    assert (
        len(result.layers) == 20
        and torch.isfinite(torch.tensor([row["clip_rate"] for row in result.layers])).all()
    )
    assert proved(out, data.test.x[:2]) > 2 * 500_000


def test_resnet_20_with_a_finer_first_layer_and_a_digital_last(
    shared_data: Callable[[str], Path],
    shared_model: Callable[[str], Path],
    tmp_path: Path,
    experiments: ModuleType,
) -> None:
    with np.load(shared_data("cifar10_jpeg75.npz")) as z:
        x = experiments.decode(z["train_jpeg"], z["train_offsets"][:401])
        images = rqtool.Images(x, z["train_labels"][:400].astype(np.int64))
    data, out = rqtool.Data("cifar", images[:300], images[300:], 10), tmp_path / "resnet.rq"
    result = rqtool.quantize(
        shared_model("resnet20_cifar10jpeg_finetuned.pt"),
        data,
        rqtool.Macro(adc_bits=4, granularity="layer", pack="rows"),
        layers={"first": {"adc_bits": 6}},
        keep=("last",),
        arch="reference_models:resnet20",
        out=out,
        recipe=rqtool.Recipe(epochs=0, calibration_images=64, norm_images=128, held_out=100),
        preprocess=rqtool.Preprocess(mean=CIFAR_MEAN, std=CIFAR_STD),
        twin=False,
    )
    first, *others, last = checkpoint.load(out).program.reads()
    macros = checkpoint.load(out).macros
    bits = {op.attrs["layer"]: macros.of(op.attrs["layer"]).adc_bits for op in (first, *others)}
    assert list(bits.values()) == [6] + 18 * [4]
    assert result.layers_off_macro == [{"layer": last.attrs["layer"], "macs": 640}]
    assert proved(out, images.x[:2]) > 2 * 500_000


def test_the_public_checkpoint_with_wrappers_loads(shared_model: Callable[[str], Path]) -> None:
    planned = rqtool.plan(
        shared_model("resnet20-12fca82f.th"),
        arch="reference_models:resnet20",
        input_shape=(3, 32, 32),
    )
    stages = [
        (3 * 16 + 6 * 16 * 16) * 1024,
        (16 * 32 + 5 * 32 * 32) * 256,
        (32 * 64 + 5 * 64 * 64) * 64,
    ]  # channels in x out x positions
    assert planned.totals["macs"] == 9 * sum(stages) + 64 * 10 and len(planned.layers) == 20
