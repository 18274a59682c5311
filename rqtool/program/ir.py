"""The integer program as plain data: tensors by name, operations in order, integer constants.

    op        integers                                                           attributes
    quantize  clamp(floor(x * 2**exponent + 1/2), lo, hi)    (float32 input)     exponent, lo, hi
    reads     the formula of docs/hardware.md; acc per column                    layer, geometry, pad, adc
    xsum      sum of the input codes under a kernel (offset weights need it)     geometry, pad, columns
    requant   clamp((sum_n x_n * mult_n + add) >> shift, lo, hi)                 shift, lo, hi
    maxpool   largest of a window; padding never wins                            kernel, stride, padding, dilation
    sumpool   sum of a window; padding adds 0                                    kernel, stride, padding
    reshape   new shape of one sample                                            shape
    permute   axes of one sample in a new order (0 is the first after batch)     axes
    concat    join along an axis of one sample                                   axis
    pad       zeros before and behind each axis of one sample                    pads
    slice     every step-th of start..stop along an axis of one sample           axis, start, stop, step

`requant` with two inputs is a residual addition. Rounding (half up), zero codes, bias and batch
norm all live in its `add`. A requant whose `add` is int32 computes in int32, one whose `add` is
int64 in 64 bits; the bounds below hold for their sums. Shapes leave the batch out. Every tensor
carries proven bounds: uint8 where they fit 0..255, else int32; the sum of a large window is int64
where int32 does not hold it, and then goes into a requant of 64 bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.hardware.converter import KINDS, Converter, from_consts
from rqtool.hardware.macro import Macro
from rqtool.mapping.assign import Macros, read_tables
from rqtool.mapping.plan import Geometry, Plan

REQUANT_BOUND = (
    1 << 30
)  # a requant keeps |sum x*mult| + |add| below this, so an int32 carrier can floor-divide exactly
WIDE_BOUND = (
    1 << 52
)  # and one of 64 bits below this, so float64 holds every product and partial sum
MAX_SHIFT, MAX_WIDE_SHIFT = 30, 50
INT32 = (1 << 31) - 1

ATTRIBUTES = {
    "quantize": {"exponent", "lo", "hi"},
    "reads": {"layer", "geometry", "pad", "adc"},
    "xsum": {"geometry", "pad", "columns"},
    "requant": {"shift", "lo", "hi"},
    "maxpool": {"kernel", "stride", "padding", "dilation"},
    "sumpool": {"kernel", "stride", "padding"},
    "reshape": {"shape"},
    "permute": {"axes"},
    "concat": {"axis"},
    "pad": {"pads"},
    "slice": {"axis", "start", "stop", "step"},
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a program: per-sample shape and proven bounds lo <= x <= hi (both None for the
    float32 input)."""

    name: str
    shape: tuple[int, ...]
    lo: int | None
    hi: int | None

    @property
    def dtype(self) -> str:
        """ "float32", "uint8", "int32" or "int64"."""
        if self.lo is None:
            return "float32"
        if self.lo >= 0 and self.hi <= 255:
            return "uint8"
        return "int32" if self.peak <= INT32 else "int64"

    @property
    def peak(self) -> int:
        """The largest magnitude."""
        return max(abs(self.lo), abs(self.hi))


