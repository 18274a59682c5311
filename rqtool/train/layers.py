"""The ReRAM layer: a float layer's weights behind quantisers, planes, reads and the ADC, all
trainable.

    y = s_x * s_w[o] * (sum over planes and tiles of a_i * b_j * step * (code - zero)  -  z * sum(W)  -  offset * sum(X)) + bias

The forward pass uses the very integers that freezing writes down: whole-number codes and weights,
and the snapped step 2**S / M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from math import floor, log2

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rqtool.errors import CheckError, escaped
from rqtool.hardware import adc
from rqtool.hardware.macro import Macro
from rqtool.kernels.choose import FLOAT32_WHOLE
from rqtool.kernels.spec import (
    ReadSpec,
    Tables,
    free_level_spec,
    inside_spec,
    level_codes,
    level_spec,
    make_spec,
    over_reads,
)
from rqtool.mapping.plan import FREE_LEVEL_PEAK, Plan
from rqtool.train.quantizers import InputQuantizer, WeightQuantizer
from rqtool.train.reads import (
    learned_table_reads,
    pad_codes,
    reads,
    scaled,
    split_planes,
    table_reads,
    unpadded,
    weight_parts,
)
from rqtool.train.relax import Relaxation, slope_tables
from rqtool.train.soft import CALLS

LEVEL_BITS = 3  # a free level is a whole number of eighths of a partial-sum unit
LEVEL_IMAGES = 4  # of a batch, on which the gradient of free levels is counted


def level_units(macro: Macro) -> float:
    """Units of a free level in one partial-sum unit: 8, or the power of two at which the largest
    partial sum is a 16-bit level.

    >>> level_units(Macro()), level_units(Macro(wl=128))
    (8.0, 2.0)
    """
    return 2.0 ** min(LEVEL_BITS, floor(log2(FREE_LEVEL_PEAK / macro.p_max)))


def group_shape(plan: Plan) -> tuple[int, int]:
    """(1 or T, 1 or O): who has a step and a zero of its own."""
    return {"layer": (1, 1), "column": (1, plan.geometry.columns), "tile": (len(plan.tiles), 1)}[
        plan.macro.granularity
    ]


@dataclass(frozen=True)
class AdcNumbers:
    """A layer's uniform ADC as whole numbers. mult, zero, gain: int64 [1 or T, 1 or O]; unit:
    float64 [1 or O], partial-sum units per unit of the accumulator, so that step = unit * gain (to
    within the snap of mult)."""

    mult: torch.Tensor
    zero: torch.Tensor
    gain: torch.Tensor
    unit: torch.Tensor

    @property
    def step(self) -> torch.Tensor:
        """float64 [1 or T, 1 or O]."""
        return self.unit.unsqueeze(0) * self.gain


def adc_numbers(step: torch.Tensor, zero: torch.Tensor, macro: Macro) -> AdcNumbers:
    """The one place where real steps become integers: training's forward pass and freezing both
    call it.

    step: float64, zero: int64, [1 or T, 1 or O].
    """
    gain = torch.ones_like(step)
    if macro.granularity == "tile":
        unit = step.max() / adc.MAX_GAIN
        gain = torch.floor(step / unit + 0.5).clamp(1, adc.MAX_GAIN)
        step, unit = gain * unit, unit.view(1)
    mult = adc.snap(step, macro.shift)
    if macro.granularity != "tile":
        unit = (2.0**macro.shift / mult).view(-1)
    return AdcNumbers(mult.long(), zero, gain.long(), unit)


class ColumnNorm(nn.BatchNorm2d):
    """The digital multiplier and addend of each column, as batch norm of outputs [N, O, H, W] in
    units of `unit`: float64, one for the layer, so that eps is small beside any output. It starts
    as the identity. static: its statistics stay as calibrated, in training too."""

    def __init__(self, columns: int, static: bool) -> None:
        super().__init__(columns)
        self.static = static
        self.running_var.fill_(1 - self.eps)
        self.register_buffer("unit", torch.ones((), dtype=torch.float64))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        if not self.static:
            return super().forward(y)
        return F.batch_norm(
            y, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class ReadLayer(nn.Module):
    """A layer on the macro; takes the place of model.network.Conv and has its signature.

    norm: its columns' own digital multiplier and addend, where the network has no batch norm behind
    the layer; else None.

    log_step: of a uniform ADC, the step; of free levels, the ratio of a column's unit to 1 /
    level_units. thresholds, levels, unit: the free levels that are served, unit float64 [1 or O]
    partial-sum units per unit of a level; they follow what is learned. relaxation: noise and slope
    of the current training step, None for hard codes (`ste`). real_zero: what a learned zero is
    before it is rounded to the code `zero`, which is what is served; it learns where its
    requires_grad is set. watch(layer, codes, weights) sees the padded input codes and the weights
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
        if not macro.ideal:
            learned = macro.range == "calibrated" and (
                macro.levels == "uniform" or macro.granularity == "column"
            )
            self.log_step = nn.Parameter(
                torch.zeros(group_shape(plan), dtype=torch.float64), requires_grad=learned
            )
            self.register_buffer(
                "zero", torch.full(group_shape(plan), macro.zero, dtype=torch.int64)
            )
            self.real_zero = nn.Parameter(self.zero.double(), requires_grad=False)
            if macro.levels == "free":
                columns = group_shape(plan)[1]
                self.register_buffer(
                    "thresholds", torch.zeros(columns, macro.top, dtype=torch.int64)
                )
                self.register_buffer("levels", torch.zeros(macro.top + 1, dtype=torch.int64))
                self.register_buffer(
                    "unit", torch.full((columns,), 1 / level_units(macro), dtype=torch.float64)
                )
                self.log_gaps = nn.Parameter(torch.zeros(macro.top, dtype=torch.float64))
        self.relaxation: Relaxation | None = None
        self.watch: Callable | None = None
        self.ideal_adc = False

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A state from before zeros and levels were learned has the codes alone, and one from
        before groups had their own zero, or columns their own thresholds, has one for all."""
        if prefix + "zero" in state_dict:
            for name in {"zero", "real_zero"} & {key.removeprefix(prefix) for key in state_dict}:
                state_dict[prefix + name] = (
                    state_dict[prefix + name].expand(group_shape(self.plan)).clone()
                )
            state_dict.setdefault(prefix + "real_zero", state_dict[prefix + "zero"].double())
        if prefix + "levels" in state_dict and prefix + "unit" not in state_dict:
            self.set_levels(state_dict[prefix + "thresholds"], state_dict[prefix + "levels"])
            state_dict |= {
                prefix + name: getattr(self, name).detach().clone()
                for name in ("thresholds", "unit")
            }
            for name in (
                ("zero", "real_zero", "log_gaps") if prefix + "log_gaps" not in state_dict else ()
            ):
                state_dict[prefix + name] = getattr(self, name).detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "order" in state_dict:
            self.set_order(state_dict[prefix + "order"])

    # -- numbers -----------------------------------------------------------------------------------
    def weight_codes(self) -> torch.Tensor:
        """float32 [O, K] whole numbers."""
        return self.weights(self.weight.reshape(self.plan.geometry.columns, -1))

    def adc(self) -> AdcNumbers:
        return adc_numbers(self.log_step.detach().exp().clamp(min=1.0), self.zero, self.plan.macro)

    def zero_can_move(self) -> bool:
        """Whether the code of p = 0 is anyone's choice: in a fixed range or another code book it is
        not."""
        macro = self.plan.macro
        return (
            macro.codebook == "twos"
            and macro.range == "calibrated"
            and macro.levels == "uniform"
            and not macro.ideal
        )

    @torch.no_grad()
    def set_order(self, order: Sequence[int]) -> None:
        """Put row order[k] of each group at place k of its tiles."""
        self.order.copy_(torch.as_tensor(order))
        self.plan = replace(self.plan, order=tuple(self.order.tolist()))

    @torch.no_grad()
    def set_zero(self, zero: np.ndarray | int) -> None:
        """Make `zero` (one for all, or one for each group of steps) the code of p = 0."""
        zero = torch.as_tensor(np.broadcast_to(zero, self.zero.numel()).copy()).view_as(self.zero)
        self.zero.copy_(zero)
        self.real_zero.copy_(zero)

    def learned_zero(self) -> torch.Tensor:
        """float64 [1 or T, 1 or O]: the code of p = 0 with the gradient of `real_zero`; the code
        that is served follows it."""
        with torch.no_grad():
            self.zero.copy_(torch.floor(self.real_zero + 0.5).clamp(0, self.plan.macro.top))
        return self.real_zero + (self.zero - self.real_zero).detach()

    @torch.no_grad()
    def set_levels(
        self, thresholds: np.ndarray, levels: np.ndarray, ratio: np.ndarray | float = 1.0
    ) -> None:
        """Give a layer with free levels its numbers: integers thresholds [top], or [1 or O, top]
        with the same code of p = 0, ascending levels [top + 1], as in `optimal_levels`, and the
        ratio [1 or O] of each column's unit to 1 / level_units."""
        self.thresholds.copy_(torch.as_tensor(thresholds))
        self.levels.copy_(torch.as_tensor(levels))
        self.log_step.copy_(torch.as_tensor(ratio).log())
        self._follow_units()
        self.set_zero(int(adc.threshold_code(0, self.thresholds[0].tolist())))
        self.log_gaps.copy_((self.levels.diff().clamp(min=1) / level_units(self.plan.macro)).log())

    def _follow_units(self) -> None:
        self.unit.copy_(self.log_step.exp().view(-1) / level_units(self.plan.macro))

    def learned_levels(self) -> torch.Tensor:
        """float64 [top + 1]: what the codes stand for, in partial-sum units of a column of ratio 1,
        with the gradient of the gaps between them, a step for each code. The code of p = 0 stays 0;
        the levels, units and thresholds that are served follow."""
        units, zero = level_units(self.plan.macro), int(self.zero.flatten()[0])
        above = torch.cat([self.log_gaps.new_zeros(1), self.log_gaps.exp().cumsum(0)])
        real = above - above[zero]
        with torch.no_grad():
            self.levels.copy_(
                torch.floor(real * units + 0.5).clamp(-FREE_LEVEL_PEAK, FREE_LEVEL_PEAK)
            )
            self._follow_units()
            self.thresholds.copy_(nearest_thresholds(self.levels, zero, self.unit))
        return real + (self.levels / units - real).detach()

    def level_values(self) -> torch.Tensor:
        """float64 [1 or O, top + 1]: what the codes of free levels stand for, in partial-sum units;
        in training with the gradients of the gaps and of the steps of columns."""
        if not self.training:
            return self.unit.unsqueeze(1) * self.levels
        levels = self.learned_levels()
        return self.log_step.exp().view(-1, 1) * levels

    def level_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest) partial sum that the end codes of free levels stand for, rounded
        outwards: float64 [1 or O]."""
        lo, hi = (self.unit * self.levels[[0, -1]].unsqueeze(1)).numpy()
        return np.floor(lo), np.ceil(hi)

    # -- forward -----------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, O, H_out, W_out] from real-valued [N, C, H, W]."""
        y = self.columns(x, 1.0 if self.norm is None else float(self.norm.unit))
        return y if self.norm is None else self.norm(y)

    def columns(self, x: torch.Tensor, unit: float = 1.0) -> torch.Tensor:
        """What the columns give before their own multiplier and addend, in units of `unit`."""
        g, macro = self.plan.geometry, self.plan.macro
        codes = pad_codes(self.input(x), g.padding, int(self.input.zero))
        weight = self.weight_codes()
        if self.watch:
            self.watch(self, codes.detach(), weight.detach())
        y = self.exact(codes, weight) if macro.ideal or self.ideal_adc else self.read(codes, weight)
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

    def read(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The sum over planes of the reads, in partial-sum units, less the offset scheme's input
        sum."""
        plan = self.plan
        if not torch.isfinite(
            codes.detach().sum() + weight.detach().sum()
        ):  # a kernel would look such a partial sum up beyond its tables
            raise CheckError(
                f"{escaped(plan.name)}: its inputs or weights are not finite "
                "numbers, so a read has no code for them; lower --lr, or check the "
                "model's weights and the images"
            )
        y = self.over_planes(
            codes,
            weight,
            self._free_call() if plan.macro.levels == "free" else self._uniform_call(),
        )
        return (
            y - plan.macro.weight_offset * self.input_sum(codes) if plan.macro.weight_offset else y
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
        macro, codes, weight = self.plan.macro, codes.double(), weight.double()
        total = self.input_sum(codes) if macro.weight_offset else None
        if macro.ideal:
            acc = self.exact(codes, weight) + (
                macro.weight_offset * total if macro.weight_offset else 0
            )
        else:
            exact = torch.float32 if self.plan.acc_bound < FLOAT32_WHOLE else torch.float64
            acc = self.over_planes(codes.to(exact), weight.to(exact), self._whole_call()).double()
        return [acc] if total is None else [acc, total.expand_as(acc)]

    def input_sum(self, codes: torch.Tensor) -> torch.Tensor:
        """The sum of the codes under the kernel, for every column of a group: exact, digital."""
        g = self.plan.geometry
        ones = codes.new_ones(g.columns if g.groups > 1 else 1, g.channels // g.groups, *g.kernel)
        return F.conv2d(codes, ones, None, g.stride, 0, g.dilation, g.groups)

    def _uniform_call(self) -> Callable:
        macro, relax = self.plan.macro, self.relaxation if self.training else None
        zero = self.learned_zero() if self.training and self.real_zero.requires_grad else None
        numbers, real = self.adc(), self.log_step.exp().clamp(min=1.0)
        step = (real + (numbers.step - real).detach()).float()
        if relax and relax.mode in CALLS:
            return CALLS[relax.mode](self.plan, numbers, step, zero, relax)
        tables = (
            slope_tables(
                numbers.mult,
                numbers.zero,
                macro.shift,
                macro.top,
                relax.tau,
                macro.p_min,
                macro.p_max,
            )
            if relax
            else None
        )
        tables = (
            Tables(tables.p_min, over_rows(tables.row, self.plan), tables.slope) if tables else None
        )
        spec = unpadded(
            make_spec(
                self.plan,
                *(t.numpy() for t in (numbers.mult, numbers.zero, numbers.gain)),
                tables=tables,
            )
        )
        unit = numbers.unit.float()
        return lambda x, w, pair: reads(x, w, step, with_noise(spec, relax, pair), unit, zero)

    def _free_call(self) -> Callable:
        """Hard reads by a table of levels; their slope is 1 between the end levels and 0 beyond."""
        values = self.level_values()
        code = level_codes(self.plan, self.thresholds.numpy())
        spec, back = (
            unpadded(level_spec(self.plan, code, self.levels.numpy())),
            unpadded(inside_spec(self.plan, *self.level_ends())),
        )
        value, unit = values.gather(1, torch.from_numpy(code)), self.unit.float()
        return lambda x, w, pair: learned_table_reads(x, w, value, spec, back, unit, LEVEL_IMAGES)

    def _whole_call(self) -> Callable:
        """Hard reads in units of the accumulator."""
        if self.plan.macro.levels == "free":
            spec = unpadded(
                free_level_spec(self.plan, self.thresholds.numpy(), self.levels.numpy())
            )
        else:
            numbers = self.adc()
            spec = unpadded(
                make_spec(
                    self.plan, *(t.numpy() for t in (numbers.mult, numbers.zero, numbers.gain))
                )
            )
        return lambda x, w, pair: table_reads(x, w, spec)


def times(factor: float, y: torch.Tensor) -> torch.Tensor:
    """factor * y, without a pass over memory where that is y."""
    return y if factor == 1 else factor * y


def over_rows(row: np.ndarray, plan: Plan) -> np.ndarray:
    """Table rows of [1 or T, 1 or O] groups spread to int64 [T, O]."""
    return over_reads(row, plan).astype(np.int64)


def with_noise(spec: ReadSpec, relax: Relaxation | None, pair: int) -> ReadSpec:
    """The spec with the noise of one pair of planes."""
    if relax is None:
        return spec
    return replace(spec, noise=Relaxation(relax.tau, relax.seed * 64 + pair).noise())


def nearest_thresholds(levels: torch.Tensor, zero: int, unit: torch.Tensor) -> torch.Tensor:
    """int64 [1 or O, top]: the thresholds that give every partial sum the nearest of unit[o] *
    levels, float64 [1 or O] and int64 [top + 1] (the upper one of two), and p = 0 the code `zero`,
    whose level is 0.

    >>> nearest_thresholds(torch.tensor([-5, 0, 4, 9]), 1, torch.tensor([1.0, 2.5])).tolist()
    [[-2, 2, 7], [-6, 5, 17]]
    """
    middle = torch.ceil((levels[1:] + levels[:-1]) * unit.unsqueeze(1) / 2).long()
    return torch.cat([middle[:, :zero].clamp(max=0), middle[:, zero:].clamp(min=1)], 1)
