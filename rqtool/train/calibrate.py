"""Calibration: scales of inputs and weights, then the ADC's step and zero from the histogram of
what it will read. No gradient.

One pass over a batch sets every layer in order, each from inputs that already went through the
calibrated layers before it. A reference network, the float one, goes through the same images beside
it: each column's digital multiplier and addend are set so that it gives what the reference's column
gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rqtool.hardware import adc
from rqtool.hardware.adc import FREE_LEVEL_PEAK
from rqtool.hardware.macro import Macro
from rqtool.model.graph import Node
from rqtool.model.network import Network, from_image, to_image
from rqtool.train.adc_numbers import level_units, nearest_thresholds
from rqtool.train.adc_state import AdcState, LevelState, UniformState
from rqtool.train.histogram import partial_sum_histogram
from rqtool.train.layers import ColumnNorm, ReadLayer
from rqtool.train.reads import pad_codes
from rqtool.train.rewrite import own_norm
from rqtool.train.rounding import fit_weights
from rqtool.train.spread import spread_order

STEPS = 120  # candidate steps, geometric
CALIBRATIONS = ("error", "peak", "percentile")
ROUNDINGS = ("learned", "nearest")
PERCENTILE = 0.999  # share of the reads, by the magnitude of their partial sums
LEVEL_BINS = 1024  # a free-level search merges partial sums beyond this many
ROUNDS = 3  # of finding levels for the units of columns, and units for the levels
REACHES = (
    2.0,
    1.1,
)  # a unit is looked for up to so many times as large or small, first coarsely, then finely
UNITS = 41  # candidates each time, geometric


# -- the ADC of a histogram ------------------------------------------------------------------------
def optimal_uniform(histograms: np.ndarray, macro: Macro) -> tuple[np.ndarray, np.ndarray]:
    """The (steps, zeros), float64 and int64 [groups], of least squared error sum_p h(p) *
    (value(code(p)) - p)**2.

    histograms: [groups, p_max - p_min + 1]. Steps are exact minima over 120 geometric candidates,
    each snapped to 2**S / M; the zero is the code book's, searched over all codes for `twos`, from
    the middle outwards: of equal ones, the first is taken.
    """
    used = np.flatnonzero(histograms.sum(0))
    p = used + macro.p_min
    h = histograms[:, used].astype(np.float64)
    zeros = np.array(
        sorted(range(macro.top + 1), key=lambda z: abs(z - macro.zero))
        if macro.codebook == "twos"
        else [macro.zero]
    )
    largest = max(1.0, float(np.abs(p).max(initial=1)))
    steps = np.unique(
        adc.snap(np.geomspace(1.0, max(1.5, 2.2 * largest / max(1, macro.top)), STEPS), macro.shift)
    )[::-1]
    errors = np.stack(
        [_squared_errors(p, h, mult, zeros, macro) for mult in steps]
    )  # [steps, zeros, groups]
    step, zero = np.unravel_index(errors.reshape(-1, len(h)).argmin(0), errors.shape[:2])
    return 2.0**macro.shift / steps[step], zeros[zero]


def _squared_errors(
    p: np.ndarray, h: np.ndarray, mult: float, zeros: np.ndarray, macro: Macro
) -> np.ndarray:
    code = adc.uniform_code(p[None], int(mult), macro.shift, zeros[:, None], macro.top)
    value = adc.uniform_value(code, zeros[:, None], 2.0**macro.shift / mult)
    return (value - p) ** 2 @ h.T


def covering_step(histograms: np.ndarray, macro: Macro, share: float) -> np.ndarray:
    """The steps float64 [groups] whose full scale takes `share` (0 to 1) of the reads of histograms
    [groups, P] by magnitude, with the code book's own zero. For comparison: a step of least squared
    error clips more, and reads the rest better."""
    magnitude = np.abs(np.arange(macro.p_min, macro.p_max + 1))
    by_size = np.stack([np.bincount(magnitude, h, magnitude.max() + 1) for h in histograms]).cumsum(
        1
    )
    bounds = (by_size >= share * by_size[:, -1:]).argmax(1)
    return np.array(
        [
            adc.full_scale_step(max(macro.p_min, -int(b)), int(b), macro.zero, macro.top)
            for b in bounds
        ]
    )


def optimal_levels(histogram: np.ndarray, macro: Macro) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds [top], levels [top + 1]) of least squared error, by dynamic programming over the
    histogram [P].

    Levels are integers, `level_units` of them in a partial-sum unit; the level of the cell that
    holds p = 0 is exactly 0 (design page 1). Thresholds are partial sums. Histograms of more than
    1,024 different sums are merged to that many bins first.
    """
    p, h = _bins(histogram, macro)
    cost = _cell_costs(p, h)
    cuts = _best_cuts(cost, min(macro.top + 1, len(p)))
    levels = _cell_levels(p, h, cuts, macro)
    thresholds = [
        int(np.ceil((p[a - 1] + p[a]) / 2))
        if p[a] > 0
        else int(np.floor((p[a - 1] + p[a]) / 2)) + 1
        for a in cuts[1:-1]
    ]
    missing = (
        macro.top + 1 - len(levels)
    )  # fewer different sums than codes: the upper codes never occur
    return np.array(thresholds + [macro.p_max + 1 + i for i in range(missing)]), np.array(
        levels + [levels[-1]] * missing
    )


