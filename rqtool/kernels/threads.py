"""Compiled work on several threads: torch's own OpenMP threads where they can be had, for two pools
on the same cores wait for each other.

After a parallel operation torch's threads stay awake for some milliseconds and keep their cores.
Work on another pool starts behind them; work on the same threads starts at once. A team is called
from compiled code and runs compiled code, so that no thread ever waits for Python's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import typeof, types
from numba.core import cgutils
from numba.extending import intrinsic

from rqtool.kernels.compiled import compiled, inlined
from rqtool.kernels.strips import BLOCK


@lru_cache(maxsize=1)
def openmp() -> int:
    """The address of GNU OpenMP's `GOMP_parallel` in this process, or 0; torch loads it on Linux."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (
        OSError,
        AttributeError,
        TypeError,
    ):  # another OpenMP, none at all, or a system without a process-wide namespace
        return 0


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rqtool-reads")


def chunks(images: int, positions: int, most: int) -> np.ndarray:
    """int64 [chunks + 1]: the images at which up to `most` chunks begin and end, none of less than
    a block."""
    count = max(1, min(most, images, images * positions // BLOCK))
    return images * np.arange(count + 1) // count


def on_threads(share: Callable, arguments: tuple, threads: int) -> None:
    """Run share(*arguments), compiled, on so many threads at once; it divides the work by
    `next_turn`, and must not raise.

    arguments: arrays, tuples of arrays or of numbers, numbers.
    """
    code = _machine_code(share, arguments)
    if threads > 1 and not openmp():
        list(_pool(threads).map(lambda _: _team(0, 1, code, arguments), range(threads)))
    else:
        _team(openmp(), threads, code, arguments)


_CODES: dict[tuple, int] = {}


def _kind(a: Any) -> Any:
    """What machine code for an argument depends on."""
    if isinstance(a, np.ndarray):
        return a.dtype, a.ndim, a.flags.c_contiguous
    return tuple(map(_kind, a)) if isinstance(a, tuple) else type(a)


def _machine_code(share: Callable, arguments: tuple) -> int:
    """The address of a compiled function for arguments like these. It is called by address, because
    numba would compile everything that a function calls by name once more, with that function."""
    key = share, _kind(arguments)
    if key not in _CODES:
        kinds = tuple(map(typeof, arguments))
        share.compile(kinds)
        made = share.overloads[kinds]
        _CODES[key] = made.library.get_pointer_to_function(made.fndesc.llvm_func_name)
    return _CODES[key]


@intrinsic
def _take(typing, address):
    """The int64 at an address, which is one more afterwards; no two threads get the same."""

    def emit(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(types.intp), emit


@inlined
def next_turn(counter):
    """A number that no other thread gets, from 0 upwards. counter: int64 [1] at 0, one for all
    threads. (A generator would read better, but numba cannot compile a caller of one that came from
    the cache.)"""
    return _take(counter.ctypes.data)


@intrinsic
def _together(typing, address, threads, code, arguments):
    """Call the compiled function at `code` with a tuple of arguments on so many threads of
    `GOMP_parallel` at `address`, and wait for all."""

    def emit(context, builder, _, args):
        pointer, i32, convention = cgutils.voidptr_t, ir.IntType(32), context.call_conv
        tuple_at, code_at = (cgutils.alloca_once_value(builder, args[n]) for n in (3, 2))
        both = cgutils.pack_struct(builder, [tuple_at, code_at])
        body = ir.Function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer]),
            builder.module.get_unique_name(f"{builder.function.name}.share"),
        )
        body.linkage = "internal"
        inside = ir.IRBuilder(body.append_basic_block())
        given_at, code_at = cgutils.unpack_tuple(
            inside, inside.load(inside.bitcast(body.args[0], both.type.as_pointer()))
        )
        kind = convention.get_function_type(types.none, arguments.types)
        share = inside.inttoptr(inside.load(code_at), kind.as_pointer())
        convention.call_function(
            inside,
            share,
            types.none,
            arguments.types,
            cgutils.unpack_tuple(inside, inside.load(given_at)),
        )
        inside.ret_void()
        start = builder.inttoptr(
            args[0], ir.FunctionType(ir.VoidType(), [body.type, pointer, i32, i32]).as_pointer()
        )
        shared = builder.bitcast(cgutils.alloca_once_value(builder, both), pointer)
        with builder.if_else(builder.icmp_signed("<=", args[1], args[1].type(1))) as (
            alone,
            together,
        ):
            with alone:
                builder.call(body, [shared])
            with together:
                builder.call(start, [body, shared, builder.trunc(args[1], i32), i32(0)])
        return context.get_dummy_value()

    return types.void(address, threads, code, arguments), emit


@compiled
def _team(address, threads, code, arguments):
    _together(address, threads, code, arguments)
