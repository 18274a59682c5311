"""numba.njit for this folder, with a cache that survives between runs and never survives a change."""

from __future__ import annotations

from pathlib import Path

from numba import njit

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.py")))
_FAST = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def compiled(function):
    """numba.njit, with a cache that is made anew when a file of this folder changes: numba itself
    watches only the function's own, and most of the code here is emitted by others."""
    try:
        made = njit(cache=True, **_FAST)(function)
    except RuntimeError:  # no folder to keep compiled code in
        return njit(**_FAST)(function)
    stamps = tuple(path.stat() for path in SOURCES)
    made._cache._cache_file._source_stamp = tuple(
        n for s in stamps for n in (s.st_mtime, s.st_size)
    )
    return made


def inlined(function):
    """For a function that is a part of one compiled function and is not compiled by itself."""
    return njit(inline="always", **_FAST)(function)
