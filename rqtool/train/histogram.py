"""Histograms of partial sums: what calibration minimises over, and what clip rates are read from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from rqtool.kernels import reference
from rqtool.kernels.spec import ReadSpec, inside_spec
from rqtool.mapping.cells import cells
from rqtool.mapping.plan import Plan
from rqtool.mapping.planes import extract
from rqtool.train.adc_numbers import group_shape
from rqtool.train.reads import unpadded

SAMPLED = 6_000_000  # partial sums counted per layer at most


def plain_spec(plan: Plan) -> ReadSpec:
    """A spec whose ADC is not used: only its tiles are."""
    return unpadded(inside_spec(plan, 0, 0))


@torch.no_grad()
def partial_sum_histogram(codes: torch.Tensor, weight: torch.Tensor, plan: Plan) -> np.ndarray:
    """int64 [groups of steps, p_max - p_min + 1]: how often each partial sum occurs, over all
    planes.

    codes: padded [N, C, H, W] whole numbers; weight: [O, K]. Images are left out evenly beyond some
    millions of partial sums.
    """
    return _histogram(_sampled(codes, plan), weight, plan, plain_spec(plan), group_shape(plan))


@torch.no_grad()
def tile_histograms(codes: torch.Tensor, weight: torch.Tensor, plan: Plan) -> Iterator[np.ndarray]:
    """The same for one tile after another (of all convolution groups together), from the same
    images: int64 [1, P], or [O, P] where columns have steps of their own. One at a time, for all of
    them at once need not fit into the memory."""
    codes, spec, shape = _sampled(codes, plan), plain_spec(plan), (1, group_shape(plan)[1])
    for tile in plan.tiles:
        yield _histogram(codes, weight, plan, replace(spec, tiles=(tile,)), shape)


def _positions(codes: torch.Tensor, plan: Plan) -> int:
    return int(np.prod(reference._positions(codes, plain_spec(plan))))


def _sampled(codes: torch.Tensor, plan: Plan) -> torch.Tensor:
    """int32 codes of so many images that SAMPLED partial sums are not passed by much."""
    return codes[
        :: max(1, codes.shape[0] * plan.reads_per_position * _positions(codes, plan) // SAMPLED)
    ].int()


def _histogram(
    codes: torch.Tensor, weight: torch.Tensor, plan: Plan, spec: ReadSpec, shape: tuple[int, int]
) -> np.ndarray:
    """int64 [prod(shape), P] over the tiles of `spec`; shape: (1 or T, 1 or O), who is counted
    apart."""
    macro, positions = plan.macro, _positions(codes, plan)
    span = macro.p_max - macro.p_min + 1
    counts = np.zeros((shape[0] * shape[1], span), np.int64)
    for held in cells(plan, weight.int()):
        reads = reference._Reads(held.float(), spec, torch.float32)
        for a in plan.input_planes:
            for part in reference._chunks(extract(codes, a).float(), spec, positions):
                counts += _count(
                    reads.partial_sums(reference._columns(part, spec)), shape, macro.p_min, span
                )
    return counts


def _count(p: torch.Tensor, shape: tuple[int, int], p_min: int, span: int) -> np.ndarray:
    """Histogram of p [n, conv groups, T, columns of a group, L] by tile, by column, or all
    together."""
    index = p.long() - p_min
    if shape[0] > 1:
        index += span * torch.arange(shape[0]).view(1, 1, -1, 1, 1)
    elif shape[1] > 1:
        index += span * torch.arange(shape[1]).view(1, p.shape[1], 1, p.shape[3], 1)
    rows = shape[0] * shape[1]
    return torch.bincount(index.flatten(), minlength=rows * span).view(rows, span).numpy()
