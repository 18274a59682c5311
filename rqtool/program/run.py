"""The integer program in torch: what `rqtool eval` reports. Every integer of every tensor equals
golden.py's.

Reads go through the fused kernel where the plan was certified: every partial sum that can occur was
converted once by the kernel's own lines and compared with hardware/adc.py. Where one code differs
the exact path is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from rqtool.hardware import adc
from rqtool.hardware.converter import Converter, Ideal, Levels, Uniform
from rqtool.kernels import choose
from rqtool.kernels.spec import ReadSpec, read_spec
from rqtool.mapping.cells import cells
from rqtool.mapping.plan import Geometry, Plan
from rqtool.mapping.planes import extract
from rqtool.model.network import flat_pads
from rqtool.program.ir import Op, Program

DTYPES = {
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
}


# -- reads -----------------------------------------------------------------------------------------
def certified(plan: Plan, mult: np.ndarray, zero: np.ndarray) -> bool:
    """Whether the fast forms of this machine convert every partial sum of the plan to the code that
    hardware/adc.py gives.

    mult, zero: int arrays [1 or T, 1 or O].
    """
    macro = plan.macro
    p = np.arange(macro.p_min, macro.p_max + 1, dtype=np.int64)
    for m, z in {
        (int(m), int(z)) for m, z in zip(*(a.flat for a in np.broadcast_arrays(mult, zero)))
    }:
        expected = adc.uniform_code(p, m, macro.shift, z, macro.top) - z
        if not all(
            np.array_equal(codes, expected)
            for codes in choose.every_code(p, m, macro.shift, -z, macro.top - z)
        ):
            return False
    return True


def certified_levels(spec: ReadSpec) -> bool:
    """The same for free levels."""
    tables = spec.tables
    p = np.arange(tables.p_min, tables.p_min + tables.value.shape[1], dtype=np.int64)
    return all(np.array_equal(levels, tables.value) for levels in choose.every_level(p, spec))


CERTIFICATES: dict[type[Converter], Callable[[Plan, ReadSpec], bool]] = {
    Uniform: lambda plan, spec: certified(plan, spec.adc.mult, spec.adc.zero),
    Levels: lambda plan, spec: certified_levels(spec),
}


class Reads:
    """One reads operation, prepared: planes of the weight, spec of the ADC, certificate.

    fused: whether the fused kernel runs it; else torch does, in float32 or float64.
    """

    def __init__(self, program: Program, op: Op) -> None:
        self.plan, self.pad = program.plan(op), op.attrs["pad"]
        adcs = program.adc(op)
        spec = read_spec(self.plan, adcs)
        self.certified = CERTIFICATES[type(adcs)](self.plan, spec)
        self.exact = [
            choose.Exact(w, spec, self.plan, self.certified)
            for w in weight_planes(program, op, self.plan)
        ]
        self.fused = all(one.prepared is not None for one in self.exact)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """acc int32 [N, O, H_out, W_out] from uint8 codes [N, C, H, W]."""
        acc, planes = None, self.plan.input_planes
        for a in planes:
            part, pad = (extract(x, a), extract(self.pad, a)) if len(planes) > 1 else (x, self.pad)
            for b, exact in zip(self.plan.weight_planes, self.exact):
                found, factor = exact(part, pad), a.factor * b.factor
                found = found if factor == 1 else found.mul_(factor)
                acc = found if acc is None else acc.add_(found)
        return acc


class IdealReads:
    """A reads operation whose ADC is ideal: a convolution in float64, which is exact."""

    def __init__(self, program: Program, op: Op) -> None:
        self.plan, self.pad, self.certified = program.plan(op), op.attrs["pad"], True
        self.fused = False
        self.planes = weight_planes(program, op, self.plan)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """acc int32 [N, O, H_out, W_out] from uint8 codes [N, C, H, W]."""
        g, acc = self.plan.geometry, 0
        x = F.pad(x, (g.padding[1], g.padding[1], g.padding[0], g.padding[0]), value=self.pad)
        planes = [(b.factor, w) for b, w in zip(self.plan.weight_planes, self.planes)]
        for factor, w in planes:
            kernel = w.view(g.columns, -1, *g.kernel).double()
            acc = acc + factor * F.conv2d(
                x.double(), kernel, None, g.stride, 0, g.dilation, g.groups
            )
        return acc.int()


def weight_planes(program: Program, op: Op, plan: Plan) -> list[torch.Tensor]:
    """The planes of a layer's weight, int32 [O, K] each."""
    weight = torch.from_numpy(program.const(op, "weight").astype(np.int32))
    flat = weight.reshape(plan.geometry.columns, -1)
    return cells(plan, flat)


READS: dict[type[Converter], Callable[[Program, Op], Reads | IdealReads]] = {
    Ideal: IdealReads,
    Uniform: Reads,
    Levels: Reads,
}


