"""Weights rounded for what their columns give, not one by one (the aim of AdaRound: Nagel et al.,
ICML 2020, section 3; here the quadratic objective is kept whole and searched by coordinate
descent).

A column with whole weights q, a scale s and inputs x gives s * q'x, and the float column gives y.
With A = E[x x'] and c = E[x y] over calibration positions, both about their means (a column's
addend is free),

    E (s * q'x - y)**2 = (s*q - t)' A (s*q - t) + const,        t = A**-1 c

Inputs x are those that the quantised layers before give, so t also makes good what they did wrong,
as far as a weight can. Few positions say little of many weights, so A and c get a share of the
float weights w: A + r*I and c + r*w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rqtool.mapping.plan import Geometry
from rqtool.train.layers import ReadLayer

POSITIONS = 1 << 15  # of the calibration images, behind A and c
FEWEST_IMAGES = 64
CHUNK_VALUES = 1 << 25  # numbers of unfolded inputs at once
RIDGE = 0.1  # r, in mean squares of the inputs
FACTORS = (0.3, 1.1, 41)  # candidate scales, times the one that clips nothing
SWEEPS = 4  # of coordinate descent
WHOLE_ROWS = 2048  # of a group; more are rounded in blocks of BLOCK rows, each for its own share of the output
BLOCK = 1024


@dataclass(frozen=True)
class Moments:
    """gram: float64 [groups, K, K], A above; cross: float64 [groups, K, columns of a group], c;
    about the means, of inputs in codes; count: positions behind them."""

    gram: torch.Tensor
    cross: torch.Tensor
    count: int


@torch.no_grad()
def fit_weights(layer: ReadLayer, codes: torch.Tensor, want: torch.Tensor) -> None:
    """Set a layer's weights and their scales for outputs `want` [N, O, H_out, W_out] from padded
    input codes [N, C, H, W]."""
    geometry, peak = layer.plan.geometry, layer.plan.macro.q_w
    unit = float(layer.input.scale)
    weight = unit * layer.weight.double().reshape(geometry.groups, -1, geometry.rows).transpose(
        1, 2
    )
    inputs = codes - int(layer.input.zero)
    if geometry.rows <= WHOLE_ROWS:
        whole, scale = rounded(moments(inputs, want, geometry, slice(None)), weight, peak)
    else:
        parts = (slice(at, at + BLOCK) for at in range(0, geometry.rows, BLOCK))
        whole, scale = rounded_in_blocks(
            [(part, moments(inputs, want, geometry, part)) for part in parts], weight, peak
        )
    columns = (whole * scale / unit).transpose(1, 2).reshape(layer.weight.shape)
    layer.weight.copy_(columns)
    layer.weights.log_scale.copy_((scale / unit).log().flatten())


def moments(inputs: torch.Tensor, want: torch.Tensor, geometry: Geometry, rows: slice) -> Moments:
    """The moments of some rows of each group, over a sample of positions; inputs: padded, in codes
    without their zero, [N, C, H, W]; want [N, O, H_out, W_out]."""
    places = want[0, 0].numel()
    images = min(len(inputs), max(FEWEST_IMAGES, -(-POSITIONS // places)))
    chunk = max(1, CHUNK_VALUES // (geometry.rows * geometry.groups * places))
    share = min(1.0, POSITIONS / (images * places))
    random = torch.Generator().manual_seed(0)
    sums = [torch.zeros(())] * 4
    count = 0
    for at in range(0, images, chunk):
        part = slice(at, min(at + chunk, images))
        kept = torch.rand((part.stop - at) * places, generator=random) < share
        unfolded = F.unfold(inputs[part], geometry.kernel, geometry.dilation, 0, geometry.stride)
        x = _by_group(unfolded, geometry.groups)[:, rows][..., kept]
        y = _by_group(want[part].flatten(2), geometry.groups)[..., kept]
        found = x @ x.transpose(1, 2), x @ y.transpose(1, 2), x.sum(2), y.sum(2)
        sums = [total + new.double() for total, new in zip(sums, found)]
        count += x.shape[2]
    gram, cross, x, y = (total / max(1, count) for total in sums)
    centred = gram - x.unsqueeze(2) * x.unsqueeze(1), cross - x.unsqueeze(2) * y.unsqueeze(1)
    return Moments(*centred, count)


def _by_group(values: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, groups * R, L] as [groups, R, N * L]."""
    return values.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)


