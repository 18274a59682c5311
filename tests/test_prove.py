"""The verifier: real programs pass, and a program with any number changed is refused or still runs,
never anything else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CASES, images, layer_program, network

from rqtool.errors import InputError, RqError
from rqtool.program import golden
from rqtool.program.ir import Program
from rqtool.program.prove import prove
from rqtool.program.run import Runner


@pytest.mark.parametrize("name", CASES)
def test_layers_pass(name: str) -> None:
    prove(layer_program(CASES[name]))


@pytest.mark.parametrize("floats", [False, True])
def test_networks_pass(floats: bool) -> None:
    for seed in range(6):
        prove(network(seed, floats=floats))


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all numbers and strings of JSON data."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, (*path, k))]
    if isinstance(value, list):
        return [leaf for k, v in enumerate(value) for leaf in leaves(v, (*path, k))]
    return [path]


def put(value: Any, path: tuple, new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


PROGRAMS = [
    network(0),
    network(1, floats=True),
    layer_program(CASES["linear"]),
    layer_program(CASES["free_columns"]),
]
DATA = [p.to_json() for p in PROGRAMS]
NEW = st.sampled_from(
    [
        -1,
        0,
        1,
        2,
        3,
        7,
        16,
        1 << 20,
        1 << 40,
        0.5,
        None,
        "x",
        True,
        [],
        [1, 2],
        {},
        [[0, 1], [1, 0]],
    ]
)


@settings(max_examples=400)
@given(st.integers(0, len(PROGRAMS) - 1), st.integers(0, 10**9), NEW)
def test_one_changed_number_is_refused_or_runs(which: int, place: int, new: Any) -> None:
    data, paths = copy.deepcopy(DATA[which]), leaves(DATA[which])
    put(data, paths[place % len(paths)], new)
    try:
        program = Program.from_json(data, PROGRAMS[which].constants)
        prove(program)
    except RqError:
        return
    x = images(PROGRAMS[which], 2)
    if program.tensors[program.input] == PROGRAMS[which].tensors[PROGRAMS[which].input]:
        values = golden.run(program, x)
        trace = Runner(program).trace(torch.from_numpy(x))
        assert all(
            np.array_equal(values[op.output], trace[op.output].numpy()) for op in program.ops
        )


@settings(max_examples=150)
@given(st.integers(0, 10**9), st.integers(-(2**31), 2**31 - 1))
def test_changed_constants_stay_within_bounds_or_are_refused(place: int, new: int) -> None:
    program = PROGRAMS[0]
    names = sorted(program.constants)
    name = names[place % len(names)]
    array = program.constants[name].copy()
    array.flat[place % array.size] = new if array.dtype == np.int32 else new % 256 - 128
    changed = (
        Program.from_json(DATA[0], {**program.constants, name: array})
        if not refused(program, name, array)
        else None
    )
    if changed is not None:
        golden.run(changed, images(program, 1))  # asserts that every tensor stays within its bounds


def refused(program: Program, name: str, array: np.ndarray) -> bool:
    try:
        prove(Program.from_json(DATA[0], {**program.constants, name: array}))
    except RqError:
        return True
    return False


@pytest.mark.parametrize(
    "order",
    [np.zeros(36, np.int32), np.arange(35, dtype=np.int32), np.arange(1, 37, dtype=np.int32)],
)
def test_an_order_takes_each_row_once(order: np.ndarray) -> None:
    program = layer_program(CASES["spread"])
    program.constants["reads0.order"] = order
    with pytest.raises(InputError) as e:
        prove(program)
    assert (
        str(e.value) == "the integer program is broken at 'reads0': its order is not one of "
        "its rows; make the file again"
    )
    del program.ops[0].consts["order"]
    with pytest.raises(
        InputError,
        match="^the integer program is broken at 'reads0': it has no constant for "
        "order; make the file again$",
    ):
        prove(program)


@pytest.mark.parametrize(
    ("thresholds", "sentence"),
    [
        (np.zeros(15), "its thresholds have shape [15]"),
        (np.zeros((2, 15)), "its thresholds have shape [2, 15]"),
        (np.zeros((5, 14)), "its thresholds and levels are not one code book"),
        (
            np.tile(np.arange(15), (5, 1)) * [[1], [1], [1], [1], [-1]],
            "its thresholds do not ascend",
        ),
    ],
)
def test_thresholds_are_ascending_rows_for_the_layer_or_for_each_column(
    thresholds: np.ndarray, sentence: str
) -> None:
    program = layer_program(CASES["free_columns"])
    program.constants["reads0.thresholds"] = thresholds.astype(np.int32)
    with pytest.raises(InputError) as e:
        prove(program)
    assert (
        str(e.value)
        == f"the integer program is broken at 'reads0': {sentence}; make the file again"
    )


def test_the_sentence() -> None:
    data = copy.deepcopy(DATA[2])
    reads = next(op for op in data["ops"] if op["kind"] == "reads")
    reads["attrs"]["geometry"]["channels"] = 400
    program = Program.from_json(data, PROGRAMS[2].constants)
    with pytest.raises(InputError) as e:
        prove(program)
    assert (
        str(e.value) == "the integer program is broken at 'reads0': its input has shape [40, "
        "1, 1]; make the file again"
    )
