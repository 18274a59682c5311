"""The modes whose forward pass is soft, kept for comparison: a read gives no code of the ADC but a real number between codes.

    mean      m(u), the expected code of the relaxed ADC (train/relax.py), as a table over all partial sums
    gumbel    sum_k w_k * k over the 5 codes nearest to u, w = softmax((log P(code = k) + Gumbel noise) / LAMBDA)
              (Louizos et al., ICLR 2019; the end codes take all that lies beyond them)

Both are written for clarity. `mean` costs a look-up and a histogram per read; `gumbel` is many times slower than the other modes, a
few images at a time, with its forward pass done again in the backward pass so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log1p

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from rqtool.kernels import reference
from rqtool.kernels.spec import ReadSpec, Tables, make_spec, over_reads
from rqtool.mapping.plan import Plan
from rqtool.train.reads import learned_table_reads, unpadded
from rqtool.train.relax import SEEDS, Relaxation, mean_code, mean_slope

LAMBDA = 2 / 3  # temperature of the softmax, as Maddison et al. (ICLR 2017) found it to work best
NEAREST = 5
CHUNK_VALUES = 1 << 18  # partial sums whose softmax is held at once


# -- mean --------------------------------------------------------------------------------------------------------------
def mean_table(step: torch.Tensor, zero: torch.Tensor, plan: Plan, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, slope): step * (m(u) - zero) under autograd, and m'(u) without, float64 [groups, P] for every partial sum.

    step, zero: [1 or T, 1 or O]; autograd gives d/dstep = (m - zero) - (u - zero) * m' and d/dzero = step * (m' - 1).
    """
    macro = plan.macro
    shape = torch.broadcast_shapes(step.shape, zero.shape)
    step, zero = (a.double().expand(shape).reshape(-1, 1) for a in (step, zero))
    u = torch.arange(macro.p_min, macro.p_max + 1) / step + zero
    return step * (mean_code(u, macro.top, tau) - zero), mean_slope(u.detach(), macro.top, tau)


def mean_call(plan: Plan, step: torch.Tensor, zero: torch.Tensor, relax: Relaxation) -> Callable:
    """call(x, w, pair) -> what the reads of a pair of planes add up to, in partial-sum units."""
    value, slope = mean_table(step, zero, plan, relax.tau)
    rows = np.arange(value.shape[0]).reshape(torch.broadcast_shapes(step.shape, zero.shape))
    tables = Tables(plan.macro.p_min, over_reads(rows, plan).astype(np.int64), slope.float().numpy(), value.detach().float().numpy())
    spec = unpadded(make_spec(plan, *np.ones((3, 1, 1)), tables=tables))  # with values in tables, only the tiles count
    return lambda x, w, pair: learned_table_reads(x, w, value, spec)


# -- gumbel ------------------------------------------------------------------------------------------------------------
def nearest_codes(u: torch.Tensor, top: int) -> torch.Tensor:
    """The codes next to u [..], at most 5 in 0 .. top, as [.., 5].

    >>> nearest_codes(torch.tensor([-3.0, 7.4, 20.0]), 15).tolist()
    [[0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 9.0], [11.0, 12.0, 13.0, 14.0, 15.0]]
    """
    count = min(NEAREST, top + 1)
    first = (torch.floor(u.detach() + 0.5) - NEAREST // 2).clamp(0, top + 1 - count)
    return first.unsqueeze(-1) + torch.arange(count, dtype=u.dtype, device=u.device)


def log_probability(u: torch.Tensor, codes: torch.Tensor, top: int, tau: float) -> torch.Tensor:
    """log P(code = k) [.., k] of the relaxed ADC at u [..], in a form that is exact far away from u too:
    sigmoid(a) - sigmoid(a - 1/tau) = sigmoid(a) * sigmoid(1/tau - a) * (1 - exp(-1/tau))."""
    at_least = (u.unsqueeze(-1) - codes + 0.5) / tau
    not_more = 1 / tau - at_least
    inner = logsigmoid(at_least) + logsigmoid(not_more) + log1p(-exp(-1 / tau))
    return torch.where(codes == 0, logsigmoid(not_more), torch.where(codes == top, logsigmoid(at_least), inner))


def gumbel_code(u: torch.Tensor, top: int, tau: float, uniform: torch.Tensor, temperature: float = LAMBDA) -> torch.Tensor:
    """A soft code [..] for u [..]; uniform: random numbers within 0 and 1, [.., as many as there are nearest codes]."""
    codes = nearest_codes(u, top)
    scores = log_probability(u, codes, top, tau) - torch.log(-torch.log(uniform))
    return ((scores / temperature).softmax(-1) * codes).sum(-1)


def gumbel_call(plan: Plan, step: torch.Tensor, zero: torch.Tensor, relax: Relaxation) -> Callable:
    """As `mean_call`."""
    spec = unpadded(make_spec(plan, *np.ones((3, 1, 1))))
    over = (len(plan.tiles), plan.geometry.columns)

    def call(x: torch.Tensor, w: torch.Tensor, pair: int) -> torch.Tensor:
        height, width = reference._positions(x, spec)
        seed = (relax.seed * 64 + pair) % SEEDS << 16
        parts = x.split(max(1, CHUNK_VALUES // max(1, over[0] * over[1] * height * width)))
        numbers = [a.to(x.dtype).expand(over) for a in (step, zero)]
        done = [checkpoint(_gumbel_reads, part, w, *numbers, spec, plan.macro.top, relax.tau, seed + n, use_reentrant=False) for n, part in enumerate(parts)]
        return torch.cat(done).unflatten(2, (height, width))

    return call


def _gumbel_reads(x: torch.Tensor, w: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, spec: ReadSpec, top: int, tau: float, seed: int) -> torch.Tensor:
    """[n, O, L] of one chunk; the noise is the same whenever it is called with the same seed."""
    reads = reference._Reads(w, spec, x.dtype)
    step, zero = (reads.per_read(a, x.device, x.dtype) for a in (step, zero))
    u = reads.partial_sums(reference._columns(x, spec)) / step + zero
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(*u.shape, min(NEAREST, top + 1), generator=generator).clamp(1e-7, 1 - 1e-7).to(u)
    return (step * (gumbel_code(u, top, tau, uniform) - zero)).sum(2).flatten(1, 2)


CALLS = {"mean": mean_call, "gumbel": gumbel_call}
