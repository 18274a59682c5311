"""Small random integer programs: the same cases go through every carrier (numpy, torch, ONNX), and
every integer must agree.

CASES             name -> macro, geometry and input size of one reads layer each; together they cover every branch of the formula
layer_program     one reads layer: uint8 codes -> int32 accumulators
random_layer      the same with everything drawn from a seed
network           every kind of operation in one program, on pixels or on float32
images            random inputs of a program
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rqtool.errors import ConfigError
from rqtool.hardware.macro import Macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.program.ir import Op, Program, Tensor, check


class Builder:
    """A program under construction: each method adds one operation and returns the name of its
    output."""

    def __init__(self, macro: Macro, seed: int):
        self.macro, self.rng = macro, np.random.default_rng(seed)
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.constants: dict[str, np.ndarray] = {}

    def input(self, shape: tuple[int, ...], lo: int | None, hi: int | None) -> str:
        self.tensors["x"] = Tensor("x", shape, lo, hi)
        return "x"

    def add(
        self,
        kind: str,
        inputs: list[str],
        shape: tuple[int, ...],
        lo: int,
        hi: int,
        attrs: dict[str, Any],
        **consts: np.ndarray,
    ) -> str:
        name = f"{kind}{len(self.ops)}"
        for role, array in consts.items():
            self.constants[f"{name}.{role}"] = array
        self.tensors[f"{name}.out"] = Tensor(f"{name}.out", shape, lo, hi)
        self.ops.append(
            Op(
                kind,
                name,
                tuple(inputs),
                f"{name}.out",
                attrs,
                {role: f"{name}.{role}" for role in consts},
            )
        )
        return f"{name}.out"

    def shape(self, x: str) -> tuple[int, ...]:
        return self.tensors[x].shape

    def program(self, output: str) -> Program:
        program = Program(
            self.macro,
            self.ops[0].inputs[0],
            output,
            self.tensors,
            tuple(self.ops),
            self.constants,
            {"preset": None},
        )
        check(program)
        return program

    # -- the macro ---------------------------------------------------------------------------------
    def reads(
        self, x: str, geometry: Geometry, pad: int = 0, gains: str = "small", zeros: str = "layer"
    ) -> str:
        """gains: one, small (1..4 per tile), large (60..127 per tile) or wide (per read); zeros:
        layer (the code book's) or own (any)."""
        layer = f"layer{len(self.ops)}"
        plan = Plan.make(layer, geometry, self.macro)
        weight = self.rng.integers(
            -self.macro.q_w,
            self.macro.q_w + 1,
            (geometry.columns, geometry.channels // geometry.groups, *geometry.kernel),
        )
        spec, consts = self._adc(plan, gains, zeros)
        if self.macro.pack == "spread":
            consts["order"] = self.rng.permutation(geometry.rows).astype(np.int32)
        height, width = geometry.out_size(*self.shape(x)[1:])
        attrs = {"layer": layer, "geometry": geometry.to_dict(), "pad": pad, "adc": spec}
        bound = plan.acc_bound
        return self.add(
            "reads",
            [x],
            (geometry.columns, height, width),
            -bound,
            bound,
            attrs,
            weight=weight.astype(np.int8),
            **consts,
        )

    def _adc(
        self, plan: Plan, gains: str, zeros: str
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        macro = self.macro
        if macro.ideal:
            return {"kind": "ideal"}, {}
        return self._free(plan) if macro.levels == "free" else self._uniform(plan, gains, zeros)

    def _free(self, plan: Plan) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        top, macro = self.macro.top, self.macro
        rows = plan.geometry.columns if macro.granularity == "column" else 1
        thresholds = np.sort(self.rng.integers(macro.p_min, macro.p_max + 2, (rows, top)))
        levels = np.sort(self.rng.integers(macro.p_min, macro.p_max + 1, top + 1)).clip(
            -32767, 32767
        )
        return {"kind": "free", "top": top}, {
            "thresholds": thresholds.astype(np.int32),
            "levels": levels.astype(np.int32),
        }

    def _uniform(
        self, plan: Plan, gains: str, zeros: str
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        macro = self.macro
        shape = {
            "layer": (1, 1),
            "column": (1, plan.geometry.columns),
            "tile": (len(plan.tiles), plan.geometry.columns),
        }[macro.granularity]
        full = max(2.0, (macro.p_max - macro.p_min) / (macro.top + 1))
        step = np.exp(self.rng.uniform(0, np.log(full), shape))
        mult = (2 * np.floor(2.0**macro.shift / step / 2) + 1).clip(1, 2**macro.shift - 1)
        zero = (
            np.full((1, 1), macro.zero)
            if zeros == "layer"
            else self.rng.integers(0, macro.top + 1, shape)
        )
        lo, hi, size = {
            "one": (1, 2, (1, 1)),
            "small": (1, 5, (shape[0], 1)),
            "large": (60, 128, (shape[0], 1)),
            "wide": (1, 128, shape),
        }[gains]
        gain = self.rng.integers(lo, hi, size)
        tables = {
            "mult": mult,
            "zero": zero,
            "gain": gain if macro.granularity == "tile" else np.ones((1, 1)),
        }
        return {"kind": "uniform", "shift": macro.shift, "top": macro.top}, {
            k: v.astype(np.int32) for k, v in tables.items()
        }

    # -- the rest ----------------------------------------------------------------------------------
    def xsum(self, x: str, geometry: Geometry, pad: int = 0) -> str:
        peak = geometry.rows * max(self.tensors[x].hi, pad)
        attrs = {"geometry": geometry.to_dict(), "pad": pad, "columns": geometry.columns}
        return self.add(
            "xsum", [x], (geometry.columns, *geometry.out_size(*self.shape(x)[1:])), 0, peak, attrs
        )

    def quantize(self, x: str, exponent: int, lo: int, hi: int) -> str:
        return self.add(
            "quantize", [x], self.shape(x), lo, hi, {"exponent": exponent, "lo": lo, "hi": hi}
        )

    def requant(self, xs: list[str], lo: int, hi: int, shift: int = 16) -> str:
        """Random multipliers, larger than the proven peak of an input asks for (accumulators rarely
        reach it), below the bound of 2**30."""
        channels, shape = self.shape(xs[0])[0], self.shape(xs[0])
        wanted = (hi - lo) * 2.0**shift / len(xs)
        mults = {}
        for n, x in enumerate(xs):
            peak = self.tensors[x].peak
            size = max(1, min(wanted / max(1, peak) * 16, (2**29) / len(xs) / max(1, peak)))
            mults[f"mult{n}"] = (
                (self.rng.uniform(-0.3, 1, (channels, *[1] * (len(shape) - 1))) * size)
                .round()
                .astype(np.int32)
            )
        add = self.rng.integers(
            -(hi - lo) << (shift - 2),
            ((hi - lo) << (shift - 2)) + 1,
            (channels, *[1] * (len(shape) - 1)),
        ).astype(np.int32)
        return self.add(
            "requant",
            xs,
            shape,
            lo,
            hi,
            {"shift": shift, "lo": lo, "hi": hi},
            add=add + np.int32(1 << (shift - 1)),
            **mults,
        )

    def pool(
        self,
        kind: str,
        x: str,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        pads: list[list[int]],
        dilation: tuple[int, int] = (1, 1),
    ) -> str:
        t = self.tensors[x]
        sizes = zip(t.shape[1:], kernel, stride, pads, dilation)
        out = tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        attrs: dict[str, Any] = {"kernel": list(kernel), "stride": list(stride), "padding": pads}
        if kind == "maxpool":
            return self.add(
                kind, [x], (t.shape[0], *out), t.lo, t.hi, {**attrs, "dilation": list(dilation)}
            )
        taps = kernel[0] * kernel[1]
        return self.add(
            kind, [x], (t.shape[0], *out), min(0, t.lo * taps), max(0, t.hi * taps), attrs
        )

    def moved(self, kind: str, x: str, **attrs: Any) -> str:
        """reshape, permute, pad or slice: numpy says what shape comes out."""
        t = self.tensors[x]
        probe = np.zeros(t.shape)
        if kind == "reshape":
            out = probe.reshape(attrs["shape"])
        elif kind == "permute":
            out = probe.transpose(attrs["axes"])
        elif kind == "pad":
            out = np.pad(probe, attrs["pads"])
        else:
            out = np.take(
                probe,
                range(t.shape[attrs["axis"]])[attrs["start"] : attrs["stop"] : attrs["step"]],
                attrs["axis"],
            )
        lo, hi = (min(0, t.lo), max(0, t.hi)) if kind == "pad" else (t.lo, t.hi)
        return self.add(kind, [x], out.shape, lo, hi, attrs)

    def concat(self, xs: list[str], axis: int) -> str:
        ts = [self.tensors[x] for x in xs]
        shape = list(ts[0].shape)
        shape[axis] = sum(t.shape[axis] for t in ts)
        return self.add(
            "concat", xs, tuple(shape), min(t.lo for t in ts), max(t.hi for t in ts), {"axis": axis}
        )


@dataclass(frozen=True)
class Case:
    """One reads layer: macro, geometry, input height and width, padding code, how gains and zeros
    are drawn."""

    macro: Macro
    geometry: Geometry
    size: tuple[int, int] = (5, 6)
    pad: int = 0
    gains: str = "small"
    zeros: str = "layer"


SAME = {"kernel": (3, 3), "padding": (1, 1)}
CASES: dict[str, Case] = {
    "kernel_per_read": Case(Macro(), Geometry(4, 5, **SAME)),
    "nthu": Case(Macro(in_bits=2, w_bits=3, codebook="sign-magnitude"), Geometry(3, 8, **SAME)),
    "short_last_tile": Case(Macro(wl=16), Geometry(5, 4, **SAME)),
    "tile_across_channels": Case(Macro(wl=4), Geometry(4, 3, **SAME)),
    "many_tiles_per_channel": Case(Macro(wl=2), Geometry(2, 3, **SAME)),
    "whole_kernels": Case(Macro(wl=20, pack="kernels"), Geometry(5, 4, **SAME)),
    "spread": Case(Macro(pack="spread"), Geometry(4, 5, **SAME)),
    "spread_short_last_tile": Case(Macro(wl=16, pack="spread", granularity="tile"), Geometry(5, 4, **SAME), pad=3, gains="wide"),
    "spread_sliced_groups": Case(Macro(wl=5, pack="spread", dac_bits=2, cell_bits=1), Geometry(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), (7, 6), pad=5),
    "spread_conv1d": Case(Macro(wl=6, pack="spread", levels="free"), Geometry(4, 3, (1, 3), padding=(0, 1), kind="conv1d"), (1, 9)),
    "spread_offset": Case(Macro(pack="spread", sign_scheme="offset"), Geometry(3, 4, **SAME)),
    "spread_linear": Case(Macro(wl=16, pack="spread"), Geometry(40, 7, kind="linear"), (1, 1)),
    "spread_ideal": Case(Macro(adc_bits=None, pack="spread"), Geometry(3, 4, **SAME)),
    "one_tile": Case(Macro(wl=128), Geometry(6, 7, **SAME)),
    "one_row_per_read": Case(Macro(wl=1, w_bits=3, in_bits=3), Geometry(2, 3, (2, 2))),
    "split": Case(Macro(sign_scheme="split"), Geometry(3, 4, **SAME)),
    "offset": Case(Macro(sign_scheme="offset"), Geometry(3, 4, **SAME)),
    "split_sliced": Case(Macro(sign_scheme="split", cell_bits=2, w_bits=5), Geometry(3, 4, **SAME)),
    "offset_binary_cells": Case(Macro(sign_scheme="offset", cell_bits=1, wl=12), Geometry(3, 4, **SAME)),
    "signed_sliced": Case(Macro(cell_bits=1), Geometry(3, 4, **SAME)),
    "bit_serial": Case(Macro(dac_bits=1), Geometry(3, 4, **SAME)),
    "serial_uneven": Case(Macro(dac_bits=2, in_bits=5, wl=7), Geometry(3, 4, **SAME)),
    "serial_and_sliced": Case(Macro(dac_bits=1, cell_bits=1, in_bits=3, sign_scheme="split"), Geometry(2, 3, **SAME)),
    "eight_bits": Case(Macro(in_bits=8, w_bits=8, wl=8), Geometry(3, 4, **SAME)),
    "eight_bits_offset": Case(Macro(in_bits=8, w_bits=8, wl=4, sign_scheme="offset"), Geometry(3, 4, **SAME)),
    "eight_bits_serial_offset": Case(Macro(in_bits=8, w_bits=8, adc_bits=8, dac_bits=1, sign_scheme="offset"), Geometry(2, 3, **SAME)),
    "long_array": Case(Macro(in_bits=8, w_bits=5, wl=64), Geometry(8, 3, **SAME), (4, 4)),
    "adc_1_bit": Case(Macro(adc_bits=1), Geometry(3, 4, **SAME)),
    "adc_8_bit": Case(Macro(adc_bits=8), Geometry(3, 4, **SAME)),
    "column_steps": Case(Macro(granularity="column"), Geometry(4, 5, **SAME)),
    "column_zeros": Case(Macro(granularity="column"), Geometry(4, 5, **SAME), zeros="own"),
    "tile_gains": Case(Macro(granularity="tile"), Geometry(4, 5, **SAME)),
    "tile_column_gains": Case(Macro(granularity="tile"), Geometry(4, 5, **SAME), gains="wide"),
    "tile_zeros": Case(Macro(granularity="tile", sign_scheme="split"), Geometry(4, 5, **SAME), gains="wide", zeros="own"),
    "tile_gains_sliced": Case(Macro(granularity="tile", cell_bits=1, dac_bits=2), Geometry(4, 5, **SAME), gains="wide"),
    "tile_gains_beyond_8_bits": Case(Macro(granularity="tile", cell_bits=1), Geometry(4, 5, **SAME), gains="large"),
    "free_levels": Case(Macro(levels="free"), Geometry(3, 4, **SAME)),
    "free_levels_split": Case(Macro(levels="free", adc_bits=3, sign_scheme="split", wl=14), Geometry(3, 4, **SAME)),
    "free_columns": Case(Macro(levels="free", granularity="column"), Geometry(4, 5, **SAME)),
    "free_columns_groups": Case(Macro(levels="free", granularity="column", adc_bits=3, wl=5), Geometry(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), (7, 6), pad=5),
    "free_columns_spread": Case(Macro(levels="free", granularity="column", adc_bits=2, wl=16, pack="spread", sign_scheme="split", dac_bits=2), Geometry(5, 6, **SAME)),
    "free_columns_nthu": Case(Macro(levels="free", granularity="column", in_bits=2, w_bits=3, codebook="sign-magnitude"), Geometry(3, 8, **SAME)),
    "free_columns_linear": Case(Macro(levels="free", granularity="column", adc_bits=6, sign_scheme="offset", cell_bits=2), Geometry(40, 7, kind="linear"), (1, 1)),
    "ideal": Case(Macro(adc_bits=None), Geometry(3, 4, **SAME)),
    "ideal_serial_sliced": Case(Macro(adc_bits=None, dac_bits=1, cell_bits=2, sign_scheme="split", wl=5), Geometry(3, 4, **SAME)),
    "padded_with_a_code": Case(Macro(), Geometry(3, 4, **SAME), pad=8),
    "padded_serial": Case(Macro(dac_bits=1, wl=5), Geometry(3, 4, **SAME), pad=5),
    "groups": Case(Macro(), Geometry(6, 4, groups=2, **SAME)),
    "groups_uneven": Case(Macro(wl=12, granularity="tile", sign_scheme="split"), Geometry(6, 4, groups=2, **SAME), gains="wide"),
    "depthwise": Case(Macro(), Geometry(5, 5, groups=5, **SAME)),
    "depthwise_tile": Case(Macro(wl=4, granularity="tile"), Geometry(4, 8, groups=4, **SAME), gains="wide"),
    "depthwise_own_gains": Case(Macro(wl=4, granularity="tile"), Geometry(4, 4, groups=4, **SAME), gains="wide"),
    "strided": Case(Macro(wl=25), Geometry(2, 3, (5, 5), (2, 3), (2, 1)), (9, 11)),
    "dilated": Case(Macro(), Geometry(3, 4, (3, 3), (1, 2), (2, 0), (2, 1)), (7, 6)),
    "conv1d": Case(Macro(wl=6), Geometry(4, 3, (1, 3), padding=(0, 1), kind="conv1d"), (1, 9)),
    "pointwise": Case(Macro(wl=4), Geometry(8, 3), (3, 2)),
    "linear": Case(Macro(wl=16), Geometry(40, 7, kind="linear"), (1, 1)),
    "linear_one_column": Case(Macro(), Geometry(9, 1, kind="linear"), (1, 1)),
}  # fmt: skip


def layer_program(case: Case, seed: int = 0) -> Program:
    """uint8 input codes "x" -> one reads layer -> int32 accumulators."""
    b = Builder(case.macro, seed)
    x = b.input((case.geometry.channels, *case.size), 0, case.macro.q_x)
    return b.program(b.reads(x, case.geometry, case.pad, case.gains, case.zeros))


def random_layer(seed: int) -> Program:
    """A reads layer with macro, geometry, sizes and tables all drawn from `seed`; contradictions
    are drawn again."""
    rng = np.random.default_rng(seed)
    while True:
        try:
            return layer_program(_random_case(rng), seed)
        except ConfigError:
            continue


def _random_case(rng: np.random.Generator) -> Case:
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    kind = pick("uniform", "uniform", "uniform", "free", "ideal")
    in_bits, w_bits = int(rng.integers(1, 7)), int(rng.integers(2, 7))
    macro = Macro(
        wl=int(rng.integers(1, 40)), in_bits=in_bits, w_bits=w_bits, sign_scheme=pick("signed", "split", "offset"), pack=pick("rows", "kernels", "spread"),
        adc_bits=None if kind == "ideal" else int(rng.integers(1, 9)), dac_bits=int(rng.integers(1, in_bits + 1)), cell_bits=int(rng.integers(1, w_bits)),
        granularity=pick("layer", "column") if kind == "free" else pick("layer", "column", "tile"), levels="free" if kind == "free" else "uniform",
    )  # fmt: skip
    groups = pick(1, 1, 2, 3)
    kernel, dilation = (
        (int(rng.integers(1, 4)), int(rng.integers(1, 4))),
        (int(rng.integers(1, 3)), int(rng.integers(1, 3))),
    )
    padding = (int(rng.integers(0, kernel[0])), int(rng.integers(0, kernel[1])))
    geometry = Geometry(
        groups * int(rng.integers(1, 4)),
        groups * int(rng.integers(1, 4)),
        kernel,
        (pick(1, 2), pick(1, 2)),
        padding,
        dilation,
        groups,
    )
    size = (int(rng.integers(5, 8)), int(rng.integers(5, 8)))
    return Case(
        macro,
        geometry,
        size,
        pick(0, int(rng.integers(0, macro.q_x + 1))),
        pick("one", "small", "wide"),
        pick("layer", "own"),
    )


def network(seed: int = 0, macro: Macro | None = None, floats: bool = False) -> Program:
    """Every kind of operation once: residual addition, pools, concat, pad, slice, permute, reshape,
    offset correction, linear."""
    macro = macro or Macro()
    q = macro.q_x
    b = Builder(macro, seed)
    if floats:
        codes = b.quantize(b.input((3, 9, 8), None, None), 3, 0, q)
    else:
        codes = b.requant([b.input((3, 9, 8), 0, 255)], 0, q, shift=12)
    first = Geometry(3, 6, **SAME)
    a = b.requant([b.reads(codes, first), b.xsum(codes, first)], 0, q)
    c = b.requant([b.reads(a, Geometry(6, 6, groups=2, **SAME)), a], 0, q)
    d = b.pool("maxpool", c, (3, 3), (2, 2), [[1, 1], [0, 1]])
    wide = b.requant([b.reads(d, Geometry(6, 4))], -300, 500)
    e = b.pool("maxpool", wide, (2, 2), (1, 1), [[1, 0], [0, 1]], (1, 2))
    f = b.requant([b.pool("sumpool", e, (2, 2), (2, 1), [[0, 1], [1, 0]])], 0, q)
    g = b.concat([f, b.moved("slice", f, axis=0, start=0, stop=3, step=2)], 0)
    h = b.moved("pad", g, pads=[[0, 1], [1, 0], [0, 2]])
    i = b.moved("permute", h, axes=[2, 0, 1])
    j = b.requant([b.pool("sumpool", i, b.shape(i)[1:], (1, 1), [[0, 0], [0, 0]])], 0, q)
    k = b.requant([b.moved("reshape", b.concat([wide, e], 2), shape=[-1, 1, 1])], 0, q)
    n = b.concat([j, k], 0)
    logits = b.reads(n, Geometry(b.shape(n)[0], 10, kind="linear"))
    out = b.requant([logits], -(2**20), 2**20, shift=4)
    return b.program(b.moved("reshape", out, shape=[10]))


def images(program: Program, n: int, seed: int = 0) -> np.ndarray:
    """Random inputs [n, ...]: uint8 over the whole range of the input tensor, or float32 around it."""
    t = program.tensors[program.input]
    rng = np.random.default_rng(seed + 1)
    if t.lo is None:
        return rng.normal(0.5, 1.5, (n, *t.shape)).astype(np.float32)
    return rng.integers(t.lo, t.hi + 1, (n, *t.shape)).astype(np.uint8)
