"""The function of a reads layer, `ai.rqtool::ReConv` or `ReLinear`, in standard operators.

qlinear     codes = Clip(QLinearConv(x, cells))       its requantisation is the ADC, where certified (layout.requantises)
explicit    p = ConvInteger(x, cells), then the lines of rqtool.hardware.adc on int32 tensors; every other ADC
sums        MatMulInteger(gains, codes) with the zero codes as zero points, or Sub, Mul, ReduceSum where gains differ by column
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto

from rqtool.export.emit import Body, Int, Library, Ref
from rqtool.export.layout import Layout, refuse_wide_inputs
from rqtool.hardware import adc
from rqtool.hardware.converter import Converter, Ideal, Levels, Uniform
from rqtool.mapping.planes import Plane

CONV_ATTRIBUTES = ("strides", "dilations", "group")
GIVEN = (
    "x",
    "cells",
    "code_pads",
    "channels",
    "adc_mult",
    "adc_zero",
    "gain",
    "thresholds",
    "levels",
    "acc",
)
NAMES = {"linear": "ReLinear"}
DOC = {
    "qlinear": "Reads of one layer: a grouped QLinearConv whose requantisation is "
    "the ADC, then the sum of the codes over tiles and planes.",
    "explicit": "Reads of one layer: a grouped ConvInteger gives the partial sums, "
    "integer arithmetic their codes and the sum over tiles and planes.",
}


class ReadsBody:
    """Writes the body of one reads layer; `inputs` names the tensors it takes beside the codes, in
    order."""

    def __init__(self, layout: Layout, form: str):
        self.layout, self.body = layout, Body(given=GIVEN)
        self.form = form if layout.requantises else "explicit"
        self.inputs: dict[str, np.ndarray] = {}
        self.attributes = self._attributes()

    def _attributes(self) -> dict[str, Any]:
        lay, g = self.layout, self.layout.geometry
        height, width = lay.program.tensors[lay.op.output].shape[1:]
        ph, pw = g.padding
        attributes: dict[str, Any] = {
            "layer": lay.op.attrs["layer"],
            "strides": g.stride,
            "dilations": g.dilation,
            "group": lay.plan.tile_count,
        }
        attributes["reads_shape"] = [0, g.groups, lay.tiles * lay.planes, -1]
        attributes["acc_shape"] = [0, g.columns, height, width]
        if self._pads_code:
            attributes["pad_code"] = lay.op.attrs["pad"]
        else:
            attributes["pads"] = [ph, pw, ph, pw]
        numbers = lay.adc.attrs()
        del numbers["kind"]
        return attributes | {f"adc_{name}": number for name, number in numbers.items()}

    @property
    def _pads_code(self) -> bool:
        return (self.layout.op.attrs["pad"] != 0 or self.layout.ordered) and any(
            self.layout.geometry.padding
        )

    def input(self, name: str, array: np.ndarray) -> str:
        """Declare an input of the function and give it this layer's constant."""
        self.inputs[name] = array
        return name

    def write(self) -> None:
        """The whole body, from `x` to `acc`."""
        self.input("cells", self.layout.cells)
        codes = self._gathered(self._padded("x"))
        total: Any = 0
        for plane in self.layout.plan.input_planes:
            total = total + self._plane_sum(self._plane(codes, plane)) * plane.factor
        self.body.append("Reshape", (total.name, self.body.shape("acc_shape")), "acc")

    # -- input codes -------------------------------------------------------------------------------
    def _padded(self, x: str) -> str:
        if not self._pads_code:
            return x
        ph, pw = self.layout.geometry.padding
        pads = self.input("code_pads", np.array([0, 0, ph, pw, 0, 0, ph, pw]))
        return self.body.node(
            "Pad", x, pads, self.body.attribute("pad_code", TensorProto.UINT8), out="padded"
        )

    def _gathered(self, x: str) -> str:
        x = self._taps(x) if self.layout.ordered else x
        if not self.layout.gathers:
            return x
        return self.body.node(
            "Gather", x, self.input("channels", self.layout.channels), axis=1, out="tile_channels"
        )

    def _taps(self, x: str) -> str:
        """The padded input once for each tap of the kernel, as its positions see it: uint8 [N, kh *
        kw * C, H_out, W_out]."""
        b, g, out = (
            self.body,
            self.layout.geometry,
            self.layout.program.tensors[self.layout.op.output].shape[1:],
        )
        if g.kernel == g.stride == (1, 1):
            return x
        axes, steps = b.const([2, 3], np.int64), b.shape("strides")
        starts = [
            (y * g.dilation[0], z * g.dilation[1])
            for y in range(g.kernel[0])
            for z in range(g.kernel[1])
        ]
        ends = [
            [at + (n - 1) * step + 1 for at, n, step in zip(start, out, g.stride)]
            for start in starts
        ]
        taps = [
            b.node(
                "Slice", x, b.const(start, np.int64), b.const(end, np.int64), axes, steps, out="tap"
            )
            for start, end in zip(starts, ends)
        ]
        return b.node("Concat", *taps, axis=1, out="taps")

    def _plane(self, x: str, plane: Plane) -> str:
        """The bits of one input plane, uint8."""
        if plane.shift:
            x = self.body.node(
                "BitShift", x, self.body.const(plane.shift, np.uint8), direction="RIGHT"
            )
        if plane.shift + plane.bits < self.layout.macro.in_bits:
            x = self.body.node("BitwiseAnd", x, self.body.const(plane.peak, np.uint8), out="plane")
        return x

    # -- one input plane ---------------------------------------------------------------------------
    def _plane_sum(self, x: str) -> Int:
        """The sum of the values of all reads of one input plane: int32 [N, groups, 1, columns of a
        group * positions]."""
        if self.form == "explicit":
            return self._reduced(self._explicit_values(x))
        codes = self._requantised(x)
        return (
            self._matmul(codes)
            if self.layout.tile_gain is not None
            else self._reduced(self._values(self._counted(codes)))
        )

    def _requantised(self, x: str) -> str:
        """Codes by QLinearConv: uint8 [N, R, H, W]."""
        b, one, zero = self.body, self.body.const(1.0, np.float32), self.body.const(0, np.uint8)
        raw = b.node(
            "QLinearConv",
            x,
            one,
            zero,
            "cells",
            self._scale,
            self._cell_zero,
            one,
            self._zero_point,
            out="adc",
            **self._conv_attributes,
        )
        return (
            raw
            if self.layout.adc.top == 255
            else b.node("Clip", raw, zero, b.attribute("adc_top", TensorProto.UINT8), out="codes")
        )

    def _matmul(self, codes: str) -> Int:
        b = self.body
        rows = b.node("Reshape", codes, b.shape("reads_shape"), out="tile_codes")
        return self._acc(
            b.node(
                "MatMulInteger",
                self._gain_u8,
                rows,
                b.const(128, np.uint8),
                self._zero_point,
                out="plane_acc",
            )
        )

    def _explicit_values(self, x: str) -> Int:
        p = self.body.node(
            "ConvInteger", x, *self._unsigned_cells, out="p", **self._conv_attributes
        )
        partial = Int(self.body, p, *self.layout.p_range)
        return VALUES[type(self.layout.adc)](self, partial)

    def _uniform_values(self, p: Int) -> Int:
        top = self._attribute_int("adc_top", self.layout.adc.top)
        return self._values(adc.uniform_code(p, self._mult_int, self._shift, self._zero_int, top))

    def _level_values(self, p: Int) -> Int:
        """Codes by counting thresholds; a table look-up does what adc.level_value does, in one pass
        instead of one per level."""
        code = adc.threshold_code(p, self._thresholds)
        levels = self.layout.adc.levels.astype(np.int32)
        value = self.body.node("Gather", self.input("levels", levels), code.name, out="level")
        return self._scaled(Int(self.body, value, int(levels.min()), int(levels.max())))

    def _counted(self, codes: str) -> Int:
        return Int(self.body, self.body.cast(codes, TensorProto.INT32), 0, self.layout.adc.top)

    def _values(self, code: Int) -> Int:
        return self._bounded(adc.uniform_value(code, self._zero_int, self._gain_int))

    def _scaled(self, value: Int) -> Int:
        return self._bounded(value * self._gain_int)

    def _bounded(self, value: Int) -> Int:
        """The value with the plan's own bound: |gain * (code - zero)| never reaches what acc_bound
        is made of."""
        peak = self.layout.plan.acc_bound
        return Int(self.body, value.name, -peak, peak, value.wide)

    def _reduced(self, values: Int) -> Int:
        b = self.body
        rows = b.node("Reshape", values._as(False).name, b.shape("reads_shape"), out="tile_values")
        return self._acc(
            b.node("ReduceSum", rows, b.const([2], np.int64), keepdims=1, out="plane_acc")
        )

    def _acc(self, name: str) -> Int:
        """Any sum over tiles lies within the plan's bound, before and after the factor of its input
        plane."""
        peak = self.layout.plan.acc_bound // sum(p.factor for p in self.layout.plan.input_planes)
        return Int(self.body, name, -peak, peak)

    # -- constants of the layer, each written where it is first used -------------------------------
    @cached_property
    def _conv_attributes(self) -> dict[str, Ref]:
        names = (
            ("group",)
            if self.layout.ordered
            else CONV_ATTRIBUTES
            if self._pads_code
            else ("pads", *CONV_ATTRIBUTES)
        )
        return {
            name: Ref(name, AttributeProto.INT if name == "group" else AttributeProto.INTS)
            for name in names
        }

    @cached_property
    def _cell_zero(self) -> str:
        zero = self.layout.cell_zero
        return self.body.const(0, np.int8) if zero is None else self.body.const(zero, np.uint8)

    @cached_property
    def _unsigned_cells(self) -> tuple[str, str, str]:
        """uint8 cells, the zero point of the codes, that of the cells: onnxruntime 1.23 has no
        ConvInteger for int8 cells."""
        b, nought, middle = self.body, self.body.const(0, np.uint8), self.body.const(128, np.uint8)
        if self.layout.cell_zero is not None:
            return "cells", nought, self._cell_zero
        shifted = b.node("Add", b.cast("cells", TensorProto.INT32), b.const(128))
        return b.cast(shifted, TensorProto.UINT8, out="cells_u8"), nought, middle

    @cached_property
    def _mult(self) -> str:
        return self.input("adc_mult", self.layout.per_read(self.layout.adc.mult))

    @cached_property
    def _zero(self) -> str:
        return self.input("adc_zero", self.layout.per_read(self.layout.adc.zero))

    @cached_property
    def _thresholds(self) -> list[Int]:
        """Each threshold as a tensor [1, 1 or R, 1, 1] that broadcasts with the partial sums."""
        b, table = self.body, self.layout.thresholds_per_read(self.layout.adc.thresholds)
        shaped = b.node(
            "Reshape",
            self.input("thresholds", table),
            b.const([0, -1, 1, 1], np.int64),
            out="thresholds_by_read",
        )
        rows = (
            b.node("Gather", shaped, b.const([n], np.int64), axis=0, out="threshold")
            for n in range(len(table))
        )
        return [Int(b, row, int(table.min()), int(table.max())) for row in rows]

    @cached_property
    def _shift(self) -> Int:
        return self._attribute_int("adc_shift", self.layout.adc.shift)

    @cached_property
    def _scale(self) -> str:
        """The step as QLinearConv takes it, float32 mult / 2**shift: exact, because mult has at
        most 23 bits."""
        power = self.body.cast((1 << self._shift).name, TensorProto.FLOAT)
        return self.body.node(
            "Div", self.body.cast(self._mult, TensorProto.FLOAT), power, out="adc_scale"
        )

    @cached_property
    def _zero_point(self) -> str:
        """The one zero code of all reads, a uint8 scalar."""
        scalar = self.body.node("Reshape", self._zero, self.body.const(np.zeros(0), np.int64))
        return self.body.cast(scalar, TensorProto.UINT8, out="zero_code")

    @cached_property
    def _mult_int(self) -> Int:
        return self._by_read(self._mult, self.layout.adc.mult, "mult_by_read")

    @cached_property
    def _zero_int(self) -> Int:
        return self._by_read(self._zero, self.layout.adc.zero, "zero_by_read")

    @cached_property
    def _gain_int(self) -> Any:
        """1 where no read has another gain, so that no multiplication is written."""
        gain = self.layout.gain
        return (
            1
            if (gain == 1).all()
            else self._by_read(self.input("gain", gain), gain, "gain_by_read")
        )

    @cached_property
    def _gain_u8(self) -> str:
        gains = self.input("gain", self.layout.tile_gain)
        return self.body.cast(
            self.body.node("Add", gains, self.body.const(128)), TensorProto.UINT8, out="gain_u8"
        )

    def _by_read(self, name: str, table: np.ndarray, out: str) -> Int:
        """An input [1] or [R] that broadcasts with [N, R, H, W]."""
        shaped = self.body.node("Reshape", name, self.body.const([1, -1, 1, 1], np.int64), out=out)
        return Int(self.body, shaped, int(table.min()), int(table.max()))

    def _attribute_int(self, name: str, value: int) -> Int:
        return Int(self.body, self.body.attribute(name, TensorProto.INT32), value, value)


VALUES: dict[type[Converter], Callable[[ReadsBody, Int], Int]] = {
    Ideal: ReadsBody._scaled,
    Uniform: ReadsBody._uniform_values,
    Levels: ReadsBody._level_values,
}  # what an explicit body makes of partial sums


def write_reads(layout: Layout, form: str, library: Library) -> tuple[str, ReadsBody]:
    """The function of a layer, added to `library`: its name, and the writer that holds its form,
    its constants and the attributes of its node.

    form: "qlinear" or "explicit"; a layer whose ADC no requantisation expresses is explicit in
    both.
    """
    refuse_wide_inputs(layout)
    writer = ReadsBody(layout, form)
    writer.write()
    name = NAMES.get(layout.geometry.kind, "ReConv")
    return library.intern(
        name, ["x", *writer.inputs], "acc", writer.body, list(writer.attributes), DOC[writer.form]
    ), writer
