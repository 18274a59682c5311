"""The reads in plain torch, a few images at a time: any device, any size, any dtype; the fallback where no faster path is certified.

It is also the readable form of the gradients: `forward` and `backward` stand side by side.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from rqtool.kernels.spec import ReadSpec

CHUNK_VALUES = 1 << 22  # partial sums held at once


def _columns(x: torch.Tensor, spec: ReadSpec) -> torch.Tensor:
    """[N, groups, T, longest tile, L] from the padded x [N, C, H, W]; a short tile ends in zeros."""
    g = spec.geometry
    rows = F.unfold(x, g.kernel, g.dilation, 0, g.stride).view(x.shape[0], g.groups, g.rows, -1)
    return _tiled(rows, spec, dim=2)


def _tiled(rows: torch.Tensor, spec: ReadSpec, dim: int) -> torch.Tensor:
    """Axis `dim` of length K cut into (tile, row of the tile), zeros behind a short tile."""
    longest = max(stop - start for start, stop in spec.tiles)
    index = torch.tensor([[min(start + r, stop) if start + r < stop else rows.shape[dim] for r in range(longest)] for start, stop in spec.tiles], device=rows.device)
    padded = torch.cat([rows, torch.zeros_like(rows.narrow(dim, 0, 1))], dim)
    return padded.index_select(dim, index.flatten()).unflatten(dim, index.shape)


def _untiled(tiled: torch.Tensor, spec: ReadSpec, dim: int) -> torch.Tensor:
    """The transpose of `_tiled`: (tile, row of the tile) joined to an axis of length K."""
    parts = [tiled.select(dim, t).narrow(dim, 0, stop - start) for t, (start, stop) in enumerate(spec.tiles)]
    return torch.cat(parts, dim)


class _Reads:
    """One call's weights and ADC on the device: everything that does not depend on the images."""

    def __init__(self, weight: torch.Tensor, spec: ReadSpec, dtype: torch.dtype) -> None:
        g = spec.geometry
        self.spec, self.geometry = spec, g
        self.weight = _tiled(weight.to(dtype).view(g.groups, g.group_columns, g.rows), spec, dim=2).transpose(1, 2)  # [G, T, Og, wl]
        self.rate, self.lo, self.hi, self.gain = (self.per_read(a, weight.device, dtype) for a in (spec.rate, spec.lo, spec.hi, spec.gain))

    def per_read(self, table, device, dtype) -> torch.Tensor:
        """[T, O] as [groups, T, columns of a group, 1], beside partial sums [n, groups, T, columns of a group, L]."""
        t = torch.as_tensor(table, device=device).to(dtype)
        return t.view(t.shape[0], self.geometry.groups, -1).transpose(0, 1).unsqueeze(-1)

    def partial_sums(self, columns: torch.Tensor) -> torch.Tensor:
        """[n, groups, T, columns of a group, L]."""
        return self.weight @ columns

    def lookup(self, table, p: torch.Tensor) -> torch.Tensor:
        """table[row, p - p_min] for every partial sum."""
        tables = self.spec.tables
        row = self.per_read(tables.row, p.device, torch.long)
        flat = torch.as_tensor(table, device=p.device).to(p.dtype)
        return flat.flatten()[row * flat.shape[1] + (p.long() - tables.p_min)]

    def noise(self, p: torch.Tensor, chunk: int):
        """The draws of one chunk of images, the same in both passes; 0 without noise."""
        if self.spec.noise is None:
            return 0
        generator = torch.Generator().manual_seed(self.spec.noise.seed * 65537 + chunk)
        draws = torch.as_tensor(self.spec.noise.draws)
        return draws[torch.randint(draws.numel(), p.shape, generator=generator)].to(p)

    def values(self, p: torch.Tensor, chunk: int) -> torch.Tensor:
        """gain * (code - zero) of every partial sum, or its table value."""
        if self.spec.tables is not None and self.spec.tables.value is not None:
            return self.lookup(self.spec.tables.value, p)
        return self.gain * torch.floor(p * self.rate + 0.5 + self.noise(p, chunk)).clamp(self.lo, self.hi)

    def slopes(self, p: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(slope, q - u * slope): how a read answers to its partial sum, and to its step (0 where a table gives the values)."""
        u = p * self.rate
        raw = torch.floor(u + 0.5 + self.noise(p, chunk))
        q = raw.clamp(self.lo, self.hi)
        tables = self.spec.tables
        slope = (raw == q).to(p.dtype) if tables is None else self.lookup(tables.slope, p)
        step_slope = torch.zeros_like(p) if tables is not None and tables.value is not None else q - u * slope
        return slope, step_slope


def _chunks(x: torch.Tensor, spec: ReadSpec, positions: int):
    per_image = len(spec.tiles) * spec.geometry.columns * positions
    return x.split(max(1, CHUNK_VALUES // max(1, per_image)))


def _positions(x: torch.Tensor, spec: ReadSpec) -> tuple[int, int]:
    g = spec.geometry
    return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], g.kernel, g.stride, g.dilation))


def forward(x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec) -> torch.Tensor:
    """acc [N, O, H_out, W_out] in x's dtype and on its device. x: [N, C, H, W] codes, already padded; weight: [O, K]."""
    reads = _Reads(weight, spec, x.dtype)
    height, width = _positions(x, spec)
    chunks = enumerate(_chunks(x, spec, height * width))
    parts = [reads.values(reads.partial_sums(_columns(part, spec)), c).sum(2).flatten(1, 2) for c, part in chunks]
    return torch.cat(parts).unflatten(2, (height, width))


def backward(x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec, gy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx of the padded x, dw [O, K], dstep [T, O]) for gy [N, O, H_out, W_out], with the forward pass's noise."""
    reads, g = _Reads(weight, spec, x.dtype), spec.geometry
    height, width = _positions(x, spec)
    dw, dstep, dx = 0, 0, []
    for c, (part, gpart) in enumerate(zip(_chunks(x, spec, height * width), _chunks(gy, spec, height * width))):
        columns = _columns(part, spec)
        slope, step_slope = reads.slopes(reads.partial_sums(columns), c)
        grad = gpart.flatten(2).unflatten(1, (g.groups, 1, -1))  # [n, G, 1, Og, L]
        dstep = dstep + (grad * step_slope).sum((0, -1))
        d = grad * slope
        dw = dw + (d @ columns.transpose(-1, -2)).sum(0)
        drows = _untiled(reads.weight.transpose(-1, -2) @ d, spec, dim=2)
        dx.append(F.fold(drows.flatten(1, 2), part.shape[2:], g.kernel, g.dilation, 0, g.stride))
    dw = _untiled(dw.transpose(1, 2).contiguous(), spec, dim=2).reshape(g.columns, g.rows)
    return torch.cat(dx), dw, dstep.transpose(0, 1).reshape(len(spec.tiles), g.columns)


def table_gradient(x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec, gy: torch.Tensor) -> torch.Tensor:
    """The gradient float64 [rows, P] of every entry of `spec.tables.value`: the sum of gy over the reads that looked it up."""
    reads, g = _Reads(weight, spec, x.dtype), spec.geometry
    rows, span = spec.tables.value.shape
    row = reads.per_read(spec.tables.row, x.device, torch.long)
    positions, total = math.prod(_positions(x, spec)), torch.zeros(rows * span, dtype=torch.float64, device=x.device)
    for part, gpart in zip(_chunks(x, spec, positions), _chunks(gy, spec, positions)):
        p = reads.partial_sums(_columns(part, spec))
        index = row * span + (p.long() - spec.tables.p_min)
        grad = gpart.flatten(2).unflatten(1, (g.groups, 1, -1)).expand(p.shape)
        total += torch.bincount(index.flatten(), grad.flatten().double(), minlength=rows * span)
    return total.view(rows, span)
