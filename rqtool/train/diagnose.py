"""Which layer's ADC costs the accuracy: what each ADC does to its reads, and what the network loses
to it.

    clip rate     share of the reads beyond full scale
    SQNR          10 log10(sum h p**2 / sum h (value(code(p)) - p)**2), over a histogram h of partial sums
    clip noise    share of that squared error which the reads beyond full scale make
    codes used    share of the codes that occur at all
    loss alone    top-1 with all ADCs ideal, less top-1 with only this one real
    regained      top-1 with only this one ideal, less top-1 with all ADCs real

The last two are differences on the same images, each with its paired standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rqtool.errors import escaped
from rqtool.mapping.plan import Plan
from rqtool.model.network import Network
from rqtool.train.finetune import Feed
from rqtool.train.histogram import tile_histograms
from rqtool.train.layers import ReadLayer
from rqtool.train.measure import hits, ideal_adcs, percent, watched
from rqtool.train.paired import Loss, paired
from rqtool.train.rewrite import read_layers

CLIPPED, CLIP_NOISE = (
    0.01,
    0.5,
)  # more reads beyond full scale, which make more of the error: the range is too small
BEYOND = 2.0  # paired standard errors: a layer that costs more than so many stands out
CULPRIT = {
    "loss_alone": "its ADC alone loses {points:.2f} points (standard error {se:.2f})",
    "regained": "{points:.2f} points (standard error {se:.2f}) come back when its "
    "ADC alone is ideal",
}
FEW_CODES = 0.5  # fewer of the codes in use than this: the range is too large
REASONS = {
    "range too small": "its range is too small",
    "range too large": "its range is too large",
    "resolution too low": "its range fits, but its resolution is too low",
}


# -- an ADC over every partial sum -----------------------------------------------------------------
@dataclass(frozen=True)
class Table:
    """What a layer's ADCs (G of them: one, or one for each column or tile) make of every partial
    sum p_min .. p_max.

    code: uint8 [G, P]; value: float64 [G, P], in partial-sum units; clipped: bool [G, P]; codes:
    how many each ADC has.
    """

    p: np.ndarray
    code: np.ndarray
    value: np.ndarray
    clipped: np.ndarray
    codes: int


def table(layer: ReadLayer) -> Table:
    """The ADCs of a layer, code by code from hardware/adc.py; the layer's ADC is not ideal."""
    macro, served = layer.plan.macro, layer.adc.snap()
    p = np.arange(macro.p_min, macro.p_max + 1)
    code = served.codes(macro.p_min, macro.p_max)
    value = np.take_along_axis(layer.adc.code_values(), code, 1)
    lo, hi = np.array(layer.adc.clip_bounds()).T[:, :, None]
    return Table(p, code.astype(np.uint8), value, (p < lo) | (p > hi), served.top + 1)


# -- what it does to its reads ---------------------------------------------------------------------
@dataclass(frozen=True)
class Reads:
    """Sums over some reads. signal, noise: of p**2 and of (value - p)**2; clip_noise: of the
    latter, beyond full scale; hit: bool [G, codes], which codes occurred."""

    count: int
    clipped: int
    signal: float
    noise: float
    clip_noise: float
    hit: np.ndarray

    def figures(self) -> dict[str, float | None]:
        """clip_rate, clip_noise and codes_used from 0 to 1; sqnr in dB; clip_noise and sqnr are
        None where no read is changed."""
        exact = self.noise == 0 or self.signal == 0
        sqnr, clip_noise = (
            (None, None)
            if exact
            else (10 * math.log10(self.signal / self.noise), self.clip_noise / self.noise)
        )
        return {
            "clip_rate": self.clipped / max(1, self.count),
            "clip_noise": clip_noise,
            "sqnr": sqnr,
            "codes_used": float(self.hit.mean()),
        }


