"""The exported file gives every integer of every tensor, says so in its metadata, and is refused
when anything in it was changed."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from programs import CASES, SAME, Builder, images, layer_program, network, random_layer

from rqtool.errors import CheckError, ConfigError, InputError, RqError, StorageError
from rqtool.export import metadata, replay
from rqtool.export.layout import Layout, differing_codes
from rqtool.export.onnx import to_onnx
from rqtool.export.schema import FORMAT, SCHEMA, validate_schema
from rqtool.export.validate import load_onnx, validate
from rqtool.export.vectors import AXES, hex_words, write_vectors
from rqtool.export.verify import (
    LEVELS,
    Report,
    compare,
    session,
    verify,
    verify_file,
    with_all_tensors,
)
from rqtool.hardware import adc
from rqtool.hardware.macro import Macro
from rqtool.mapping.plan import Geometry
from rqtool.program import golden
from rqtool.program.ir import Op, Program, Tensor

ROOT = Path(__file__).resolve().parents[1]
BODIES = ("qlinear", "explicit")


def reader() -> Any:
    """examples/read_metadata.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "read_metadata", ROOT / "examples" / "read_metadata.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- every integer ---------------------------------------------------------------------------------
def assert_equal(program: Program, body: str, n: int = 2) -> None:
    """Every tensor of `program` on n images, by onnxruntime at each level and by onnx.reference:
    dtype, shape and integers."""
    x = images(program, n)
    want, model = golden.run(program, x), to_onnx(program, body)
    validate(model)
    full = with_all_tensors(program, model)
    names = [o.name for o in full.graph.output]
    runs = [session(full, level).run(None, {program.input: x}) for level in LEVELS] + [
        ReferenceEvaluator(full).run(None, {program.input: x})
    ]
    for values in runs:
        for name, value in zip(names, values):
            assert value.dtype == program.tensors[name].dtype and np.array_equal(
                value, want[name]
            ), name
    assert np.array_equal(
        session(model, "all").run(None, {program.input: x})[0], want[program.output]
    )


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_read_is_exact(case: str, body: str) -> None:
    assert_equal(layer_program(CASES[case], seed=1), body)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(BODIES))
def test_random_layers_are_exact(seed: int, body: str) -> None:
    assert_equal(random_layer(seed), body)


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_whole_networks_are_exact(seed: int, floats: bool) -> None:
    assert_equal(network(seed, floats=floats), BODIES[seed % 2], n=3)


Bounds = tuple[int | None, int | None]
Out = tuple[tuple[int, ...], int, int]  # shape, lo, hi


def one_op(
    kind: str, x: np.ndarray, bounds: Bounds, out: Out, attrs: dict[str, Any], **consts: Any
) -> np.ndarray:
    """What a program of one operation gives for one sample x, after golden, onnxruntime and
    onnx.reference agreed."""
    name, (shape, lo, hi) = "op", out
    tensors = {"x": Tensor("x", x.shape, *bounds), "y": Tensor("y", shape, lo, hi)}
    names = {role: f"op.{role}" for role in consts}
    constants = {
        names[role]: np.asarray(value, np.int8 if role == "weight" else np.int32)
        for role, value in consts.items()
    }
    program = Program(
        Macro(), "x", "y", tensors, (Op(kind, name, ("x",), "y", attrs, names),), constants
    )
    batch = x[None].astype(tensors["x"].dtype)
    want, model = golden.run(program, batch)["y"], to_onnx(program)
    for values in (
        session(model, "all").run(None, {"x": batch}),
        ReferenceEvaluator(model).run(None, {"x": batch}),
    ):
        assert np.array_equal(values[0], want) and values[0].dtype == tensors["y"].dtype
    return want[0]


def test_the_examples_of_the_documentation() -> None:
    row = np.array([[[1, 2, 3]]])
    requant = one_op(
        "requant",
        np.array([-10, -7, -6, -3, -2, 1, 2, 5, 6, 99]),
        (-99, 99),
        ((10,), -2, 2),
        {"shift": 2, "lo": -2, "hi": 2},
        add=[2],
        mult0=[1],
    )
    assert requant.tolist() == [-2, -2, -1, -1, 0, 0, 1, 1, 2, 2]
    quantize = one_op(
        "quantize",
        np.array([-0.1, 0.06, 0.0625, 0.19, 99]),
        (None, None),
        ((5,), 0, 15),
        {"exponent": 3, "lo": 0, "hi": 15},
    )
    assert quantize.tolist() == [0, 0, 1, 2, 15]
    geometry = Geometry(1, 3, (1, 3)).to_dict()
    assert one_op(
        "xsum", row, (0, 15), ((3, 1, 1), 0, 45), {"geometry": geometry, "pad": 0, "columns": 3}
    ).ravel().tolist() == [6, 6, 6]
    pool = {"kernel": [1, 2], "stride": [1, 2], "padding": [[0, 0], [0, 0]]}
    assert one_op(
        "sumpool", np.array([[[1, 2, 3, 4]]]), (0, 15), ((1, 1, 2), 0, 30), pool
    ).ravel().tolist() == [3, 7]
    signed = one_op(
        "maxpool",
        np.array([[[-4, 2, -3, -9]]]),
        (-9, 9),
        ((1, 1, 2), -9, 9),
        {**pool, "dilation": [1, 1]},
    )
    assert signed.ravel().tolist() == [2, -3]
    whole = {"kernel": [2, 2], "stride": [1, 1], "padding": [[0, 0], [0, 0]]}
    assert one_op(
        "sumpool", np.array([[[1, 2], [3, 4]]]), (0, 15), ((1, 1, 1), 0, 60), whole
    ).ravel().tolist() == [10]


