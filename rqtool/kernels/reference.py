"""The reads in plain torch, a few images at a time: any device, any size, any dtype; the fallback
where no faster path is certified.

It is also the readable form of the gradients: `forward` and `backward` stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from rqtool.kernels.spec import ReadSpec, Tables
from rqtool.mapping.plan import Geometry

CHUNK_VALUES = 1 << 22  # partial sums held at once, where all tiles are
TILE_VALUES = 1 << 17  # and of one tile


def _columns(x: torch.Tensor, spec: ReadSpec) -> torch.Tensor:
    """[N, groups, T, longest tile, L] from the padded x [N, C, H, W]; a short tile ends in zeros."""
    g = spec.geometry
    rows = F.unfold(x, g.kernel, g.dilation, 0, g.stride).view(x.shape[0], g.groups, g.rows, -1)
    return _tiled(_placed(rows, spec, dim=2), spec, dim=2)


def _placed(rows: torch.Tensor, spec: ReadSpec, dim: int) -> torch.Tensor:
    """Axis `dim` of length K with the row of each place in its place."""
    return (
        rows
        if spec.order is None
        else rows.index_select(dim, torch.tensor(spec.order, device=rows.device))
    )


def _unplaced(rows: torch.Tensor, spec: ReadSpec, dim: int) -> torch.Tensor:
    """The way back."""
    return (
        rows
        if spec.order is None
        else torch.empty_like(rows).index_copy_(
            dim, torch.tensor(spec.order, device=rows.device), rows
        )
    )


def _tiled(rows: torch.Tensor, spec: ReadSpec, dim: int) -> torch.Tensor:
    """Axis `dim` of length K cut into (tile, row of the tile), zeros behind a short tile."""
    longest = max(stop - start for start, stop in spec.tiles)
    index = torch.tensor(
        [
            [min(start + r, stop) if start + r < stop else rows.shape[dim] for r in range(longest)]
            for start, stop in spec.tiles
        ],
        device=rows.device,
    )
    padded = torch.cat([rows, torch.zeros_like(rows.narrow(dim, 0, 1))], dim)
    return padded.index_select(dim, index.flatten()).unflatten(dim, index.shape)


class _Reads:
    """All tiles at once, for what looks at every partial sum (histograms, gradients of tables)."""

    def __init__(self, weight: torch.Tensor, spec: ReadSpec, dtype: torch.dtype) -> None:
        g = spec.geometry
        self.spec, self.geometry = spec, g
        self.weight = _tiled(
            _placed(weight.to(dtype).view(g.groups, g.group_columns, g.rows), spec, dim=2),
            spec,
            dim=2,
        ).transpose(1, 2)  # [G, T, Og, wl]

    def partial_sums(self, columns: torch.Tensor) -> torch.Tensor:
        """[n, groups, T, columns of a group, L]."""
        return self.weight @ columns


class Tiles:
    """One call tile by tile, for weights and rows of all groups at once: what forward and backward
    do to a chunk of images.

    Rows and partial sums are [groups, .., n * L], n images of L positions. A table that is the same
    for all columns of a tile is a plain number, for torch is several times faster with those.
    """

    def __init__(self, weight: torch.Tensor, spec: ReadSpec, like: torch.Tensor) -> None:
        g = spec.geometry
        self.spec, self.geometry, self.like = spec, g, like
        weight = _placed(weight.to(like.dtype).view(g.groups, g.group_columns, g.rows), spec, dim=2)
        self.half = like.new_tensor(0.5)
        self.weights = [weight[:, :, a:b].contiguous() for a, b in spec.tiles]
        self.rate, self.lo, self.hi, self.gain = (
            self._of_tiles(a) for a in (spec.rate, spec.lo, spec.hi, spec.gain)
        )

    def _of_tiles(self, table) -> list:
        """For each tile a float, or [groups, columns of a group, 1]."""
        rows = [row.reshape(self.geometry.groups, -1, 1) for row in table]
        return [
            float(row.flat[0])
            if (row == row.flat[0]).all()
            else torch.as_tensor(row, device=self.like.device).to(self.like.dtype)
            for row in rows
        ]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[groups, K, n * L] of a chunk of images, a row at each place."""
        g = self.geometry
        (n, c, h, w), (down, right), (dh, dw) = x.stride(), g.stride, g.dilation
        seen = x.as_strided(
            (x.shape[1], *g.kernel, x.shape[0], *_positions(x, self.spec)),
            (c, dh * h, dw * w, n, down * h, right * w),
            x.storage_offset(),
        )
        return _placed(
            seen.reshape(g.groups, g.rows, -1), self.spec, dim=1
        )  # one copy; F.unfold makes another order, and a second copy

    def partial_sums(
        self, rows: torch.Tensor, t: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        start, stop = self.spec.tiles[t]
        return torch.bmm(self.weights[t], rows[:, start:stop], out=out)

    def raw_code(self, p: torch.Tensor, t: int, chunk: int) -> torch.Tensor:
        """floor(p * rate + 1/2 + noise), in place of p."""
        torch.add(self.half, p, alpha=self.rate[t], out=p) if isinstance(
            self.rate[t], float
        ) else p.mul_(self.rate[t]).add_(0.5)
        if self.spec.noise is not None:
            p.add_(self.noise(p, t, chunk))
        return p.floor_()

    def noise(self, p: torch.Tensor, t: int, chunk: int) -> torch.Tensor:
        """The draws of one tile and one chunk of images, the same in both passes."""
        generator = torch.Generator().manual_seed(
            ((self.spec.noise.seed * 65537 + chunk) * 4099 + t) % (1 << 63)
        )
        draws = torch.as_tensor(self.spec.noise.draws)
        return draws[torch.randint(draws.numel(), p.shape, generator=generator)].to(p)

    def lookup(self, table, p: torch.Tensor, t: int) -> torch.Tensor:
        """table[row, p - p_min] for every partial sum of a tile."""
        tables = self.spec.tables
        flat = torch.as_tensor(table, device=p.device).to(p.dtype)
        row = torch.as_tensor(tables.row[t], device=p.device).view(self.geometry.groups, -1, 1)
        return flat.flatten()[row * flat.shape[1] + (p.long() - tables.p_min)]

    def values(self, p: torch.Tensor, t: int, chunk: int) -> torch.Tensor:
        """gain * (code - zero) of every partial sum, or its table value; p is used up."""
        if self.spec.values is not None:
            return self.lookup(self.spec.values, p, t).mul_(self.gain[t])
        q = self.raw_code(p, t, chunk).clamp_(self.lo[t], self.hi[t])
        return q if isinstance(self.gain[t], float) and self.gain[t] == 1 else q.mul_(self.gain[t])

    def slopes(
        self, p: torch.Tensor, t: int, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(slope, q - u * slope, slope - 1): how a read answers to its partial sum, its step and
        its zero (0 where a table gives the values)."""
        table, u = self.spec.slopes, p * self.rate[t]
        raw = self.raw_code(p.clone(), t, chunk)
        q = raw.clamp(self.lo[t], self.hi[t])
        slope = (raw == q).to(p.dtype) if table is None else self.lookup(table, p, t)
        learned = self.spec.values is None
        return slope, *((q - u * slope, slope - 1) if learned else (torch.zeros_like(p),) * 2)


def codes(p: np.ndarray, mult: int, shift: int, lo: int, hi: int) -> np.ndarray:
    """float32 code - zero of whole-number partial sums through the very lines of `forward`: what
    certification compares."""
    one = np.ones((1, 1))
    spec = ReadSpec(
        Geometry(1, 1),
        ((0, 1),),
        one * (mult / 2.0**shift),
        one * lo,
        one * hi,
        one,
        int(np.abs(p).max()),
    )
    sums = torch.from_numpy(p.astype(np.float32)).view(1, 1, -1)
    return Tiles(torch.ones(1, 1), spec, sums).values(sums, 0, 0).flatten().numpy()


def _chunks(x: torch.Tensor, spec: ReadSpec, positions: int):
    per_image = len(spec.tiles) * spec.geometry.columns * positions
    return x.split(max(1, CHUNK_VALUES // max(1, per_image)))


def _positions(x: torch.Tensor, spec: ReadSpec) -> tuple[int, int]:
    g = spec.geometry
    return tuple(
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], g.kernel, g.stride, g.dilation)
    )


def _tile_chunks(x: torch.Tensor, spec: ReadSpec) -> tuple[torch.Tensor, ...]:
    """Images whose partial sums of one tile stay in a processor's cache."""
    per_image = spec.geometry.columns * math.prod(_positions(x, spec))
    return x.split(max(1, TILE_VALUES // max(1, per_image)))


def forward(
    x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec, kind: type[Tiles] = Tiles
) -> torch.Tensor:
    """acc [N, O, H_out, W_out] in x's dtype and on its device. x: [N, C, H, W] codes, already
    padded; weight: [O, K]; kind: what a read makes of a partial sum."""
    tiles, parts = kind(weight, spec, x), []
    for c, part in enumerate(_tile_chunks(x, spec)):
        rows = tiles.rows(part)
        acc, p = (
            rows.new_zeros(spec.geometry.groups, spec.geometry.group_columns, rows.shape[2])
            for _ in range(2)
        )
        for t in range(len(spec.tiles)):
            acc += tiles.values(tiles.partial_sums(rows, t, p), t, c)
        parts.append(acc.reshape(spec.geometry.columns, len(part), -1).transpose(0, 1))
    return torch.cat(parts).unflatten(2, _positions(x, spec))


def backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    spec: ReadSpec,
    gy: torch.Tensor,
    kind: type[Tiles] = Tiles,
) -> tuple[torch.Tensor, ...]:
    """(dx of the padded x, dw [O, K], dstep [T, O], dzero [T, O]) for gy [N, O, H_out, W_out], with
    the forward pass's noise.

    dstep = sum of gy * (q - u * slope), dzero = sum of gy * (slope - 1), what the step is
    multiplied with; 0 where tables give the values.
    """
    tiles, g = kind(weight, spec, x), spec.geometry
    chunks = _tile_chunks(x, spec)
    dw, dx = torch.zeros(g.groups, g.group_columns, g.rows).to(x), []
    dstep, dzero = (torch.zeros(len(spec.tiles), g.columns).to(x) for _ in range(2))
    for c, (part, gpart) in enumerate(zip(chunks, gy.split(len(chunks[0])))):
        rows, grad = (
            tiles.rows(part),
            gpart.flatten(2).transpose(0, 1).reshape(g.groups, g.group_columns, -1),
        )
        drows = torch.empty_like(rows)
        for t, (start, stop) in enumerate(spec.tiles):
            slope, step_slope, zero_slope = tiles.slopes(tiles.partial_sums(rows, t), t, c)
            dstep[t] += (grad * step_slope).sum(-1).flatten()
            dzero[t] += (grad * zero_slope).sum(-1).flatten()
            d = grad * slope
            dw[:, :, start:stop] += d @ rows[:, start:stop].transpose(1, 2)
            drows[:, start:stop] = tiles.weights[t].transpose(1, 2) @ d
        drows = (
            _unplaced(drows, spec, dim=1)
            .unflatten(2, (len(part), -1))
            .permute(2, 0, 1, 3)
            .flatten(1, 2)
        )
        dx.append(F.fold(drows, part.shape[2:], g.kernel, g.dilation, 0, g.stride))
    return torch.cat(dx), _unplaced(dw, spec, dim=2).reshape(g.columns, g.rows), dstep, dzero


def count(p: torch.Tensor, grad: torch.Tensor, tables: Tables, total: torch.Tensor) -> None:
    """total float64 [rows, P] gains, at the row and the partial sum of each read, its gradient: p
    [n, groups, T, columns of a group, L] with grad [n, O, L], the same for all tiles."""
    _, groups, tiles, columns, _ = p.shape
    row = (
        torch.as_tensor(tables.row, device=p.device).view(tiles, groups, columns, 1).transpose(0, 1)
    )
    index = row * total.shape[1] + (p.long() - tables.p_min)
    weights = grad.unflatten(1, (groups, 1, columns)).expand(p.shape)
    total += torch.bincount(
        index.flatten(), weights.flatten().double(), minlength=total.numel()
    ).view_as(total)


def table_gradient(
    x: torch.Tensor,
    weight: torch.Tensor,
    spec: ReadSpec,
    gy: torch.Tensor,
    counted: Callable = count,
) -> torch.Tensor:
    """The gradient float64 [rows, P] of every entry of `spec.tables.value`: the sum of gy over the
    reads that looked it up."""
    reads, total = (
        _Reads(weight, spec, x.dtype),
        torch.zeros(spec.tables.value.shape, dtype=torch.float64, device=x.device),
    )
    positions = math.prod(_positions(x, spec))
    for part, gpart in zip(_chunks(x, spec, positions), _chunks(gy, spec, positions)):
        counted(reads.partial_sums(_columns(part, spec)), gpart.flatten(2), spec.tables, total)
    return total
