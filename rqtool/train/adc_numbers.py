"""What a layer learns of its ADC as whole numbers: steps become mult and gain, levels thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2

import torch

from rqtool.hardware import adc
from rqtool.hardware.adc import FREE_LEVEL_PEAK
from rqtool.hardware.converter import Uniform
from rqtool.hardware.macro import Macro
from rqtool.mapping.plan import Plan

LEVEL_BITS = 3  # a free level is a whole number of eighths of a partial-sum unit


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
    within the snap of mult); shift, top: of the macro."""

    mult: torch.Tensor
    zero: torch.Tensor
    gain: torch.Tensor
    unit: torch.Tensor
    shift: int
    top: int

    @property
    def step(self) -> torch.Tensor:
        """float64 [1 or T, 1 or O]."""
        return self.unit.unsqueeze(0) * self.gain

    @property
    def adc(self) -> Uniform:
        """The same without the unit."""
        tables = (a.numpy() for a in (self.mult, self.zero, self.gain))
        return Uniform(*tables, self.shift, self.top)


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
    return AdcNumbers(mult.long(), zero, gain.long(), unit, macro.shift, macro.top)


def nearest_thresholds(levels: torch.Tensor, zero: int, unit: torch.Tensor) -> torch.Tensor:
    """int64 [1 or O, top]: the thresholds that give every partial sum the nearest of unit[o] *
    levels, float64 [1 or O] and int64 [top + 1] (the upper one of two), and p = 0 the code `zero`,
    whose level is 0.

    >>> nearest_thresholds(torch.tensor([-5, 0, 4, 9]), 1, torch.tensor([1.0, 2.5])).tolist()
    [[-2, 2, 7], [-6, 5, 17]]
    """
    middle = torch.ceil((levels[1:] + levels[:-1]) * unit.unsqueeze(1) / 2).long()
    return torch.cat([middle[:, :zero].clamp(max=0), middle[:, zero:].clamp(min=1)], 1)
