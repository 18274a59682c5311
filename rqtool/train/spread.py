"""Which rows meet in a read, chosen from what they carry: `--pack spread`.

An ADC's step is as wide as its partial sums reach, so what the reads of an output lose grows with
the sum over tiles of E[p_t ** 2]:

    E[p_t ** 2] = sum over rows i, k of tile t of  M[i, k],    M[i, k] = E[x_i * x_k] * sum over columns of w_i * w_k

Products that rise together make it large where they meet (the taps of one kernel do, for
neighbouring pixels are alike), and products that cancel make it small. All tiles together sum to
the same whichever rows meet, so an order of the rows costs a digital side nothing but the order in
which it drives its wordlines.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from rqtool.mapping.plan import Plan

ROW_VALUES = 1 << 24  # input codes of rows that are looked at, at most
POSITIONS = 1 << 14  # and the positions at which their products are averaged
SEARCHED = 1152  # rows among which an order is searched at once
SWEEPS = 40


@torch.no_grad()
def spread_order(codes: torch.Tensor, weight: torch.Tensor, plan: Plan) -> tuple[int, ...]:
    """The row of a group at each of its K places, as in `Plan`; one order for all convolution
    groups.

    codes: padded [N, C, H, W] whole numbers; weight: [O, K]. Beyond SEARCHED rows, neighbouring
    rows are dealt to several searches.
    """
    rows, columns = (
        _rows(codes, plan),
        weight.view(plan.geometry.groups, -1, plan.geometry.rows).double(),
    )
    sizes = np.array([stop - start for start, stop in plan.tiles])
    searches = min(len(sizes), -(-plan.geometry.rows // SEARCHED))
    dealt = np.argsort(np.arange(plan.geometry.rows) % searches, kind="stable")
    order, at = [], 0
    for part in np.array_split(sizes, searches):
        mine = torch.from_numpy(dealt[at : at + part.sum()])
        x, w = (
            rows[:, mine].double(),
            columns[:, :, mine],
        )  # whole numbers: the same sums on any number of threads
        meeting = ((x @ x.transpose(1, 2)) * (w.transpose(1, 2) @ w)).sum(0).numpy()
        order.append(dealt[at + least_meeting(meeting, part)])
        at += part.sum()
    return tuple(np.concatenate(order).tolist())


def _rows(codes: torch.Tensor, plan: Plan) -> torch.Tensor:
    """float32 [groups, K, positions]: the codes of the rows at some positions of some images, both
    left out evenly."""
    g = plan.geometry
    height, width = (n - d * (k - 1) for n, d, k in zip(codes.shape[2:], g.dilation, g.kernel))
    codes = codes[
        :: max(
            1,
            codes.shape[0] * g.channels * g.kernel[0] * g.kernel[1] * height * width // ROW_VALUES,
        )
    ]
    rows = (
        F.unfold(codes.float(), g.kernel, g.dilation, 0, g.stride)
        .view(codes.shape[0], g.groups, g.rows, -1)
        .permute(1, 2, 0, 3)
        .flatten(2)
    )
    return rows[
        :, :, :: rows.shape[2] // POSITIONS | 1
    ]  # odd, so that it does not fall on the same column of every image


def least_meeting(meeting: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [K]: an order of the rows in which the sum of `meeting` [K, K] (symmetric) within tiles
    of these sizes is small.

    From the rows in order, each row in turn changes places with the row of another tile that lowers
    the sum most, until none does.
    """
    n, tiles = np.arange(len(meeting)), np.arange(len(sizes))
    tile, meeting = np.repeat(tiles, sizes), meeting - np.diag(meeting.diagonal())
    gain = -1e-9 * np.abs(meeting).max(initial=0)  # less is rounding
    joins = meeting @ (tile[:, None] == tiles)  # [row, tile]: what a row adds to a tile
    for _ in range(SWEEPS):
        before = tile.copy()
        for i in n:
            mine, stays = tile[i], joins[n, tile]
            change = np.where(
                tile == mine, 0, joins[i, tile] - stays[i] + joins[:, mine] - stays - 2 * meeting[i]
            )
            k = change.argmin()
            if change[k] < gain:
                joins[:, [mine, tile[k]]] += np.outer(meeting[k] - meeting[i], [1, -1])
                tile[i], tile[k] = tile[k], mine
        if np.array_equal(tile, before):
            break
    return np.argsort(tile, kind="stable")