def judged(histogram: np.ndarray, adcs: Table, rows: slice = slice(None)) -> Reads:
    """What the ADCs `rows` do to the reads counted in histogram, int64 [G of these rows, P]."""
    used = np.flatnonzero(histogram.any(0))  # of thousands of partial sums a tile has hundreds
    histogram, p = histogram[:, used], adcs.p[used].astype(np.float64)
    code, value, clipped = (each[rows][:, used] for each in (adcs.code, adcs.value, adcs.clipped))
    place = code + adcs.codes * np.arange(len(code))[:, None]
    hit = (
        np.bincount(place.ravel(), histogram.ravel(), len(code) * adcs.codes).reshape(
            -1, adcs.codes
        )
        > 0
    )
    signal, noise = histogram.sum(0) @ p**2, histogram * (value - p) ** 2
    return Reads(
        int(histogram.sum()),
        int(histogram[clipped].sum()),
        float(signal),
        float(noise.sum()),
        float(noise[clipped].sum()),
        hit,
    )


def together(parts: list[Reads], by_tile: bool) -> Reads:
    """All tiles of a layer as one; by_tile: each has an ADC of its own."""
    hits = [part.hit for part in parts]
    sums = (
        sum(getattr(part, name) for part in parts)
        for name in ("count", "clipped", "signal", "noise", "clip_noise")
    )
    return Reads(*sums, np.concatenate(hits) if by_tile else np.logical_or.reduce(hits))


@dataclass(frozen=True)
class Seen:
    """One layer's reads. figures: of `Reads.figures`; tiles: the same for each tile, with its
    number; histogram: int64 [P], all reads; thresholds, full_scale: of the ADC with the median
    step; adcs: how many there are."""

    plan: Plan
    figures: dict[str, Any]
    tiles: list[dict[str, Any]]
    histogram: np.ndarray
    thresholds: tuple[int, ...]
    full_scale: tuple[int, int]
    adcs: int


def seen(layer: ReadLayer, codes: torch.Tensor, weight: torch.Tensor) -> Seen:
    """What a layer's ADCs do to the reads of padded input codes [N, C, H, W] and weights [O, K]."""
    adcs, by_tile = table(layer), layer.plan.macro.granularity == "tile"
    total, parts = np.zeros(adcs.p.size, np.int64), []
    for t, histogram in enumerate(tile_histograms(codes, weight, layer.plan)):
        total += histogram.sum(0)
        parts.append(judged(histogram, adcs, slice(t, t + 1) if by_tile else slice(None)))
    tiles = [{"tile": t, **part.figures()} for t, part in enumerate(parts)]
    return Seen(
        layer.plan,
        together(parts, by_tile).figures(),
        tiles,
        total,
        *_typical(layer),
        len(adcs.code),
    )


