"""Codes and accumulators of a layer from the metadata document and the file's tensors alone: no
program, no plan.

What this module computes is compared with the definition when a file is verified, so a document
that left something out, or said it wrongly, is found. examples/read_metadata.py is a second,
independent reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from rqtool.hardware import adc
from rqtool.hardware.converter import Ideal, Levels, Uniform


class Entry(NamedTuple):
    """One entry of a layer's `reads`. p, code, value: int64 [N, columns of the entry, H_out,
    W_out]; value before `factor`."""

    tile: int
    columns: tuple[int, int]
    factor: int
    p: np.ndarray
    code: np.ndarray
    value: np.ndarray


def entries(
    layer: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray
) -> Iterator[Entry]:
    """Every entry of `layer["reads"]` for the input codes x: uint8 [N, C, H, W]."""
    names = (
        "tile",
        "serial",
        "plane",
        "group",
        "factor",
        "row_start",
        "row_stop",
        "col_start",
        "col_stop",
    )
    taps = _taps(layer, x)
    for tile, serial, plane, group, factor, start, stop, first, last in zip(
        *(layer["reads"][name] for name in names)
    ):
        cells = _cells(layer, tensors, tile, plane, group, (start, stop))
        planes = layer["input"]["planes"]
        driven = (taps[group, start:stop] >> planes["shift"][serial]) & (
            (1 << planes["bits"][serial]) - 1
        )
        p = np.einsum("ok,knyx->noyx", cells, driven)
        yield Entry(
            tile, (first, last), factor, p, *_converted(layer["adc"], tile, slice(first, last), p)
        )


def accumulators(
    layer: dict[str, Any], tensors: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    """int64 [N, O, H_out, W_out]: what the layer hands on."""
    acc: Any = None
    for entry in entries(layer, tensors, x):
        if acc is None:
            acc = np.zeros((entry.p.shape[0], layer["columns"], *entry.p.shape[2:]), np.int64)
        acc[:, slice(*entry.columns)] += entry.factor * entry.value
    return acc


def _taps(layer: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """int64 [groups, places, N, H_out, W_out]: the code on each wordline."""
    g = layer["geometry"]
    (ph, pw), (sh, sw), (dh, dw), (kh, kw) = g["padding"], g["stride"], g["dilation"], g["kernel"]
    x = np.pad(
        x.astype(np.int64),
        ((0, 0), (0, 0), (ph, ph), (pw, pw)),
        constant_values=layer["input"]["zero"],
    )
    ho, wo = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    shifted = [
        x[:, :, y * dh : y * dh + (ho - 1) * sh + 1 : sh, z * dw : z * dw + (wo - 1) * sw + 1 : sw]
        for y in range(kh)
        for z in range(kw)
    ]
    rows = (
        np.stack(shifted, 2).reshape(x.shape[0], g["groups"], -1, ho, wo).transpose(1, 2, 0, 3, 4)
    )
    taken = layer["rows"]["taken"]
    return rows if taken is None else rows[:, taken]


def _cells(
    layer: dict[str, Any],
    tensors: dict[str, np.ndarray],
    tile: int,
    plane: int,
    group: int,
    rows: tuple[int, int],
) -> np.ndarray:
    """int64 [columns of a group, rows of the tile]: the cells of one plane of one tile."""
    weight, g = layer["weight"], layer["geometry"]
    taps = g["kernel"][0] * g["kernel"][1] if layer["rows"]["taken"] is None else 1
    columns, tiles, planes = (
        layer["columns"] // g["groups"],
        len(weight["first_channel"]),
        len(weight["planes"]["factor"]),
    )
    first = ((group * tiles + tile) * planes + plane) * columns
    held = (
        tensors[weight["tensor"]][first : first + columns].astype(np.int64).reshape(columns, -1)
        - weight["zero_point"]
    )
    offset = weight["first_channel"][tile] * taps
    return held[:, rows[0] - offset : rows[1] - offset]


def _converted(
    spec: dict[str, Any], tile: int, columns: slice, p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of the partial sums p of one tile and some columns."""
    return READERS[spec["kind"]](spec, tile, columns, p)


def _ideal(
    spec: dict[str, Any], tile: int, columns: slice, p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return p, p


def _levels(
    spec: dict[str, Any], tile: int, columns: slice, p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rows = spec["thresholds"]
    code = _counted(p, rows[columns] if len(rows) > 1 else rows)
    return code, np.array(spec["levels"], np.int64)[code]


def _uniform(
    spec: dict[str, Any], tile: int, columns: slice, p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    step, gain = _of(spec["step_of"], tile, columns), _of(spec["gain"], tile, columns)
    zero = np.array(spec["steps"]["zero"], np.int64)[step]
    code = _counted(p, [spec["steps"]["thresholds"][n] for n in step])
    return code, adc.uniform_value(code, zero[:, None, None], gain[:, None, None])


READERS = {Ideal.kind: _ideal, Uniform.kind: _uniform, Levels.kind: _levels}


def _counted(p: np.ndarray, rows: list[list[int]]) -> np.ndarray:
    """The codes of p [N, columns, H_out, W_out] by the thresholds of each column, or of all."""
    return adc.threshold_code(p, np.array(rows).T[:, :, None, None])


def _of(table: list[list[int]], tile: int, columns: slice) -> np.ndarray:
    """int64 [columns or 1]: the entries of a [tiles or 1][columns or 1] table."""
    row = np.array(table[tile if len(table) > 1 else 0], np.int64)
    return row[columns] if row.size > 1 else row