def test_the_documented_read_and_addition() -> None:
    spec = {"kind": "uniform", "shift": 15, "top": 3}
    tensors = {"x": Tensor("x", (2, 1, 1), 0, 15), "acc": Tensor("acc", (1, 1, 1), -6, 6)}
    attrs = {"layer": "conv", "geometry": Geometry(2, 1).to_dict(), "pad": 0, "adc": spec}
    constants = {"w": np.array([2, -3], np.int8).reshape(1, 2, 1, 1)} | {
        k: np.array([[v]], np.int32) for k, v in (("mult", 8191), ("zero", 2), ("gain", 1))
    }
    op = Op(
        "reads",
        "conv",
        ("x",),
        "acc",
        attrs,
        {"weight": "w", "mult": "mult", "zero": "zero", "gain": "gain"},
    )
    program = Program(Macro(wl=1, adc_bits=2), "x", "acc", tensors, (op,), constants)
    x = np.array([3, 1], np.uint8).reshape(1, 2, 1, 1)
    reads = list(golden.each_read(program, op, x))
    assert [int(r.p.item()) for r in reads] == [6, -3] and [int(r.code.item()) for r in reads] == [
        3,
        1,
    ]
    for body in BODIES:
        assert session(to_onnx(program, body), "all").run(None, {"x": x})[0].tolist() == [[[[0]]]]
    assert (5 * 3 + 7 * -1 + 2) >> 2 == 2


def test_windows_that_lie_in_the_padding() -> None:
    """The kernel's taps can step over a small image: the padding then gives the lower bound, and 0
    to a sum."""
    pool = {"kernel": [2, 2], "stride": [1, 1], "padding": [[1, 1], [1, 1]]}
    for lo, dtype in ((0, "uint8"), (3, "uint8"), (-7, "int32")):
        top = one_op(
            "maxpool",
            np.full((1, 2, 2), 5),
            (lo, 9),
            ((1, 1, 1), lo, 9),
            {**pool, "dilation": [3, 3]},
        )
        assert top.item() == lo, dtype


def test_a_shift_beyond_31_leaves_the_sign() -> None:
    shifted = one_op(
        "requant",
        np.array([-9, -1, 0, 9]),
        (-9, 9),
        ((4,), -5, 5),
        {"shift": 40, "lo": -5, "hi": 5},
        add=[0],
        mult0=[1000],
    )
    assert shifted.tolist() == [-1, -1, 0, 0]


def test_a_tensor_of_another_type_is_cast() -> None:
    """Concat widens uint8 beside int32; a sum that fits uint8 becomes uint8."""
    b = Builder(Macro(), 3)
    x = b.input((2, 3, 3), 0, 3)
    small = b.pool("sumpool", x, (3, 3), (1, 1), [[0, 0], [0, 0]])
    program = b.program(b.concat([small, b.requant([small], -5, 5)], 0))
    assert (program.tensors[small].dtype, program.tensors[program.output].dtype) == (
        "uint8",
        "int32",
    )
    assert_equal(program, "qlinear")


# -- bodies ----------------------------------------------------------------------------------------
def body_of(case: str, body: str = "qlinear") -> list[str]:
    """The operators in the function of a case."""
    return [n.op_type for n in to_onnx(layer_program(CASES[case]), body).functions[0].node]


def test_the_body_follows_from_the_adc() -> None:
    assert (
        "QLinearConv" in body_of("kernel_per_read")
        and "MatMulInteger" in body_of("kernel_per_read")
        and "Gather" not in body_of("kernel_per_read")
    )
    assert "ConvInteger" in body_of("kernel_per_read", "explicit") and "QLinearConv" not in body_of(
        "kernel_per_read", "explicit"
    )
    assert "Gather" in body_of("tile_across_channels")
    assert "ReduceSum" in body_of("tile_column_gains") and "QLinearConv" in body_of(
        "tile_column_gains"
    )
    assert "MatMulInteger" not in body_of(
        "tile_gains_beyond_8_bits"
    ) and "MatMulInteger" in body_of("tile_gains")
    for case in ("column_zeros", "tile_zeros", "free_levels", "free_columns", "ideal"):
        assert "QLinearConv" not in body_of(case), case
    assert "Pad" in body_of("padded_with_a_code")
    assert body_of("bit_serial").count("QLinearConv") == 4
    assert "Clip" not in body_of("adc_8_bit")
    wide = to_onnx(layer_program(CASES["eight_bits"]), "explicit").functions[0]
    assert onnx.TensorProto.INT64 in [a.i for n in wide.node for a in n.attribute if a.name == "to"]


def test_cells_are_uint8_where_two_products_could_saturate() -> None:
    zeros = {
        case: Layout(program, program.ops[0]).cell_zero
        for case in CASES
        for program in [layer_program(CASES[case])]
    }
    assert {case: zero for case, zero in zeros.items() if zero is not None} == {
        "eight_bits": 128,
        "eight_bits_offset": 0,
        "eight_bits_serial_offset": 0,
    }


