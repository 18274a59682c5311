"""The modes whose forward pass is soft, kept for comparison: a read gives no code of the ADC but a
real number between codes.

    mean      m(u), the expected code of the relaxed ADC (train/relax.py), as a table over all partial sums
    gumbel    sum_k w_k * k over the 5 codes nearest to u, w = softmax((log P(code = k) + Gumbel noise) / LAMBDA)
              (Louizos et al., ICLR 2019; the end codes take all that lies beyond them)

`mean` costs a look-up and a histogram per read; `gumbel` five look-ups and five exponentials, and
ten of the first in the backward pass. They run on the loops of kernels/reference.py, which keep
nothing between the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, log1p

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from rqtool.kernels import reference
from rqtool.kernels.spec import ReadSpec, Tables, inside_spec, over_reads, read_spec
from rqtool.mapping.plan import Plan
from rqtool.train.adc_numbers import AdcNumbers
from rqtool.train.reads import learned_table_reads, reads, unpadded
from rqtool.train.relax import SEEDS, Relaxation, mean_code, mean_slope

LAMBDA = 2 / 3  # temperature of the softmax, as Maddison et al. (ICLR 2017) found it to work best
NEAREST = 5
GUMBEL_DRAWS = (
    1 << 19
)  # of which a tile of a chunk takes a run from anywhere, for each of the nearest codes


# -- mean ------------------------------------------------------------------------------------------
def mean_table(
    step: torch.Tensor, zero: torch.Tensor, plan: Plan, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, slope): step * (m(u) - zero) under autograd, and m'(u) without, float64 [groups, P]
    for every partial sum.

    step, zero: [1 or T, 1 or O]; autograd gives d/dstep = (m - zero) - (u - zero) * m' and d/dzero
    = step * (m' - 1).
    """
    macro = plan.macro
    shape = torch.broadcast_shapes(step.shape, zero.shape)
    step, zero = (a.double().expand(shape).reshape(-1, 1) for a in (step, zero))
    u = torch.arange(macro.p_min, macro.p_max + 1) / step + zero
    return step * (mean_code(u, macro.top, tau) - zero), mean_slope(u.detach(), macro.top, tau)


def mean_call(
    plan: Plan,
    numbers: AdcNumbers,
    step: torch.Tensor,
    zero: torch.Tensor | None,
    relax: Relaxation,
) -> Callable:
    """call(x, w, pair) -> what the reads of a pair of planes add up to, in partial-sum units.

    step, and zero where it is learned: [1 or T, 1 or O] under autograd, with the values of
    `numbers`.
    """
    zero = numbers.zero if zero is None else zero
    value, slope = mean_table(step, zero, plan, relax.tau)
    rows = np.arange(value.shape[0]).reshape(torch.broadcast_shapes(step.shape, zero.shape))
    tables = Tables(
        plan.macro.p_min,
        over_reads(rows, plan).astype(np.int64),
        slope.float().numpy(),
        value.detach().float().numpy(),
    )
    # with values in tables, only the tiles count
    spec = unpadded(replace(inside_spec(plan, 0, 0), tables=tables))
    return lambda x, w, pair: learned_table_reads(x, w, value, spec, spec)


