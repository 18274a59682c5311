"""Every code of a partial sum through the very lines that the kernels run: what certification
compares (program/run.py)."""

from __future__ import annotations

import numpy as np

from rqtool.kernels import strips
from rqtool.kernels.compiled import compiled
from rqtool.kernels.layout import scratch
from rqtool.kernels.records import MOST15, SHIFT16, levels16
from rqtool.kernels.spec import ReadSpec
from rqtool.kernels.strips import ADC, ADC16
from rqtool.kernels.vector import DOT8, LANES


@compiled
def _convert(p, record, out):
    strips.convert(p.ctypes.data, p.size // LANES, record.ctypes.data, out.ctypes.data)


@compiled
def _convert16(p, record, out):
    strips.convert16(p.ctypes.data, p.size // LANES, record.ctypes.data, out.ctypes.data)


@compiled
def _convert_levels16(p, record, form, out):
    strips.convert_levels16(
        form, p.ctypes.data, p.size // LANES, record.ctypes.data, out.ctypes.data
    )


def codes(p: np.ndarray, rate: float, lo: float, hi: float) -> np.ndarray:
    """float32 code - zero of whole-number partial sums through the very lines the kernels run: what
    certification compares."""
    record = np.zeros(1, ADC)
    record["rate"], record["lo"], record["hi"] = rate, lo, hi
    return _through(_convert, p, record, np.float32)


def codes16(p: np.ndarray, mult: int, lo: int, hi: int) -> np.ndarray:
    """The same, int32, through the lines of the 16-bit form; for a shift of 15 and |p| < 2**15, on
    processors with 8-bit dot products."""
    record = np.zeros(1, ADC16)
    record["mult"], record["lo"], record["hi"] = mult, lo, hi
    return _through(_convert16, p, record, np.int32)


def every_code(p: np.ndarray, mult: int, shift: int, lo: int, hi: int) -> list[np.ndarray]:
    """code - zero of whole-number partial sums p, once by each form that a read with this
    multiplier may take on this processor."""
    found = [codes(p, mult / 2.0**shift, lo, hi)]
    if DOT8 and shift == SHIFT16 and np.abs(p).max() < MOST15:
        found.append(codes16(p, mult, lo, hi))
    return found


def every_level(p: np.ndarray, spec: ReadSpec) -> list[np.ndarray]:
    """The spec's values [rows, P] of whole-number partial sums p [P] through the 16-bit forms that
    may be taken."""
    found = levels16(spec) if DOT8 and np.abs(p).max() < MOST15 else []
    return [
        np.stack([_levels(p, form, records[n : n + 1]) for n in range(len(records))])
        for form, records in found
    ]


def _levels(p: np.ndarray, form: int, record: np.ndarray) -> np.ndarray:
    """int32 levels of partial sums p by one record [1]."""
    return _through(
        lambda p, record, out: _convert_levels16(p, record, form, out), p, record, np.int32
    )


def _through(convert, p: np.ndarray, record: np.ndarray, dtype: type) -> np.ndarray:
    padded = scratch((-(-p.size // LANES) * LANES,), dtype)
    padded[: p.size] = p
    out = np.empty_like(padded)
    convert(padded, record, out)
    return out[: p.size]
