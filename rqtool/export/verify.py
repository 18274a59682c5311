"""The proof of an exported file: every integer of every tensor, by onnxruntime and by the metadata
alone, equals the definition.

Golden runs once over the images; every optimisation level, every batch and both views of the graph
(as it is, and with all its tensors as outputs, which keeps optimisers from hiding them) are
compared with what it gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto

from rqtool.errors import CheckError, InputError, escaped
from rqtool.export import metadata, replay
from rqtool.export.validate import enumerated, validate
from rqtool.program import golden
from rqtool.program.ir import Op, Program
from rqtool.program.run import Runner

LEVELS = {"disabled": 0, "basic": 1, "extended": 2, "all": 99}
BATCHES = (1, 2, 5, 64)


@dataclass(frozen=True)
class Report:
    """What was compared, and found equal."""

    images: int  # distinct inputs that golden ran
    levels: tuple[str, ...]
    batches: tuple[int, ...]
    tensors: int  # of the program, each compared in every run
    integers: int  # compared with golden, all runs together
    codes: int  # (partial sum, step) pairs enumerated against adc.py
    reads: int  # entries of the metadata replayed on the first image

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """One sentence for people."""
        batches = ", ".join(map(str, self.batches))
        return (
            f"{self.integers} integers of {self.tensors} tensors equal in torch "
            f"and in onnxruntime at {len(self.levels)} optimisation levels and "
            f"batch {batches}; "
            f"{self.codes} codes enumerated; {self.reads} reads replayed from the metadata"
        )


def verify(
    model: ModelProto,
    program: Program,
    x: np.ndarray,
    batches: Sequence[int] = BATCHES,
    levels: Sequence[str] = tuple(LEVELS),
) -> Report:
    """The report of a file that equals its program on the images x (uint8 or float32 [n, ...], n >=
    1), bit for bit.

    The last batch is filled up with the first images. levels: of `LEVELS`. Raises CheckError with
    the first tensor or read that differs, InputError where the model is not an rqtool export or x
    does not fit.
    """
    check_images(program, x)
    doc = validate(model)
    if doc["program"]["sha256"] != program.sha256():
        raise CheckError(
            "the file was exported from another program (their sha256 differ); "
            "export this one again"
        )
    want = golden.run(program, x)
    views = (model, with_all_tensors(program, model))
    integers = _compare_torch(program, x, want, max(batches))
    integers += sum(
        _compare_runs(view, program, x, want, batches, level) for level in levels for view in views
    )
    constants = metadata.constants_of(model)
    reads = sum(
        _compare_replay(layer, constants, program, op, want)
        for layer, op in zip(doc["layers"], program.reads())
    )
    codes = sum(enumerated(layer) for layer in doc["layers"])
    return Report(len(x), tuple(levels), tuple(batches), len(program.ops), integers, codes, reads)


def verify_file(model: ModelProto, images: int = 1, seed: int = 0) -> int:
    """How many accumulators of a file agree with its own metadata on random images, without the
    program it came from.

    onnxruntime runs the graph, unoptimised and fully optimised; the metadata alone must give the
    same accumulators for the input codes that each layer got. Raises as `validate` does, and
    CheckError with the first accumulator that differs.
    """
    doc = validate(model)
    constants, x = metadata.constants_of(model), _random_images(doc["input"], images, seed)
    names = sorted(
        {layer[end]["tensor"] for layer in doc["layers"] for end in ("input", "acc")}
        - {doc["input"]["tensor"]}
    )
    count = 0
    for level in ("disabled", "all"):
        values = dict(
            zip(
                names,
                session(_with_outputs(model, names), level).run(names, {doc["input"]["tensor"]: x}),
            )
        )
        values[doc["input"]["tensor"]] = x
        for layer in doc["layers"]:
            name = layer["acc"]["tensor"]
            compare(
                f"onnxruntime, optimisation level {level}: tensor {name}",
                values[name],
                _replayed(layer, constants, values),
            )
            count += values[name].size
    return count


def _replayed(
    layer: dict[str, Any], constants: dict[str, np.ndarray], values: dict[str, np.ndarray]
) -> np.ndarray:
    try:
        return replay.accumulators(layer, constants, values[layer["input"]["tensor"]])
    except (LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise CheckError(
            f"the metadata of {escaped(layer['layer'])} contradicts itself "
            f"({escaped(e)}); export the file again"
        ) from e


def _random_images(spec: dict[str, Any], images: int, seed: int) -> np.ndarray:
    rng, shape = np.random.default_rng(seed), (images, *spec["shape"])
    if spec["dtype"] == "float32":
        return rng.normal(0, 1, shape).astype(np.float32)
    return rng.integers(spec["lo"], spec["hi"] + 1, shape).astype(spec["dtype"])


def _with_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    """A copy of the model that also returns the tensors `names`."""
    full = ModelProto()
    full.CopyFrom(model)
    present = {o.name for o in full.graph.output}
    full.graph.output.extend(
        v for v in model.graph.value_info if v.name in names and v.name not in present
    )
    return full


def check_images(program: Program, x: np.ndarray) -> None:
    """Raise InputError where x is not a batch of what the program takes."""
    t = program.tensors[program.input]
    if len(x) == 0 or x.shape[1:] != t.shape or x.dtype != t.dtype:
        given = f"{len(x)} of {x.dtype} {list(x.shape[1:])}"
        raise InputError(
            f"the program takes images of {t.dtype} {list(t.shape)}, and at "
            f"least one, not {given}; give what the model was made for"
        )


def with_all_tensors(program: Program, model: ModelProto) -> ModelProto:
    """A copy of the model that returns every tensor of the program, the output first."""
    return _with_outputs(model, [op.output for op in program.ops])


def session(model: ModelProto, level: str) -> onnxruntime.InferenceSession:
    """A CPU session at one optimisation level."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(LEVELS[level])
    options.log_severity_level = (
        3  # errors only: warnings would speak of the graph's unused value names
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _compare_runs(
    model: ModelProto,
    program: Program,
    x: np.ndarray,
    want: dict[str, np.ndarray],
    batches: Sequence[int],
    level: str,
) -> int:
    """The integers compared when every image goes through at every batch size, all in one session."""
    names, runtime, count = [o.name for o in model.graph.output], session(model, level), 0
    for batch in batches:
        for start in range(0, len(x), batch):
            chosen = np.arange(start, start + batch) % len(x)
            for name, value in zip(names, runtime.run(names, {program.input: x[chosen]})):
                compare(
                    f"onnxruntime, optimisation level {level}, batch {batch}: tensor {name}",
                    value,
                    want[name][chosen],
                )
                count += value.size
    return count


def _compare_torch(program: Program, x: np.ndarray, want: dict[str, np.ndarray], batch: int) -> int:
    """The integers compared when every image goes through the torch carrier, which is what `eval`
    runs."""
    runner, count = Runner(program), 0
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        values = runner.trace(torch.from_numpy(np.ascontiguousarray(x[part])))
        for op in program.ops:
            compare(f"torch: tensor {op.output}", values[op.output].numpy(), want[op.output][part])
            count += values[op.output].numel()
    return count


def _compare_replay(
    layer: dict[str, Any],
    constants: dict[str, np.ndarray],
    program: Program,
    op: Op,
    want: dict[str, np.ndarray],
) -> int:
    """The reads of a layer compared, as the metadata describes them, on the first image."""
    x, count = want[op.inputs[0]][:1], 0
    acc = np.zeros_like(want[op.output][:1])
    for read, entry in zip(
        _by_group(golden.each_read(program, op, x)),
        replay.entries(layer, constants, x),
        strict=True,
    ):
        what = (
            f"metadata of {layer['layer']}, tile {entry.tile}, columns "
            f"{entry.columns[0]}..{entry.columns[1] - 1}"
        )
        compare(f"{what}: partial sum", entry.p, read[0])
        compare(f"{what}: code", entry.code, read[1])
        acc[:, slice(*entry.columns)] += entry.factor * entry.value
        count += 1
    compare(f"metadata of {layer['layer']}: accumulator", acc, want[op.output][:1])
    return count


def _by_group(reads: Iterable[golden.Read]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    return ((read.p[:, g], read.code[:, g]) for read in reads for g in range(read.p.shape[1]))


def compare(what: str, value: np.ndarray, want: np.ndarray) -> None:
    """Raise CheckError, with the first place, where two integer arrays are not equal."""
    if value.shape != want.shape:
        raise CheckError(
            f"{escaped(what)} has the shape {list(value.shape)}, not "
            f"{list(want.shape)}; please report this as a bug"
        )
    wrong = np.argwhere(value != want)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise CheckError(
            f"{escaped(what)} differs from the definition at {len(wrong)} of "
            f"{value.size} integers, "
            f"first at {list(at)}: {value[at]}, not {want[at]}; please report this as a bug"
        )
