"""Golden vectors for a test bench: what every tile of every layer takes in and gives out, as .npz
and as hex memory files.

    manifest.json                  names, shapes, axes, widths and sha256 of everything below
    00-conv1.npz                   the arrays of the first layer
    00-conv1.p.hex ...             the same arrays, one word per line, for Verilog's $readmemh

    array      axes                                               word
    input      image, channel, y, x                               in_bits, unsigned
    cells      read, channel, ky, kx (docs/metadata.md)           wide enough for every cell
    p          tile, serial, plane, image, column, y, x           wide enough for every possible partial sum
    code       tile, serial, plane, image, column, y, x           adc_bits, unsigned; an ideal ADC: as p
    tile_acc   tile, image, column, y, x                          32 bits: the sum over planes of factor * value
    acc        image, column, y, x                                32 bits: the sum over tiles

The last axis runs fastest. Negative words are two's complement in the width that the manifest
gives; a word is written with as many hex digits as its width needs. The first line of a hex file is
a comment.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from rqtool.errors import StorageError, escaped
from rqtool.export.layout import Layout
from rqtool.export.verify import check_images
from rqtool.program import golden
from rqtool.program.ir import Op, Program
from rqtool.storage import write_atomic

FORMAT = "rqtool.vectors/1"
ACC_BITS = 32
AXES = {
    "input": ["image", "channel", "y", "x"],
    "cells": ["read", "channel", "ky", "kx"],
    "p": ["tile", "serial", "plane", "image", "column", "y", "x"],
    "code": ["tile", "serial", "plane", "image", "column", "y", "x"],
    "tile_acc": ["tile", "image", "column", "y", "x"],
    "acc": ["image", "column", "y", "x"],
}


def write_vectors(
    program: Program, x: np.ndarray, folder: str | Path, *, force: bool = False
) -> dict[str, Any]:
    """The manifest of the vectors written into `folder` for the images x (uint8 or float32 [n,
    ...]).

    Raises InputError where x does not fit the program, ConfigError for existing files without
    `force`, StorageError where the disk refuses.
    """
    check_images(program, x)
    folder = _made(Path(folder))
    values = golden.run(program, x)
    layers = [
        _write_layer(program, op, values, folder, number, force)
        for number, op in enumerate(program.reads())
    ]
    manifest = {
        "format": FORMAT,
        "program_sha256": program.sha256(),
        "macro": program.macro.to_dict(),
        **program.macros.tables(),
        "images": len(x),
        "layers": layers,
    }
    write_atomic(
        folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode(), force=force
    )
    return manifest


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(
            f"{escaped(folder)}: cannot be made a folder ({e.strerror}); give another one"
        ) from e
    return folder


def _write_layer(
    program: Program, op: Op, values: dict[str, np.ndarray], folder: Path, number: int, force: bool
) -> dict[str, Any]:
    arrays, layout = layer_arrays(program, op, values), Layout(program, op)
    stem = f"{number:02d}-{re.sub('[^A-Za-z0-9_.-]', '_', op.attrs['layer'])[:40]}"
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_atomic(folder / f"{stem}.npz", packed.getvalue(), force=force)
    words = {
        name: _write_words(folder, stem, name, array, *word(layout, name), force)
        for name, array in arrays.items()
    }
    return {"layer": op.attrs["layer"], "npz": f"{stem}.npz", "arrays": words}


def _write_words(
    folder: Path, stem: str, name: str, array: np.ndarray, bits: int, signed: bool, force: bool
) -> dict[str, Any]:
    text = hex_words(array, bits, f"{stem} {name} {list(array.shape)}, {bits} bits")
    write_atomic(folder / f"{stem}.{name}.hex", text.encode(), force=force)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {
        "hex": f"{stem}.{name}.hex",
        "axes": AXES[name],
        "shape": list(array.shape),
        "bits": bits,
        "signed": signed,
        "sha256": digest,
    }


def layer_arrays(program: Program, op: Op, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of one layer by name (see the head of this file): uint8 input, int16 cells, int32
    the others.

    values: every tensor of the program, as `golden.run` gives them.
    """
    plan, x, acc = program.plan(op), values[op.inputs[0]], values[op.output]
    shape = (len(plan.tiles), len(plan.input_planes), len(plan.weight_planes), *acc.shape)
    p, code, tile_acc = (
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros((shape[0], *acc.shape), np.int32),
    )
    for read in golden.each_read(program, op, x):
        at = read.tile, read.input_plane, read.weight_plane
        p[at], code[at] = read.p.reshape(acc.shape), read.code.reshape(acc.shape)
        tile_acc[read.tile] += (read.factor * read.value).reshape(acc.shape).astype(np.int32)
    cells = Layout(program, op).values
    return {
        "input": x.astype(np.uint8),
        "cells": cells,
        "p": p,
        "code": code,
        "tile_acc": tile_acc,
        "acc": acc.astype(np.int32),
    }


def word(layout: Layout, name: str) -> tuple[int, bool]:
    """(bits, signed) of a word of one array: enough for everything the hardware could give, not
    only for these images."""
    macro = layout.macro
    if name in ("tile_acc", "acc"):
        return ACC_BITS, True
    if name == "input" or (name == "code" and not layout.adc.exact):
        return macro.in_bits if name == "input" else macro.adc_bits, False
    lo, hi = (
        (int(layout.values.min()), int(layout.values.max())) if name == "cells" else layout.p_range
    )
    return bits_of(lo, hi), lo < 0


def bits_of(lo: int, hi: int) -> int:
    """The narrowest word for lo..hi: unsigned where lo >= 0, else two's complement.

    >>> bits_of(0, 15), bits_of(-945, 945), bits_of(-8, 7), bits_of(0, 0)
    (4, 11, 4, 1)
    """
    return max(1, hi.bit_length()) if lo >= 0 else 1 + max(hi.bit_length(), (-lo - 1).bit_length())


def hex_words(array: np.ndarray, bits: int, title: str) -> str:
    """The text of a $readmemh file: a comment, then one word per line in C order, two's complement
    in `bits` bits.

    >>> hex_words(np.array([5, -1, -945]), 11, "three words")
    '// three words\\n005\\n7ff\\n44f\\n'
    """
    digits = -(-bits // 4)
    words = array.reshape(-1).astype(np.int64) & ((1 << bits) - 1)
    return f"// {title}\n" + "".join(f"{word:0{digits}x}\n" for word in words.tolist())