def prepared(program: Program, op: Op) -> Reads | IdealReads:
    """A reads operation made ready to run."""
    return READS[type(program.adc(op))](program, op)


# -- the other operations: one rule each -----------------------------------------------------------
def _xsum(op: Op, consts: dict, x: torch.Tensor) -> torch.Tensor:
    g = Geometry.from_dict(op.attrs["geometry"])
    ph, pw = g.padding
    ones = torch.ones(op.attrs["columns"], g.channels // g.groups, *g.kernel, dtype=torch.float64)
    return F.conv2d(
        F.pad(x.double(), (pw, pw, ph, ph), value=op.attrs["pad"]),
        ones,
        None,
        g.stride,
        0,
        g.dilation,
        g.groups,
    ).int()


def _quantize(op: Op, consts: dict, x: torch.Tensor) -> torch.Tensor:
    scaled = torch.floor(x * np.float32(2.0 ** op.attrs["exponent"]).item() + 0.5)
    return scaled.clamp(op.attrs["lo"], op.attrs["hi"]).int()


def _requant(op: Op, consts: dict, *xs: torch.Tensor) -> torch.Tensor:
    dtype = torch.uint8 if op.attrs["lo"] >= 0 and op.attrs["hi"] <= 255 else torch.int32
    return choose.requant(
        xs,
        [consts[f"mult{n}"] for n in range(len(xs))],
        consts["add"],
        op.attrs["shift"],
        op.attrs["lo"],
        op.attrs["hi"],
        dtype,
    )


def _maxpool(op: Op, consts: dict, x: torch.Tensor) -> torch.Tensor:
    a = op.attrs
    x = F.pad(x.double(), flat_pads(a["padding"]), value=float("-inf"))
    return F.max_pool2d(x, tuple(a["kernel"]), tuple(a["stride"]), 0, tuple(a["dilation"])).int()


def _sumpool(op: Op, consts: dict, x: torch.Tensor) -> torch.Tensor:
    a = op.attrs
    return F.avg_pool2d(
        F.pad(x.double(), flat_pads(a["padding"])),
        tuple(a["kernel"]),
        tuple(a["stride"]),
        divisor_override=1,
    )


def _slice(op: Op, consts: dict, x: torch.Tensor) -> torch.Tensor:
    return x[
        (slice(None),) * (op.attrs["axis"] + 1)
        + (slice(op.attrs["start"], op.attrs["stop"], op.attrs["step"]),)
    ]


RULES: dict[str, Callable[..., torch.Tensor]] = {
    "xsum": _xsum,
    "quantize": _quantize,
    "requant": _requant,
    "maxpool": _maxpool,
    "sumpool": _sumpool,
    "reshape": lambda op, consts, x: x.reshape(x.shape[0], *op.attrs["shape"]),
    "permute": lambda op, consts, x: x.permute(0, *(a + 1 for a in op.attrs["axes"])),
    "concat": lambda op, consts, *xs: torch.cat(xs, op.attrs["axis"] + 1),
    "pad": lambda op, consts, x: F.pad(x, flat_pads(op.attrs["pads"])),
    "slice": _slice,
}


class Runner:
    """A program made ready to run on batches.

    `fast` says which reads use the fused kernel (by layer); calling it gives the output, `trace`
    every tensor.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.rules = [self._rule(op) for op in program.ops]
        self.fast = {
            op.attrs["layer"]: rule.fused
            for op, rule in zip(program.ops, self.rules)
            if op.kind == "reads"
        }

    def _rule(self, op: Op) -> Callable[..., torch.Tensor]:
        if op.kind == "reads":
            return prepared(self.program, op)
        consts = {
            role: torch.from_numpy(np.array(self.program.constants[name]))
            for role, name in op.consts.items()
        }
        return lambda *xs: RULES[op.kind](op, consts, *xs)

    @torch.no_grad()
    def trace(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every tensor by name, uint8, int32 or int64 [N, ...], for uint8 or float32 x [N, ...]."""
        values = {self.program.input: x}
        for op, rule in zip(self.program.ops, self.rules):
            values[op.output] = rule(*(values[name] for name in op.inputs)).to(
                DTYPES[self.program.tensors[op.output].dtype]
            )
        return values

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The output tensor, int32 [N, classes]."""
        values, last = (
            {self.program.input: x},
            {name: i for i, op in enumerate(self.program.ops) for name in op.inputs},
        )
        for i, (op, rule) in enumerate(zip(self.program.ops, self.rules)):
            values[op.output] = rule(*(values[name] for name in op.inputs)).to(
                DTYPES[self.program.tensors[op.output].dtype]
            )
            for name in set(op.inputs):
                if last[name] == i:
                    del values[name]
        return values[self.program.output]
