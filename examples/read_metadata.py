"""Reads an exported file with nothing but onnx and numpy, and computes every code of a layer from
its metadata.

    python examples/read_metadata.py model.onnx                       one line per layer
    python examples/read_metadata.py model.onnx conv1 codes.npy       accumulators of layer conv1, saved as conv1.acc.npy
                                                                      codes.npy: uint8 [N, C, H, W] input codes of the layer

docs/metadata.md explains the fields. This file does not import rqtool on purpose: it is how a
compiler or a test bench would start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

FORMAT = "rqtool.reram/1"


def document(model: onnx.ModelProto) -> dict:
    """The metadata document of a model."""
    return json.loads({p.key: p.value for p in model.metadata_props}[FORMAT])


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The constants of a model by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def patches(layer: dict, codes: np.ndarray) -> np.ndarray:
    """int64 [N, groups, channels of a group, ky, kx, H_out, W_out]: the input code of every row, at
    every position."""
    g = layer["geometry"]
    (kh, kw), (sh, sw), (dh, dw) = g["kernel"], g["stride"], g["dilation"]
    edges = [(0, 0), (0, 0), *((p, p) for p in g["padding"])]
    padded = np.pad(codes.astype(np.int64), edges, constant_values=layer["input"]["zero"])
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, ((kh - 1) * dh + 1, (kw - 1) * dw + 1), axis=(2, 3)
    )
    windows = windows[:, :, ::sh, ::sw, ::dh, ::dw]  # [N, C, H_out, W_out, ky, kx]
    n, channels, height, width = windows.shape[:4]
    split = windows.reshape(n, g["groups"], channels // g["groups"], height, width, kh, kw)
    return split.transpose(0, 1, 2, 5, 6, 3, 4)


def reads(
    layer: dict, constants: dict[str, np.ndarray], codes: np.ndarray
) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """(entry, partial sums, ADC codes) of every read; the arrays are int64 [N, columns, H_out,
    W_out]."""
    g, weight, steps = layer["geometry"], layer["weight"], layer["input"]["planes"]
    # the row at each place, where rows are not in order; then each place counts as a channel
    taken = layer["rows"]["taken"]
    kernel = g["kernel"][0] * g["kernel"][1] if taken is None else 1
    columns = layer["columns"] // g["groups"]
    cells = constants[weight["tensor"]].astype(np.int64) - weight["zero_point"]
    cells = cells.reshape(
        g["groups"],
        len(weight["first_channel"]),
        len(weight["planes"]["factor"]),
        columns,
        weight["span"] * kernel,
    )
    rows = patches(layer, codes)
    rows = rows.reshape(*rows.shape[:2], -1, *rows.shape[-2:])  # [N, groups, K, H_out, W_out]
    rows = rows if taken is None else rows[:, :, taken]
    names = list(layer["reads"])
    for values in zip(*layer["reads"].values()):
        entry = dict(zip(names, values))
        first_row = weight["first_channel"][entry["tile"]] * kernel
        start, stop, serial = entry["row_start"], entry["row_stop"], entry["serial"]
        tile = cells[entry["group"], entry["tile"], entry["plane"]]
        held = tile[:, start - first_row : stop - first_row]
        driven = rows[:, entry["group"], start:stop]
        driven = driven // 2 ** steps["shift"][serial] % 2 ** steps["bits"][serial]
        p = np.tensordot(held, driven, (1, 1)).swapaxes(0, 1)
        yield entry, p, adc_codes(layer["adc"], entry, p)


def per_column(table: list[list], entry: dict) -> list:
    """The entries of a [tiles or 1][columns or 1] table for each column of a read."""
    row = table[entry["tile"] % len(table)]
    count = entry["col_stop"] - entry["col_start"]
    return row[entry["col_start"] : entry["col_stop"]] if len(row) > 1 else row * count


def adc_codes(adc: dict, entry: dict, p: np.ndarray) -> np.ndarray:
    """The number of thresholds at or below each partial sum."""
    if adc["kind"] == "ideal":
        return p
    if adc["kind"] == "free":
        columns = per_column([adc["thresholds"]], entry)
    else:
        columns = [adc["steps"]["thresholds"][n] for n in per_column(adc["step_of"], entry)]
    return np.stack(
        [np.searchsorted(t, p[:, c], side="right") for c, t in enumerate(columns)], axis=1
    )


def read_values(adc: dict, entry: dict, codes: np.ndarray) -> np.ndarray:
    """What the digital side adds up for the codes of one read, before the factor of its planes."""
    if adc["kind"] == "ideal":
        return codes
    if adc["kind"] == "free":
        return np.array(adc["levels"])[codes]
    zero = [adc["steps"]["zero"][n] for n in per_column(adc["step_of"], entry)]
    gain = per_column(adc["gain"], entry)
    return np.array(gain)[:, None, None] * (codes - np.array(zero)[:, None, None])


def accumulators(layer: dict, constants: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """int64 [N, columns, H_out, W_out]: what the layer hands on."""
    parts: dict[int, np.ndarray] = {}
    for entry, _, code in reads(layer, constants, codes):
        group = entry["group"]
        value = read_values(layer["adc"], entry, code)
        parts[group] = parts.get(group, 0) + entry["factor"] * value
    return np.concatenate([parts[group] for group in sorted(parts)], axis=1)


def summary(layer: dict) -> str:
    """One line for people."""
    adc, rows = layer["adc"], layer["rows"]
    kind = "ideal ADC" if adc["kind"] == "ideal" else f"{adc['bits']}-bit {adc['kind']} ADC"
    count = len(layer["reads"]["tile"]) * (layer["columns"] // layer["geometry"]["groups"])
    size = f"{rows['count']} rows, {layer['columns']} columns, {rows['wordlines']} wordlines"
    return f"{layer['layer']}: {layer['kind']}, {size}, {kind}, {count} reads per position"


def main(arguments: list[str]) -> None:
    model = onnx.load(arguments[0])
    layers = {layer["layer"]: layer for layer in document(model)["layers"]}
    if len(arguments) == 1:
        print("\n".join(summary(layer) for layer in layers.values()))
        return
    name, path = arguments[1:]
    acc = accumulators(layers[name], tensors(model), np.load(path, allow_pickle=False))
    np.save(f"{name}.acc.npy", acc)
    print(f"{name}.acc.npy: int64 {list(acc.shape)}, {acc.min()}..{acc.max()}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4):
        sys.exit(__doc__)
    main(sys.argv[1:])