def _typical(layer: ReadLayer) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(thresholds, full scale) of the ADC with the median step."""
    g = _median(layer.adc.sizes())
    rows = layer.adc.snap().each().thresholds
    return tuple(rows[g, 0].tolist()), layer.adc.clip_bounds()[g]


def _median(values: list[float]) -> int:
    """The place of the median, of two the upper one."""
    return sorted(range(len(values)), key=values.__getitem__)[len(values) // 2]


@torch.no_grad()
def look(network: Network, x: torch.Tensor) -> dict[str, Seen]:
    """What each layer's ADCs do to their reads of real-valued inputs x, by name; layers with an
    ideal ADC are left out."""
    found: dict[str, Seen] = {}

    def watch(name: str, layer: ReadLayer, codes: torch.Tensor, weight: torch.Tensor) -> None:
        if not layer.adc.exact:
            found[name] = seen(layer, codes, weight)

    with watched(network, watch):
        network.eval()(x)
    return found


# -- what the network loses to it ------------------------------------------------------------------
def trials(network: Network) -> list[frozenset[str]]:
    """Which layers are made ideal in each measurement: none, all, all but one, only one of those
    that are not. A network with ideal ADCs has nothing to try."""
    layers = [name for name, layer in read_layers(network).items() if not layer.adc.exact]
    if not layers:
        return [frozenset()]
    every = frozenset(layers)
    return list(
        dict.fromkeys(
            [
                frozenset(),
                every,
                *(every - {name} for name in layers),
                *(frozenset({name}) for name in layers),
            ]
        )
    )


def tried(
    network: Network, feed: Feed, done: Callable[[int], None] = lambda n: None
) -> dict[frozenset[str], np.ndarray]:
    """Which images are right, bool [N], in every one of `trials`."""
    found = {}
    for ideal in trials(network):
        with ideal_adcs(network, ideal):
            found[ideal] = hits(network, feed, done)
    return found


# -- the verdict -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Diagnosis:
    """Which layer's ADC costs most. Accuracies in percent of `images` images, by the trained
    network in floating point.

    adc_loss_same_weights: `ideal_top1` - `real_top1`, one network with its ADCs ideal and with its
    own. That is not the loss of `quantize`, whose twin was trained with ideal ADCs. Every *_se is a
    paired standard error (train/paired.py). worst: the layer that stands out most, None where none
    does; worst_by: the column where it does, "loss_alone" or "regained"; reason: of REASONS.
    layers: rows in network order, as docs/json.md describes them.
    """

    source: str
    images: int
    measured_on: str
    sample_images: int
    real_top1: float
    ideal_top1: float
    adc_loss_same_weights: float
    adc_loss_same_weights_se: float | None
    worst: str | None
    worst_by: str | None
    reason: str | None
    sentence: str
    layers: list[dict[str, Any]]
    plots: list[str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


NOTHING = {"clip_rate": None, "clip_noise": None, "sqnr": None, "codes_used": None}


def layer_rows(
    found: dict[str, Seen], right: dict[frozenset[str], np.ndarray], names: Collection[str]
) -> list[dict[str, Any]]:
    """A row for each layer: its figures, what it loses alone, what is regained without it, its
    tiles, and the worst of them.

    right: as from `tried`.
    """
    none, every = frozenset(), frozenset(names)
    rows = []
    for name in names:
        losses = dict.fromkeys(("loss_alone", "regained"))
        if every in right:
            alone, without = right[every - {name}], right[frozenset({name})]
            losses = {
                "loss_alone": paired(right[every], alone),
                "regained": paired(without, right[none]),
            }
        figures, tiles = (
            (found[name].figures, found[name].tiles) if name in found else (NOTHING, [])
        )
        rows.append(
            {
                "layer": name,
                **_columns(losses),
                **figures,
                "worst_tile": worst_tile(tiles),
                "tiles": tiles,
            }
        )
    return rows


def _columns(losses: dict[str, Loss | None]) -> dict[str, float | None]:
    """The columns of losses, each with its standard error; a layer with an ideal ADC loses 0, which
    is no estimate."""
    columns: dict[str, float | None] = {}
    for name, loss in losses.items():
        columns |= {name: loss.points if loss else 0.0, f"{name}_se": loss.se if loss else None}
    return columns


def worst_tile(tiles: list[dict[str, Any]]) -> int | None:
    """The number of the tile with the lowest SQNR; None where no read of any tile is changed.

    >>> worst_tile([{"tile": 0, "sqnr": 9.0}, {"tile": 1, "sqnr": 7.5}, {"tile": 2, "sqnr": None}])
    1
    """
    changed = [row for row in tiles if row["sqnr"] is not None]
    return min(changed, key=lambda row: row["sqnr"])["tile"] if changed else None


def reason(figures: dict[str, Any]) -> str:
    """Why an ADC does badly, by plain rules. Calibration for the least error clips some per cent at
    few bits, rightly: what clips is to blame only where it also makes most of the error.

    >>> [reason({"clip_rate": c, "clip_noise": n, "codes_used": 0.3}) for c, n in ((0.02, 0.6), (0.02, 0.4), (0.01, 0.6))]
    ['range too small', 'range too large', 'range too large']
    >>> reason({"clip_rate": 0.02, "clip_noise": 0.4, "codes_used": 1.0})
    'resolution too low'
    """
    if figures["clip_rate"] > CLIPPED and (figures["clip_noise"] or 0) > CLIP_NOISE:
        return "range too small"
    return "range too large" if figures["codes_used"] < FEW_CODES else "resolution too low"


def significance(row: dict[str, Any], column: str) -> float:
    """How many paired standard errors a column of a row is from zero; 0 where it is no estimate."""
    return row[column] / row[f"{column}_se"] if row[f"{column}_se"] else 0.0


def verdict(rows: list[dict[str, Any]], all_adcs: Loss | None) -> dict[str, str | None]:
    """worst, worst_by, reason and the sentence that says so; all_adcs: what all ADCs cost together,
    None where all are ideal.

    A layer stands out where either column is beyond two paired standard errors; the worst is the
    one farthest beyond.
    """
    nobody = {"worst": None, "worst_by": None, "reason": None}
    if all_adcs is None:
        return {**nobody, "sentence": "every ADC is ideal, so none costs any accuracy"}
    places = [(row, column) for row in rows for column in CULPRIT]
    row, column = max(places, key=lambda place: significance(*place))
    if significance(row, column) <= BEYOND:
        return {**nobody, "sentence": _nobody(all_adcs)}
    sqnr = "no error in the sample" if row["sqnr"] is None else f"SQNR {row['sqnr']:.1f} dB"
    cost = CULPRIT[column].format(points=row[column], se=row[f"{column}_se"])
    head = (
        f"layer {escaped(row['layer'])} costs most: {cost}; clip "
        f"{100 * row['clip_rate']:.1f} %, {sqnr}"
    )
    named = {"worst": row["layer"], "worst_by": column, "reason": reason(row)}
    return {**named, "sentence": f"{head}: {REASONS[reason(row)]}"}


def _nobody(all_adcs: Loss) -> str:
    verb = "cost" if all_adcs.points >= 0 else "gain"
    total = (
        f"all ADCs together {verb} {abs(all_adcs.points):.2f} points "
        f"(standard error {all_adcs.se:.2f})"
    )
    head = "no layer stands out beyond two standard errors"
    if all_adcs.significance <= BEYOND:
        return f"{head}; {total}, which is not significant either"
    return f"{head}, but {total}; use a larger --limit to tell the layers apart"


def _judged(network: Network) -> list[str]:
    """The layers that get a row: those with an ADC of their own; where there are none, those on the
    macro."""
    plans = [layer.plan for layer in read_layers(network).values()]
    own = [plan.name for plan in plans if not plan.macro.ideal]
    return own or [plan.name for plan in plans if not plan.digital]


def examine(
    network: Network, feed: Feed, sample: torch.Tensor, done: Callable[..., None]
) -> tuple[dict[str, Seen], dict[str, Any]]:
    """(what each layer's ADCs do to the reads of `sample`, the fields of a `Diagnosis` that follow
    from it and from top-1 on the feed).

    sample: real-valued inputs [N, ...]. done(n, note) after each n of (1 + number of trials) *
    images; the last note is the verdict.
    """
    names = _judged(network)
    found = look(network, sample)
    done(len(feed))
    right = tried(network, feed, done)
    real, ideal = right[frozenset()], right.get(frozenset(names))  # ideal ADCs were tried once
    all_adcs = None if ideal is None else paired(ideal, real)
    rows = layer_rows(found, right, names)
    said = verdict(rows, all_adcs)
    done(0, said["sentence"])
    top1 = {"real_top1": percent(real), "ideal_top1": percent(real if ideal is None else ideal)}
    lost = _columns({"adc_loss_same_weights": all_adcs})
    return found, {
        "images": len(feed),
        "sample_images": len(sample),
        **top1,
        **lost,
        **said,
        "layers": rows,
    }