# -- gumbel ----------------------------------------------------------------------------------------
def nearest_codes(u: torch.Tensor, top: int) -> torch.Tensor:
    """The codes next to u [..], at most 5 in 0 .. top, as [.., 5].

    >>> nearest_codes(torch.tensor([-3.0, 7.4, 20.0]), 15).tolist()
    [[0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 9.0], [11.0, 12.0, 13.0, 14.0, 15.0]]
    """
    count = min(NEAREST, top + 1)
    first = (torch.floor(u.detach() + 0.5) - NEAREST // 2).clamp(0, top + 1 - count)
    return first.unsqueeze(-1) + torch.arange(count, dtype=u.dtype, device=u.device)


def log_probability(
    u: torch.Tensor, codes: torch.Tensor, top: int, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log P(code = k) of the relaxed ADC at u [..] and its derivative by u, both [.., k], in a form
    that is exact far away from u too: sigmoid(a) - sigmoid(a - 1/tau) = sigmoid(a) * sigmoid(1/tau
    - a) * (1 - exp(-1/tau))."""
    at_least = (u.unsqueeze(-1) - codes + 0.5) / tau
    not_more = 1 / tau - at_least
    up, down = logsigmoid(at_least), logsigmoid(not_more)
    rises, falls = torch.sigmoid(-at_least) / tau, torch.sigmoid(-not_more) / tau
    low, high = codes == 0, codes == top
    score = torch.where(low, down, torch.where(high, up, up + down + log1p(-exp(-1 / tau))))
    return score, torch.where(low, -falls, torch.where(high, rises, rises - falls))


@dataclass(frozen=True)
class GumbelTables(Tables):
    """What the softmax is made of at every partial sum, float32: scores [5, rows, P], log P /
    LAMBDA of the nearest codes; leans [5, rows, P], their derivatives by u; first [rows, P], the
    lowest of the codes less the zero. seed: of the noise."""

    scores: torch.Tensor | None = None
    leans: torch.Tensor | None = None
    first: torch.Tensor | None = None
    seed: int = 0


def gumbel_tables(
    step: torch.Tensor, zero: torch.Tensor, plan: Plan, tau: float, seed: int
) -> GumbelTables:
    """For steps and zeros [1 or T, 1 or O], as numbers."""
    macro, shape = plan.macro, torch.broadcast_shapes(step.shape, zero.shape)
    step, zero = (a.detach().double().expand(shape).reshape(-1, 1) for a in (step, zero))
    u = torch.arange(macro.p_min, macro.p_max + 1) / step + zero
    codes = nearest_codes(u, macro.top)
    scores, leans = (
        a.movedim(-1, 0).float() / LAMBDA for a in log_probability(u, codes, macro.top, tau)
    )
    row = over_reads(np.arange(len(step)).reshape(shape), plan).astype(np.int64)
    return GumbelTables(
        macro.p_min,
        row,
        np.zeros((0, u.shape[1]), np.float32),
        None,
        scores,
        leans,
        (codes[..., 0] - zero).float(),
        seed,
    )


@lru_cache(maxsize=1)
def gumbel_draws() -> torch.Tensor:
    """float32: Gumbel noise / LAMBDA."""
    uniform = torch.rand(GUMBEL_DRAWS, generator=torch.Generator().manual_seed(0)).clamp(
        1e-7, 1 - 1e-7
    )
    return -torch.log(-torch.log(uniform)) / LAMBDA


class GumbelTiles(reference.Tiles):
    """The reads of reference.py with soft codes; noise is a run of the draws from a place that
    seed, chunk, tile and code choose."""

    def softmax(
        self, p: torch.Tensor, t: int, chunk: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(where each partial sum is in the tables, the weights of its nearest codes)."""
        tables, draws = self.spec.tables, gumbel_draws()
        span = tables.first.shape[1]
        at = (
            p.long()
            - tables.p_min
            + torch.as_tensor(tables.row[t]).view(self.geometry.groups, -1, 1) * span
        )
        draws = draws.repeat(-(-p.numel() // GUMBEL_DRAWS) + 1)
        generator = torch.Generator().manual_seed(
            ((tables.seed * 65537 + chunk) * 4099 + t) % (1 << 63)
        )
        starts = torch.randint(GUMBEL_DRAWS, (len(tables.scores),), generator=generator).tolist()
        weights = [
            (score.take(at) + draws[start : start + p.numel()].view_as(p)).exp_()
            for score, start in zip(tables.scores, starts)
        ]
        total = sum(weights)
        return at, [w.div_(total) for w in weights]

    def values(self, p: torch.Tensor, t: int, chunk: int) -> torch.Tensor:
        at, weights = self.softmax(p, t, chunk)
        return (
            self.spec.tables.first.take(at) + sum(k * w for k, w in enumerate(weights))
        ) * self.gain[t]

    def slopes(
        self, p: torch.Tensor, t: int, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """d sum_k w_k * k = sum_k w_k * k * s_k - (sum_k w_k * k) * (sum_k w_k * s_k) for d s_k, as
        of any softmax."""
        at, weights = self.softmax(p, t, chunk)
        lean = [w * s.take(at) for w, s in zip(weights, self.spec.tables.leans)]
        code = sum(k * w for k, w in enumerate(weights))
        slope = sum(k * s for k, s in enumerate(lean)) - code * sum(lean)
        return slope, self.spec.tables.first.take(at) + code - p * self.rate[t] * slope, slope - 1


class Gumbel:
    """A carrier of soft codes, as those of kernels/choose.py."""

    keep = staticmethod(lambda x: x)

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec) -> torch.Tensor:
        return reference.forward(x, weight, spec, GumbelTiles)

    @staticmethod
    def backward(
        x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec, gy: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return reference.backward(x, weight, spec, gy, GumbelTiles)


def gumbel_call(
    plan: Plan,
    numbers: AdcNumbers,
    step: torch.Tensor,
    zero: torch.Tensor | None,
    relax: Relaxation,
) -> Callable:
    """As `mean_call`."""
    spec = unpadded(read_spec(plan, numbers.adc))

    def call(x: torch.Tensor, w: torch.Tensor, pair: int) -> torch.Tensor:
        tables = gumbel_tables(
            numbers.step, numbers.zero, plan, relax.tau, (relax.seed * 64 + pair) % SEEDS
        )
        return reads(x, w, step, replace(spec, tables=tables), numbers.unit.float(), zero, Gumbel)

    return call


CALLS = {"mean": mean_call, "gumbel": gumbel_call}