@dataclass(frozen=True)
class Op:
    """One operation; `consts` maps a role ("weight", "mult", "add0"...) to the name of a constant."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attrs: dict[str, Any] = field(default_factory=dict)
    consts: dict[str, str] = field(default_factory=dict)


@dataclass
class Program:
    """Operations in order, from one input to one output.

    macro: of the layers that are not in `own`, the macros of the others by layer; digital: the
    layers that are kept off the macro, each of them in `own`.
    constants: int8 (weights) or int32 arrays by name. meta: JSON data for people and reports (scale
    of the output, preprocessing of the input, float islands, ...); it never changes a result.
    """

    macro: Macro
    input: str
    output: str
    tensors: dict[str, Tensor]
    ops: tuple[Op, ...]
    constants: dict[str, np.ndarray]
    meta: dict[str, Any] = field(default_factory=dict)
    own: Mapping[str, Macro] = field(default_factory=dict)
    digital: tuple[str, ...] = ()
    _plans: dict[str, tuple[Op, Plan]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def macros(self) -> Macros:
        """The macro of every layer."""
        return Macros(self.macro, self.own, self.digital)

    def const(self, op: Op, role: str) -> np.ndarray:
        return self.constants[op.consts[role]]

    def plan(self, op: Op) -> Plan:
        """The plan of a reads operation, on its layer's own macro."""
        known, plan = self._plans.get(op.name, (None, None))
        if known is not op:
            plan = self._made_plan(op)
            self._plans[op.name] = op, plan
        return plan

    def _made_plan(self, op: Op) -> Plan:
        layer, geometry = op.attrs["layer"], Geometry.from_dict(op.attrs["geometry"])
        spread = self.macros.of(layer).pack == "spread"
        order = tuple(self.const(op, "order").tolist()) if spread else None
        return self.macros.plan(layer, geometry, order)

    def layers_off_macro(self) -> list[dict[str, Any]]:
        """The kept layers, in order: {"layer": name, "macs": for one image}."""
        return [
            plan.off_macro(prod(self.tensors[op.output].shape[1:]))
            for op, plan in ((op, self.plan(op)) for op in self.reads())
            if plan.digital
        ]

    def adc(self, op: Op) -> Converter:
        """The ADC of a reads operation."""
        roles = KINDS[op.attrs["adc"]["kind"]].roles
        return from_consts(op.attrs["adc"], {role: self.const(op, role) for role in roles})

    def reads(self) -> tuple[Op, ...]:
        """The operations that use the macro, in order."""
        return tuple(op for op in self.ops if op.kind == "reads")

    def to_json(self) -> dict[str, Any]:
        """Everything but the constants, as JSON data; `from_json` is the way back."""
        return {
            "macro": self.macro.to_dict(),
            **self.macros.tables(),
            "input": self.input,
            "output": self.output,
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "lo": t.lo, "hi": t.hi}
                for t in self.tensors.values()
            ],
            "ops": [
                {
                    "kind": o.kind,
                    "name": o.name,
                    "inputs": list(o.inputs),
                    "output": o.output,
                    "attrs": o.attrs,
                    "consts": o.consts,
                }
                for o in self.ops
            ],
            "meta": self.meta,
        }

    @staticmethod
    def from_json(d: dict[str, Any], constants: dict[str, np.ndarray]) -> Program:
        """The program again; raises InputError when the data does not describe one (see `check`)."""
        try:
            tensors = {
                t["name"]: Tensor(t["name"], tuple(t["shape"]), t["lo"], t["hi"])
                for t in d["tensors"]
            }
            ops = tuple(
                Op(o["kind"], o["name"], tuple(o["inputs"]), o["output"], o["attrs"], o["consts"])
                for o in d["ops"]
            )
            parts = (d["input"], d["output"], tensors, ops, constants, d["meta"])
            program = Program(Macro(**d["macro"]), *parts, **read_tables(d))
            check(program)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise InputError(
                f"the integer program is not readable ({escaped(e)}); make the file again"
            ) from e
        return program

    def sha256(self) -> str:
        """A digest of all that a result depends on (everything but `meta`): equal programs have
        equal digests."""
        data = {key: value for key, value in self.to_json().items() if key != "meta"}
        h = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
        for name in sorted(self.constants):
            a = self.constants[name]
            h.update(f"{name}{a.dtype}{a.shape}".encode() + np.ascontiguousarray(a).tobytes())
        return h.hexdigest()


def check(program: Program) -> None:
    """Refuse a program that no carrier could run: unknown kinds, missing or wrong attributes,
    tensors used before they are made, constants that are absent or not integers, a requant beyond
    its bound. Raises InputError."""
    layers = {op.attrs.get("layer") for op in program.ops}
    for name in (*program.own, *program.digital):
        if name not in layers or name not in program.own:
            raise InputError(
                f"the integer program has a macro for '{escaped(name)}', which is no layer of it; "
                "make the file again"
            )
    known = {program.input}
    for op in program.ops:
        _check_op(program, op, known)
        known.add(op.output)
    if program.output not in known:
        raise InputError(
            "the integer program never makes its output "
            f"'{escaped(program.output)}'; make the file again"
        )


def _check_op(program: Program, op: Op, known: set[str]) -> None:
    def refuse(what: str) -> None:
        raise InputError(
            f"the integer program is broken at '{escaped(op.name)}': "
            f"{escaped(what)}; make the file again"
        )

    if type(op.name) is not str:
        refuse("its name is no text")
    if op.kind not in ATTRIBUTES:
        refuse(f"operation {op.kind} is unknown")
    if set(op.attrs) != ATTRIBUTES[op.kind]:
        refuse(f"its attributes are {sorted(op.attrs)}")
    for name in op.inputs:
        if name not in known:
            refuse(f"{name} is used before it is made")
    if op.output not in program.tensors:
        refuse(f"{op.output} has no shape")
    if op.kind == "reads" and op.attrs["adc"]["kind"] not in KINDS:
        refuse(f"adc {op.attrs['adc']['kind']} is unknown")
    for role in roles(op):
        if role not in op.consts:
            refuse(f"it has no constant for {role}")
    for name in op.consts.values():
        if name not in program.constants or program.constants[name].dtype.kind != "i":
            refuse(f"integer constant {name} is missing")
    if op.kind == "requant" and requant_peak(program, op) >= requant_bound(program, op):
        refuse(f"its sum can pass 2**{requant_bound(program, op).bit_length() - 1}")


def roles(op: Op) -> tuple[str, ...]:
    """The constants that an operation cannot do without."""
    if op.kind == "reads":
        return ("weight", *KINDS[op.attrs["adc"]["kind"]].roles)
    return ("add", *(f"mult{n}" for n in range(len(op.inputs)))) if op.kind == "requant" else ()


def requant_peak(program: Program, op: Op) -> int:
    """The proven bound of |sum x*mult| + |add| of a requant."""
    total = np.abs(
        program.const(op, "add").astype(np.float64)
    )  # exact up to 2**53, and no forged number can wrap it
    for n, name in enumerate(op.inputs):
        total = total + program.tensors[name].peak * np.abs(
            program.const(op, f"mult{n}").astype(np.float64)
        )
    return int(total.max())


def is_wide(program: Program, op: Op) -> bool:
    """Whether a requant computes in 64 bits."""
    return program.const(op, "add").dtype == np.int64


def requant_bound(program: Program, op: Op) -> int:
    """What the sum of a requant must stay below."""
    return WIDE_BOUND if is_wide(program, op) else REQUANT_BOUND
