"""Planes put together again are the number they were cut from, for every scheme, slicing and
carrier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rqtool.hardware.macro import SIGN_SCHEMES, Macro
from rqtool.mapping.planes import Plane, extract, input_planes, slices, weight_planes

CARRIERS = {
    "int": (int, int),
    "numpy int16": (lambda q: np.array([q], np.int16), lambda a: int(a[0])),
    "numpy int64": (lambda q: np.array([[q]]), lambda a: int(a[0, 0])),
    "torch int32": (lambda q: torch.tensor([q], dtype=torch.int32), lambda a: int(a[0])),
    "torch int64": (lambda q: torch.tensor(q), int),
}


def weight_macros() -> list[Macro]:
    """Every width, sign scheme and slicing of a weight."""
    return [
        Macro(w_bits=bits, sign_scheme=scheme, cell_bits=cell)
        for scheme in SIGN_SCHEMES
        for bits in range(2, 9)
        for cell in range(1, bits + (scheme == "offset"))
    ]


def put_together(q, planes):
    return sum(p.factor * extract(q, p) for p in planes)


@pytest.mark.parametrize("scheme", SIGN_SCHEMES)
def test_every_weight_is_the_sum_of_its_planes(scheme):
    for m in [m for m in weight_macros() if m.sign_scheme == scheme]:
        weights = np.arange(-m.q_w, m.q_w + 1)
        assert np.array_equal(put_together(weights, weight_planes(m)) - m.weight_offset, weights), m
        tensor = torch.arange(-m.q_w, m.q_w + 1)
        assert torch.equal(put_together(tensor, weight_planes(m)) - m.weight_offset, tensor), m


@pytest.mark.parametrize("in_bits", range(1, 9))
def test_every_input_is_the_sum_of_its_planes(in_bits):
    for dac_bits in range(1, in_bits + 1):
        m = Macro(in_bits=in_bits, dac_bits=dac_bits)
        codes = np.arange(m.q_x + 1)
        assert np.array_equal(put_together(codes, input_planes(m)), codes), m


@pytest.mark.parametrize("carrier", CARRIERS)
@given(data=st.data())
def test_all_carriers_cut_alike(carrier, data):
    m = data.draw(st.sampled_from(weight_macros()))
    q = data.draw(st.integers(-m.q_w, m.q_w))
    make, read = CARRIERS[carrier]
    for plane in weight_planes(m):
        assert read(extract(make(q), plane)) == extract(q, plane)


@pytest.mark.parametrize("dtype", [np.int8, torch.int8])
def test_int8_holds_every_weight_without_an_offset(dtype):
    for m in [m for m in weight_macros() if m.weight_offset == 0]:
        weights = list(range(-m.q_w, m.q_w + 1))
        q = torch.tensor(weights, dtype=dtype) if dtype is torch.int8 else np.array(weights, dtype)
        for plane in weight_planes(m):
            assert extract(q, plane).tolist() == [extract(w, plane) for w in weights]


def test_uint8_holds_every_input():
    m = Macro(in_bits=8, dac_bits=3)
    codes = np.arange(256, dtype=np.uint8)
    assert [extract(codes, p).tolist() for p in input_planes(m)] == [
        [extract(x, p) for x in range(256)] for p in input_planes(m)
    ]


@given(st.sampled_from(weight_macros()), st.data())
def test_a_plane_stays_within_its_cells(m, data):
    q = data.draw(st.integers(-m.q_w, m.q_w))
    for plane in weight_planes(m):
        part = extract(q, plane)
        assert plane.peak == 2**plane.bits - 1 and plane.bits <= m.cell_bits
        assert (-plane.peak if plane.part == "all" else 0) <= part <= plane.peak


@given(st.integers(1, 8), st.integers(1, 8))
def test_slices_cover_every_bit_once(total, width):
    cut = slices(total, width)
    assert [b for s, n in cut for b in range(s, s + n)] == list(range(total))
    assert all(n == width for _, n in cut[:-1])


@pytest.mark.parametrize(
    ("fields", "planes"),
    [
        ({}, (Plane(1, "all", 0, 3),)),
        ({"cell_bits": 2}, (Plane(1, "all", 0, 2), Plane(4, "all", 2, 1))),
        ({"sign_scheme": "split"}, (Plane(1, "positive", 0, 3), Plane(-1, "negative", 0, 3))),
        (
            {"sign_scheme": "offset", "cell_bits": 2},
            (Plane(1, "offset", 0, 2, 8), Plane(4, "offset", 2, 2, 8)),
        ),
    ],
)
def test_planes_by_hand(fields, planes):
    assert weight_planes(Macro(**fields)) == planes


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, {-7: [-7], 0: [0], 5: [5]}),
        ({"cell_bits": 2}, {-7: [-3, -1], 0: [0, 0], 5: [1, 1]}),
        ({"sign_scheme": "split"}, {-7: [0, 7], 0: [0, 0], 5: [5, 0]}),
        ({"sign_scheme": "offset", "cell_bits": 2}, {-7: [1, 0], 0: [0, 2], 5: [1, 3]}),
    ],
)
def test_parts_by_hand(fields, parts):
    assert {w: [extract(w, p) for p in weight_planes(Macro(**fields))] for w in parts} == parts
