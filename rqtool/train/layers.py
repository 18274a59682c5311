"""The ReRAM layer: a float layer's weights behind quantisers, planes, reads and the ADC, all
trainable.

    y = s_x * s_w[o] * (sum over planes and tiles of a_i * b_j * step * (code - zero)  -  z * sum(W)  -  offset * sum(X)) + bias

The forward pass uses the very integers that freezing writes down: whole-number codes and weights,
and the snapped step 2**S / M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from rqtool.errors import CheckError, escaped
from rqtool.mapping.plan import Plan
from rqtool.train.adc_state import adc_state
from rqtool.train.quantizers import InputQuantizer, WeightQuantizer
from rqtool.train.reads import pad_codes, scaled, split_planes, weight_parts
from rqtool.train.relax import Relaxation


class ColumnNorm(nn.Module):
    """The digital multiplier and addend of each column, as batch norm of outputs [N, O, H, W] in
    units of `unit`: float64, one for the layer, so that eps is small beside any output. It starts
    as the identity. static: its statistics stay as calibrated, in training too.

    momentum: what a batch counts in the statistics, None for an average over all since the reset.
    """

    eps = 1e-5

    def __init__(self, columns: int, static: bool) -> None:
        super().__init__()
        self.static = static
        self.momentum: float | None = 0.1
        self.batches = 0
        self.weight, self.bias = (
            nn.Parameter(torch.full((columns,), start)) for start in (1.0, 0.0)
        )
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("var", torch.full((columns,), 1 - self.eps))
        self.register_buffer("unit", torch.ones((), dtype=torch.float64))

    @property
    def running_mean(self) -> torch.Tensor:
        """The mean, under batch norm's name for it."""
        return self.mean

    @property
    def running_var(self) -> torch.Tensor:
        """The variance, under batch norm's name for it."""
        return self.var

    def reset_running_stats(self) -> None:
        """Begin an average anew."""
        self.batches = 0

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        measured = self.training and not self.static
        self.batches += measured
        share = 1 / max(1, self.batches) if self.momentum is None else self.momentum
        return F.batch_norm(
            y, self.mean, self.var, self.weight, self.bias, measured, share, self.eps
        )


class ReadLayer(nn.Module):
    """A layer on the macro; takes the place of model.network.Conv and has its signature.

    norm: its columns' own digital multiplier and addend, where the network has no batch norm behind
    the layer; else None.

    adc: what it has learned of its ADC (train/adc_state.py), whose parameters stand in the layer.
    relaxation: noise and slope of the current training step, None for hard codes (`ste`).
    watch(layer, codes, weights) sees the padded input codes and the weights
    of each call. ideal_adc: the forward pass takes the layer's reads as an ideal ADC would give
    them, to see what its own one costs.
    """

    def __init__(
        self,
        plan: Plan,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        norm: ColumnNorm | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.weight, self.bias, self.norm = plan, weight, bias, norm
        macro, g = plan.macro, plan.geometry
        self.input = InputQuantizer(macro.in_bits)
        self.weights = WeightQuantizer(macro.q_w, g.columns)
        if macro.pack == "spread":
            self.register_buffer("order", torch.arange(g.rows))
        self.adc = adc_state(self)
        self.relaxation: Relaxation | None = None
        self.watch: Callable | None = None
        self.ideal_adc = False

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A state from before parts of the ADC were learned lacks them."""
        self.adc.upgrade(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "order" in state_dict:
            self.set_order(state_dict[prefix + "order"])

    # -- numbers -----------------------------------------------------------------------------------
    def weight_codes(self) -> torch.Tensor:
        """float32 [O, K] whole numbers."""
        return self.weights(self.weight.reshape(self.plan.geometry.columns, -1))

    @torch.no_grad()
    def set_order(self, order: Sequence[int]) -> None:
        """Put row order[k] of each group at place k of its tiles."""
        self.order.copy_(torch.as_tensor(order))
        self.plan = replace(self.plan, order=tuple(self.order.tolist()))

    # -- forward -----------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, O, H_out, W_out] from real-valued [N, C, H, W]."""
        y = self.columns(x, 1.0 if self.norm is None else float(self.norm.unit))
        return y if self.norm is None else self.norm(y)

    def columns(self, x: torch.Tensor, unit: float = 1.0) -> torch.Tensor:
        """What the columns give before their own multiplier and addend, in units of `unit`."""
        g = self.plan.geometry
        codes = pad_codes(self.input(x), g.padding, int(self.input.zero))
        weight = self.weight_codes()
        if self.watch:
            self.watch(self, codes.detach(), weight.detach())
        read = self.exact if self.ideal_adc else self.adc.read
        y = read(codes, weight)
        scale = self.input.scale * self.weights.scale
        offset = -scale * self.input.zero * weight.sum(1)
        if self.bias is not None:
            offset = offset + self.bias
        if unit != 1:
            scale, offset = scale / unit, offset / unit
        return scaled(y, scale, offset)

    def exact(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What an ideal ADC gives: the whole-number convolution (every sign scheme and slicing sums
        to it)."""
        g = self.plan.geometry
        return F.conv2d(
            codes, weight.view(g.columns, -1, *g.kernel), None, g.stride, 0, g.dilation, g.groups
        )

    def refuse_infinite(self, codes: torch.Tensor, weight: torch.Tensor) -> None:
        """Raise CheckError where a number is not finite: a kernel would look such a partial sum up
        beyond its tables."""
        if not torch.isfinite(codes.detach().sum() + weight.detach().sum()):
            raise CheckError(
                f"{escaped(self.plan.name)}: its inputs or weights are not finite "
                "numbers, so a read has no code for them; lower --lr, or check the "
                "model's weights and the images"
            )

    def over_planes(
        self, codes: torch.Tensor, weight: torch.Tensor, call: Callable
    ) -> torch.Tensor:
        """The sum over planes of what call(input plane, weight plane, number of the pair) gives."""
        plan = self.plan
        inputs = zip(plan.input_planes, split_planes(codes, plan.input_planes))
        weights = zip(plan.weight_planes, weight_parts(weight, plan))
        pairs = enumerate(product(inputs, weights))
        return reduce(
            torch.add,
            (times(a.factor * b.factor, call(x, w, pair)) for pair, ((a, x), (b, w)) in pairs),
        )

    def accumulators(self, codes: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        """The whole numbers behind `read` without noise, float64 [N, O, H_out, W_out]: the sum of
        the reads, and for weights with an offset the input sum. codes: padded [N, C, H, W]."""
        codes, weight = codes.double(), weight.double()
        acc = self.adc.accumulator(codes, weight)
        if not self.plan.macro.weight_offset:
            return [acc]
        return [acc, self.input_sum(codes).expand_as(acc)]

    def input_sum(self, codes: torch.Tensor) -> torch.Tensor:
        """The sum of the codes under the kernel, for every column of a group: exact, digital."""
        g = self.plan.geometry
        ones = codes.new_ones(g.columns if g.groups > 1 else 1, g.channels // g.groups, *g.kernel)
        return F.conv2d(codes, ones, None, g.stride, 0, g.dilation, g.groups)


def times(factor: float, y: torch.Tensor) -> torch.Tensor:
    """factor * y, without a pass over memory where that is y."""
    return y if factor == 1 else factor * y
