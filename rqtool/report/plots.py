"""Histograms of partial sums as SVG: how often each sum occurs (log scale), the ADC's thresholds,
and full scale. Text, no library."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from rqtool.errors import ConfigError, StorageError, escaped
from rqtool.storage import check_writable

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 66, 52  # margins, with the words in them
BARS = 640  # partial sums are merged beyond this many
FLOOR = 0.5  # counts begin here, so that a single one can be seen
TITLE = 70  # characters of a layer's name
STYLE = (
    "text{font:12px "
    "sans-serif;fill:#222}.title{font-size:15px}.counts{fill:#7a9cc6}.axis{stroke:#222}.grid{stroke:#ddd}"
    ".threshold{stroke:#c0392b;stroke-width:1}.full-scale{stroke:#1e8449;stroke-width:2;stroke-dasharray:6 4}"
)


def plot_files(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """The file of each layer in `folder`, which is made; names that a file cannot have are made
    safe, and numbers keep them apart.

    Raises ConfigError where one exists already, StorageError where the folder cannot be made or
    takes no file.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise StorageError(
            f"{escaped(folder)}: cannot be made a folder "
            f"({escaped(getattr(e, 'strerror', e))}); give another --plots"
        ) from e
    files = [
        folder / f"{number:02d}-{re.sub('[^A-Za-z0-9_.-]', '_', name)[:40]}.svg"
        for number, name in enumerate(names)
    ]
    for file in files:
        if file.exists():
            raise ConfigError(
                f"{escaped(file)}: exists already; move it away or give another --plots"
            )
        check_writable(file, option="--plots")
    return files


def histogram_svg(
    name: str,
    counts: np.ndarray,
    p_min: int,
    thresholds: Sequence[int],
    full_scale: tuple[int, int],
    note: str = "",
) -> str:
    """One plot as SVG text, from the smallest to the largest partial sum that occurs. Equal data
    gives equal text.

    counts: int64 [P], how often p_min, p_min + 1, ... occur; thresholds: ascending partial sums,
    drawn where they are in sight; full_scale: (lowest, highest) partial sum that does not clip;
    note: a line below the title.
    """
    used = np.flatnonzero(counts) if counts.any() else np.array([-p_min])
    lo, hi = int(used[0]) + p_min, int(used[-1]) + p_min
    axes = Axes(lo, hi, int(counts.max()))
    bars = _bars(counts[lo - p_min : hi - p_min + 1], lo, axes)
    inside = [t for t in thresholds if lo <= t <= hi]
    lines = [_vertical(axes.x(t - 0.5), "threshold") for t in inside]
    ends = [
        _vertical(axes.x(p), "full-scale")
        for p in (full_scale[0] - 0.5, full_scale[1] + 0.5)
        if lo - 0.5 <= p <= hi + 0.5
    ]
    words = [
        _text(LEFT, 24, _short(escaped(name)), "title"),
        _text(LEFT, 42, note),
        _text(LEFT, 58, _legend(len(inside), len(thresholds), full_scale)),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
        f'height="{HEIGHT}" viewBox="0 0 {WIDTH} '
        f'{HEIGHT}"><style>{STYLE}</style>'
    )
    frame = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return (
        "\n".join(
            [head, frame, *_grid(axes), bars, *lines, *ends, *_labels(axes), *words, "</svg>"]
        )
        + "\n"
    )


class Axes:
    """Where partial sums lo .. hi and counts up to `most` are on the page, in pixels."""

    def __init__(self, lo: int, hi: int, most: int) -> None:
        self.lo, self.hi, self.decades = lo, hi, max(1, math.ceil(math.log10(max(1, most))))
        self.base = math.log10(FLOOR)

    def x(self, p: float) -> float:
        return LEFT + (p - self.lo + 0.5) / (self.hi - self.lo + 1) * (WIDTH - LEFT - RIGHT)

    def y(self, count: float) -> float:
        share = (math.log10(max(FLOOR, count)) - self.base) / (self.decades - self.base)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _bars(counts: np.ndarray, lo: int, axes: Axes) -> str:
    """One path of all bars; where there are many sums, a bar stands for several and shows the
    largest of them."""
    width = -(-len(counts) // BARS)
    parts = []
    for at in range(0, len(counts), width):
        most, left = int(counts[at : at + width].max()), axes.x(lo + at - 0.5)
        if most:
            right = axes.x(lo + min(at + width, len(counts)) - 0.5)
            parts.append(
                f"M{left:.2f} {axes.y(0):.2f}V{axes.y(most):.2f}H{right:.2f}V{axes.y(0):.2f}Z"
            )
    return f'<path class="counts" d="{"".join(parts)}"/>'


def _vertical(x: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.2f}" x2="{x:.2f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _grid(axes: Axes) -> list[str]:
    """A line and a figure for each power of ten."""
    found = []
    for decade in range(axes.decades + 1):
        y = axes.y(10**decade)
        found.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>'
        )
        found.append(
            _text(LEFT - 6, y + 4, f"{10**decade:,}" if decade < 4 else f"1e{decade}", anchor="end")
        )
    return found


def _labels(axes: Axes) -> list[str]:
    """The horizontal axis with its figures, and what both axes are."""
    bottom = HEIGHT - BOTTOM
    ticks = _ticks(axes.lo, axes.hi)
    found = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    found += [
        f'<line class="axis" x1="{axes.x(p):.2f}" x2="{axes.x(p):.2f}" '
        f'y1="{bottom}" y2="{bottom + 5}"/>'
        for p in ticks
    ]
    found += [_text(axes.x(p), bottom + 19, str(p), anchor="middle") for p in ticks]
    found.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "partial sum", anchor="middle"))
    return [
        *found,
        f'<text transform="translate(16 {(TOP + bottom) / 2:.2f}) '
        'rotate(-90)" text-anchor="middle">reads (log scale)</text>',
    ]


def _ticks(lo: int, hi: int) -> list[int]:
    """Eleven round whole numbers at most, from lo to hi.

    >>> _ticks(-3, 3), _ticks(-480, 530), _ticks(4, 4)
    ([-3, -2, -1, 0, 1, 2, 3], [-400, -200, 0, 200, 400], [4])
    """
    unit = next(k * 10**n for n in range(20) for k in (1, 2, 5) if k * 10**n * 10 >= hi - lo)
    return list(range(-(-lo // unit) * unit, hi + 1, unit))


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(words)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= TITLE else name[: TITLE - 3] + "..."


def _legend(inside: int, thresholds: int, full_scale: tuple[int, int]) -> str:
    return (
        f"red: {inside} of {thresholds} thresholds in sight; green, dashed: "
        f"full scale, {full_scale[0]} to {full_scale[1]}"
    )
