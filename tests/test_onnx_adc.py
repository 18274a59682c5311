"""One ADC, every carrier: exact rationals, Python ints, numpy, torch, onnxruntime and
onnx.reference give the same code for every p.

About 300 uniform ADCs (1 to 8 bits, every code book, zeros anywhere, one step or many) and free
thresholds, over the whole domain of p. The nodes are those of the exported file:
rqtool.hardware.adc run on `Int`, and the QLinearConv whose requantisation is the ADC.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rqtool.export.emit import IR_VERSION, OPSET, Body, Int
from rqtool.export.layout import requantised
from rqtool.hardware import adc

LEVELS = [onnxruntime.GraphOptimizationLevel(v) for v in (0, 1, 2, 99)]
COARSE = 64  # the larger cell of the two that make any p below 2**14 from uint8 codes; pairs of products stay below 2**15


@dataclass(frozen=True)
class Group:
    """ADCs that one tensor operation converts: same bits, code book, shift and domain; own step and
    zero each."""

    name: str
    bits: int
    codebook: str
    p_max: int
    mult: tuple[int, ...]
    zero: tuple[int, ...]

    @property
    def shift(self) -> int:
        return adc.shift_for(self.p_max)

    @property
    def top(self) -> int:
        return adc.top_code(self.bits, self.codebook)

    @cached_property
    def domain(self) -> np.ndarray:
        return np.arange(0 if self.codebook == "unsigned" else -self.p_max, self.p_max + 1)

    @cached_property
    def exact(self) -> np.ndarray:
        """int64 [ADCs, domain]: the number of codes j with p >= (j - zero - 1/2) * step, step an
        exact rational."""
        rows = []
        for mult, zero in zip(self.mult, self.zero):
            step = Fraction(1 << self.shift, mult)
            thresholds = [ceil((j - zero - Fraction(1, 2)) * step) for j in range(1, self.top + 1)]
            rows.append(np.searchsorted(thresholds, self.domain, side="right"))
        return np.array(rows)

    def column(self, values: tuple[int, ...], dtype: type = np.int64) -> np.ndarray:
        return np.array(values, dtype)[:, None]


def make_groups() -> list[Group]:
    rng, groups = np.random.default_rng(5), []
    for bits in range(1, 9):
        for codebook in adc.CODEBOOKS:
            if (bits, codebook) == (1, "sign-magnitude"):
                continue
            for zeros in ("book", "anywhere"):
                p_max = int(rng.choice([3, 81, 945, 1344, 2000]))
                groups.append(make_group(rng, bits, codebook, zeros, p_max, count=6))
    groups += [make_group(rng, bits, "twos", "book", 16383, count=4) for bits in (4, 8)]
    groups += [
        make_group(rng, bits, "twos", "anywhere", p_max, count=2)
        for bits, p_max in ((6, 40000), (4, 100000), (2, 100001))
    ]
    return groups


def make_group(
    rng: np.random.Generator, bits: int, codebook: str, zeros: str, p_max: int, count: int
) -> Group:
    shift, top = adc.shift_for(p_max), adc.top_code(bits, codebook)
    steps = np.exp(rng.uniform(0, np.log(2 * p_max), count))
    mult = [1, (1 << shift) - 1, *(int(m) for m in adc.snap(steps, shift))][:count]
    zero = (
        [adc.default_zero(bits, codebook)] * count
        if zeros == "book"
        else rng.integers(0, top + 1, count).tolist()
    )
    return Group(
        f"{bits}-{codebook}-{zeros}-{p_max}", bits, codebook, p_max, tuple(mult), tuple(zero)
    )


GROUPS = make_groups()
NAMES = [g.name for g in GROUPS]


def test_there_are_at_least_200_adcs_of_all_kinds() -> None:
    assert sum(len(g.mult) for g in GROUPS) >= 200
    assert {(g.bits, g.codebook) for g in GROUPS} == {
        (b, c) for b in range(1, 9) for c in adc.CODEBOOKS
    } - {(1, "sign-magnitude")}
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_python_ints_equal_the_exact_rationals(group: Group) -> None:
    step = max(1, len(group.domain) // 4000)
    for mult, zero, want in zip(group.mult, group.zero, group.exact):
        got = [
            adc.uniform_code(p, mult, group.shift, zero, group.top)
            for p in group.domain[::step].tolist()
        ]
        assert got == want[::step].tolist()


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_numpy_and_torch_equal_the_exact_rationals(group: Group) -> None:
    mult, zero, p = group.column(group.mult), group.column(group.zero), group.domain[None]
    arguments = group.shift, group.top
    got = [adc.uniform_code(p, mult, arguments[0], zero, arguments[1])]
    tensors = [torch.from_numpy(a.copy()) for a in (p, mult, zero)]
    got.append(adc.uniform_code(tensors[0], tensors[1], group.shift, tensors[2], group.top).numpy())
    floats = [t.to(torch.float32) for t in tensors]
    assert adc.float32_exact(group.p_max, group.shift, group.bits)
    got.append(
        adc.uniform_code_float(floats[0], floats[1], group.shift, floats[2], group.top).numpy()
    )
    got.append(requantised(p, mult, group.shift, zero, group.top))
    if group.shift == adc.Q15:
        narrow = [a.astype(np.int32) for a in (p, mult, zero)]
        got.append(adc.uniform_code(narrow[0], narrow[1], group.shift, narrow[2], group.top))
        assert got[-1].dtype == np.int32
    for codes in got:
        assert np.array_equal(codes, group.exact)


# -- graphs ----------------------------------------------------------------------------------------
Arrays = dict[str, np.ndarray]


def run_everywhere(
    body: Body, inputs: Arrays, outputs: dict[str, int], rank: int, initializers: Arrays
) -> list[Arrays]:
    """The outputs by name from onnxruntime at each optimisation level and from onnx.reference."""
    ends = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    results = [helper.make_tensor_value_info(n, kind, [None] * rank) for n, kind in outputs.items()]
    graph = helper.make_graph(
        body.nodes,
        "adc",
        ends,
        results,
        [numpy_helper.from_array(a, n) for n, a in initializers.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    runs = []
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 3
        runs.append(
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            ).run(list(outputs), inputs)
        )
    runs.append(ReferenceEvaluator(model).run(list(outputs), inputs))
    return [dict(zip(outputs, values)) for values in runs]


def test_emitted_integer_nodes_equal_the_exact_rationals() -> None:
    body, inputs, constants = Body("v_"), {}, {}
    for n, g in enumerate(GROUPS):
        inputs[f"p{n}"] = g.domain[None].astype(np.int32)
        constants |= {
            f"mult{n}": g.column(g.mult, np.int32),
            f"zero{n}": g.column(g.zero, np.int32),
        }
        p = Int(body, f"p{n}", int(g.domain[0]), int(g.domain[-1]))
        mult, zero = Int(body, f"mult{n}", 1, max(g.mult)), Int(body, f"zero{n}", 0, max(g.zero))
        adc.uniform_code(p, mult, g.shift, zero, g.top)
        body.nodes[-1].output[0] = f"code{n}"
    for values in run_everywhere(
        body, inputs, {f"code{n}": TensorProto.INT32 for n in range(len(GROUPS))}, 2, constants
    ):
        for n, g in enumerate(GROUPS):
            assert np.array_equal(values[f"code{n}"], g.exact), g.name
    wide = [
        node
        for node in body.nodes
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.INT64
    ]
    assert wide, "domains beyond 2**14 must have gone through int64"


def test_qlinearconv_is_the_adc() -> None:
    """p = 64 a - 64 b + c - d from four input channels, so that one 1x1 convolution meets every p
    of a group's domain."""
    groups = [g for g in GROUPS if g.p_max < 1 << 14 and len(set(g.zero)) == 1]
    body, inputs, constants = Body("v_"), {}, {}
    one, nought = body.const(1.0, np.float32), body.const(0, np.uint8)
    cells = np.array([COARSE, -COARSE, 1, -1], np.int8)
    for n, g in enumerate(groups):
        size, below = np.abs(g.domain), g.domain < 0
        channels = np.stack(
            [
                size // COARSE * ~below,
                size // COARSE * below,
                size % COARSE * ~below,
                size % COARSE * below,
            ],
            1,
        )
        assert channels.max() <= 255 and np.array_equal(channels @ cells.astype(int), g.domain)
        inputs[f"x{n}"] = channels.astype(np.uint8)[:, :, None, None]
        constants[f"w{n}"] = np.tile(cells[None, :, None, None], (len(g.mult), 1, 1, 1))
        constants[f"s{n}"] = np.array(g.mult, np.float32) / np.float32(1 << g.shift)
        zero = body.const(g.zero[0], np.uint8)
        raw = body.node(
            "QLinearConv", f"x{n}", one, nought, f"w{n}", f"s{n}", body.const(0, np.int8), one, zero
        )
        body.append("Clip", (raw, nought, body.const(g.top, np.uint8)), f"code{n}")
    for values in run_everywhere(
        body, inputs, {f"code{n}": TensorProto.UINT8 for n in range(len(groups))}, 4, constants
    ):
        for n, g in enumerate(groups):
            assert np.array_equal(values[f"code{n}"][:, :, 0, 0].T, g.exact), g.name


