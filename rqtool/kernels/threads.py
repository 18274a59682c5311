"""Compiled work on several threads: torch's own OpenMP threads where they can be had, for two pools on the same cores wait for each other.

After a parallel operation torch's threads stay awake for some milliseconds and keep their cores. Work on another pool starts behind them; work on
the same threads starts at once. A team is called from compiled code and runs compiled code, so that no thread ever waits for Python's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rqtool.kernels.strips import BLOCK


@lru_cache(maxsize=1)
def openmp() -> int:
    """The address of GNU OpenMP's `GOMP_parallel` in this process, or 0; torch loads it on Linux."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):  # another OpenMP, none at all, or a system without a process-wide namespace
        return 0


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rqtool-reads")


def chunks(images: int, positions: int, most: int) -> np.ndarray:
    """int64 [chunks + 1]: the images at which up to `most` chunks begin and end, none of less than a block."""
    count = max(1, min(most, images, images * positions // BLOCK))
    return images * np.arange(count + 1) // count


def on_threads(region: Callable, arguments: tuple, threads: int) -> None:
    """Call region(address, threads, arguments), compiled and without Python's lock, which calls `team` with a share that divides the work by
    `next_turn`; without OpenMP, on threads of our own."""
    if threads > 1 and not openmp():
        list(_pool(threads).map(lambda _: region(0, 1, arguments), range(threads)))
    else:
        region(openmp(), threads, arguments)


@intrinsic
def next_turn(typing, address):
    """The int64 at an address, which is one more afterwards; no two threads get the same."""

    def emit(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(types.intp), emit


@intrinsic
def team(typing, address, threads, share, arguments):
    """Call the compiled function `share` with a tuple of arguments on so many threads, and wait for all; it must not raise.

    address: of `GOMP_parallel`; it is not used for one thread.
    """
    signature = share.get_call_type(typing, arguments.types, {})

    def emit(context, builder, _, args):
        pointer, i32 = cgutils.voidptr_t, ir.IntType(32)
        body = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [pointer]), builder.module.get_unique_name(f"{builder.function.name}.share"))
        body.linkage = "internal"
        inside = ir.IRBuilder(body.append_basic_block())
        given = inside.load(inside.bitcast(body.args[0], args[3].type.as_pointer()))
        made = share.dispatcher.overloads[signature.args]
        context.active_code_library.add_linking_library(made.library)
        context.call_internal_no_propagate(inside, made.fndesc, signature, cgutils.unpack_tuple(inside, given))
        inside.ret_void()
        start = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [body.type, pointer, i32, i32]).as_pointer())
        shared = builder.bitcast(cgutils.alloca_once_value(builder, args[3]), pointer)
        with builder.if_else(builder.icmp_signed("<=", args[1], args[1].type(1))) as (alone, together):
            with alone:
                builder.call(body, [shared])
            with together:
                builder.call(start, [body, shared, builder.trunc(args[1], i32), i32(0)])
        return context.get_dummy_value()

    return types.void(address, threads, share, arguments), emit
