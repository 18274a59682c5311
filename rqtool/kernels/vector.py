"""Sixteen lanes at a time: what kernels/cpu.py needs of LLVM, as numba intrinsics written in
Python.

An emitted function is called from compiled numba code with plain numbers, most of them addresses in
bytes. Its body runs once, when it is compiled: Python loops are unrolled, `Emitter.times` is a loop
of the machine. Vectors have 16 lanes of 32 bits (or 32 of 16) on every processor; LLVM splits them
where registers are narrower. Only `dot8` needs instructions of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

LANES = 16
BYTES = 64  # of a vector
F32, I64, I32, I16, I8 = (
    ir.FloatType(),
    ir.IntType(64),
    ir.IntType(32),
    ir.IntType(16),
    ir.IntType(8),
)
F32S, I32S = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
DOT8_FEATURES = ("avx512vnni", "avx512bw")


def has_dot8() -> bool:
    """Whether numba compiles for a processor that multiplies and adds four bytes at once on 512-bit
    vectors (x86 AVX512-VNNI)."""
    if (
        config.CPU_NAME or config.CPU_FEATURES is not None
    ):  # somebody asked numba for another processor than this one
        return False
    features = get_host_cpu_features()
    return all(features.get(name, False) for name in DOT8_FEATURES)


DOT8 = has_dot8()


class Emitter:
    """Writes LLVM at the place where an emitted function is called. Addresses are i64 values, in
    bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    # -- addresses and memory ----------------------------------------------------------------------
    def whole(self, n: int | ir.Value) -> ir.Value:
        return I64(n) if isinstance(n, int) else n

    def at(self, base: ir.Value, *terms: int | ir.Value | tuple) -> ir.Value:
        """base + sum of the terms; a tuple is the product of two numbers."""
        for term in terms:
            offset = (
                self.b.mul(self.whole(term[0]), self.whole(term[1]))
                if isinstance(term, tuple)
                else self.whole(term)
            )
            base = self.b.add(base, offset)
        return base

    def load(self, address: ir.Value, kind: ir.Type, lanes: int = 0, align: int = 4) -> ir.Value:
        """A scalar, or a vector where `lanes` is given."""
        kind = ir.VectorType(kind, lanes) if lanes else kind
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: ir.Value, address: ir.Value, align: int = 4) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def add_to(self, address: ir.Value, value: ir.Value) -> None:
        """memory[address] += value."""
        whole = isinstance(value.type.element, ir.IntType)
        old = self.load(address, value.type.element, value.type.count)
        self.store(self.b.add(old, value) if whole else self.b.fadd(old, value), address)

    def variable(self, value: ir.Value) -> ir.Value:
        """A place that LLVM keeps in a register; see `get` and `put`."""
        place = cgutils.alloca_once(self.b, value.type)
        self.b.store(value, place)
        return place

    def get(self, place: ir.Value) -> ir.Value:
        return self.b.load(place)

    def put(self, value: ir.Value, place: ir.Value) -> None:
        self.b.store(value, place)

    @contextmanager
    def times(self, count: int | ir.Value) -> Iterator[ir.Value]:
        """A loop; gives the index."""
        with cgutils.for_range(self.b, self.whole(count)) as loop:
            yield loop.index

    # -- vectors -----------------------------------------------------------------------------------
    def constant(self, kind: ir.Type, value: float, lanes: int = LANES) -> ir.Constant:
        return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)

    def splat(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        kind = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle(one, one, [0] * lanes)

    def shuffle(self, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
        """The lanes of a, then b, picked by `order`."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))

    def call(self, name: str, *args: ir.Value, result: ir.Type | None = None) -> ir.Value:
        """An LLVM intrinsic."""
        kind = ir.FunctionType(result or args[0].type, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once."""
        return self.call("llvm.fma.v16f32", a, b, c)

    def floor(self, a: ir.Value) -> ir.Value:
        return self.call("llvm.floor.v16f32", a)

    def clamp(self, a: ir.Value, lo: ir.Value, hi: ir.Value) -> ir.Value:
        a = self.b.select(self.b.fcmp_ordered(">", a, lo), a, lo)
        return self.b.select(self.b.fcmp_ordered("<", a, hi), a, hi)

    def clamp16(self, a: ir.Value, lo: ir.Value, hi: ir.Value) -> ir.Value:
        """The same on 32 lanes of 16 bits."""
        return self.call("llvm.smax.v32i16", self.call("llvm.smin.v32i16", a, hi), lo)

    def gather(self, base: ir.Value, index: ir.Value) -> ir.Value:
        """float32 lanes memory[base + 4 * index], index int32."""
        wide = self.b.add(
            self.splat(base),
            self.b.shl(self.b.sext(index, ir.VectorType(I64, LANES)), self.constant(I64, 2)),
        )
        pointers = self.b.inttoptr(wide, ir.VectorType(F32.as_pointer(), LANES))
        everywhere, nothing = self.constant(ir.IntType(1), 1), self.constant(F32, 0.0)
        return self.call(
            "llvm.masked.gather.v16f32.v16p0",
            pointers,
            I32(4),
            everywhere,
            nothing,
            result=nothing.type,
        )

    def numbers(self) -> ir.Constant:
        """int32 0 .. 15."""
        return ir.Constant(I32S, list(range(LANES)))

    def masked_load(self, address: ir.Value, mask: ir.Value) -> ir.Value:
        """float32 lanes, 0 where the mask is."""
        return self.call(
            "llvm.masked.load.v16f32.p0",
            self.b.inttoptr(address, F32S.as_pointer()),
            I32(4),
            mask,
            self.constant(F32, 0.0),
            result=F32S,
        )

    def masked_store(self, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
        self.call(
            "llvm.masked.store.v16f32.p0",
            value,
            self.b.inttoptr(address, F32S.as_pointer()),
            I32(4),
            mask,
            result=ir.VoidType(),
        )

    def sum_lanes(self, vectors: list[ir.Value]) -> ir.Value:
        """One vector whose lane n is the sum over all lanes of vectors[n] (at most 16), always
        added in the same order."""
        width, parts = LANES, [*vectors, *[None] * (LANES - len(vectors))]
        while width > 1:
            width //= 2
            parts = [self._halved(a, b, width) for a, b in zip(parts[::2], parts[1::2])]
        return parts[0]

    def _halved(self, a: ir.Value | None, b: ir.Value | None, width: int) -> ir.Value | None:
        """Neighbouring runs of `width` lanes added, those of a first, then those of b."""
        if a is None:
            return None
        low = [n for n in range(2 * LANES) if n // width % 2 == 0]
        b = a if b is None else b
        return self.b.fadd(self.shuffle(a, b, low), self.shuffle(a, b, [n + width for n in low]))

    # -- 8-bit dot products ------------------------------------------------------------------------
    def dot8(self, total: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
        """total + sum over the four bytes of each lane of x (unsigned) * w (signed); all int32."""
        if not DOT8:
            return total  # never called: kernels/cpu.py asks has_dot8 first
        as_bytes = ir.VectorType(I8, BYTES)
        return self.call(
            "llvm.x86.avx512.vpdpbusd.512",
            total,
            self.b.bitcast(x, as_bytes),
            self.b.bitcast(w, as_bytes),
        )

    def pack16(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Two int32 vectors as 32 lanes of 16 bits, saturated; see PACKED for their order."""
        if not DOT8:
            return self.constant(I16, 0, 2 * LANES)
        return self.call("llvm.x86.avx512.packssdw.512", a, b, result=ir.VectorType(I16, 2 * LANES))

    def scale15(self, a: ir.Value, mult: ir.Value) -> ir.Value:
        """(a * mult + 2**14) >> 15 on 32 lanes of 16 bits."""
        return self.call("llvm.x86.avx512.pmul.hr.sw.512", a, mult) if DOT8 else a

    def pick16(self, table: ir.Value, index: ir.Value) -> ir.Value:
        """table[index] on 32 lanes of 16 bits."""
        return self.call("llvm.x86.avx512.permvar.hi.512", table, index) if DOT8 else table


PACKED = [
    16 * (n // 4 % 2) + 4 * (n // 8) + n % 4 for n in range(32)
]  # which of a, b's 32 lanes is in lane n of pack16


def emitted(body: Callable) -> Callable:
    """A body (emitter, *values) as a function that numba code can call with whole numbers; it
    returns nothing."""
    names = ["typingctx", *list(inspect.signature(body).parameters)[1:]]
    signature = types.void(*(types.int64,) * (len(names) - 1))

    def codegen(context, builder, sig, values):
        body(Emitter(builder), *values)
        return context.get_dummy_value()

    def typer(typingctx, *given):
        return signature, codegen

    typer.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    )
    typer.__name__, typer.__doc__, typer.__module__ = body.__name__, body.__doc__, body.__module__
    return intrinsic(typer)


def one_of(bodies: Sequence[Callable]) -> Callable:
    """Bodies with the same arguments as one, whose first argument says which of them runs."""

    def pick(e: Emitter, form, *values):
        end = e.b.append_basic_block("end")
        switch = e.b.switch(form, end)
        for n, body in enumerate(bodies):
            switch.add_case(I64(n), e.b.append_basic_block(f"form{n}"))
            e.b.position_at_end(switch.cases[n][1])
            body(e, *values)
            e.b.branch(end)
        e.b.position_at_end(end)

    first = inspect.signature(bodies[0])
    form = inspect.Parameter("form", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    emitter, *others = first.parameters.values()
    pick.__signature__ = first.replace(parameters=[emitter, form, *others])
    pick.__name__, pick.__doc__, pick.__module__ = (
        bodies[0].__name__,
        bodies[0].__doc__,
        bodies[0].__module__,
    )
    return pick
