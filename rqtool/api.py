"""The public functions: each command of the shell is one call of one of these.

    quantize      a trained float model -> a .rq file, and the closing figures
    train_more    a .rq file -> another one, trained for more epochs
    evaluate      a .rq file -> top-1 of its integer program
    diagnose      a .rq file -> which layer's ADC costs most, and why
    export_onnx   a .rq file -> an ONNX file, proved equal bit for bit
    plan          a model or .rq file -> tiles, reads, cycles; no data needed
    inspect       any file rqtool reads -> what it holds; nothing in it is executed
    verify        a .rq or .onnx file -> what was found right; raises CheckError where anything is not
    operations    what of a model is understood, and what an integer program is made of
    run_demo      the whole job on an embedded model and data set

`presets` is in hardware/macro.py and `doctor` in report/doctor.py: they need no model, so they need
no torch.

Results are dataclasses of plain data with `to_json()`. A `progress` has a method `stage(name,
total)`: a context manager that gives a function to call with the number of units done and a note.
Where it has a method `warn(sentence)` too, that is called with each warning as soon as there is
one; results keep them all in `warnings`.
"""

from __future__ import annotations

from rqtool.jobs.demo import run_demo
from rqtool.jobs.files import inspect, operations, plan, verify
from rqtool.jobs.results import Demo, Evaluated, Exported, Planned, Quantized, Trained
from rqtool.jobs.serve import diagnose, evaluate, export_onnx
from rqtool.jobs.tune import quantize, train_more
from rqtool.train.diagnose import Diagnosis

__all__ = [
    "Demo",
    "Diagnosis",
    "Evaluated",
    "Exported",
    "Planned",
    "Quantized",
    "Trained",
    "diagnose",
    "evaluate",
    "export_onnx",
    "inspect",
    "operations",
    "plan",
    "quantize",
    "run_demo",
    "train_more",
    "verify",
]  # fmt: skip