def rounded(found: Moments, weight: torch.Tensor, peak: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole numbers -peak..peak float64 [groups, K, O], scales float64 [groups, 1, O]) for float
    weights [groups, K, O].

    >>> gram, w = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]).double(), torch.tensor([[[0.4], [0.4]]]).double()
    >>> whole, scale = rounded(Moments(gram, gram @ w, 1000), w, 1)
    >>> [round(float(x), 2) for x in (whole * scale).flatten()]  # as large as they are: both are the peak
    [0.4, 0.4]
    """
    gram, ridge = with_ridge(found)
    aim = torch.linalg.solve(gram, found.cross + ridge * weight)
    scale = best_scale(aim, gram, peak)
    return descend(_nearest(aim / scale, peak), scale, gram, aim, peak), scale


def rounded_in_blocks(
    found: list[tuple[slice, Moments]], weight: torch.Tensor, peak: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for many rows: each block is rounded for what it adds itself, and aims at the float
    weights."""
    squares = torch.cat([torch.diagonal(moments.gram, dim1=1, dim2=2) for _, moments in found], 1)
    scale = best_scale(weight, squares, peak)
    blocks = []
    for part, moments_ in found:
        start, gram = _nearest(weight[:, part] / scale, peak), with_ridge(moments_)[0]
        blocks.append(descend(start, scale, gram, weight[:, part], peak))
    return torch.cat(blocks, 1), scale


def with_ridge(found: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """(A + r*I, r float64 [groups, 1, 1]): the fewer positions there are for each weight, the more
    the float weights count."""
    gram, rows = found.gram, found.gram.shape[1]
    square = torch.diagonal(gram, dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    share = RIDGE * (1 + rows / max(1, found.count))
    ridge = share * torch.where(square > 0, square, torch.ones_like(square))
    return gram + ridge * torch.eye(rows, dtype=gram.dtype), ridge


def _nearest(values: torch.Tensor, peak: int) -> torch.Tensor:
    return torch.floor(values + 0.5).clamp(-peak, peak)


def best_scale(aim: torch.Tensor, gram: torch.Tensor, peak: int) -> torch.Tensor:
    """float64 [groups, 1, O]: of each column, the scale at which rounding `aim` [groups, K, O]
    costs least by the metric `gram` [groups, K, K], or [groups, K] for a diagonal one."""
    largest = aim.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest)) / peak
    low, high, count = FACTORS
    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in torch.linspace(low, high, count).tolist():
        scale = largest * factor
        error = _nearest(aim / scale, peak) * scale - aim
        weighted = gram @ error if gram.dim() == 3 else gram.unsqueeze(2) * error
        cost = (error * weighted).sum(1, keepdim=True)
        best, least = torch.where(cost < least, scale, best), torch.minimum(cost, least)
    return best


def descend(
    whole: torch.Tensor, scale: torch.Tensor, gram: torch.Tensor, aim: torch.Tensor, peak: int
) -> torch.Tensor:
    """Whole numbers [groups, K, O] from `whole` on, of which changing a single one gains nothing
    more (or SWEEPS were done)."""
    slope = gram @ (whole * scale - aim)
    own = torch.diagonal(gram, dim1=1, dim2=2)
    step = scale[:, 0]
    for _ in range(SWEEPS):
        before = whole.clone()
        for k in range(whole.shape[1]):
            better = _nearest(whole[:, k] - slope[:, k] / (own[:, k, None] * step), peak)
            change = (better - whole[:, k]) * step
            whole[:, k] = better
            slope += gram[:, :, k, None] * change[:, None, :]
        if torch.equal(before, whole):
            break
    return whole
