"""The one definition of the ADC: from a partial sum to a code, and from a code to a value.

    code(p)  = the number of thresholds that are <= p
    value(c) = gain * (c - zero)      uniform levels
             = level[c]               free levels

The uniform ADC has an exact integer form. Its step is 2**S / M partial-sum units per code, M odd:

    code(p) = clamp(((p*M + 2**(S-1)) >> S) + zero, 0, top)

Glossary, with the default macro's figures (9 wordlines, 4-bit inputs and weights, 4-bit ADC):

    p       partial sum            -945 .. 945
    M       mult, odd              2**15 / 64 -> 513 (step 63.875...)
    S       shift                  15 ("Q15"), more only when |p| reaches 2**14
    zero    the code of p = 0      8
    top     the highest code       15

Truth table at mult 8191, shift 15 (step 4.0005), zero 2, top 3; no partial sum can ever be on a
tie, because M is odd:

    p     <=-7  -6..-3  -2..2  3.. (and all above)
    code    0      1      2      3

Every line below is written over operators, so the same lines run on Python ints, numpy arrays,
torch tensors and on the small class that prints ONNX nodes. Training, evaluation, the fast kernels'
certificates and the exported file all come here; no other module turns a partial sum into a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CODEBOOKS = ("twos", "sign-magnitude", "unsigned")
Q15 = 15  # the canonical shift: exact in 16-bit SIMD, in float32 and in ONNX
FLOAT32_BITS = 23  # S <= 23 - bits keeps the float32 form of a code exact
MAX_GAIN = 127  # a tile's integer gain has 7 bits
FREE_LEVEL_PEAK = 32767  # free levels are 16-bit integers


def clamp(x: Any, lo: Any, hi: Any) -> Any:
    """`x` held within lo..hi; works on ints and on anything that has `.clip`."""
    return x.clip(lo, hi) if hasattr(x, "clip") else max(lo, min(x, hi))


def top_code(bits: int, codebook: str) -> int:
    """The highest code: 2**bits - 1, one less for sign-magnitude (plus and minus zero are one
    code).

    >>> top_code(4, "twos"), top_code(4, "sign-magnitude")
    (15, 14)
    """
    return (1 << bits) - (2 if codebook == "sign-magnitude" else 1)


def default_zero(bits: int, codebook: str) -> int:
    """The code of p = 0 that the code book names.

    >>> [default_zero(4, book) for book in CODEBOOKS]
    [8, 7, 0]
    """
    return {"twos": 1 << (bits - 1), "sign-magnitude": (1 << (bits - 1)) - 1, "unsigned": 0}[
        codebook
    ]


def uniform_code(p: Any, mult: Any, shift: int, zero: Any, top: int) -> Any:
    """The code of each partial sum by the exact integer form; the type and shape of `p` broadcast
    with `mult` and `zero`.

    p, mult, zero: integers, or integer arrays (int32 holds p*mult when |p| < 2**14 and mult <
    2**15; else int64).

    >>> [uniform_code(p, 8191, 15, 2, 3) for p in (-99, -7, -6, -3, -2, 0, 2, 3, 99)]
    [0, 0, 1, 1, 2, 2, 2, 3, 3]
    """
    return clamp(((p * mult + (1 << (shift - 1))) >> shift) + zero, 0, top)


def uniform_code_float(p: Any, mult: Any, shift: int, zero: Any, top: int) -> Any:
    """The same code with `p` a float32 array of integers: what fast paths compute, exact where
    `float32_exact` holds.

    p and zero: float32 arrays of integers; mult: float32, so that mult / 2**shift is exact.
    """
    return clamp((p * (mult * 2.0**-shift) + 0.5) // 1 + zero, 0, top)


def float32_exact(p_bound: int, shift: int, bits: int) -> bool:
    """Whether float32 arithmetic gives every code of |p| <= p_bound exactly (design bound: |p| <
    2**(S-1), S <= 23 - bits)."""
    return p_bound < 1 << (shift - 1) and shift <= FLOAT32_BITS - bits


def threshold_code(p: Any, thresholds: Sequence[Any]) -> Any:
    """The code of each partial sum by counting: how many of the ascending integer `thresholds` are
    <= p; each is a whole number, or several that broadcast with `p` where columns have their own.

    >>> [threshold_code(p, (-6, -2, 3)) for p in (-7, -6, -3, -2, 2, 3)]
    [0, 1, 1, 2, 2, 3]
    """
    return sum((p >= t) * 1 for t in thresholds)


def uniform_value(code: Any, zero: Any, gain: Any = 1) -> Any:
    """What the digital side adds up for `code`: gain * (code - zero)."""
    return gain * (code - zero)


def level_value(code: Any, levels: Sequence[int]) -> Any:
    """level[code] for free levels, written as level[0] plus the increments the code has passed (so
    any carrier can do it)."""
    return int(levels[0]) + sum(
        (code >= j) * int(levels[j] - levels[j - 1]) for j in range(1, len(levels))
    )


def uniform_thresholds(mult: int, shift: int, zero: int, top: int) -> tuple[int, ...]:
    """The `top` ascending integers of a uniform ADC: entry j-1 is the smallest p whose code is at
    least j.

    >>> uniform_thresholds(8191, 15, 2, 3)
    (-6, -2, 3)
    """
    half = 1 << (shift - 1)
    return tuple(-((half - ((j - zero) << shift)) // mult) for j in range(1, top + 1))


def shift_for(p_bound: int) -> int:
    """The canonical shift of an array whose partial sums reach `p_bound`: Q15, or more where |p| <
    2**(S-1) needs it.

    >>> shift_for(945), shift_for(16383), shift_for(16384)
    (15, 15, 16)
    """
    return max(Q15, int(p_bound).bit_length() + 1)


def snap(step: Any, shift: int) -> Any:
    """The mult of the representable step next to `step`: the odd whole number nearest 2**shift /
    step, in 1..2**shift - 1.

    step: float or float64 array, in partial-sum units per code. The result has its type and holds
    whole numbers. Training calls this in its forward pass and freezing calls it once, so what is
    trained is what is served.

    >>> snap(1.0, 15), snap(64.0, 15), snap(2.5, 15)
    (32767.0, 513.0, 13107.0)
    """
    return clamp(2 * ((2.0**shift / step) // 2) + 1, 1.0, 2.0**shift - 1)


def full_scale_step(p_min: int, p_max: int, zero: int, top: int) -> float:
    """The smallest step (at least 1) at which the end codes still represent p_min and p_max.

    >>> full_scale_step(-945, 945, 8, 15)
    135.0
    """
    below = -p_min / zero if zero else 0.0
    above = p_max / (top - zero) if top > zero else 0.0
    return max(1.0, below, above)


def clip_bounds(thresholds: Sequence[int], step: float) -> tuple[int, int]:
    """The lowest and highest p that do not clip: half a step beyond them the end codes take
    everything.

    thresholds: as from `uniform_thresholds`. The end codes' own cells are one step wide by this
    convention.

    >>> clip_bounds((-6, -2, 3), 4.0)
    (-10, 6)
    """
    width = max(1, round(step))
    return int(thresholds[0]) - width, int(thresholds[-1]) + width - 1
