"""The living definition: numpy int64, plain loops over the plan, slow and obvious.

Everything faster (torch, kernels, the ONNX graph) is compared with this file by equality of
integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from rqtool.mapping.cells import cells
from rqtool.mapping.plan import Geometry
from rqtool.mapping.planes import extract
from rqtool.program.ir import Op, Program


def rows_of(x: np.ndarray, g: Geometry, pad: int) -> np.ndarray:
    """What the wordlines see: int64 [N, groups, K, H_out, W_out] from int [N, C, H, W], padding
    holding code `pad`."""
    (ph, pw), (sh, sw), (dh, dw), (kh, kw) = g.padding, g.stride, g.dilation, g.kernel
    ho, wo = g.out_size(x.shape[2], x.shape[3])
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=pad)
    taps = [
        x[:, :, y * dh : y * dh + (ho - 1) * sh + 1 : sh, z * dw : z * dw + (wo - 1) * sw + 1 : sw]
        for y in range(kh)
        for z in range(kw)
    ]
    return np.stack(taps, axis=2).reshape(x.shape[0], g.groups, g.rows, ho, wo)


class Read(NamedTuple):
    """One tile of every group and column, one pair of planes.

    p: int64 [N, groups, columns of a group, H_out, W_out] partial sums; code: the same shape;
    value: what the digital side adds up for it, before `factor` = a_i * b_j.
    """

    tile: int
    input_plane: int
    weight_plane: int
    factor: int
    p: np.ndarray
    code: np.ndarray
    value: np.ndarray


def each_read(program: Program, op: Op, x: np.ndarray) -> Iterator[Read]:
    """Every read of a layer, in the order of the metadata: tile, input plane, weight plane."""
    plan = program.plan(op)
    g = plan.geometry
    rows = rows_of(x, g, op.attrs["pad"])
    weight = program.const(op, "weight").astype(np.int64).reshape(g.columns, g.rows)
    held = [part.reshape(g.groups, g.group_columns, g.rows) for part in cells(plan, weight)]
    if plan.order is not None:
        rows = rows[:, :, list(plan.order)]
        held = [part[:, :, list(plan.order)] for part in held]
    adcs = program.adc(op)
    for t, (start, stop) in enumerate(plan.tiles):
        converter = adcs.at(t, g.groups)
        for i, a in enumerate(plan.input_planes):
            for j, b in enumerate(plan.weight_planes):
                p = np.einsum(
                    "gok,ngkyx->ngoyx",
                    held[j][:, :, start:stop],
                    extract(rows[:, :, start:stop], a),
                )
                code = converter.code(p)
                yield Read(t, i, j, a.factor * b.factor, p, code, converter.value(code))


def _reads(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    acc = 0
    for read in each_read(program, op, x):
        acc = acc + read.factor * read.value
    n, groups, columns, height, width = acc.shape
    return acc.reshape(n, groups * columns, height, width)


def _xsum(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    g = Geometry.from_dict(op.attrs["geometry"])
    sums = rows_of(x, g, op.attrs["pad"]).sum(axis=2)
    return np.repeat(sums, op.attrs["columns"] // g.groups, axis=1)


def _quantize(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    scaled = x.astype(np.float32) * np.float32(2.0 ** op.attrs["exponent"])
    return np.floor(scaled + np.float32(0.5)).clip(op.attrs["lo"], op.attrs["hi"]).astype(np.int64)


def _requant(program: Program, op: Op, *xs: np.ndarray) -> np.ndarray:
    total = program.const(op, "add").astype(np.int64)
    for n, x in enumerate(xs):
        total = total + x * program.const(op, f"mult{n}").astype(np.int64)
    return (total >> op.attrs["shift"]).clip(op.attrs["lo"], op.attrs["hi"])


def _windows(x: np.ndarray, op: Op, fill: int) -> np.ndarray:
    """All taps of a pooling window: int64 [kh*kw, N, C, H_out, W_out]."""
    (kh, kw), (sh, sw), pads = op.attrs["kernel"], op.attrs["stride"], op.attrs["padding"]
    dh, dw = op.attrs.get("dilation", (1, 1))
    x = np.pad(x, ((0, 0), (0, 0), *(tuple(p) for p in pads)), constant_values=fill)
    ho, wo = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    return np.stack(
        [
            x[
                :,
                :,
                y * dh : y * dh + (ho - 1) * sh + 1 : sh,
                z * dw : z * dw + (wo - 1) * sw + 1 : sw,
            ]
            for y in range(kh)
            for z in range(kw)
        ]
    )


def _maxpool(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    return _windows(x, op, program.tensors[op.inputs[0]].lo).max(axis=0)


def _sumpool(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    return _windows(x, op, 0).sum(axis=0)


def _reshape(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], *op.attrs["shape"])


def _permute(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    return x.transpose(0, *(a + 1 for a in op.attrs["axes"]))


def _concat(program: Program, op: Op, *xs: np.ndarray) -> np.ndarray:
    return np.concatenate(xs, axis=op.attrs["axis"] + 1)


def _pad(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), *(tuple(p) for p in op.attrs["pads"])))


def _slice(program: Program, op: Op, x: np.ndarray) -> np.ndarray:
    cut = [slice(None)] * x.ndim
    cut[op.attrs["axis"] + 1] = slice(op.attrs["start"], op.attrs["stop"], op.attrs["step"])
    return x[tuple(cut)]


RULES: dict[str, Callable[..., np.ndarray]] = {
    "quantize": _quantize, "reads": _reads, "xsum": _xsum, "requant": _requant, "maxpool": _maxpool, "sumpool": _sumpool,
    "reshape": _reshape, "permute": _permute, "concat": _concat, "pad": _pad, "slice": _slice,
}  # fmt: skip


def run(program: Program, x: np.ndarray, keep: Any = None) -> dict[str, np.ndarray]:
    """Every tensor of the program by name, int64 [N, ...], for the input x (uint8 pixels, or
    float32).

    keep: names to return (default: all). Raises AssertionError if a tensor leaves its proven
    bounds: that is a bug.
    """
    values = {program.input: x if program.tensors[program.input].lo is None else x.astype(np.int64)}
    for op in program.ops:
        y = RULES[op.kind](program, op, *(values[name] for name in op.inputs))
        spec = program.tensors[op.output]
        assert y.shape[1:] == spec.shape, f"{op.name}: shape {y.shape[1:]} is not {spec.shape}"
        assert y.size == 0 or (spec.lo <= y.min() and y.max() <= spec.hi), (
            f"{op.name}: {y.min()}..{y.max()} leaves {spec.lo}..{spec.hi}"
        )
        values[op.output] = y
    return values if keep is None else {name: values[name] for name in keep}