def test_equal_bodies_share_a_function_and_others_are_numbered() -> None:
    b = Builder(Macro(), 0)
    x = b.input((2, 4, 4), 0, 15)
    for pad in (0, 0, 7):
        x = b.requant([b.reads(x, Geometry(2, 2, **SAME), pad)], 0, 15)
    model = to_onnx(b.program(x))
    assert sorted(f.name for f in model.functions) == ["ReConv", "ReConv_2", "Requant"]
    assert [n.op_type for n in model.graph.node if n.op_type.startswith("Re")] == [
        "ReConv",
        "Requant",
        "ReConv",
        "Requant",
        "ReConv_2",
        "Requant",
    ]


def test_an_adc_that_no_requantisation_expresses_is_not_certified() -> None:
    assert differing_codes(np.array([[513, 8]]), (-945, 945), 15, 15) == 0
    tie = np.array(
        [[1 << 14, 8]]
    )  # an even mult puts every odd p on a tie: half to even is not half up
    assert differing_codes(tie, (-9, 9), 15, 15) == 5
    program = layer_program(CASES["kernel_per_read"])
    program.constants["reads0.mult"] = np.array([[1 << 14]], np.int32)
    assert not Layout(program, program.ops[0]).requantises
    assert_equal(program, "qlinear")


def test_the_same_program_gives_the_same_bytes() -> None:
    one, two = (to_onnx(network(1)).SerializeToString(deterministic=True) for _ in range(2))
    assert one == two


def test_refusals_of_to_onnx() -> None:
    program = layer_program(CASES["kernel_per_read"])
    with pytest.raises(
        ConfigError, match=re.escape("--body qlinaer is not known; did you mean 'qlinear'?")
    ):
        to_onnx(program, "qlinaer")
    program.tensors["x"] = Tensor("x", (4, 5, 6), 0, 200)
    with pytest.raises(InputError) as e:
        to_onnx(program)
    assert (
        str(e.value) == "layer0: its input reaches 0..200, but the macro drives codes 0..15; "
        "requantise the input first or raise --in-bits"
    )
    b = Builder(Macro(), 0)
    wide = b.pool("sumpool", b.input((2, 3, 3), 0, 255), (3, 3), (1, 1), [[0, 0], [0, 0]])
    with pytest.raises(
        InputError,
        match="^xsum1: sums of input codes need a uint8 tensor, not int32; "
        "requantise the input first$",
    ):
        to_onnx(b.program(b.xsum(wide, Geometry(2, 2))))
    b = Builder(Macro(), 0)
    twice = b.program(b.requant([b.requant([b.input((2, 3, 3), 0, 255)], 0, 15)], 0, 15))
    renamed = Program(
        twice.macro,
        "x",
        twice.output,
        twice.tensors,
        tuple(replace(op, name="a") for op in twice.ops),
        twice.constants,
    )
    with pytest.raises(
        InputError, match="^the integer program has 2 operations called 'a'; make the file again$"
    ):
        to_onnx(renamed)


# -- metadata --------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_two_readers_reproduce_every_read_from_the_metadata(case: str) -> None:
    program, example = layer_program(CASES[case], seed=2), reader()
    model, x = to_onnx(program), images(program, 2)
    doc, constants = example.document(model), example.tensors(model)
    layer, want = (
        doc["layers"][0],
        [
            (r.p[:, g], r.code[:, g])
            for r in golden.each_read(program, program.ops[0], x)
            for g in range(r.p.shape[1])
        ],
    )
    own, replayed = (
        list(example.reads(layer, constants, x)),
        list(replay.entries(layer, constants, x)),
    )
    assert len(own) == len(replayed) == len(want)
    for (_, p, code), other, (want_p, want_code) in zip(own, replayed, want):
        assert np.array_equal(p, want_p) and np.array_equal(code, want_code)
        assert np.array_equal(other.p, want_p) and np.array_equal(other.code, want_code)
    acc = golden.run(program, x)[program.output]
    assert np.array_equal(example.accumulators(layer, constants, x), acc) and np.array_equal(
        replay.accumulators(layer, constants, x), acc
    )


def test_the_example_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, example = layer_program(CASES["split_sliced"]), reader()
    x = images(program, 1)
    onnx.save(to_onnx(program), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", x)
    monkeypatch.chdir(tmp_path)
    example.main(["m.onnx"])
    example.main(["m.onnx", "layer0", "x.npy"])
    acc = golden.run(program, x)[program.output]
    lines = [
        "layer0: conv2d, 27 rows, 4 columns, 9 wordlines, 4-bit uniform ADC, 48 reads per position"
    ]
    assert capsys.readouterr().out.splitlines() == [
        *lines,
        f"layer0.acc.npy: int64 [1, 4, 5, 6], {acc.min()}..{acc.max()}",
    ]
    assert np.array_equal(np.load("layer0.acc.npy"), acc)
    source = (ROOT / "examples" / "read_metadata.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) == {
        "__future__",
        "json",
        "sys",
        "collections",
        "numpy",
        "onnx",
    }


def test_the_document_of_one_layer() -> None:
    program = layer_program(
        CASES["tile_across_channels"]
    )  # 36 rows, 4 at once: tiles lie across kernels of 9
    doc = metadata.read(to_onnx(program))
    layer = doc["layers"][0]
    assert (
        doc["format"] == FORMAT
        and doc["macro"]["sha256"] == program.macro.sha256()
        and doc["program"]["sha256"] == program.sha256()
    )
    assert (layer["rows"]["count"], layer["rows"]["wordlines"], layer["columns"]) == (36, 4, 3)
    assert (
        layer["reads"]["row_start"] == [0, 4, 8, 12, 16, 20, 24, 28, 32]
        and layer["reads"]["row_stop"][-1] == 36
    )
    assert layer["weight"]["span"] == 2 and layer["weight"]["first_channel"] == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        2,
        2,
    ]
    assert (layer["reads"]["p_min"][0], layer["reads"]["p_max"][0]) == (-420, 420)
    mult = int(program.constants["reads0.mult"][0, 0])
    assert layer["adc"]["steps"]["mult"] == [mult] and layer["adc"]["steps"]["thresholds"] == [
        list(adc.uniform_thresholds(mult, 15, 8, 15))
    ]
    assert layer["adc"]["tie_free"] is True and layer["adc"]["step_of"] == [[0]]


