"""What needs no data set: the plan of a model, what a file holds, what of it is right, and which
operations there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rqtool import checkpoint
from rqtool.checkpoint import Checkpoint
from rqtool.errors import CheckError, ConfigError, InputError, escaped
from rqtool.hardware.macro import Macro
from rqtool.jobs.alarms import Alarms
from rqtool.jobs.prepare import sample_images
from rqtool.jobs.results import Planned
from rqtool.mapping.assign import Assignment, assignment_of
from rqtool.mapping.plan import Plan
from rqtool.model.capture import LIFT, capture
from rqtool.model.graph import Graph
from rqtool.model.load import load_model
from rqtool.model.zoo import ZOO
from rqtool.program import golden
from rqtool.program.ir import ATTRIBUTES
from rqtool.program.run import Runner
from rqtool.train.rewrite import layer_rows, plans


def plan(
    model: str | Path | nn.Module,
    macro: Macro | Assignment | None = None,
    *,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    keep: Iterable[str] = (),
    arch: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    weights: str | None = None,
    prefix: str | None = None,
    progress: Any = None,
) -> Planned:
    """The reads of a model on a macro, for one image; no data needed.

    model: a .rq file (whose own macro is the default), a model file, a built-in name or a torch
    module. layers, keep: as in `quantize`. input_shape: (C, H, W) of one image; built-in networks and .rq files know theirs.
    weights, prefix: as in `quantize`.
    """
    alarms = Alarms(progress)
    name = model if isinstance(model, (str, Path)) else type(model).__name__
    if str(name).endswith(".rq"):
        saved = checkpoint.load(name)
        graph, macros = saved.network.graph, saved.macros
    else:
        macros = None
        graph = capture(
            load_model(model, arch, weights=weights, prefix=prefix, say=alarms.say),
            _shape_for(name, arch, input_shape),
        ).graph
    if macros is None or macro is not None or layers or keep:
        base = (macro or macros.default) if macros else macro
        macros = assignment_of(base).and_also(layers, keep).macros(layer_rows(graph))
    found = plans(graph, macros).values()
    return Planned(
        str(name),
        macros.default,
        graph.input_shape,
        [p.cost(_positions(graph, p)) for p in found if not p.digital],
        tuple(alarms.sentences),
        macros.own,
        [p.off_macro(_positions(graph, p)) for p in found if p.digital],
    )


def _positions(graph: Graph, plan: Plan) -> int:
    return prod(graph.shape(plan.name)) // plan.geometry.columns


def _shape_for(
    name: str | Path, arch: str | None, shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    known = ZOO.get(str(arch)) or ZOO.get(str(name))
    if shape is not None:
        return shape
    if known is None:
        raise ConfigError(
            f"{escaped(name)}: a model file does not say what it takes; give "
            "--input C,H,W, for example --input 1,28,28"
        )
    return known.shape


def inspect(path: str | Path, weights: str | None = None) -> dict[str, Any]:
    """What a file holds, as plain data: .rq, .onnx, or a model file (names and shapes of its
    tensors). Nothing is executed.

    weights: which of several sets of weights of a model file to show.
    """
    suffix = Path(path).suffix
    if suffix == ".rq":
        return _inspect_rq(checkpoint.load(path), path)
    if suffix == ".onnx":
        return _inspect_onnx(path)
    from rqtool.model.load import state_of

    state = state_of(path, weights)
    tensors = [
        {"name": escaped(k), "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for k, t in state.items()
    ]
    return {
        "command": "inspect",
        "source": str(path),
        "kind": "weights",
        "values": sum(t.numel() for t in state.values()),
        "tensors": tensors,
    }


def _inspect_rq(saved: Checkpoint, path: str | Path) -> dict[str, Any]:
    ops = [
        {"kind": op.kind, "name": op.name, "output": list(saved.program.tensors[op.output].shape)}
        for op in saved.program.ops
    ]
    about = {
        "macro": saved.macro.to_dict(),
        "macros": saved.macros.own_fields(),
        "layers_off_macro": saved.program.layers_off_macro(),
        "preprocess": saved.preprocess.to_dict(),
        "classes": saved.classes,
        "recipe": saved.recipe,
        "results": saved.results,
    }
    return {
        "command": "inspect",
        "source": str(path),
        "kind": "rq",
        **about,
        "program_sha256": saved.program.sha256(),
        "ops": ops,
    }


def _inspect_onnx(path: str | Path) -> dict[str, Any]:
    from rqtool.export import metadata
    from rqtool.export.validate import load_onnx

    document = metadata.read(load_onnx(path))
    try:
        Macro(**document["macro"]["fields"])
        for layer in document["layers"]:
            Macro(**layer.get("macro", document["macro"])["fields"])
    except (TypeError, ConfigError) as e:
        raise InputError(
            f"{escaped(path)}: its metadata describes no macro that can be "
            f"({escaped(e)}); export the file again"
        ) from e
    return {"command": "inspect", "source": str(path), "kind": "onnx", "metadata": document}


def verify(path: str | Path) -> dict[str, Any]:
    """What was checked of a .rq or .onnx file and found right, as plain data. Raises InputError
    where it cannot be read, CheckError where it is not what rqtool wrote or computes.

    .rq: every hash, the program's structure, and every integer of one random image against the definition. .onnx: the graph, the
    metadata, their hashes and ADC codes, and every accumulator of one random image, by onnxruntime
    and by the metadata alone.
    """
    suffix = Path(path).suffix
    if suffix not in (".rq", ".onnx"):
        raise InputError(
            f"{escaped(path)}: is no kind of file that rqtool writes; give a .rq or .onnx file"
        )
    checked = _verify_rq(path) if suffix == ".rq" else _verify_onnx(path)
    return {"source": str(path), "kind": suffix[1:], **checked}


def _verify_rq(path: str | Path) -> dict[str, Any]:
    saved = checkpoint.load(path)
    x = sample_images(saved, None, 1)
    want, got = golden.run(saved.program, x), Runner(saved.program).trace(torch.from_numpy(x))
    for name, values in want.items():
        if not np.array_equal(values, got[name].numpy()):
            raise CheckError(
                f"{escaped(path)}: tensor {escaped(name)} differs from the "
                "definition on a random image; please report this as a bug"
            )
    return {
        "program_sha256": saved.program.sha256(),
        "tensors": len(want),
        "integers": int(sum(values.size for values in want.values())),
    }


def _verify_onnx(path: str | Path) -> dict[str, Any]:
    from rqtool.export.validate import enumerated, load_onnx, validate
    from rqtool.export.verify import verify_file

    model = load_onnx(path)
    doc = validate(model)
    codes = sum(enumerated(layer) for layer in doc["layers"])
    return {
        "program_sha256": doc["program"]["sha256"],
        "layers": len(doc["layers"]),
        "codes": codes,
        "accumulators": verify_file(model),
    }


def operations() -> dict[str, Any]:
    """The aten operations that are understood in a model, the operations of an integer program, and
    the built-in networks."""
    networks = [
        {"name": name, "input_shape": list(entry.shape), "about": entry.about}
        for name, entry in ZOO.items()
    ]
    return {
        "command": "ops",
        "model": sorted(LIFT),
        "program": {kind: sorted(names) for kind, names in ATTRIBUTES.items()},
        "networks": networks,
    }
