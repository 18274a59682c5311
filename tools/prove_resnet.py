"""Prove the exported ResNet-20 on CIFAR-10 images: every integer of every tensor, in torch and in
onnxruntime, equals the definition.

    python tools/prove_resnet.py --shared DIR [--images 200] [--train 2000] [--pack rows] [--threads N] [--folder build/prove]

DIR is the one of tools/experiments.py. The network is calibrated on --train training images, not
fine-tuned, saved as resnet20.rq and exported as resnet20.onnx in --folder, both replaced. The proof
runs every optimisation level and batches of 1, 2, 5 and 64 over
--images test images; agreement with the network in floating point is counted on the same images. Exits with an error at the first
integer that differs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from experiments import TASKS, decode, read_model

import rqtool

TASK = TASKS["cifar"]


def read_part(path: Path, split: str, count: int) -> rqtool.Images:
    """The first `count` images of a split; only they are decoded."""
    with np.load(path) as z:
        return rqtool.Images(
            decode(z[f"{split}_jpeg"], z[f"{split}_offsets"][: count + 1]),
            z[f"{split}_labels"][:count].astype(np.int64),
        )


def prove(
    shared: Path, macro: rqtool.Macro, images: int, train: int, folder: Path
) -> tuple[rqtool.Quantized, dict]:
    """(the closing figures, the report of the proof)."""
    path = shared / "data" / TASK.data
    data = rqtool.Data(
        "CIFAR-10 (JPEG-75 copy)",
        read_part(path, "train", train),
        read_part(path, "test", images),
        10,
    )
    recipe, preprocess = rqtool.Recipe(epochs=0), rqtool.Preprocess(mean=TASK.mean, std=TASK.std)
    folder.mkdir(parents=True, exist_ok=True)
    rq = folder / "resnet20.rq"
    result = rqtool.quantize(
        read_model(TASK, shared / "models"),
        data,
        macro,
        out=rq,
        recipe=recipe,
        preprocess=preprocess,
        twin=False,
        force=True,
    )
    return result, rqtool.export_onnx(rq, data=data, images=images, force=True).report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--pack", default="rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/prove"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    result, report = prove(
        args.shared, rqtool.Macro(pack=args.pack), args.images, args.train, args.folder
    )
    levels, batches = ", ".join(report["levels"]), ", ".join(map(str, report["batches"]))
    print(
        f"top-1       {result.tuned_top1:.2f} % of {result.images} test "
        f"images by the integer program, {result.float_top1:.2f} % by the "
        "float model"
    )
    print(
        f"agreement   {result.agreement:.2f} % of them get the same class "
        "from the network in floating point"
    )
    print(
        f"equal       {report['integers']:,} integers of {report['tensors']} "
        f"tensors on {report['images']} images; levels {levels}; batch "
        f"{batches}"
    )
    print(
        f"also        {report['codes']:,} codes tried one by one; "
        f"{report['reads']:,} reads replayed from the metadata"
    )
    print(f"seconds     {time.monotonic() - started:.0f}")


if __name__ == "__main__":
    main()