def _cell_levels(p: np.ndarray, h: np.ndarray, cuts: list[int], macro: Macro) -> list[int]:
    """The integer next to the mean of each cell; 0 for the one that holds p = 0."""
    means = (
        0.0 if p[a] <= 0 <= p[b - 1] else float(h[a:b] @ p[a:b]) / max(1e-9, h[a:b].sum())
        for a, b in zip(cuts, cuts[1:])
    )
    return [
        max(-FREE_LEVEL_PEAK, min(round(level_units(macro) * mean), FREE_LEVEL_PEAK))
        for mean in means
    ]


def _bins(histogram: np.ndarray, macro: Macro) -> tuple[np.ndarray, np.ndarray]:
    """Occurring partial sums (0 always) and their counts, merged to at most LEVEL_BINS."""
    h = histogram.astype(np.float64)
    h[-macro.p_min] += 1e-6
    p = np.flatnonzero(h) + macro.p_min
    width = -(-len(p) // LEVEL_BINS)
    if width == 1:
        return p.astype(np.float64), h[p - macro.p_min]
    keys = np.where(p == 0, 0, np.sign(p) * (np.abs(p) // width + 1))
    weights = h[p - macro.p_min]
    _, inverse = np.unique(keys, return_inverse=True)
    total = np.bincount(inverse, weights)
    return np.bincount(inverse, weights * p) / total, total


def _cell_costs(p: np.ndarray, h: np.ndarray) -> np.ndarray:
    """cost[a, b]: squared error of one cell over bins a .. b-1; a cell around 0 is represented by
    0."""
    s0, s1, s2 = (np.concatenate([[0], np.cumsum(h * p**k)]) for k in range(3))
    w, m, e = (s[None, :] - s[:, None] for s in (s0, s1, s2))
    cost = e - np.divide(m * m, w, out=np.zeros_like(m), where=w > 0)
    zero = int(np.flatnonzero(p == 0)[0])
    cost[: zero + 1, zero + 1 :] = e[: zero + 1, zero + 1 :]
    return np.where(np.arange(len(p) + 1)[:, None] < np.arange(len(p) + 1)[None, :], cost, np.inf)


def _best_cuts(cost: np.ndarray, cells: int) -> list[int]:
    """Ends of the cells that partition all bins at least cost."""
    n = cost.shape[0]
    best, back = cost[0].copy(), []
    for _ in range(cells - 1):
        total = best[:, None] + cost
        back.append(total.argmin(0))
        best = total.min(0)
    cuts = [n - 1]
    for choice in reversed(back):
        cuts.append(int(choice[cuts[-1]]))
    return [0] + cuts[::-1] if cuts[-1] else cuts[::-1]


# -- free levels with a step for each column -------------------------------------------------------
@dataclass(frozen=True)
class ColumnLevels:
    """One shape and a step for each column. levels: int64 [top + 1], zero: the code of p = 0,
    ratio: float64 [O], of a column's unit to 1 / level_units; error: float64 [O], the squared error
    of each column."""

    levels: np.ndarray
    zero: int
    ratio: np.ndarray
    error: np.ndarray

    def thresholds(self, macro: Macro) -> np.ndarray:
        """int64 [O, top]."""
        return nearest_thresholds(
            torch.from_numpy(self.levels),
            self.zero,
            torch.from_numpy(self.ratio / level_units(macro)),
        ).numpy()


def optimal_column_levels(histograms: np.ndarray, macro: Macro) -> ColumnLevels:
    """Levels that all columns share and a step for each of them, of little squared error over
    histograms [O, P].

    It begins with steps in proportion to the root mean square of each column's partial sums. The
    best levels for given steps come from the dynamic program, on the histograms of all columns in
    units of their steps; the best step of a column for given levels from a search on its own
    histogram; each is found a few times in turn. Columns are no worse together than with the levels
    of `optimal_levels` for all of them: those are tried, too.
    """
    columns = _Columns(histograms, macro)
    thresholds, levels = optimal_levels(histograms.sum(0), macro)
    best = columns.fitted(levels, int(adc.threshold_code(0, thresholds)), np.ones(len(histograms)))
    ratio = columns.spread()
    for _ in range(ROUNDS):
        found = columns.fitted(*columns.shape(ratio), ratio)
        best, ratio = min(best, found, key=lambda one: one.error.sum()), found.ratio
    return best


class _Columns:
    """Histograms [O, P] made ready for many tries: the partial sums p that occur, how often (h [O,
    n]), and running sums of h * p**k."""

    def __init__(self, histograms: np.ndarray, macro: Macro) -> None:
        used = np.flatnonzero(
            histograms.any(0) | (np.arange(histograms.shape[1]) == -macro.p_min)
        )  # 0 always
        self.macro, self.p, self.h = (
            macro,
            (used + macro.p_min).astype(np.float64),
            histograms[:, used].astype(np.float64),
        )
        self.sums = [np.pad(np.cumsum(self.h * self.p**k, 1), ((0, 0), (1, 0))) for k in range(3)]

    def spread(self) -> np.ndarray:
        """float64 [O]: the root mean square of each column over that of all; 1 for a column whose
        sums are all 0."""
        counts, _, squares = (s[:, -1] for s in self.sums)
        ratio = np.sqrt(squares / np.maximum(counts, 1) * counts.sum() / max(squares.sum(), 1))
        return np.where(ratio > 0, ratio, 1.0)

    def shape(self, ratio: np.ndarray) -> tuple[np.ndarray, int]:
        """(levels int64 [top + 1], zero): the best ones for the units of columns."""
        p, h = self._pooled(ratio)
        cells = self.macro.top + 1
        cuts = _best_cuts(_cell_costs(p, h), min(cells, len(p)))
        levels = _cell_levels(p, h, cuts, self.macro)
        zero = int(adc.threshold_code(int(np.flatnonzero(p == 0)[0]), cuts[1:-1]))
        return np.array(levels + [levels[-1]] * (cells - len(levels))), zero

    def _pooled(self, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Partial sums of all columns in units of their steps, and how much the square of each
        counts; merged to at most LEVEL_BINS, whose width grows with the root of the sum: levels are
        close near 0."""
        p, h = (self.p / ratio[:, None]).ravel(), (self.h * ratio[:, None] ** 2).ravel()
        half = LEVEL_BINS // 2 - 1
        key = half + (
            np.sign(p) * np.ceil(half * np.sqrt(np.abs(p) / max(1.0, np.abs(p).max(initial=0))))
        ).astype(np.int64)
        total, first = (np.bincount(key, weights, 2 * half + 1) for weights in (h, h * p))
        total[half] += 1e-6  # a cell for 0, though nothing may have been read
        kept = total > 0
        return first[kept] / total[kept], total[kept]

    def fitted(self, levels: np.ndarray, zero: int, ratio: np.ndarray) -> ColumnLevels:
        """The best step of each column for given levels, from `ratio` on; of equal ones, the one
        nearest to it."""
        for reach in REACHES:
            tried = ratio[:, None] * reach ** np.array(sorted(np.linspace(-1, 1, UNITS), key=abs))
            errors = self._errors(levels, zero, tried)
            each = np.arange(len(ratio)), errors.argmin(1)
            ratio = tried[each]
        return ColumnLevels(levels, zero, ratio, errors[each])

    def _errors(self, levels: np.ndarray, zero: int, ratio: np.ndarray) -> np.ndarray:
        """The squared error, float64 [O, n], of each column at n ratios [O, n]."""
        unit, columns = ratio / level_units(self.macro), np.arange(len(ratio))[:, None, None]
        thresholds = nearest_thresholds(
            torch.from_numpy(levels), zero, torch.from_numpy(unit.ravel())
        ).numpy()
        ends = np.searchsorted(self.p, thresholds).reshape(*ratio.shape, -1)
        ends = np.pad(
            ends, ((0, 0), (0, 0), (1, 1)), constant_values=((0, 0), (0, 0), (0, len(self.p)))
        )
        count, first, square = (np.diff(s[columns, ends]) for s in self.sums)
        value = unit[:, :, None] * levels
        return (square - 2 * value * first + value**2 * count).sum(-1)


# -- a layer, a network ----------------------------------------------------------------------------
@torch.no_grad()
def set_adc(layer: ReadLayer, histogram: np.ndarray, policy: str = "error") -> None:
    """Give a layer the ADC that its macro's range asks for; histogram as from
    `partial_sum_histogram`. policy: what a calibrated step is for, the least squared "error", the
    largest sum ("peak"), or the largest of 99.9 % ("percentile"); free levels always the first.
    """
    SETTERS[type(layer.adc)](layer, histogram, policy)


def _set_steps(layer: ReadLayer, histogram: np.ndarray, policy: str) -> None:
    macro = layer.plan.macro
    if macro.range == "calibrated" and policy == "error":
        step, zero = optimal_uniform(histogram, macro)
        layer.adc.set_zero(zero)
    elif macro.range == "calibrated":
        step = covering_step(histogram, macro, 1.0 if policy == "peak" else PERCENTILE)
    else:
        step = (
            adc.full_scale_step(macro.p_min, macro.p_max, macro.zero, macro.top)
            if macro.range == "full"
            else macro.step
        )
    layer.log_step.copy_(
        torch.as_tensor(np.array(np.broadcast_to(step, layer.log_step.numel())))
        .view_as(layer.log_step)
        .log()
    )


def _set_levels(layer: ReadLayer, histogram: np.ndarray, policy: str) -> None:
    macro = layer.plan.macro
    if macro.granularity == "layer":
        layer.adc.set_levels(*optimal_levels(histogram.sum(0), macro))
    else:
        found = optimal_column_levels(histogram, macro)
        layer.adc.set_levels(found.thresholds(macro), found.levels, found.ratio)


SETTERS: dict[type[AdcState], Callable[[ReadLayer, np.ndarray, str], None]] = {
    UniformState: _set_steps,
    LevelState: _set_levels,
}


@torch.no_grad()
def _calibrate_layer(
    layer: ReadLayer, x: torch.Tensor, want: torch.Tensor, about: Calibration
) -> None:
    if about.scales:
        layer.input.calibrate(x)
        layer.weights.calibrate(layer.weight.reshape(layer.plan.geometry.columns, -1))
    codes = pad_codes(layer.input(x), layer.plan.geometry.padding, int(layer.input.zero))
    if about.scales and about.rounding == "learned":
        fit_weights(layer, codes, want)
    if not layer.adc.exact:
        weight = layer.weight_codes()
        if layer.plan.macro.pack == "spread":
            layer.set_order(spread_order(codes, weight, layer.plan))
        set_adc(layer, partial_sum_histogram(codes, weight, layer.plan), about.policy)


@dataclass(frozen=True)
class Calibration:
    """One walk through a network beside its reference. scales: off where the scales of inputs and
    weights are learned already, and only the ADCs are to be set. policy: as in `set_adc`;
    rounding: of weights, each to the "nearest" whole number, or "learned" for what columns give."""

    network: Network
    reference: Network
    scales: bool = True
    policy: str = "error"
    rounding: str = "learned"
    done: Callable[[], None] = lambda: None

    def __call__(
        self, node: Node, *pairs: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the network's value of a node, the reference's) from the pairs of its inputs; what the
        node holds is set on the way."""
        want = self.reference.compute(node, *(pair[1] for pair in pairs))
        ours = [pair[0] for pair in pairs]
        if node.op == "conv":
            return self._layer(node, ours[0], want), want
        if node.op == "batch_norm":
            fit_norm(self.network.layer(node.module), ours[0], want)
        return self.network.compute(node, *ours), want

    def _layer(self, node: Node, x: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
        layer, kind = self.network.layer(node.name), node.attrs["geometry"]["kind"]
        image, target = to_image(x, kind), to_image(want, kind)
        _calibrate_layer(layer, image, target, self)
        y = layer.columns(image)
        if layer.norm is not None:
            fit_norm(layer.norm, y, target)
            y = layer.norm(y / layer.norm.unit.float())
        self.done()
        return from_image(y, kind, node.shape)


@torch.no_grad()
def calibrate(
    network: Network,
    x: torch.Tensor,
    reference: Network,
    done: Callable[[], None] = lambda: None,
    **how: Any,
) -> None:
    """Set every layer's quantisers, ADC, multipliers and addends from a batch of real-valued inputs
    x [N, ...], so that its columns give what those of `reference`, a network of the same graph,
    give; `done` is called after each layer. how: fields of `Calibration`."""
    network.eval()
    reference.eval()
    network.walk((x, x), Calibration(network, reference, done=done, **how))


# -- batch norm ------------------------------------------------------------------------------------
PRIOR = 8  # positions that the slope of a norm is worth before any is seen


@torch.no_grad()
def fit_norm(norm: nn.Module, y: torch.Tensor, want: torch.Tensor) -> None:
    """Set batch norm so that its values of y [N, C, ...] come near to `want`, of the same shape,
    channel by channel.

    Its statistics become those of y; its addend makes the mean that of `want`, its multiplier the
    slope that of least squared error. So the function stays the same when statistics are those of a
    batch, in training. Few positions move the slope little from what it was (for a column's own
    norm: 1), and a channel that does not vary keeps it.
    """
    y, want = (v.transpose(0, 1).flatten(1) for v in (y, want))
    var, mean = torch.var_mean(y, 1, correction=0)
    wanted = want.mean(1)
    covariance = ((y - mean.unsqueeze(1)) * (want - wanted.unsqueeze(1))).mean(1)
    unit, was = _unit_and_slope(norm, var)
    prior = PRIOR / y.shape[1]
    slope = (covariance + prior * var * was) / ((1 + prior) * var)
    slope = torch.where((var > 0) & (want.var(1, correction=0) > 0), slope, was)
    scaled = torch.where(var > 0, var / unit**2, torch.ones_like(var))
    norm.running_mean.copy_(mean / unit)
    norm.running_var.copy_(scaled)
    norm.weight.copy_(slope * unit * torch.sqrt(scaled + norm.eps))
    norm.bias.copy_(wanted)


def _unit_and_slope(norm: nn.Module, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the norm's values are divided by, its slope float32 [C]) before it is fitted to values
    of variance `var` [C]; a column's own norm gets its unit."""
    if not isinstance(norm, ColumnNorm):
        return torch.ones(()), norm.weight / torch.sqrt(norm.running_var + norm.eps)
    norm.unit.fill_(float(var.mean().sqrt()) or 1.0)
    return norm.unit.float(), torch.ones_like(var)


def norms(network: nn.Module) -> list[nn.Module]:
    """Batch norms whose statistics may be measured anew, those of columns among them."""
    kinds = (nn.modules.batchnorm._BatchNorm, ColumnNorm)
    found = [m for m in network.modules() if isinstance(m, kinds) and m.running_mean is not None]
    return [m for m in found if not getattr(m, "static", False)]


@torch.no_grad()
def take_norms(network: Network, reference: Network) -> None:
    """Give every batch norm of the graph the numbers that it has in `reference`, a network of the
    same graph with plain batch norms."""
    for node in network.graph.nodes:
        if node.op == "batch_norm":
            network.set_layer(node.module, own_norm(reference.layer(node.module)))


class batch_statistics:
    """Within: batch norm uses each batch's statistics and averages them; afterwards the average is
    its running statistics."""

    def __init__(self, network: nn.Module) -> None:
        self.norms = norms(network)

    def __enter__(self) -> None:
        self.momenta = [m.momentum for m in self.norms]
        for m in self.norms:
            m.reset_running_stats()
            m.momentum = None  # a cumulative average
            m.train()

    def __exit__(self, *_: object) -> None:
        for m, momentum in zip(self.norms, self.momenta):
            m.momentum = momentum
            m.eval()


@torch.no_grad()
def reestimate_norms(network: Network, batches) -> None:
    """Batch-norm statistics measured anew with the hard ADC, over real-valued batches [N, ...]; the
    network is left in eval mode."""
    network.eval()
    with batch_statistics(network):
        for x in batches:
            if len(x) > 1:  # the last batch may be a single image, which has no variance
                network(x)
