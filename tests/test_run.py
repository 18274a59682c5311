"""The torch carrier of integer programs: every integer of every tensor equals golden's, for every
kind of operation and input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CASES, Builder, images, layer_program, network, random_layer

from rqtool.hardware.macro import Macro
from rqtool.kernels import choose
from rqtool.mapping.plan import Geometry
from rqtool.program import golden, run
from rqtool.program.ir import ATTRIBUTES, Program
from rqtool.program.run import RULES, Runner

MACROS = {
    "default": Macro(),
    "ideal": Macro(adc_bits=None),
    "free": Macro(levels="free"),
    "free columns": Macro(levels="free", granularity="column"),
    "tiles": Macro(granularity="tile", sign_scheme="split", wl=14),
    "columns": Macro(granularity="column", sign_scheme="offset", cell_bits=2),
    "serial": Macro(dac_bits=1, cell_bits=1),
    "eight bits": Macro(in_bits=8, w_bits=8, adc_bits=4, wl=4),
}


def same(program: Program, x: np.ndarray) -> dict[str, torch.Tensor]:
    """The trace, after every tensor of it was compared with golden's."""
    trace, expected = Runner(program).trace(torch.from_numpy(x)), golden.run(program, x)
    assert trace.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(trace[name].numpy(), values), name
        assert str(trace[name].dtype) == f"torch.{program.tensors[name].dtype}"
    return trace


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("macro", MACROS)
@pytest.mark.parametrize("seed", range(3))
def test_every_tensor_of_a_whole_network_equals_golden(macro, floats, seed):
    program = network(seed, MACROS[macro], floats)
    x = images(program, 4, seed)
    trace = same(program, x)
    assert torch.equal(Runner(program)(torch.from_numpy(x)), trace[program.output])


def test_every_kind_of_operation_has_a_rule():
    assert set(RULES) | {"reads"} == set(ATTRIBUTES)
    assert {op.kind for floats in (False, True) for op in network(floats=floats).ops} == set(
        ATTRIBUTES
    )


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_any_layer_equals_golden(seed):
    program = random_layer(seed)
    same(program, images(program, 3, seed))


@pytest.mark.parametrize("name", CASES)
def test_extreme_codes_equal_golden(name):
    """All inputs at their largest code, all at 0, and a checkerboard."""
    program = layer_program(CASES[name])
    shape, top = program.tensors["x"].shape, program.tensors["x"].hi
    board = np.indices(shape).sum(0) % 2
    same(
        program, np.stack([np.full(shape, top), np.zeros(shape, int), top * board]).astype(np.uint8)
    )


@pytest.mark.parametrize("name", CASES)
def test_the_fused_kernel_runs_wherever_it_is_certified(name):
    """But for ideal ADCs, which are convolutions, and sums that float32 does not hold."""
    program = layer_program(CASES[name])
    plan = program.plan(program.ops[0])
    fits = max(plan.acc_bound, plan.macro.p_max) < choose.FLOAT32_WHOLE
    fused = fits and not program.macro.ideal
    assert list(Runner(program).fast.values()) == [fused]


def test_an_uncertified_layer_takes_the_exact_path(monkeypatch):
    monkeypatch.setattr(run, "certified", lambda plan, mult, zero: False)
    program = network(1)
    assert not any(Runner(program).fast.values())
    same(program, images(program, 2))


def test_images_do_not_change_each_other_and_none_is_fine():
    program = network(2)
    x = images(program, 5)
    runner = Runner(program)
    together = runner(torch.from_numpy(x))
    assert torch.equal(
        together, torch.cat([runner(torch.from_numpy(x[n : n + 1])) for n in range(5)])
    )
    layer = layer_program(CASES["nthu"])
    assert Runner(layer)(torch.from_numpy(images(layer, 1)[:0])).shape == (
        0,
        *layer.tensors[layer.output].shape,
    )


def test_requants_floor_below_zero_and_clamp():
    b = Builder(Macro(), 0)
    x = b.input((5,), 0, 255)
    y = b.add(
        "requant",
        [x],
        (5,),
        -3,
        9,
        {"shift": 2, "lo": -3, "hi": 9},
        mult0=np.array([-1, -1, -1, 1, 1], np.int32),
        add=np.array([0, 2, -50, 2, 0], np.int32),
    )
    assert Runner(b.program(y))(torch.tensor([[5, 5, 5, 5, 255]], dtype=torch.uint8)).tolist() == [
        [-2, -1, -3, 1, 9]
    ]


def test_quantize_is_float32_half_up():
    b = Builder(Macro(), 0)
    program = b.program(b.quantize(b.input((7,), None, None), 2, -4, 11))
    x = np.array([[-9.0, -0.125, -0.126, 0.124, 0.125, 2.6, 99.0]], np.float32)
    assert same(program, x)[program.output].tolist() == [[-4, 0, -1, 0, 1, 10, 11]]


def test_max_pool_padding_never_wins():
    b = Builder(Macro(), 0)
    x = b.input((1, 2, 2), 0, 255)
    negative = b.add(
        "requant",
        [x],
        (1, 2, 2),
        -255,
        0,
        {"shift": 0, "lo": -255, "hi": 0},
        mult0=np.array([-1], np.int32).reshape(1, 1, 1),
        add=np.zeros((1, 1, 1), np.int32),
    )
    program = b.program(b.pool("maxpool", negative, (2, 2), (2, 2), [[1, 1], [1, 1]]))
    assert same(program, np.array([[[[1, 2], [3, 4]]]], np.uint8))[program.output].tolist() == [
        [[[-1, -2], [-3, -4]]]
    ]


def test_one_read_worked_by_hand():
    """Two rows, one column: p = 3 * 15 - 7 * 2 = 31 at step 2**15 / 1639 (about 20): code - zero =
    2; and the gain multiplies."""
    macro = Macro(wl=2, granularity="tile")
    b = Builder(macro, 0)
    name = b.reads(b.input((2, 1, 1), 0, 15), Geometry(2, 1, kind="linear"))
    program = b.program(name)
    op = program.ops[0]
    for role, value in (
        ("weight", np.array([3, -7], np.int8).reshape(1, 2, 1, 1)),
        ("mult", np.full((1, 1), 1639, np.int32)),
        ("zero", np.full((1, 1), 8, np.int32)),
        ("gain", np.full((1, 1), 5, np.int32)),
    ):
        program.constants[op.consts[role]] = value
    assert same(program, np.array([15, 2], np.uint8).reshape(1, 2, 1, 1))[name].item() == 5 * 2
