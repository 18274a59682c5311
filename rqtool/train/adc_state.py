"""What a layer learns of its ADC: one class for each kind of converter, and what it is to training.

The parameters and buffers stand in the layer itself, under the names that its state has in files;
a state object makes them, reads them, and gives the integers that are served (`snap`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from rqtool.hardware import adc
from rqtool.hardware.adc import FREE_LEVEL_PEAK
from rqtool.hardware.converter import Converter, Ideal, Levels, Uniform, of_macro
from rqtool.kernels.choose import FLOAT32_WHOLE
from rqtool.kernels.spec import (
    ReadSpec,
    Tables,
    inside_spec,
    level_spec,
    over_reads,
    read_spec,
)
from rqtool.mapping.plan import Plan
from rqtool.train.adc_numbers import (
    AdcNumbers,
    adc_numbers,
    group_shape,
    level_units,
    nearest_thresholds,
)
from rqtool.train.reads import learned_table_reads, reads, table_reads, unpadded
from rqtool.train.relax import Relaxation, slope_tables
from rqtool.train.soft import CALLS

LEVEL_IMAGES = 4  # of a batch, on which the gradient of free levels is counted

Call = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class Layer(Protocol):
    """What a state needs of the layer that it stands in (train/layers.py)."""

    plan: Plan
    training: bool
    relaxation: Relaxation | None
    log_step: nn.Parameter
    real_zero: nn.Parameter
    log_gaps: nn.Parameter
    zero: torch.Tensor
    thresholds: torch.Tensor
    levels: torch.Tensor
    unit: torch.Tensor

    def register_buffer(self, name: str, tensor: torch.Tensor) -> None:
        """Give the layer a tensor that is part of its state."""

    def exact(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The whole-number convolution."""

    def input_sum(self, codes: torch.Tensor) -> torch.Tensor:
        """The sum of the codes under the kernel."""

    def over_planes(self, codes: torch.Tensor, weight: torch.Tensor, call: Call) -> torch.Tensor:
        """The sum over planes of what `call` gives."""

    def refuse_infinite(self, codes: torch.Tensor, weight: torch.Tensor) -> None:
        """Raise CheckError where a number is not finite."""