def test_free_thresholds_and_levels_equal_counting() -> None:
    rng, body = np.random.default_rng(6), Body("v_")
    domain = np.arange(-945, 946)
    sets = []
    for bits in (1, 2, 2, 3, 3, 4, 4, 4, 5, 8):
        top = (1 << bits) - int(rng.integers(1, 2 if bits == 1 else 3))
        thresholds, levels = (
            np.sort(rng.integers(-1000, 1000, top)),
            np.sort(rng.integers(-1000, 1000, top + 1)),
        )
        sets.append((thresholds.tolist(), levels.tolist()))
        code = adc.threshold_code(Int(body, "p", -945, 945), sets[-1][0])
        body.append("Identity", (code.name,), f"code{len(sets) - 1}")
        body.append("Identity", (adc.level_value(code, sets[-1][1]).name,), f"value{len(sets) - 1}")
    names = {
        f"{what}{n}": TensorProto.INT32 for n in range(len(sets)) for what in ("code", "value")
    }
    runs = run_everywhere(body, {"p": domain.astype(np.int32)}, names, 1, {})
    for n, (thresholds, levels) in enumerate(sets):
        want = np.array([sum(1 for t in thresholds if t <= p) for p in domain.tolist()])
        assert np.array_equal(adc.threshold_code(domain, thresholds), want)
        assert np.array_equal(
            adc.threshold_code(torch.from_numpy(domain), thresholds).numpy(), want
        )
        for values in runs:
            assert np.array_equal(values[f"code{n}"], want) and np.array_equal(
                values[f"value{n}"], np.array(levels)[want]
            )


def test_a_wide_integer_is_clipped_exactly_up_to_what_float64_holds() -> None:
    """Whole numbers up to 2**53 are compared as reals; beyond them nothing is clipped silently."""
    body, top = Body(), 1 << 53
    clipped = Int(body, "p", -top, top, wide=True).clip(-7, 15)
    assert (clipped.lo, clipped.hi) == (-7, 15)
    body.append("Identity", (clipped.name,), "code")
    p = np.array([-top, -(1 << 32) - 1, -(1 << 32), -8, -7, 0, 15, 16, 1 << 32, top - 1, top])
    for values in run_everywhere(body, {"p": p}, {"code": TensorProto.INT32}, 1, {}):
        assert np.array_equal(values["code"], np.clip(p, -7, 15))
    with pytest.raises(AssertionError, match=f"p in {-top - 1}..{top} does not fit float64"):
        Int(Body(), "p", -top - 1, top, wide=True).clip(0, 15)
