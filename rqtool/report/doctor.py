"""What this machine has: versions, processor, threads, and which carrier will run the reads, with
the reason."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "rqtool",
    "torch",
    "numpy",
    "numba",
    "safetensors",
    "onnx",
    "onnxruntime",
    "typer",
    "rich",
    "pillow",
)


def doctor() -> dict[str, Any]:
    """Plain data: versions by package (None: not installed), system, processor, cpus, torch's
    threads, carrier of the reads and why."""
    import torch

    carrier, reason, cache = _carrier()
    return {
        "command": "doctor", "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": platform.platform(), "processor": processor(), "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "carrier": carrier, "reason": reason, "cache": cache,
    }  # fmt: skip


def _version(package: str) -> str | None:
    if package == "rqtool":
        from rqtool import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The model name that Linux gives, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _carrier() -> tuple[str, str, str | None]:
    """(carrier, why, folder of the compiled kernels): found by compiling the converter and trying
    every code of the default macro."""
    import numpy as np

    from rqtool.hardware.macro import Macro
    from rqtool.kernels import choose
    from rqtool.mapping.plan import Geometry, Plan
    from rqtool.program.run import certified

    failure = choose.numba_failure()
    if failure is not None:
        return choose.Chunked.name, failure, None
    from rqtool.kernels import certify

    plan, one = Plan.make("default", Geometry(1, 1), Macro()), np.ones((1, 1), np.int64)
    if not certified(plan, one * ((1 << plan.macro.shift) - 1), one * plan.macro.zero):
        return (
            choose.Chunked.name,
            "a code of the compiled converter differs from the definition",
            None,
        )
    tried = plan.macro.p_max - plan.macro.p_min + 1
    sums = (
        "8-bit dot products"
        if certify.DOT8
        else "float32 sums, for this processor has no 8-bit dot products on 512-bit vectors"
    )
    reason = (
        f"numba compiles here, with {sums}, and all {tried} partial sums of "
        "the default macro get the right code"
    )
    return choose.Fused.name, reason, str(certify._convert.stats.cache_path)