class IdealState:
    """Nothing to learn: reads are exact."""

    exact = True

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def snap(self) -> Ideal:
        """The ADC that is served."""
        return Ideal()

    def unit(self) -> np.ndarray:
        """float64 [1]: partial-sum units per unit of the accumulator."""
        return np.ones(1)

    def zero_can_move(self) -> bool:
        """There is no code of p = 0."""
        return False

    def upgrade(self, state: dict[str, torch.Tensor], prefix: str) -> None:
        """No state ever held anything of it."""

    def read(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The whole-number convolution."""
        return self.layer.exact(codes, weight)

    def accumulator(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """float64 [N, O, H_out, W_out]: the sum of the reads, from float64 codes and weights."""
        layer, offset = self.layer, self.layer.plan.macro.weight_offset
        acc = layer.exact(codes, weight)
        return acc + offset * layer.input_sum(codes) if offset else acc

    def figures(self) -> dict[str, float | int | None]:
        """step and zero, for people."""
        return {"step": None, "zero": None}

    def clip_bounds(self) -> list[tuple[int, int]]:
        """Nothing clips."""
        return []


class _LearnedState(ABC):
    """What states with codes share: step and zero, and reads through the kernels."""

    exact = False

    def __init__(self, layer: Layer, learned: bool) -> None:
        self.layer = layer
        macro, shape = layer.plan.macro, group_shape(layer.plan)
        layer.log_step = nn.Parameter(
            torch.zeros(shape, dtype=torch.float64), requires_grad=learned
        )
        layer.register_buffer("zero", torch.full(shape, macro.zero, dtype=torch.int64))
        layer.real_zero = nn.Parameter(layer.zero.double(), requires_grad=False)

    @torch.no_grad()
    def set_zero(self, zero: np.ndarray | int) -> None:
        """Make `zero` (one for all, or one for each group of steps) the code of p = 0."""
        layer = self.layer
        spread = np.broadcast_to(zero, layer.zero.numel()).copy()
        codes = torch.as_tensor(spread).view_as(layer.zero)
        layer.zero.copy_(codes)
        layer.real_zero.copy_(codes)

    def upgrade(self, state: dict[str, torch.Tensor], prefix: str) -> None:
        """A state from before zeros were learned has the codes alone, and one from before groups
        had their own zero has one for all."""
        if prefix + "zero" not in state:
            return
        shape = group_shape(self.layer.plan)
        for name in ("zero", "real_zero"):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].expand(shape).clone()
        state.setdefault(prefix + "real_zero", state[prefix + "zero"].double())

    def read(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The sum over planes of the reads, in partial-sum units, less the offset scheme's input
        sum."""
        layer, offset = self.layer, self.layer.plan.macro.weight_offset
        layer.refuse_infinite(codes, weight)
        y = layer.over_planes(codes, weight, self.call())
        return y - offset * layer.input_sum(codes) if offset else y

    def accumulator(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """float64 [N, O, H_out, W_out]: the sum of the reads in units of the accumulator, without
        noise, from float64 codes and weights."""
        layer = self.layer
        spec = unpadded(read_spec(layer.plan, self.snap()))
        exact = torch.float32 if layer.plan.acc_bound < FLOAT32_WHOLE else torch.float64
        hard = lambda x, w, pair: table_reads(x, w, spec)  # noqa: E731
        return layer.over_planes(codes.to(exact), weight.to(exact), hard).double()

    @abstractmethod
    def snap(self) -> Uniform | Levels:
        """The ADC that is served."""

    @abstractmethod
    def call(self) -> Call:
        """call(input plane, weight plane, number of the pair) -> reads in partial-sum units."""


class UniformState(_LearnedState):
    """Steps and zeros of a uniform ADC.

    log_step: of the step; real_zero: what a learned zero is before it is rounded to the code
    `zero`, which is what is served; it learns where its requires_grad is set.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, learned=layer.plan.macro.range == "calibrated")

    def numbers(self) -> AdcNumbers:
        """The ADC as whole numbers, with its unit."""
        layer = self.layer
        step = layer.log_step.detach().exp().clamp(min=1.0)
        return adc_numbers(step, layer.zero, layer.plan.macro)

    def snap(self) -> Uniform:
        """The ADC that is served."""
        return self.numbers().adc

    def unit(self) -> np.ndarray:
        """float64 [1 or O]: partial-sum units per unit of the accumulator."""
        return self.numbers().unit.numpy()

    def zero_can_move(self) -> bool:
        """Whether the code of p = 0 is anyone's choice: in a fixed range or another code book it is
        not."""
        macro = self.layer.plan.macro
        return macro.codebook == "twos" and macro.range == "calibrated"

    def learned_zero(self) -> torch.Tensor:
        """float64 [1 or T, 1 or O]: the code of p = 0 with the gradient of `real_zero`; the code
        that is served follows it."""
        layer = self.layer
        with torch.no_grad():
            rounded = torch.floor(layer.real_zero + 0.5)
            layer.zero.copy_(rounded.clamp(0, layer.plan.macro.top))
        return layer.real_zero + (layer.zero - layer.real_zero).detach()

    def call(self) -> Call:
        """call(input plane, weight plane, number of the pair) -> reads in partial-sum units."""
        layer = self.layer
        relax = layer.relaxation if layer.training else None
        zero = self.learned_zero() if layer.training and layer.real_zero.requires_grad else None
        numbers = self.numbers()
        real = layer.log_step.exp().clamp(min=1.0)
        step = (real + (numbers.step - real).detach()).float()
        if relax and relax.mode in CALLS:
            return CALLS[relax.mode](layer.plan, numbers, step, zero, relax)
        spec = unpadded(read_spec(layer.plan, numbers.adc))
        spec = replace(spec, tables=relaxed_slopes(numbers, layer.plan, relax) if relax else None)
        unit = numbers.unit.float()
        return lambda x, w, pair: reads(x, w, step, with_noise(spec, relax, pair), unit, zero)

    def code_values(self) -> np.ndarray:
        """float64 [G, top + 1]: what each code stands for, in partial-sum units."""
        numbers, shape = self.numbers(), group_shape(self.layer.plan)
        zero, step = (a.expand(shape).reshape(-1, 1).numpy() for a in (numbers.zero, numbers.step))
        return adc.uniform_value(np.arange(numbers.top + 1), zero, step)

    def sizes(self) -> list[int]:
        """A number for each of the G ADCs that orders them by their mult."""
        return self.snap().each().mult.flatten().tolist()

    def figures(self) -> dict[str, float | int | None]:
        """step and zero, for people."""
        return {
            "step": float(self.numbers().step.mean()),
            "zero": int(self.layer.zero.median()),
        }

    def clip_bounds(self) -> list[tuple[int, int]]:
        """(lowest, highest) partial sum within full scale, for each of the G ADCs."""
        return self.snap().clip_bounds()


class LevelState(_LearnedState):
    """Free levels, and the steps of their columns.

    log_step: of the ratio of a column's unit to 1 / level_units; log_gaps: of the gaps between
    levels. thresholds, levels, unit: what is served, unit float64 [1 or O] partial-sum units per
    unit of a level; they follow what is learned.
    """

    def __init__(self, layer: Layer) -> None:
        macro = layer.plan.macro
        by_column = macro.granularity == "column"
        super().__init__(layer, learned=macro.range == "calibrated" and by_column)
        columns, top = group_shape(layer.plan)[1], macro.top
        unit = torch.full((columns,), 1 / level_units(macro), dtype=torch.float64)
        layer.register_buffer("thresholds", torch.zeros(columns, top, dtype=torch.int64))
        layer.register_buffer("levels", torch.zeros(top + 1, dtype=torch.int64))
        layer.register_buffer("unit", unit)
        layer.log_gaps = nn.Parameter(torch.zeros(top, dtype=torch.float64))

    def snap(self) -> Levels:
        """The ADC that is served."""
        return Levels(self.layer.thresholds.numpy(), self.layer.levels.numpy())

    def unit(self) -> np.ndarray:
        """float64 [1 or O]: partial-sum units per unit of the accumulator."""
        return self.layer.unit.numpy()

    def zero_can_move(self) -> bool:
        """The code of p = 0 is that of a level, which is chosen with the others."""
        return False

    def upgrade(self, state: dict[str, torch.Tensor], prefix: str) -> None:
        """A state from before levels were learned, or columns had their own thresholds, has one
        for all."""
        super().upgrade(state, prefix)
        if prefix + "levels" not in state or prefix + "unit" in state:
            return
        self.set_levels(state[prefix + "thresholds"], state[prefix + "levels"])
        names = ["thresholds", "unit"]
        if prefix + "log_gaps" not in state:
            names += ["zero", "real_zero", "log_gaps"]
        for name in names:
            state[prefix + name] = getattr(self.layer, name).detach().clone()

    @torch.no_grad()
    def set_levels(
        self, thresholds: np.ndarray, levels: np.ndarray, ratio: np.ndarray | float = 1.0
    ) -> None:
        """Take integers thresholds [top], or [1 or O, top] with the same code of p = 0, ascending
        levels [top + 1], as in `optimal_levels`, and the ratio [1 or O] of each column's unit to 1
        / level_units."""
        layer = self.layer
        layer.thresholds.copy_(torch.as_tensor(thresholds))
        layer.levels.copy_(torch.as_tensor(levels))
        layer.log_step.copy_(torch.as_tensor(ratio).log())
        self._follow_units()
        self.set_zero(int(adc.threshold_code(0, layer.thresholds[0].tolist())))
        gaps = layer.levels.diff().clamp(min=1) / level_units(layer.plan.macro)
        layer.log_gaps.copy_(gaps.log())

    def _follow_units(self) -> None:
        layer = self.layer
        layer.unit.copy_(layer.log_step.exp().view(-1) / level_units(layer.plan.macro))

    def learned_levels(self) -> torch.Tensor:
        """float64 [top + 1]: what the codes stand for, in partial-sum units of a column of ratio 1,
        with the gradient of the gaps between them, a step for each code. The code of p = 0 stays 0;
        the levels, units and thresholds that are served follow."""
        layer = self.layer
        units, zero = level_units(layer.plan.macro), int(layer.zero.flatten()[0])
        above = torch.cat([layer.log_gaps.new_zeros(1), layer.log_gaps.exp().cumsum(0)])
        real = above - above[zero]
        with torch.no_grad():
            whole = torch.floor(real * units + 0.5)
            layer.levels.copy_(whole.clamp(-FREE_LEVEL_PEAK, FREE_LEVEL_PEAK))
            self._follow_units()
            layer.thresholds.copy_(nearest_thresholds(layer.levels, zero, layer.unit))
        return real + (layer.levels / units - real).detach()

    def level_values(self) -> torch.Tensor:
        """float64 [1 or O, top + 1]: what the codes of free levels stand for, in partial-sum units;
        in training with the gradients of the gaps and of the steps of columns."""
        layer = self.layer
        if not layer.training:
            return layer.unit.unsqueeze(1) * layer.levels
        levels = self.learned_levels()
        return layer.log_step.exp().view(-1, 1) * levels

    def level_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest) partial sum that the end codes stand for, rounded outwards: float64 [1
        or O]."""
        layer = self.layer
        lo, hi = (layer.unit * layer.levels[[0, -1]].unsqueeze(1)).numpy()
        return np.floor(lo), np.ceil(hi)

    def call(self) -> Call:
        """As that of a uniform ADC: hard reads by a table of levels, whose slope is 1 between the
        end levels and 0 beyond."""
        plan, values = self.layer.plan, self.level_values()
        served = self.snap()
        code = served.codes(plan.macro.p_min, plan.macro.p_max)
        spec = unpadded(level_spec(plan, served, code))
        back = unpadded(inside_spec(plan, *self.level_ends()))
        value = values.gather(1, torch.from_numpy(code))
        unit = self.layer.unit.float()
        return lambda x, w, pair: learned_table_reads(x, w, value, spec, back, unit, LEVEL_IMAGES)

    def code_values(self) -> np.ndarray:
        """float64 [G, top + 1]: what each code stands for, in partial-sum units."""
        layer = self.layer
        return layer.unit.unsqueeze(1).numpy() * layer.levels.numpy()

    def sizes(self) -> list[float]:
        """A number for each of the G ADCs that orders them by their unit."""
        return self.layer.unit.tolist()

    def figures(self) -> dict[str, float | int | None]:
        """step and zero, for people: levels have neither."""
        return {"step": None, "zero": None}

    def clip_bounds(self) -> list[tuple[int, int]]:
        """(lowest, highest) partial sum that the end codes stand for, for each of the G ADCs."""
        return [(int(lo), int(hi)) for lo, hi in zip(*self.level_ends())]


AdcState = IdealState | UniformState | LevelState
STATES: dict[type[Converter], type[AdcState]] = {
    Ideal: IdealState,
    Uniform: UniformState,
    Levels: LevelState,
}


def adc_state(layer: Layer) -> AdcState:
    """The state of a layer's ADC; it makes its parameters in the layer."""
    return STATES[of_macro(layer.plan.macro)](layer)


def relaxed_slopes(numbers: AdcNumbers, plan: Plan, relax: Relaxation) -> Tables:
    """The slopes of every partial sum under the noise of a training step."""
    macro = plan.macro
    tables = slope_tables(
        numbers.mult, numbers.zero, macro.shift, macro.top, relax.tau, macro.p_min, macro.p_max
    )
    return Tables(tables.p_min, over_rows(tables.row, plan), tables.slope)


def over_rows(row: np.ndarray, plan: Plan) -> np.ndarray:
    """Table rows of [1 or T, 1 or O] groups spread to int64 [T, O]."""
    return over_reads(row, plan).astype(np.int64)


def with_noise(spec: ReadSpec, relax: Relaxation | None, pair: int) -> ReadSpec:
    """The spec with the noise of one pair of planes."""
    if relax is None:
        return spec
    return replace(spec, noise=Relaxation(relax.tau, relax.seed * 64 + pair).noise())
