"""A macro for each layer: which layer gets which, and that every carrier follows it, integer by
integer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rqtool
from rqtool import Data, Images, Macro, Recipe, checkpoint
from rqtool.cli.main import run
from rqtool.errors import CheckError, ConfigError, InputError
from rqtool.export import metadata
from rqtool.export.onnx import to_onnx
from rqtool.export.validate import load_onnx, validate
from rqtool.export.verify import verify
from rqtool.mapping.assign import Assignment, make_assignment
from rqtool.program import golden
from rqtool.program.run import Runner

FILES = REPOSITORY / "tests" / "files"
BASE = Macro(adc_bits=4, granularity="layer", pack="rows")
QUICK = Recipe(epochs=0, calibration_images=32, norm_images=32)
ROWS = {"conv1": 9, "layer1.0": 72, "layer2.0": 72, "fc": 128}


def net() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    parts += [nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)]
    return nn.Sequential(*parts).eval()


def images(count: int) -> Images:
    """Left or right half bright, [n, 1, 6, 6]."""
    labels = np.arange(count) % 2
    x = np.random.default_rng(count).integers(0, 80, (count, 1, 6, 6))
    for i, label in enumerate(labels):
        x[i, 0, :, 3 * label : 3 * label + 3] += 120
    return Images(x.astype(np.uint8), labels)


DATA = Data("halves", images(40), images(20), 2)
MIXED_SHA256 = "5583b4925714e64e3e99fdf32fb881f1099d13fa73f2e9a1d5e350e283a3abd0"
MIXED = {"0": {"adc_bits": 6, "wl": 64, "in_bits": 6, "sign_scheme": "split"}}


def quantized(folder: Path, **more: object) -> tuple[Path, rqtool.api.Quantized]:
    out = folder / "m.rq"
    about = {"recipe": QUICK, "twin": False, "force": True, "layers": MIXED, "keep": ("last",)}
    return out, rqtool.quantize(net(), DATA, BASE, out=out, **{**about, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("mixed"))[0]


# -- which layer gets which ------------------------------------------------------------------------
def test_names_patterns_and_ends_in_the_order_they_are_given():
    layers = {"layer*": {"wl": 18}, "layer1.0": {"wl": 36}, "first": {"adc_bits": 6}}
    macros = Assignment(BASE, layers, ("re:^f",)).macros(ROWS)
    assert macros.default == BASE and macros.digital == ("fc",)
    assert [macros.of(name).wl for name in ROWS] == [9, 36, 18, 128]
    assert [macros.of(name).adc_bits for name in ROWS] == [6, 4, 4, None]
    assert (macros.of("fc").in_bits, macros.of("fc").w_bits) == (8, 8)
    assert not macros.ideal and macros.with_ideal_adc().ideal
    assert macros.with_ideal_adc().of("fc") == macros.of("fc")


def test_what_follows_from_a_field_follows_from_its_new_value():
    fields = {"in_bits": 2, "w_bits": 6, "sign_scheme": "split"}
    macro = Assignment(BASE, {"fc": fields}).macros(ROWS).of("fc")
    assert macro == replace(BASE, **fields, dac_bits=None, cell_bits=None, codebook=None)
    fixed = replace(BASE, range="fixed", step=30.0)
    assert Assignment(fixed, {"fc": {"range": "full"}}).macros(ROWS).of("fc").step is None


def test_one_macro_for_every_layer_is_the_default_itself():
    macros = Assignment(BASE, {"*": {"adc_bits": 6}}).macros(ROWS)
    assert (macros.default, dict(macros.own)) == (replace(BASE, adc_bits=6), {})


REFUSED = [
    ({"cnv1": {"wl": 9}}, (), "--layer cnv1 matches no layer; did you mean 'conv1'?"),
    ({"x*": {"wl": 9}}, (), "--layer x* matches no layer; choose one of conv1, fc, layer1.0, layer2.0"),
    ({}, ("fcc",), "--keep fcc matches no layer; did you mean 'fc'?"),
    ({"fc": {"wll": 9}}, (), "--layer fc: a macro has no 'wll'; did you mean 'wl'?"),
    ({"fc": {}}, (), "--layer fc names no field of a macro; give some, for example conv1:adc-bits=6,wl=64"),
    ({"fc": {"adc_bits": 9}}, (), "fc: --adc-bits must be a whole number from 1 to 8, not 9"),
    ({"fc": {"keep": True, "wl": 9}}, (), "--layer fc: keep = true stands alone, for a kept layer has no macro; leave the rest out"),
    ({"fc": {"wl": 9}}, ("last",), "--layer fc gives a macro to what --keep keeps off it; leave one of the two out"),
    ({}, ("*",), "--keep keeps every layer off the macro, so there is nothing for it to do; leave at least one layer on it"),
    ({}, ("re:(",), "--keep re:( is no regular expression (missing ), unterminated subpattern at position 0); mend it, or use a shell pattern without re:"),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "keep", "sentence"), REFUSED)
def test_what_cannot_be_is_refused(layers, keep, sentence):
    with pytest.raises(ConfigError) as caught:
        Assignment(BASE, layers, keep).macros(ROWS)
    assert str(caught.value) == sentence


def test_a_toml_file_has_tables_for_layers(tmp_path):
    path = tmp_path / "m.toml"
    text = '[macro]\nwl = 16\n[layers.conv1]\nadc_bits = "ideal"\n[layers."layer*"]\nwl = 8\n'
    path.write_text(text + "[layers.fc]\nkeep = true\n", encoding="utf-8")
    macros = make_assignment(str(path), {"layer2.0": {"wl": 4}}, io=4).macros(ROWS)
    assert [macros.of(name).wl for name in ROWS] == [16, 8, 4, 128] and macros.default.io == 4
    assert macros.of("conv1").ideal and macros.digital == ("fc",)
    with pytest.raises(InputError) as caught:
        rqtool.make_macro(str(path))
    assert str(caught.value) == (
        f"{path}: has tables [layers.NAME], which one macro does not hold; read it with "
        "make_assignment"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[macro]\n[layer.conv1]\nwl = 8\n",
            "has a table [layer], which nothing reads; did you mean [layers.NAME]?",
        ),
        (
            "[macro]\n[layers]\nwl = 8\n",
            "layers has 'wl', which is no table; write [layers.NAME], with a name or pattern that "
            "has dots in quotes",
        ),
    ],
)
def test_a_toml_file_that_says_something_else_is_refused(tmp_path, text, sentence):
    path = tmp_path / "m.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        make_assignment(str(path))
    assert str(caught.value) == f"{path}: {sentence}"


# -- the command line ------------------------------------------------------------------------------
def shell(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    code = run(list(args))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_plan_names_own_macros_and_what_is_kept(capsys):
    args = ("plan", "demo", "--layer", "first:adc-bits=6", "--layer", "first:wl=64", "--keep=last")
    code, out, _ = shell(capsys, *args, "--json")
    found = json.loads(out)
    assert code == 0 and found["layers_off_macro"] == [{"layer": "13", "macs": 5760}]
    assert (found["macros"]["0"]["adc_bits"], found["macros"]["0"]["wl"]) == (6, 64)
    assert [row["layer"] for row in found["layers"]] == ["0", "4", "8"]
    _, out, _ = shell(capsys, *args)
    assert "layers off the macro  13 (5,760 digital MACs)" in out and "\nfor 0  " in out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ("--layer", "first"),
            "--layer first is not NAME:FIELD=VALUE with commas between fields; write it like "
            "conv1:adc-bits=6,wl=64",
        ),
        (
            ("--layer", "0:adc-bit=6"),
            "--layer 0: a macro has no 'adc_bit'; did you mean 'adc_bits'?",
        ),
        (
            ("--keep", "first,"),
            "--keep first, has an empty name; give names with commas between them, for example "
            "first,last",
        ),
    ],
)
def test_flags_that_say_nothing_are_refused(capsys, args, sentence):
    code, _, err = shell(capsys, "plan", "demo", *args)
    assert (code, err) == (2, f"error: {sentence}\n")


# -- a mixed program, in every carrier -------------------------------------------------------------
def same_everywhere(path: Path, bodies: tuple[str, ...] = ("qlinear", "explicit")) -> None:
    """Golden, torch and onnxruntime agree on every integer, at batch 1, 2 and 5."""
    program, x = checkpoint.load(path).program, images(5).x
    want, got = golden.run(program, x), Runner(program).trace(torch.from_numpy(x))
    assert all(np.array_equal(values, got[name].numpy()) for name, values in want.items())
    for body in bodies:
        model = to_onnx(program, body)
        assert verify(model, program, x, batches=(1, 2, 5), levels=("disabled", "all")).integers
        validate(model)


def test_every_integer_is_the_definitions(made):
    same_everywhere(made)


def test_figures_files_and_tables_name_the_kept_layer(made, tmp_path, capsys):
    out, result = quantized(tmp_path)
    kept = [{"layer": "6", "macs": 128}]
    assert result.layers_off_macro == kept and result.to_json()["layers_off_macro"] == kept
    assert [row["layer"] for row in result.layers] == ["0", "3"]
    assert list(result.macros) == ["0", "6"] and result.macro == BASE
    found = rqtool.evaluate(out, DATA)
    assert found.top1 == result.tuned_top1 and found.layers_off_macro == kept
    assert sorted(found.fast) == ["0", "3"]
    assert rqtool.inspect(out)["layers_off_macro"] == kept
    assert rqtool.plan(out).layers_off_macro == kept
    assert rqtool.plan(out).macros == checkpoint.load(out).macros.own
    _, text, _ = shell(capsys, "inspect", str(out))
    assert "layers off the macro  6 (128 digital MACs)" in text
    assert rqtool.verify(out)["integers"] > 0


def test_an_ideal_adc_keeps_bits_and_what_is_kept(made):
    found = rqtool.evaluate(made, DATA, adc="ideal")
    assert found.layers_off_macro == [{"layer": "6", "macs": 128}]
    assert found.macros["0"].ideal and found.macros["0"].in_bits == 6 and found.macro.ideal


def test_metadata_says_each_layers_own(made, tmp_path):
    out = tmp_path / "m.onnx"
    rqtool.export_onnx(made, out, images=2, vectors=tmp_path / "vectors")
    doc = metadata.read(load_onnx(out))
    first, second, last = doc["layers"]
    assert doc["layers_off_macro"] == [{"layer": "6", "macs": 128}]
    assert (first["adc"]["bits"], first["rows"]["wordlines"], first["input"]["bits"]) == (6, 64, 6)
    assert first["weight"]["sign_scheme"] == "split"
    own = checkpoint.load(made).program.own
    assert first["macro"] == {"sha256": own["0"].sha256(), "fields": own["0"].to_dict()}
    assert "macro" not in second and second["adc"]["bits"] == 4
    assert (last["adc"]["kind"], last["input"]["bits"], last["weight"]["bits"]) == ("ideal", 8, 8)
    assert rqtool.verify(out)["layers"] == 3 and rqtool.inspect(out)["kind"] == "onnx"
    manifest = json.loads((tmp_path / "vectors" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["off_macro"] == ["6"] and manifest["macros"]["0"]["wl"] == 64


def test_metadata_that_contradicts_itself_is_refused(made):
    model = to_onnx(checkpoint.load(made).program)
    doc = metadata.read(model)
    doc["layers"][0]["macro"]["fields"]["wl"] = 63
    model.metadata_props[0].value = json.dumps(doc)
    with pytest.raises(CheckError) as caught:
        validate(model)
    assert str(caught.value) == (
        "0: its macro has wl 63, the layer 64; the file is not what rqtool export wrote, export "
        "it again"
    )


def test_diagnosis_judges_the_layers_that_have_an_adc(made):
    found = rqtool.diagnose(made, DATA, limit=20)
    assert [row["layer"] for row in found.layers] == ["0", "3"]


def test_training_goes_on_with_the_same_macros(tmp_path):
    out, result = quantized(tmp_path, twin=True, recipe=replace(QUICK, epochs=1, batch=20))
    assert result.ideal_top1 is not None
    more = rqtool.train_more(out, DATA, out=tmp_path / "n.rq", recipe={"epochs": 1})
    assert checkpoint.load(tmp_path / "n.rq").macros == checkpoint.load(out).macros
    assert more.layers_off_macro == result.layers_off_macro
    same_everywhere(tmp_path / "n.rq", ("qlinear",))


def test_a_state_of_other_macros_is_refused(tmp_path):
    state, recipe = tmp_path / "s", replace(QUICK, epochs=1, batch=20)
    quantized(tmp_path, state=state, recipe=recipe)
    with pytest.raises(ConfigError) as caught:
        quantized(tmp_path, state=state, recipe=recipe, keep=())
    assert str(caught.value) == (
        f"{state}: is the state of another job (its layers had other macros, by --layer or "
        "--keep); give the command it was made with, or another --state"
    )


# -- files -----------------------------------------------------------------------------------------
def test_a_program_with_one_macro_says_nothing_of_layers():
    program = checkpoint.load(FILES / "pools.rq").program
    assert {"macros", "off_macro"}.isdisjoint(program.to_json())
    document = metadata.read(to_onnx(program))
    assert "layers_off_macro" not in document
    assert all("macro" not in layer for layer in document["layers"])


def test_a_mixed_file_of_this_format_is_read_the_same():
    saved = checkpoint.load(FILES / "mixed.rq")
    assert saved.macros.digital == ("6",) and list(saved.macros.own) == ["0", "6"]
    assert saved.program.sha256() == MIXED_SHA256
    same_everywhere(FILES / "mixed.rq")


def test_a_macro_for_no_layer_is_refused(made):
    program = checkpoint.load(made).program
    data = program.to_json()
    data["macros"] = {"nobody": BASE.to_dict()}
    del data["off_macro"]
    with pytest.raises(InputError) as caught:
        type(program).from_json(data, program.constants)
    assert str(caught.value) == (
        "the integer program has a macro for 'nobody', which is no layer of it; make the file again"
    )


# -- any assignment --------------------------------------------------------------------------------
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "adc_bits": st.sampled_from([1, 3, 6, 8, "ideal"]),
        "wl": st.integers(1, 70),
        "in_bits": st.integers(2, 8),
        "w_bits": st.integers(2, 8),
        "sign_scheme": st.sampled_from(["signed", "split", "offset"]),
        "granularity": st.sampled_from(["layer", "column"]),
        "levels": st.sampled_from(["uniform", "free"]),
        "pack": st.sampled_from(["rows", "spread"]),
    },
)


@settings(max_examples=6)
@given(
    layers=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("0", "3", "last"), FIELDS.filter(bool))
    ),
    keep=st.sampled_from([(), ("first",), ("3",)]),
)
def test_any_assignment_is_exact(tmp_path_factory, layers, keep):
    layers = {name: own for name, own in layers.items() if name not in keep}
    if keep == ("first",):
        layers.pop("0", None)
    out, _ = quantized(tmp_path_factory.mktemp("any"), layers=layers, keep=keep)
    same_everywhere(out, ("qlinear",))
