"""rqtool compresses trained networks for ReRAM computing-in-memory chips, with the ADC of every
read in the arithmetic.

    import rqtool
    result = rqtool.quantize("model.pt", "mnist.npz", arch="package.module:factory", out="model.rq")
    rqtool.evaluate("model.rq", "mnist.npz").top1
    rqtool.export_onnx("model.rq", "model.onnx")

The names below are imported when they are first used, for torch takes seconds to load.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "quantize": "rqtool.api", "train_more": "rqtool.api", "evaluate": "rqtool.api", "diagnose": "rqtool.api", "export_onnx": "rqtool.api", "plan": "rqtool.api",
    "inspect": "rqtool.api", "verify": "rqtool.api", "operations": "rqtool.api", "run_demo": "rqtool.api", "presets": "rqtool.hardware.macro",
    "doctor": "rqtool.report.doctor", "Recipe": "rqtool.train.finetune", "Preprocess": "rqtool.model.data", "Images": "rqtool.model.data",
    "Data": "rqtool.model.data", "Macro": "rqtool.hardware.macro", "make_macro": "rqtool.hardware.macro",
    "Assignment": "rqtool.mapping.assign", "make_assignment": "rqtool.mapping.assign", "RqError": "rqtool.errors",
}  # fmt: skip
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'rqtool' has no attribute '{name}'")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
