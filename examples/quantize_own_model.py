"""Compresses a PyTorch model of your own, trained on arrays of your own, from start to finish.

    python examples/quantize_own_model.py                     writes shapes.rq and shapes.onnx
    python examples/quantize_own_model.py --out folder --epochs 4

To use it for your work, replace two functions: `images_and_labels`, which returns arrays, and
`network`, which returns a torch.nn.Module. The rest stays as it is. No file is needed, and nothing
is downloaded: the images are drawn here, noisy squares, crosses and rings that a small network
tells apart in most cases.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

import rqtool

SIZE = 12  # pixels
CLASSES = ("square", "cross", "ring")


def images_and_labels(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, channels, height, width] and int64 labels [N], which count from 0."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    pixels = np.empty((count, 1, SIZE, SIZE))
    for image, label in zip(pixels, labels, strict=True):
        y = rows - random.uniform(4, 7)
        x = columns - random.uniform(4, 7)
        shapes = (
            np.maximum(abs(x), abs(y)) < 3,
            np.minimum(abs(x), abs(y)) < 1,
            abs(np.hypot(x, y) - 3) < 1,
        )
        image[0] = 60 * shapes[label] + random.normal(90, 60, (SIZE, SIZE))
    return pixels.clip(0, 255).astype(np.uint8), labels


def network() -> nn.Module:
    """Any network of the layers that `rqtool ops` lists; it takes float images in 0..1."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (SIZE // 4) ** 2, len(CLASSES)),
    )


def train(model: nn.Module, images: rqtool.Images, epochs: int) -> None:
    """Ordinary training in floating point; skip it if your model is trained already."""
    x = torch.from_numpy(images.x).float() / 255
    y = torch.from_numpy(images.y)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a PyTorch model of your own.")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the files")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of fine-tuning")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "shapes.rq"

    torch.manual_seed(0)
    data = rqtool.Data(
        "noisy shapes",
        train=rqtool.Images(*images_and_labels(1200, seed=0)),
        test=rqtool.Images(*images_and_labels(400, seed=1)),
        classes=len(CLASSES),
    )
    model = network()
    train(model, data.train, epochs=4)
    model.eval()

    # What the chip can do: how many wordlines are on in one read, and how fine its ADC is.
    macro = rqtool.Macro(wl=9, adc_bits=4, granularity="column")
    recipe = rqtool.Recipe(epochs=given.epochs, teacher="float")
    result = rqtool.quantize(model, data, macro, recipe=recipe, out=file, force=True)

    print(macro.describe())
    print(f"float               {result.float_top1:6.2f} %")
    print(f"post-training       {result.ptq_top1:6.2f} %")
    print(f"fine-tuned          {result.tuned_top1:6.2f} %")
    print(f"with an ideal ADC   {result.ideal_top1:6.2f} %")
    print(f"reads per MAC       {result.reads_per_mac:6.2f}")

    # The file holds all that is needed: the trained network and its integer program.
    assert rqtool.evaluate(file, data).top1 == result.tuned_top1
    exported = rqtool.export_onnx(file, given.out / "shapes.onnx", data=data, force=True)
    print(f"{exported.out}: {exported.report['integers']:,} integers match the reference")


if __name__ == "__main__":
    main()