def test_thresholds_of_columns_are_rows_of_the_document_and_one_for_each_read_in_the_file() -> None:
    program = layer_program(CASES["free_columns_groups"])  # 4 columns in 2 groups, 4 tiles of each
    model = to_onnx(program)
    thresholds, held = (
        program.constants["reads0.thresholds"],
        metadata.constants_of(model)["reads0/thresholds"],
    )
    assert metadata.read(model)["layers"][0]["adc"][
        "thresholds"
    ] == thresholds.tolist() and thresholds.shape == (4, 7)
    assert held.dtype == np.int32 and np.array_equal(
        held.reshape(7, 2, 4, 2), np.broadcast_to(thresholds.T.reshape(7, 2, 1, 2), (7, 2, 4, 2))
    )
    alike = layer_program(CASES["free_levels"])
    assert (
        metadata.constants_of(to_onnx(alike))["reads0/thresholds"].tolist()
        == alike.constants["reads0.thresholds"].T.tolist()
    )


def test_columns_are_split_by_io_and_scales_come_from_the_program() -> None:
    b = Builder(Macro(io=4), 0)
    program = b.program(b.reads(b.input((3, 4, 4), 0, 15), Geometry(3, 10, **SAME)))
    program.meta |= {"scales": {program.output: 0.5}, "output_scale": 0.25}
    doc = metadata.read(to_onnx(program))
    layer = doc["layers"][0]
    assert doc["output"]["scale"] == 0.25
    assert layer["io_ranges"] == [[0, 4], [4, 8], [8, 10]] and layer["acc"]["scale"] == [0.5]


def test_the_following_requants_are_named() -> None:
    program = network(0)
    layer = metadata.read(to_onnx(program))["layers"][1]
    assert [r["inputs"] for r in layer["requant"]] == [["reads4.out", "requant3.out"]]
    assert layer["requant"][0]["mult"] == ["requant5/mult0", "requant5/mult1"]


def test_each_node_has_a_short_copy() -> None:
    model = to_onnx(network(0))
    nodes = [n for n in model.graph.node if n.metadata_props]
    assert [n.op_type for n in nodes] == ["ReConv", "ReConv", "ReConv", "ReLinear"]
    copy = json.loads(nodes[0].metadata_props[0].value)
    assert copy["layer"] == "layer1" and copy["adc"] == {
        "kind": "uniform",
        "bits": 4,
        "codebook": "twos",
        "shift": 15,
        "top": 15,
    }
    assert copy["reads_per_position"] == 18


def test_the_schema_in_docs_is_the_one_that_is_used() -> None:
    assert json.loads((ROOT / "docs" / "rqtool.reram-1.schema.json").read_text()) == SCHEMA


def test_documented_names_are_the_ones_in_the_file() -> None:
    text = (ROOT / "docs" / "onnx.md").read_text()
    sections = {
        name: part for part in text.split("\n## ")[1:] for name in part.splitlines()[0].split(", ")
    }
    models = [to_onnx(network(0, floats=f), b) for f in (False, True) for b in BODIES] + [
        to_onnx(layer_program(c)) for c in CASES.values()
    ]
    functions = [f for m in models for f in m.functions]
    assert {f.name.split("_")[0] for f in functions} == set(sections) - {"How a file is proved"}
    for f in functions:
        for word in [*f.input, *f.attribute, *f.output]:
            assert f"`{word}`" in sections[f.name.split("_")[0]], (f.name, word)
    fields = (ROOT / "docs" / "metadata.md").read_text()
    layer = SCHEMA["properties"]["layers"]["items"]["properties"]
    for name in [
        *SCHEMA["properties"],
        *layer,
        *layer["adc"]["properties"],
        *layer["reads"]["properties"],
        *layer["weight"]["properties"],
    ]:
        assert f"`{name}" in fields, name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.pop("macro"), "document has no macro"),
        (lambda d: d.update(extra=1), "document has an unknown extra"),
        (
            lambda d: d["layers"][0].update(columns="5"),
            "document.layers[0].columns is not of type integer",
        ),
        (
            lambda d: d["layers"][0].update(columns=True),
            "document.layers[0].columns is not of type integer",
        ),
        (lambda d: d["layers"][0].update(columns=0), "document.layers[0].columns is below 1"),
        (
            lambda d: d["layers"][0].update(kind="conv9d"),
            "document.layers[0].kind is not one of ['conv1d', 'conv2d', 'linear']",
        ),
        (
            lambda d: d["layers"][0]["adc"].update(shift=99),
            "document.layers[0].adc.shift is above 31",
        ),
        (
            lambda d: d["layers"][0]["geometry"].update(kernel=[3]),
            "document.layers[0].geometry.kernel has fewer items than 2",
        ),
        (lambda d: d["macro"].update(sha256="ab"), "document.macro.sha256 is shorter than 64"),
        (lambda d: d["constants"].update(a="b" * 65), "document.constants.a is longer than 64"),
        (
            lambda d: d["layers"][0]["geometry"].update(kernel=[3, 3, 3]),
            "document.layers[0].geometry.kernel has more items than 2",
        ),
    ],
)
def test_a_document_that_breaks_the_schema(change: Any, sentence: str) -> None:
    doc = metadata.read(to_onnx(layer_program(CASES["kernel_per_read"])))
    change(doc)
    with pytest.raises(InputError) as e:
        validate_schema(doc)
    assert str(e.value) == f"metadata rqtool.reram/1: {sentence}; export the file again"


