"""Histograms of partial sums: what calibration minimises over, and what clip rates are read from."""

from __future__ import annotations

import numpy as np
import torch

from rqtool.kernels import reference
from rqtool.kernels.spec import ReadSpec, make_spec
from rqtool.mapping.plan import Plan
from rqtool.mapping.planes import extract
from rqtool.train.layers import group_shape
from rqtool.train.reads import unpadded

SAMPLED = 6_000_000  # partial sums counted per layer at most


def plain_spec(plan: Plan) -> ReadSpec:
    """A spec whose ADC is not used: only its tiles are."""
    one = np.ones((1, 1))
    return unpadded(make_spec(plan, one, one, one))


@torch.no_grad()
def partial_sum_histogram(codes: torch.Tensor, weight: torch.Tensor, plan: Plan) -> np.ndarray:
    """int64 [groups of steps, p_max - p_min + 1]: how often each partial sum occurs, over all planes.

    codes: padded [N, C, H, W] whole numbers; weight: [O, K]. Images are left out evenly beyond some millions of partial sums.
    """
    spec, macro = plain_spec(plan), plan.macro
    per_image = plan.reads_per_position * int(np.prod(reference._positions(codes, spec)))
    codes = codes[:: max(1, codes.shape[0] * per_image // SAMPLED)].int()
    shape, span = group_shape(plan), macro.p_max - macro.p_min + 1
    counts = np.zeros((shape[0] * shape[1], span), np.int64)
    for b in plan.weight_planes:
        reads = reference._Reads(extract(weight.int(), b).float(), spec, torch.float32)
        for a in plan.input_planes:
            for part in reference._chunks(extract(codes, a).float(), spec, per_image // plan.reads_per_position):
                counts += _count(reads.partial_sums(reference._columns(part, spec)), shape, macro.p_min, span)
    return counts


def _count(p: torch.Tensor, shape: tuple[int, int], p_min: int, span: int) -> np.ndarray:
    """Histogram of p [n, conv groups, T, columns of a group, L] by tile, by column, or all together."""
    index = p.long() - p_min
    if shape[0] > 1:
        index += span * torch.arange(shape[0]).view(1, 1, -1, 1, 1)
    elif shape[1] > 1:
        index += span * torch.arange(shape[1]).view(1, p.shape[1], 1, p.shape[3], 1)
    rows = shape[0] * shape[1]
    return torch.bincount(index.flatten(), minlength=rows * span).view(rows, span).numpy()
