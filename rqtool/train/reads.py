"""Differentiable reads: planes with straight-through gradients, and the fused forward and backward
of kernels/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from rqtool.kernels import choose
from rqtool.kernels.spec import ReadSpec
from rqtool.mapping.cells import cells
from rqtool.mapping.plan import Plan
from rqtool.mapping.planes import Plane, extract

ALL = 1 << 30  # images


class _Plane(torch.autograd.Function):
    """One plane of whole numbers q, given as `value`; backward hands `share` of the gradient on, so
    that the planes together give q its own."""

    @staticmethod
    def forward(
        ctx, q: torch.Tensor, value: torch.Tensor, plane: Plane, share: float
    ) -> torch.Tensor:
        ctx.share = share
        if plane.part in ("positive", "negative"):
            ctx.save_for_backward(q >= 0 if plane.part == "positive" else q < 0)
        return value.to(q.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad = grad * ctx.share
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None, None


def weight_parts(weight: torch.Tensor, plan: Plan) -> list[torch.Tensor]:
    """The cells of weights [O, K] (float), with gradients as `split_planes` gives them."""
    return split_planes(weight, plan.weight_planes, lambda q: cells(plan, q))


def split_planes(
    q: torch.Tensor,
    planes: tuple[Plane, ...],
    values: Callable[[torch.Tensor], list[torch.Tensor]] | None = None,
) -> list[torch.Tensor]:
    """The planes of whole numbers q (float), which `values` gives from the same as int32 (None:
    they are extracted). d q = sum_j share_j * d plane_j, where share_j * factor_j sums to 1 over
    the planes of one polarity, in proportion to the range each plane covers: with an ideal ADC the
    gradient of q is exact."""
    if len(planes) == 1 and planes[0].part == "all":
        return [q]
    reach = {
        part: sum(abs(p.factor) * p.peak for p in planes if p.part == part)
        for part in {p.part for p in planes}
    }
    whole = q.detach().int()
    parts = [extract(whole, p) for p in planes] if values is None else values(whole)
    return [
        _Plane.apply(q, part, p, p.peak * (1 if p.factor > 0 else -1) / reach[p.part])
        for p, part in zip(planes, parts)
    ]


class _Reads(torch.autograd.Function):
    """sum over tiles of step * (code - zero), in partial-sum units; see kernels/ for both passes."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        step: torch.Tensor,
        zero: torch.Tensor | None,
        spec: ReadSpec,
        unit: torch.Tensor,
        carrier: type | None,
    ) -> torch.Tensor:
        """x [N, C, H, W] padded codes, weight [O, K], step and zero [1 or T, 1 or O], zero or None,
        unit [1 or O]: step = unit * gain."""
        ctx.spec, ctx.carrier = spec, carrier or choose.for_training(x, spec)
        x = ctx.carrier.keep(x)
        ctx.save_for_backward(x, weight, step, zero)
        return ctx.carrier.forward(x, weight, spec).mul_(unit.view(1, -1, 1, 1))

    @staticmethod
    def backward(ctx, gy: torch.Tensor):
        x, weight, step, zero = ctx.saved_tensors
        dx, dw, dstep, dzero = ctx.carrier.backward(x, weight, ctx.spec, gy.contiguous())
        return (
            dx,
            dw,
            dstep.sum_to_size(step.shape),
            (dzero * step).sum_to_size(zero.shape).double() if ctx.needs_input_grad[3] else None,
            None,
            None,
            None,
        )


class _TableReads(torch.autograd.Function):
    """Reads whose values are looked up in a table that gets a gradient of its own."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        value: torch.Tensor,
        spec: ReadSpec,
        back: ReadSpec,
        unit: torch.Tensor | None,
        images: int,
    ) -> torch.Tensor:
        """x [N, C, H, W] padded codes, weight [O, K], value [rows, P] under autograd: unit [1 or O]
        times what `spec.tables.value` holds."""
        ctx.spec, ctx.back, ctx.carrier, ctx.images = (
            spec,
            back,
            choose.for_training(x, spec),
            min(images, len(x)),
        )
        x = ctx.carrier.keep(x)
        ctx.save_for_backward(x, weight)
        y = ctx.carrier.forward(x, weight, spec)
        return y if unit is None else y.mul_(unit.view(1, -1, 1, 1))

    @staticmethod
    def backward(ctx, gy: torch.Tensor):
        (x, weight), gy, n = ctx.saved_tensors, gy.contiguous(), ctx.images
        dx, dw, *_ = ctx.carrier.backward(x, weight, ctx.back, gy)
        return (
            dx,
            dw,
            choose.table_gradient(x[:n].to(gy.dtype), weight, ctx.spec, gy[:n]) * (len(x) / n),
            None,
            None,
            None,
            None,
        )


class _Scaled(torch.autograd.Function):
    """y * scale + offset, per column; backward finds y again from the result, which what follows
    keeps anyway."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        v = torch.addcmul(offset.view(1, -1, 1, 1), y, scale.view(1, -1, 1, 1))
        ctx.save_for_backward(v, scale, offset)
        return v

    @staticmethod
    def backward(ctx, gy: torch.Tensor):
        v, scale, offset = ctx.saved_tensors
        dy, total, weighted = choose.outputs_gradient(gy, v, scale)
        return dy, (weighted - offset * total) / scale, total


def scaled(y: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """y [N, O, H, W] * scale [O] + offset [O]; no scale is 0."""
    return _Scaled.apply(y, scale, offset)


def pad_codes(x: torch.Tensor, padding: tuple[int, int], code: int) -> torch.Tensor:
    """x [N, C, H, W] with `padding` positions of code `code` around it."""
    return (
        F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=float(code))
        if any(padding)
        else x
    )


def reads(
    x: torch.Tensor,
    weight: torch.Tensor,
    step: torch.Tensor,
    spec: ReadSpec,
    unit: torch.Tensor,
    zero: torch.Tensor | None = None,
    carrier: type | None = None,
) -> torch.Tensor:
    """[N, O, H_out, W_out] in partial-sum units; x holds padded codes, `step` and `zero` get
    gradients, `unit` is the step's plain value. carrier: None for the fastest of kernels/choose.py.
    """
    return _Reads.apply(x, weight, step, zero, spec, unit, carrier)


def table_reads(x: torch.Tensor, weight: torch.Tensor, spec: ReadSpec) -> torch.Tensor:
    """The same for an ADC given by its codes or a value table, with nothing to learn."""
    one = x.new_ones(1, 1)
    return _Reads.apply(x, weight, one, None, spec, x.new_ones(1), None)


def learned_table_reads(
    x: torch.Tensor,
    weight: torch.Tensor,
    value: torch.Tensor,
    spec: ReadSpec,
    back: ReadSpec,
    unit: torch.Tensor | None = None,
    images: int = ALL,
) -> torch.Tensor:
    """The same with values that are learned: float64 [rows, P] under autograd, unit (float32 [1 or
    O], None for 1) times the numbers in the spec; back: the spec whose slope the backward pass
    takes. The gradient of the values is counted on the first `images` images and multiplied up to
    all of them: the counting is slow, and a table has few numbers."""
    return _TableReads.apply(x, weight, value, spec, back, unit, images)


def unpadded(spec: ReadSpec) -> ReadSpec:
    """The spec for an input that carries its padding already."""
    return replace(spec, geometry=replace(spec.geometry, padding=(0, 0)))