# -- validate --------------------------------------------------------------------------------------
def changed(change: Any, program: Program | None = None, doc_change: Any = None) -> onnx.ModelProto:
    """An exported model after `change(model)`, or after `doc_change(document)` was written back."""
    model = to_onnx(program or layer_program(CASES["kernel_per_read"]))
    if change:
        change(model)
    if doc_change:
        doc = metadata.read(model)
        doc_change(doc)
        model.metadata_props[0].value = json.dumps(doc)
    return model


def resigned(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a document that vouches for its changed graph, so that only running it can
    tell."""
    doc = metadata.read(model)
    doc["graph_sha256"] = metadata.graph_sha256(model)
    model.metadata_props[0].value = json.dumps(doc)
    return model


def set_initializer(model: onnx.ModelProto, name: str, value: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def drop_attribute(model: onnx.ModelProto) -> None:
    node = model.graph.node[0]
    kept = [a for a in node.attribute if a.name != "layer"]
    del node.attribute[:]
    node.attribute.extend(kept)


def set_attribute(model: onnx.ModelProto, name: str, value: int) -> None:
    next(a for a in model.graph.node[0].attribute if a.name == name).i = value


def rehash(doc: dict[str, Any], model: onnx.ModelProto) -> None:
    doc["constants"] = {n: metadata.sha256(a) for n, a in metadata.constants_of(model).items()}


def thresholds(doc: dict[str, Any]) -> list[int]:
    return doc["layers"][0]["adc"]["steps"]["thresholds"][0]


def reads(doc: dict[str, Any]) -> dict[str, list[Any]]:
    return doc["layers"][0]["reads"]


def no_copies(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.ClearField("metadata_props")


TAIL = "; the file is not what rqtool export wrote, export it again"
ATTRIBUTES = "acc_shape, adc_shift, adc_top, dilations, group, {}pads, reads_shape, strides"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda m: set_initializer(m, "reads0/cells", 1),
            "the sha256 of initializer reads0/cells is not the one in the metadata",
        ),
        (
            lambda m: set_initializer(m, "reads0/adc_mult", 3),
            "the sha256 of initializer reads0/adc_mult is not the one in the metadata",
        ),
        (
            lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(1), "extra")),
            "initializer extra is only in the graph",
        ),
        (
            drop_attribute,
            f"node reads0 gives ReConv the attributes {ATTRIBUTES.format('')}, "
            f"not {ATTRIBUTES.format('layer, ')}",
        ),
        (
            lambda m: set_attribute(m, "adc_top", 14),
            "layer0: its node has adc_shift 15 and adc_top 14, the metadata 15 and 15",
        ),
        (
            lambda m: m.graph.node[0].metadata_props[0].__setattr__("value", "{}"),
            "layer0: the copy of the metadata at its node is not the document's",
        ),
        (
            lambda m: setattr(m.graph.node[0], "name", "other"),
            "the metadata describes the reads nodes reads0, but the graph has other",
        ),
    ],
)
def test_a_changed_graph_is_refused(change: Any, sentence: str) -> None:
    with pytest.raises(CheckError) as e:
        validate(changed(change))
    assert str(e.value) == sentence + TAIL


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d["constants"].update(gone="0" * 64),
            "initializer gone is only in the metadata",
        ),
        (
            lambda d: thresholds(d).__setitem__(3, 7),
            "layer0: the thresholds in the metadata do not follow from mult, shift and zero",
        ),
        (
            lambda d: d["layers"][0]["weight"].update(sha256="0" * 64),
            "layer0: its cells are not the tensor that the metadata names",
        ),
        (
            lambda d: d["layers"][0]["geometry"].update(stride=[2, 1]),
            "layer0: the stride is [2, 1] in the metadata, but [1, 1] in the graph",
        ),
        (
            lambda d: d["layers"][0]["geometry"].update(padding=[9, 1]),
            "layer0: the padding is [9, 1, 9, 1] in the metadata, but [1, 1, 1, 1] in the graph",
        ),
        (
            lambda d: d["layers"][0]["input"].update(zero=3),
            "layer0: the padding code is 3 in the metadata, but 0 in the graph",
        ),
        (
            lambda d: d["layers"][0]["weight"].update(span=2),
            "layer0: the shape of the cells is [20, 2, 3, 3] in the metadata, "
            "but [20, 1, 3, 3] in the graph",
        ),
        (
            lambda d: d["layers"][0]["acc"].update(tensor="z"),
            "layer0: its node reads x and writes reads0.out, not x and z",
        ),
        (
            lambda d: d["layers"][0]["adc"].update(step_of=[[5]]),
            "the graph and the metadata contradict each other (index 5 is out of "
            "bounds for axis 0 with size 1)",
        ),
        (
            lambda d: reads(d).update(p_max=[1 << 40]),
            "layer0: its partial sums, -945..1099511627776, are beyond what "
            "float32 keeps exact at shift 15",
        ),
    ],
)
def test_a_changed_document_is_refused(change: Any, sentence: str) -> None:
    model = changed(no_copies, doc_change=change)
    with pytest.raises(CheckError) as e:
        validate(model)
    assert str(e.value) == sentence + TAIL


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d["layers"][0]["rows"]["taken"].__setitem__(0, 36),
            "layer0: its rows are not each of 36 once",
        ),
        (
            lambda d: d["layers"][0]["rows"]["taken"].reverse(),
            "layer0: the channels that its graph gathers are not those of the metadata",
        ),
        (
            lambda d: d["layers"][0]["weight"]["first_channel"].__setitem__(3, 28),
            "layer0: a tile begins at channel 28 of its group, but the last one that can is 27",
        ),
        (
            lambda d: d["layers"][0]["rows"].update(taken=None),
            "layer0: the shape of the cells is [20, 9, 3, 3] in the metadata, "
            "but [20, 9, 1, 1] in the graph",
        ),
    ],
)
def test_a_changed_order_of_the_rows_is_refused(change: Any, sentence: str) -> None:
    with pytest.raises(CheckError) as e:
        validate(changed(no_copies, layer_program(CASES["spread"]), doc_change=change))
    assert str(e.value) == sentence + TAIL


def test_the_document_of_rows_that_are_spread() -> None:
    program = layer_program(CASES["spread"])
    layer = metadata.read(to_onnx(program))["layers"][0]
    order = program.constants["reads0.order"].tolist()
    assert layer["rows"]["taken"] == order and order != sorted(order)
    assert layer["weight"]["layout"] == ["group", "tile", "plane", "column", "place"] and layer[
        "weight"
    ]["first_channel"] == [0, 9, 18, 27]
    cells, weight = (
        metadata.constants_of(to_onnx(program))["reads0/cells"],
        program.constants["reads0.weight"].reshape(5, 36),
    )
    assert np.array_equal(cells.reshape(4, 5, 9), weight[:, order].reshape(5, 4, 9).swapaxes(0, 1))


def test_constants_that_agree_with_their_hash_but_not_with_the_thresholds() -> None:
    model = to_onnx(layer_program(CASES["kernel_per_read"]))
    doc = metadata.read(model)
    set_initializer(model, "reads0/adc_mult", 12345)
    rehash(doc, model)
    model.metadata_props[0].value = json.dumps(doc)
    with pytest.raises(CheckError) as e:
        validate(model)
    assert (
        str(e.value) == "layer0: the tensor reads0/adc_mult is not the mult of the metadata" + TAIL
    )


def test_a_graph_that_is_no_onnx() -> None:
    with pytest.raises(CheckError, match="^the graph is not valid ONNX, "):
        validate(changed(lambda m: m.graph.node[0].input.__setitem__(0, "nowhere")))
    with pytest.raises(
        CheckError,
        match="^(the graph is not valid ONNX, |node reads0 calls ReConv, which the "
        "file does not define)",
    ):
        validate(changed(lambda m: m.functions.pop()))


def test_models_that_rqtool_did_not_write() -> None:
    tail = "; give a file that rqtool export wrote and nothing has rewritten"
    for change, sentence in (
        (
            lambda m: m.ClearField("metadata_props"),
            f"the model has no metadata rqtool.reram/1{tail}",
        ),
        (
            lambda m: m.metadata_props.append(m.metadata_props[0]),
            f"the model has 2 metadata rqtool.reram/1{tail}",
        ),
        (
            lambda m: m.metadata_props[0].__setattr__("value", "{"),
            "the model has metadata rqtool.reram/1 that is not JSON; export the file again",
        ),
    ):
        with pytest.raises(InputError) as e:
            validate(changed(change))
        assert str(e.value) == sentence


def test_node_copies_may_be_lost() -> None:
    validate(changed(no_copies, network(0)))


def test_load_onnx_takes_files_and_nothing_else(tmp_path: Path) -> None:
    model, path = to_onnx(network(0)), tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert load_onnx(path) == model
    path.write_bytes(model.SerializeToString()[:-9])
    with pytest.raises(
        InputError,
        match="m.onnx: is not an ONNX file, or is damaged; give a file that rqtool export wrote$",
    ):
        load_onnx(path)
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        InputError,
        match="m.onnx: keeps tensors in other files, which are not read; give a "
        "file that rqtool export wrote$",
    ):
        load_onnx(path)
    with pytest.raises(InputError, match="n.onnx: no such file; did you mean '.*m.onnx'?"):
        load_onnx(tmp_path / "n.onnx")


@settings(max_examples=150)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_flipped_bits_raise_only_our_errors(place: int, bit: int) -> None:
    """In the nodes, functions and constants every flipped bit is found; in the JSON, a digit for
    people may pass."""
    whole = bytearray(EXPORTED)
    whole[place % len(whole)] ^= 1 << bit
    try:
        verify_file(onnx.ModelProto.FromString(bytes(whole)))
    except (RqError, DecodeError):
        pass


EXPORTED = to_onnx(network(0)).SerializeToString(deterministic=True)


# -- verify ----------------------------------------------------------------------------------------
def test_verify_reports_what_it_compared() -> None:
    program = network(2)
    report = verify(
        to_onnx(program), program, images(program, 3), batches=(1, 2, 5), levels=("disabled", "all")
    )
    sizes = [int(np.prod(program.tensors[op.output].shape)) for op in program.ops]
    onnx_integers = (
        2 * (3 + 4 + 5) * (sum(sizes) + sizes[-1])
    )  # two levels; batches of 2 and of 5 are filled up; all tensors, then the output
    assert report == Report(
        3, ("disabled", "all"), (1, 2, 5), 25, 3 * sum(sizes) + onnx_integers, 4 * 1891, 27
    )
    assert report.describe().endswith("7564 codes enumerated; 27 reads replayed from the metadata")
    assert json.loads(json.dumps(report.to_dict()))["batches"] == [1, 2, 5]


def test_verify_at_its_defaults_with_repeated_images() -> None:
    program = layer_program(CASES["linear"])
    report = verify(to_onnx(program, "explicit"), program, images(program, 2))
    assert (
        report.levels == ("disabled", "basic", "extended", "all")
        and report.batches == (1, 2, 5, 64)
        and report.codes == 0
    )


def test_verify_names_the_first_tensor_that_differs() -> None:
    program = layer_program(CASES["kernel_per_read"])
    model, x = to_onnx(program), images(program, 2)
    function = model.functions[0]
    matmul = next(n for n in function.node if n.op_type == "MatMulInteger")
    matmul.input[2] = next(
        n.output[0] for n in function.node if n.output[0] == "c0_uint8"
    )  # gains without their zero point
    with pytest.raises(CheckError) as e:
        verify(resigned(model), program, x, batches=(2,), levels=("basic",))
    assert re.fullmatch(
        r"onnxruntime, optimisation level basic, batch 2: tensor reads0\.out "
        r"differs from the definition at \d+ of 300 integers, "
        r"first at \[0, 0, 0, \d\]: -?\d+, not -?\d+; please report this as a bug",
        str(e.value),
    )


def test_verify_replays_the_metadata() -> None:
    program = layer_program(CASES["split"])
    model = changed(no_copies, program, lambda d: reads(d)["row_stop"].__setitem__(1, 7))
    with pytest.raises(
        CheckError,
        match=r"^metadata of layer0, tile 0, columns 0\.\.3: partial sum differs "
        r"from the definition at \d+ of 120 integers",
    ):
        verify(model, program, images(program, 1), batches=(1,), levels=("all",))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("free_levels", lambda adc: adc.update(thresholds=[[-9] * 15])),
        ("free_columns", lambda adc: adc["thresholds"].reverse()),
    ],
)
def test_thresholds_that_the_graph_does_not_have_are_refused(case: str, change: Any) -> None:
    """The graph and the document are compared first; a reader of the document alone would get other
    codes."""
    program = layer_program(CASES[case])
    model = changed(None, program, lambda d: change(d["layers"][0]["adc"]))
    with pytest.raises(
        CheckError,
        match="^layer0: the tensor reads0/thresholds is not the thresholds of the "
        "metadata; the file is not what rqtool export wrote, export it "
        "again$",
    ):
        verify(model, program, images(program, 1), batches=(1,), levels=("all",))
    layer, x = metadata.read(model)["layers"][0], images(program, 1)
    assert not np.array_equal(
        replay.accumulators(layer, metadata.constants_of(model), x),
        golden.run(program, x)[program.output],
    )


def test_verify_refuses_another_program_or_other_images() -> None:
    program = layer_program(CASES["kernel_per_read"])
    with pytest.raises(
        CheckError,
        match=r"^the file was exported from another program \(their sha256 "
        r"differ\); export this one again$",
    ):
        verify(
            to_onnx(program), layer_program(CASES["kernel_per_read"], seed=9), images(program, 1)
        )
    one = images(program, 1)
    for x, found in (
        (one[:, :3], "1 of uint8 [3, 5, 6]"),
        (one[:0], "0 of uint8 [4, 5, 6]"),
        (one * 1.0, "1 of float64 [4, 5, 6]"),
    ):
        with pytest.raises(InputError) as e:
            verify(to_onnx(program), program, x)
        assert (
            str(e.value) == "the program takes images of uint8 [4, 5, 6], and at least one, not "
            f"{found}; give what the model was made for"
        )


def test_compare_says_where() -> None:
    compare("a", np.array([1, 2]), np.array([1, 2]))
    with pytest.raises(
        CheckError,
        match=r"^a differs from the definition at 1 of 2 integers, first at \[1\]: "
        r"3, not 2; please report this as a bug$",
    ):
        compare("a", np.array([1, 3]), np.array([1, 2]))
    with pytest.raises(
        CheckError, match=r"^a has the shape \[1\], not \[2\]; please report this as a bug$"
    ):
        compare("a", np.array([1]), np.array([1, 2]))


@pytest.mark.parametrize(
    "case",
    [
        "serial_and_sliced",
        "free_levels",
        "free_columns_groups",
        "free_columns_spread",
        "ideal",
        "groups_uneven",
        "padded_serial",
        "spread_sliced_groups",
    ],
)
def test_a_file_is_verified_without_its_program(case: str) -> None:
    program = layer_program(CASES[case])
    assert verify_file(to_onnx(program), images=2) == 2 * 2 * np.prod(
        program.tensors[program.output].shape
    )


def test_a_network_is_verified_without_its_program() -> None:
    for floats in (False, True):
        program = network(1, floats=floats)
        reads = [op.output for op in program.reads()]
        assert verify_file(to_onnx(program, "explicit")) == 2 * sum(
            int(np.prod(program.tensors[name].shape)) for name in reads
        )


def test_a_changed_function_is_found_without_the_program() -> None:
    def swap(model: onnx.ModelProto) -> None:
        conv = next(n for n in model.functions[0].node if n.op_type == "QLinearConv")
        conv.input[2] = next(
            n.output[0] for n in model.functions[0].node if n.output[0] == "zero_code"
        )

    with pytest.raises(
        CheckError,
        match=r"^onnxruntime, optimisation level disabled: tensor reads0.out "
        r"differs from the definition at \d+ of 150 integers",
    ):
        verify_file(resigned(changed(swap)))
    with pytest.raises(
        CheckError, match="^the sha256 of the graph's nodes is not the one in the metadata;"
    ):
        verify_file(changed(swap))
    sentence = r"the metadata of layer0 contradicts itself \(.+\); export the file again"
    with pytest.raises(CheckError, match=f"^{sentence}$"):
        verify_file(changed(no_copies, doc_change=lambda d: reads(d)["tile"].__setitem__(3, 9)))
    with pytest.raises(
        CheckError, match="^layer0: the tensor reads0/levels is not the levels of the metadata;"
    ):
        verify_file(
            changed(
                no_copies,
                layer_program(CASES["free_levels"]),
                lambda d: d["layers"][0]["adc"].update(levels=[0] * 16),
            )
        )
    with pytest.raises(
        CheckError,
        match="^layer0: the tensor reads0/thresholds is not the thresholds of the metadata;",
    ):
        verify_file(
            changed(
                no_copies,
                layer_program(CASES["free_columns"]),
                lambda d: d["layers"][0]["adc"]["thresholds"].reverse(),
            )
        )
    with pytest.raises(CheckError, match="^the graph and the metadata contradict each other "):
        verify_file(
            changed(
                no_copies,
                layer_program(CASES["free_columns"]),
                lambda d: d["layers"][0]["adc"]["thresholds"].pop(),
            )
        )


# -- vectors ---------------------------------------------------------------------------------------
def words(path: Path, bits: int, signed: bool) -> np.ndarray:
    """A hex memory file, read the way a test bench would."""
    values = [int(line, 16) for line in path.read_text().splitlines() if not line.startswith("//")]
    return np.array([v - (1 << bits) if signed and v >> (bits - 1) else v for v in values])


@pytest.mark.parametrize(
    "case",
    [
        "serial_and_sliced",
        "ideal",
        "tile_zeros",
        "eight_bits_offset",
        "groups",
        "spread_short_last_tile",
    ],
)
def test_vectors_are_the_golden_reads_in_both_forms(case: str, tmp_path: Path) -> None:
    program = layer_program(CASES[case])
    x = images(program, 2)
    manifest = write_vectors(program, x, tmp_path / "v")
    assert json.loads((tmp_path / "v" / "manifest.json").read_text()) == manifest
    (layer,) = manifest["layers"]
    arrays = dict(np.load(tmp_path / "v" / layer["npz"], allow_pickle=False))
    assert set(arrays) == set(AXES)
    for name, entry in layer["arrays"].items():
        got = words(tmp_path / "v" / entry["hex"], entry["bits"], entry["signed"])
        assert got.size == np.prod(entry["shape"]) and np.array_equal(
            got.reshape(entry["shape"]), arrays[name]
        ), name
        assert len(entry["shape"]) == len(entry["axes"])
    acc = golden.run(program, x)[program.output]
    for read in golden.each_read(program, program.ops[0], x):
        at = read.tile, read.input_plane, read.weight_plane
        assert np.array_equal(arrays["p"][at], read.p.reshape(acc.shape)) and np.array_equal(
            arrays["code"][at], read.code.reshape(acc.shape)
        )
    assert (
        np.array_equal(arrays["tile_acc"].sum(0), acc)
        and np.array_equal(arrays["acc"], acc)
        and np.array_equal(arrays["input"], x)
    )


def test_vectors_of_a_network_name_every_layer(tmp_path: Path) -> None:
    program = network(0, floats=True)
    manifest = write_vectors(program, images(program, 1), tmp_path)
    assert [layer["npz"] for layer in manifest["layers"]] == [
        "00-layer1.npz",
        "01-layer4.npz",
        "02-layer7.npz",
        "03-layer22.npz",
    ]
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"manifest.json"} | {
        f
        for layer in manifest["layers"]
        for f in [layer["npz"], *(a["hex"] for a in layer["arrays"].values())]
    }
    with pytest.raises(ConfigError, match="exists already; give --force"):
        write_vectors(program, images(program, 1), tmp_path)
    assert write_vectors(program, images(program, 1), tmp_path, force=True) == manifest


def test_a_layer_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    program = layer_program(CASES["linear_one_column"])
    program.ops[0].attrs["layer"] = "../../a b\n"
    manifest = write_vectors(program, images(program, 1), tmp_path / "v")
    assert manifest["layers"][0]["npz"] == "00-.._.._a_b_.npz"


def test_vectors_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    program = layer_program(CASES["linear"])
    with pytest.raises(
        StorageError,
        match=r"file/v: cannot be made a folder \(Not a directory\); give another one$",
    ):
        write_vectors(program, images(program, 1), tmp_path / "file" / "v")


def test_words_are_twos_complement() -> None:
    assert hex_words(np.array([5, -1, -945]), 11, "t") == "// t\n005\n7ff\n44f\n"
