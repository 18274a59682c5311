"""Chunks on threads: torch's own OpenMP threads where they can be had, for two pools on the same cores wait for each other.

After a parallel operation torch's threads stay awake for some milliseconds and keep their cores. Work on another pool starts behind them; work on
the same threads starts at once.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def openmp() -> Callable | None:
    """GNU OpenMP's `GOMP_parallel` as this process has it loaded, or None; torch loads it on Linux."""
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):  # another OpenMP, none at all, or a system without a process-wide namespace
        return None


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rqtool-reads")


def each(task: Callable[[Any], Any], jobs: list, threads: int) -> list:
    """[task(job) for job in jobs] on up to `threads` threads; the task should let go of Python's lock. Raises what a task raised first."""
    if threads == 1 or len(jobs) < 2:
        return [task(job) for job in jobs]
    return list(_pool(threads).map(task, jobs)) if openmp() is None else _on_openmp(task, jobs, threads)


def _on_openmp(task: Callable[[Any], Any], jobs: list, threads: int) -> list:
    results, errors, turns = [None] * len(jobs), [], itertools.count()

    def work(_: int | None) -> None:
        while (turn := next(turns)) < len(jobs) and not errors:
            try:
                results[turn] = task(jobs[turn])
            except BaseException as e:  # none may cross the foreign stack between here and `each`
                errors.append(e)

    openmp()(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work), None, ctypes.c_uint(threads), ctypes.c_uint(0))
    if errors:
        raise errors[0]
    return results
