"""Writing ONNX nodes: `Body` collects them, `Int` is an integer tensor whose operators add to a
body.

`Int` carries a proven interval, so that `rqtool.hardware.adc` and the requantisation can be run on
it and the nodes that come out cannot overflow: int32 where every intermediate value fits, int64
where it does not.

    Python              nodes
    x + y, x - y, x * y Add, Sub, Mul
    x >> s              Add 2**30, Div by 2**s, Sub 2**(30-s)    Div truncates towards zero: floor needs a positive dividend
    1 << s              BitShift (on uint32 or uint64: there is no signed one)
    x >= t              GreaterOrEqual, Cast
    x.clip(lo, hi)      Clip in int32, in float64 where that does not hold x (int64 Clip is wrong near 2**31 in some runtimes)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

DOMAIN = "ai.rqtool"
DOMAIN_VERSION = 1
OPSET = 21
IR_VERSION = 10

INT32 = (-(1 << 31), (1 << 31) - 1)
FLOOR_OFFSET = {False: 30, True: 62}  # int32, int64: 2**offset makes every dividend positive
DTYPES = {
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float32": TensorProto.FLOAT,
}


@dataclass(frozen=True)
class Ref:
    """The attribute `name` of the function that is being written."""

    name: str
    kind: int = AttributeProto.INT


class Body:
    """Nodes under construction, of a function or of the main graph; every value gets a fresh
    readable name.

    prefix: begins the names, to keep those of the main graph apart. given: names that are inputs or
    outputs already.
    """

    def __init__(self, prefix: str = "", given: Iterable[str] = ()):
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self._taken = Counter(given)
        self._constants: dict[Any, str] = {}

    def fresh(self, hint: str) -> str:
        """A name nobody has: the hint itself, then hint_2, hint_3..."""
        self._taken[hint] += 1
        count = self._taken[hint]
        return f"{self.prefix}{hint}" + (f"_{count}" if count > 1 else "")

    def node(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Add one standard node; the name of its output is made from `out` (default: the operator)."""
        output = self.fresh(out or op.lower())
        self.append(op, inputs, output, **attributes)
        return output

    def append(
        self,
        op: str,
        inputs: tuple[str, ...],
        output: str,
        domain: str | None = None,
        **attributes: Any,
    ) -> NodeProto:
        """Add one node whose output has a given name; attributes that are `Ref` refer to the
        function's own."""
        plain = {k: v for k, v in attributes.items() if not isinstance(v, Ref)}
        node = helper.make_node(op, inputs, [output], domain=domain, **plain)
        node.attribute.extend(
            AttributeProto(name=k, ref_attr_name=v.name, type=v.kind)
            for k, v in attributes.items()
            if isinstance(v, Ref)
        )
        self.nodes.append(node)
        return node

    def const(self, value: Any, dtype: Any = np.int32) -> str:
        """A Constant node, written once per value; scalars are named after it."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            hint = (
                f"c{array.item():g}_{array.dtype}".replace("-", "m") if array.ndim == 0 else "const"
            )
            self._constants[key] = self.node(
                "Constant", out=hint, value=numpy_helper.from_array(array)
            )
        return self._constants[key]

    def attribute(self, name: str, dtype: int, out: str | None = None) -> str:
        """The scalar value of an integer attribute of this function, as a tensor of the ONNX type
        `dtype`."""
        key = ("attribute", name, dtype)
        if key not in self._constants:
            wide = self.node("Constant", out=f"{name}_i64", value_int=Ref(name))
            self._constants[key] = self.node("Cast", wide, to=dtype, out=out or name)
        return self._constants[key]

    def shape(self, name: str) -> str:
        """An integer-list attribute of this function, as an int64 tensor."""
        return self.node("Constant", out=name, value_ints=Ref(name, AttributeProto.INTS))

    def cast(self, x: str, dtype: int, out: str | None = None) -> str:
        return self.node("Cast", x, to=dtype, out=out)


@dataclass(frozen=True)
class Int:
    """An integer tensor in a body with lo <= every value <= hi; int32, or int64 when `wide`."""

    body: Body
    name: str
    lo: int
    hi: int
    wide: bool = False

    def __add__(self, other: Any) -> Int:
        o = self._other(other)
        return self._binary("Add", o, self.lo + o.lo, self.hi + o.hi)

    def __sub__(self, other: Any) -> Int:
        o = self._other(other)
        return self._binary("Sub", o, self.lo - o.hi, self.hi - o.lo)

    def __mul__(self, other: Any) -> Int:
        if isinstance(other, int) and other == 1:
            return self
        o = self._other(other)
        ends = [a * b for a in (self.lo, self.hi) for b in (o.lo, o.hi)]
        return self._binary("Mul", o, min(ends), max(ends))

    def __radd__(self, other: int) -> Int:
        return self if other == 0 else self + other

    __rmul__ = __mul__

    def __rlshift__(self, one: int) -> Int:
        wide = one << self.hi > INT32[1]
        base = self.body.const(one, np.uint64 if wide else np.uint32)
        by = self.body.cast(self.name, TensorProto.UINT64 if wide else TensorProto.UINT32)
        shifted = self.body.node("BitShift", base, by, direction="LEFT")
        power = self.body.cast(
            shifted, TensorProto.INT64 if wide else TensorProto.INT32, out="power"
        )
        return Int(self.body, power, one << self.lo, one << self.hi, wide)

    def __rshift__(self, shift: Any) -> Int:
        power = 1 << self._other(shift)
        wide = (
            self.wide
            or not -(1 << FLOOR_OFFSET[False]) <= self.lo <= self.hi < 1 << FLOOR_OFFSET[False]
        )
        x, power = self._as(wide), power._as(wide)
        offset = x._other(1 << FLOOR_OFFSET[wide])._as(wide)
        positive = self.body.node("Add", x.name, offset.name)
        quotient = self.body.node("Div", positive, power.name)
        back = self.body.node("Div", offset.name, power.name)
        floor = self.body.node("Sub", quotient, back, out="floor")
        return Int(self.body, floor, self.lo // power.lo, self.hi // power.lo, wide)

    def __ge__(self, other: Any) -> Int:
        o = self._other(other)
        wide = self.wide or o.wide
        truth = self.body.node("GreaterOrEqual", self._as(wide).name, o._as(wide).name)
        return Int(self.body, self.body.cast(truth, TensorProto.INT32, out="passed"), 0, 1)

    def clip(self, lo: Any, hi: Any) -> Int:
        lo, hi = self._other(lo), self._other(hi)
        bounds = min(max(self.lo, lo.lo), hi.hi), max(min(self.hi, hi.hi), lo.lo)
        if INT32[0] <= self.lo <= self.hi <= INT32[1]:
            return Int(
                self.body, self.body.node("Clip", self._as(False).name, lo.name, hi.name), *bounds
            )
        assert -(1 << 53) <= self.lo <= self.hi <= 1 << 53, (
            f"{self.name} in {self.lo}..{self.hi} does not fit float64"
        )
        reals = [self.body.cast(n.name, TensorProto.DOUBLE) for n in (self, lo, hi)]
        return Int(
            self.body, self.body.cast(self.body.node("Clip", *reals), TensorProto.INT32), *bounds
        )

    # -- helpers -----------------------------------------------------------------------------------
    def _other(self, other: Any) -> Int:
        if isinstance(other, Int):
            return other
        wide = not INT32[0] <= other <= INT32[1]
        return Int(
            self.body, self.body.const(other, np.int64 if wide else np.int32), other, other, wide
        )

    def _as(self, wide: bool) -> Int:
        if self.wide == wide:
            return self
        assert wide or INT32[0] <= self.lo <= self.hi <= INT32[1], (
            f"{self.name} in {self.lo}..{self.hi} does not fit int32"
        )
        return Int(
            self.body,
            self.body.cast(self.name, TensorProto.INT64 if wide else TensorProto.INT32),
            self.lo,
            self.hi,
            wide,
        )

    def _binary(self, op: str, other: Int, lo: int, hi: int) -> Int:
        wide = self.wide or other.wide or lo < INT32[0] or hi > INT32[1]
        name = self.body.node(op, self._as(wide).name, other._as(wide).name)
        return Int(self.body, name, lo, hi, wide)


class Library:
    """The model-local functions of one file: equal bodies share a name, different ones under the
    same name are numbered."""

    def __init__(self) -> None:
        self.functions: dict[str, FunctionProto] = {}

    def intern(
        self, name: str, inputs: list[str], output: str, body: Body, attributes: list[str], doc: str
    ) -> str:
        """The name under which this function now exists: `name`, or name_2, name_3... where another
        body has it."""
        opsets = [helper.make_opsetid("", OPSET)]
        count = 1
        while True:
            unique = name if count == 1 else f"{name}_{count}"
            made = helper.make_function(
                DOMAIN, unique, inputs, [output], body.nodes, opsets, attributes
            )
            made.doc_string = doc
            known = self.functions.setdefault(unique, made)
            if known.SerializeToString(deterministic=True) == made.SerializeToString(
                deterministic=True
            ):
                return unique
            count += 1
