"""The demo: quantize, evaluate and export in one, on what is embedded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rqtool.errors import StorageError, escaped
from rqtool.hardware.macro import Macro
from rqtool.jobs.results import Demo
from rqtool.jobs.serve import evaluate, export_onnx
from rqtool.jobs.tune import quantize
from rqtool.train.finetune import Recipe

DEMO_EPOCHS = 6  # its 3,600 training images are few steps each


def run_demo(
    folder: str | Path = "rqtool-demo",
    *,
    macro: Macro | None = None,
    recipe: Recipe | None = None,
    progress: Any = None,
) -> Demo:
    """The whole job, offline, on the embedded network and 5,000 Fashion-MNIST images; demo.rq and
    demo.onnx in `folder` are replaced."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(
            f"{escaped(folder)}: cannot be made ({e.strerror}); name another folder"
        ) from e
    rq, onnx = folder / "demo.rq", folder / "demo.onnx"
    quantized = quantize(
        "demo",
        "demo",
        macro,
        out=rq,
        recipe=recipe or Recipe(epochs=DEMO_EPOCHS),
        force=True,
        progress=progress,
    )
    evaluated = evaluate(rq, "demo", progress=progress)
    return Demo(
        quantized,
        evaluated,
        export_onnx(rq, onnx, data="demo", images=4, force=True, progress=progress),
    )
