"""A plot of lines as SVG text, without a library: each line a mean with its range. Equal numbers
give equal text."""

from __future__ import annotations

from math import ceil, floor
from statistics import mean
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 250, 44, 52
COLOURS = ("#1b6ca8", "#c0392b", "#1e8449", "#8e44ad", "#444444", "#b9770e")
STYLE = (
    "text{font:12px sans-serif;fill:#222}.title{font-size:15px}.grid{stroke:#ddd}.axis{stroke:#222}"
)

Lines = dict[str, dict[int, list[float]]]


def lines_svg(title: str, across: str, up: str, lines: Lines) -> str:
    """SVG text. lines: by name, the values found at each whole number of the horizontal axis; there
    is at least one."""
    points = [(x, v) for line in lines.values() for x, found in line.items() for v in found]
    page = Page(sorted({x for x, _ in points}), *nice_ends([v for _, v in points]))
    parts = [
        part for n, (name, line) in enumerate(lines.items()) for part in drawn(page, n, name, line)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
        f'height="{HEIGHT}" viewBox="0 0 {WIDTH} '
        f'{HEIGHT}"><style>{STYLE}</style>'
    )
    words = [
        text(LEFT, 24, title, kind="title"),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across, "middle"),
    ]
    words.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) '
        f'rotate(-90)" text-anchor="middle">{escape(up)}</text>'
    )
    return (
        "\n".join(
            [
                head,
                f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
                *page.frame(),
                *parts,
                *words,
                "</svg>",
            ]
        )
        + "\n"
    )


def nice_ends(values: list[float]) -> tuple[float, float, float]:
    """(lowest, highest, distance) of the marks of an axis that holds the values: five to twelve
    round ones.

    >>> nice_ends([88.2, 92.1]), nice_ends([21.6, 87.9]), nice_ends([5, 9])
    ((88.0, 92.5, 0.5), (20, 90, 10), (5.0, 9.0, 0.5))
    """
    low, high = min(values), max(max(values), min(values) + 0.1)
    unit = next(
        u for n in range(-3, 6) for u in (10**n, 2 * 10**n, 5 * 10**n) if (high - low) / u <= 10
    )
    return floor(low / unit) * unit, ceil(high / unit) * unit, unit


class Page:
    """Where numbers are on the page, in pixels."""

    def __init__(self, across: list[int], low: float, high: float, unit: float) -> None:
        self.across, self.low, self.high, self.unit = across, low, high, unit

    def x(self, value: int) -> float:
        share = (value - self.across[0] + 0.5) / (self.across[-1] - self.across[0] + 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return (
            HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)
        )

    def frame(self) -> list[str]:
        """Grid lines, the axis, and their figures."""
        marks = [
            self.low + n * self.unit for n in range(round((self.high - self.low) / self.unit) + 1)
        ]
        found = [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
            f'y1="{self.y(m):.1f}" y2="{self.y(m):.1f}"/>'
            for m in marks
        ]
        found += [text(LEFT - 6, self.y(m) + 4, f"{m:g}", "end") for m in marks]
        found += [text(self.x(v), HEIGHT - BOTTOM + 19, str(v), "middle") for v in self.across]
        return [
            *found,
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
            f'y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
        ]


def drawn(page: Page, number: int, name: str, line: dict[int, list[float]]) -> list[str]:
    """A line through the means, a bar over the range at each, and the name at the right."""
    colour, at = COLOURS[number % len(COLOURS)], sorted(line)
    path = " ".join(f"{page.x(x):.1f},{page.y(mean(line[x])):.1f}" for x in at)
    found = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x in at:
        here = f"{page.x(x):.1f}"
        found.append(
            f'<line x1="{here}" x2="{here}" y1="{page.y(min(line[x])):.1f}" '
            f'y2="{page.y(max(line[x])):.1f}" stroke="{colour}" stroke-width="4" '
            'stroke-opacity=".4"/>'
        )
        found.append(
            f'<circle cx="{here}" cy="{page.y(mean(line[x])):.1f}" r="3.5" fill="{colour}"/>'
        )
    y = TOP + 12 + 20 * number
    found.append(
        f'<line x1="{WIDTH - RIGHT + 14}" x2="{WIDTH - RIGHT + 34}" y1="{y}" '
        f'y2="{y}" stroke="{colour}" stroke-width="3"/>'
    )
    return [*found, text(WIDTH - RIGHT + 40, y + 4, name)]


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
