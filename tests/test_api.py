"""The public functions from Python: what the command line does not show, and the fields that
docs/json.md promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY
from torch import nn

import rqtool
from rqtool import Data, Images, Macro, Preprocess, Recipe, checkpoint
from rqtool.cli.main import COMMANDS, run
from rqtool.errors import CheckError, ConfigError, InputError
from rqtool.jobs import prepare
from rqtool.jobs.serve import ideal_program
from rqtool.jobs.tune import STAYS
from rqtool.model.load import RECORDS, Record, state_of
from rqtool.program.freeze import Norm
from rqtool.program.run import Runner
from rqtool.train.frozen import lower
from rqtool.train.rewrite import read_layers
from rqtool.train.served import Served

CALIBRATED = Recipe(epochs=0, calibration_images=32)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    ).eval()


def images(count: int, dtype: type = np.uint8) -> Images:
    """Left or right half bright, [n, 1, 6, 6]."""
    labels = np.arange(count) % 2
    x = np.random.default_rng(count).integers(0, 80, (count, 1, 6, 6))
    for i, label in enumerate(labels):
        x[i, 0, :, 3 * label : 3 * label + 3] += 120
    return Images(x.astype(dtype) if dtype is np.uint8 else (x / 255).astype(dtype), labels)


DATA = Data("halves", images(40), images(20), 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """m.rq, m.onnx and what quantize said (m.json)."""
    folder = tmp_path_factory.mktemp("made")
    result = rqtool.quantize(net(), DATA, out=folder / "m.rq", recipe=Recipe(epochs=1, batch=20))
    (folder / "m.json").write_text(json.dumps(result.to_json()), encoding="utf-8")
    rqtool.export_onnx(folder / "m.rq", images=1)
    return folder


# -- quantize --------------------------------------------------------------------------------------
def test_a_module_is_not_changed_and_nothing_is_written_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = rqtool.quantize(model, DATA, recipe=CALIBRATED, twin=False)
    assert (
        all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        and not model.training
    )
    assert (result.out, result.ideal_top1, result.loss, result.layers[0]["layer"]) == (
        None,
        None,
        None,
        "0",
    )
    assert not list(tmp_path.iterdir())


def test_the_saved_program_is_the_measured_one(made):
    result = json.loads((made / "m.json").read_text(encoding="utf-8"))
    assert rqtool.evaluate(made / "m.rq", DATA).top1 == result["metrics"]["tuned_top1"]
    saved = checkpoint.load(made / "m.rq")
    assert (
        saved.results == result
        and saved.recipe == result["recipe"] == Recipe(epochs=1, batch=20).to_dict()
    )


def test_a_file_holds_all_that_its_program_follows_from(made):
    """The network in it, on the numbers that freezing finds again, gives the program's scores in
    floating point."""
    saved = checkpoint.load(made / "m.rq")
    program, numbers = lower(
        saved.network, saved.macro, saved.peaks, Norm(*saved.preprocess.affine(1)), whole=True
    )
    assert program.sha256() == saved.program.sha256()
    scores, integers = (
        run_on(torch.from_numpy(DATA.test.x))
        for run_on in (Served(saved.network, numbers), Runner(saved.program))
    )
    assert torch.equal(scores, integers.double().mul(saved.program.meta["output_scale"]).float())


FREE = Macro(levels="free", granularity="column", adc_bits=3)


@pytest.fixture(scope="module")
def free(tmp_path_factory) -> Path:
    """f.rq: free levels with a step for each column, fine-tuned."""
    folder = tmp_path_factory.mktemp("free")
    rqtool.quantize(
        net(), DATA, FREE, out=folder / "f.rq", recipe=Recipe(epochs=1, batch=20), twin=False
    )
    return folder / "f.rq"


def test_a_file_with_free_levels_and_a_step_for_each_column(free, tmp_path):
    """What was trained is what is served, exported, and judged."""
    saved = checkpoint.load(free)
    program, numbers = lower(
        saved.network, saved.macro, saved.peaks, Norm(*saved.preprocess.affine(1)), whole=True
    )
    assert program.sha256() == saved.program.sha256()
    assert [saved.program.const(op, "thresholds").shape for op in saved.program.reads()] == [
        (3, 7),
        (2, 7),
    ]
    scores, integers = (
        run_on(torch.from_numpy(DATA.test.x))
        for run_on in (Served(saved.network, numbers), Runner(saved.program))
    )
    assert torch.equal(scores, integers.double().mul(saved.program.meta["output_scale"]).float())
    assert (
        rqtool.evaluate(free, DATA).top1 == saved.results["metrics"]["tuned_top1"]
        and rqtool.evaluate(free, DATA, adc="ideal").images == 20
    )
    assert rqtool.export_onnx(free, tmp_path / "f.onnx", images=2).report["images"] == 2
    saved.save(tmp_path / "again.rq")
    assert checkpoint.load(tmp_path / "again.rq").program.sha256() == program.sha256()


def test_the_command_judges_free_levels_with_a_step_for_each_column(free, tmp_path, capsys):
    np.savez(tmp_path / "halves.npz", x=DATA.test.x, y=DATA.test.y)
    assert (
        run(
            [
                "eval",
                str(free),
                "--data",
                str(tmp_path / "halves.npz"),
                "--diagnose",
                "--plots",
                str(tmp_path / "p"),
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)["diagnosis"]
    assert [row["layer"] for row in found["layers"]] == ["0", "4"] and all(
        row["sqnr"] > 5 for row in found["layers"]
    )
    assert "the thresholds are those of the column with the median step, one of 3" in (
        tmp_path / "p" / "00-0.svg"
    ).read_text(encoding="utf-8")


def test_a_file_from_before_columns_had_thresholds_is_read(tmp_path):
    rqtool.quantize(
        net(), DATA, Macro(levels="free"), out=tmp_path / "m.rq", recipe=CALIBRATED, twin=False
    )
    saved = checkpoint.load(tmp_path / "m.rq")
    for name in [name for name in saved.program.constants if name.endswith("thresholds")]:
        saved.program.constants[name] = saved.program.constants[name][0]
    state = {
        name: value[0] if name.endswith("thresholds") else value
        for name, value in saved.network.state_dict().items()
        if not name.endswith(".unit") or name.endswith(".norm.unit")
    }
    saved.network.state_dict = lambda: state
    saved.save(tmp_path / "old.rq")
    again, first = (checkpoint.load(tmp_path / name) for name in ("old.rq", "m.rq"))
    assert again.program.sha256() == first.program.sha256()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            again.network.state_dict().values(), first.network.state_dict().values(), strict=True
        )
    )


def test_the_same_seed_gives_the_same_file(made, tmp_path):
    rqtool.quantize(net(), DATA, out=tmp_path / "m.rq", recipe=Recipe(epochs=1, batch=20))
    again, first = (
        checkpoint.load(folder / "m.rq").program.sha256() for folder in (tmp_path, made)
    )
    assert again == first


def test_a_macro_with_an_ideal_adc_is_its_own_twin():
    result = rqtool.quantize(net(), DATA, Macro(adc_bits=None), recipe=CALIBRATED)
    assert result.ideal_top1 == result.tuned_top1 and result.loss == 0
    assert [row["step"] for row in result.layers] == [None, None]


def test_without_test_images_the_held_out_ones_are_measured():
    result = rqtool.quantize(
        net(), Data("halves", images(40), None, 2), recipe=CALIBRATED, twin=False
    )
    assert (result.measured_on, result.images, result.train_images, result.held_out_images) == (
        "held-out",
        4,
        36,
        4,
    )


def test_pixels_are_worth_what_preprocess_says(tmp_path):
    for preprocess, expected in (
        (None, Preprocess(1 / 255)),
        ({"mean": (0.5,)}, Preprocess(1 / 255, (0.5,))),
        (Preprocess(2.0), Preprocess(2.0)),
    ):
        rqtool.quantize(
            net(),
            DATA,
            out=tmp_path / "m.rq",
            recipe=CALIBRATED,
            preprocess=preprocess,
            twin=False,
            force=True,
        )
        assert checkpoint.load(tmp_path / "m.rq").preprocess == expected


def test_float_pixels_need_float_pixels_again(tmp_path):
    data = Data("halves", images(40, np.float32), images(20, np.float32), 2)
    rqtool.quantize(net(), data, out=tmp_path / "m.rq", recipe=CALIBRATED, twin=False)
    assert rqtool.evaluate(tmp_path / "m.rq", data).images == 20
    with pytest.raises(InputError) as e:
        rqtool.evaluate(tmp_path / "m.rq", DATA)
    assert (
        str(e.value) == "halves: images are uint8, but the model takes float32; give pixels "
        "in the form it was quantized with"
    )
    assert rqtool.export_onnx(tmp_path / "m.rq", images=2).report["images"] == 2


def test_a_data_set_without_training_images_is_refused():
    with pytest.raises(InputError) as e:
        rqtool.quantize(net(), Data("halves", None, images(20), 2))
    assert (
        str(e.value) == "halves: has no training images to calibrate on; give a data set "
        "with a training part (x_train, y_train)"
    )


def test_an_unknown_pixel_setting_is_a_mistake_of_the_caller():
    with pytest.raises(TypeError):
        rqtool.quantize(net(), DATA, preprocess={"means": 1})


# -- train_more ------------------------------------------------------------------------------------
def test_a_file_is_trained_on(made, tmp_path):
    result = rqtool.train_more(
        made / "m.rq", DATA, out=tmp_path / "t.rq", recipe={"epochs": 2, "lr": 5e-4}
    )
    first = checkpoint.load(made / "m.rq")
    assert result.recipe == Recipe(
        epochs=2, batch=20, lr=5e-4, teacher="none"
    ) and result.history == [Recipe(epochs=1, batch=20)]
    assert result.before_top1 == first.results["metrics"]["tuned_top1"] and (
        result.images,
        result.measured_on,
    ) == (20, "test")
    assert rqtool.evaluate(tmp_path / "t.rq", DATA).top1 == result.tuned_top1
    saved = checkpoint.load(tmp_path / "t.rq")
    assert (
        saved.results == result.to_json()
        and saved.recipe == result.recipe.to_dict()
        and saved.macro == first.macro
    )
    assert rqtool.verify(tmp_path / "t.rq")["integers"] > 0


def test_rows_that_are_spread_stay_where_they_are(tmp_path):
    made = rqtool.quantize(
        net(),
        DATA,
        Macro(pack="spread", wl=7),
        recipe=Recipe(epochs=1, batch=20),
        out=tmp_path / "m.rq",
    )
    assert (
        rqtool.evaluate(tmp_path / "m.rq", DATA).top1 == made.tuned_top1 and made.agreement == 100
    )
    assert rqtool.evaluate(tmp_path / "m.rq", DATA, adc="ideal").macro.ideal
    rqtool.train_more(tmp_path / "m.rq", DATA, out=tmp_path / "t.rq", recipe={"epochs": 1})
    files = [checkpoint.load(tmp_path / name) for name in ("m.rq", "t.rq")]
    orders = [
        {op.attrs["layer"]: saved.program.plan(op).order for op in saved.program.reads()}
        for saved in files
    ]
    assert orders[0] == orders[1] and all(
        order != tuple(sorted(order)) for order in orders[0].values()
    )
    assert orders[0] == {
        name: layer.plan.order for name, layer in read_layers(files[1].network).items()
    }
    assert rqtool.export_onnx(tmp_path / "t.rq", data=DATA, images=5).report["integers"] > 0


def test_no_more_epochs_keep_the_network_as_it_is(made, tmp_path):
    """Its batch norm may be measured anew, if the held-out images say so."""
    rqtool.train_more(made / "m.rq", DATA, out=tmp_path / "t.rq", recipe={"epochs": 0})
    before, after = (
        checkpoint.load(p).network.state_dict() for p in (made / "m.rq", tmp_path / "t.rq")
    )
    assert all(
        torch.equal(value, after[name])
        for name, value in before.items()
        if "running" not in name and "num_batches" not in name
    )


def test_the_same_images_are_held_out(made, monkeypatch):
    splits = []
    right = prepare.held_out
    monkeypatch.setattr(
        prepare,
        "held_out",
        lambda images, count, seed: splits.append((count, seed)) or right(images, count, seed),
    )
    rqtool.quantize(net(), DATA, recipe=Recipe(epochs=0, held_out=7, seed=3), twin=False)
    rqtool.train_more(made / "m.rq", DATA, recipe={"epochs": 0})
    assert splits == [(7, 3), (4, 0)]


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_cannot_be_changed(made, name):
    with pytest.raises(ConfigError) as e:
        rqtool.train_more(made / "m.rq", DATA, recipe={name: 1})
    assert (
        str(e.value) == f"--{name.replace('_', '-')} cannot change when training goes on, "
        f"for {STAYS[name]}; leave it out"
    )


def test_a_recipe_of_another_version_is_refused(made, tmp_path):
    saved = checkpoint.load(made / "m.rq")
    saved.recipe = {"epochz": 1}
    saved.save(tmp_path / "x.rq")
    with pytest.raises(
        InputError,
        match=r"x\.rq: its recipe is not one of this version \(.*'epochz'\); make the file again$",
    ):
        rqtool.train_more(tmp_path / "x.rq", DATA)


def test_training_on_needs_training_images(made):
    with pytest.raises(InputError) as e:
        rqtool.train_more(made / "m.rq", Data("halves", None, images(20), 2))
    assert (
        str(e.value)
        == "halves: has no training images; give a data set with a training part (x_train, y_train)"
    )


# -- evaluate, export, plan ------------------------------------------------------------------------
def test_min_acc_passes_at_what_was_reached(made):
    top1 = rqtool.evaluate(made / "m.rq", DATA).top1
    assert rqtool.evaluate(made / "m.rq", DATA, min_acc=top1).top1 == top1


@pytest.mark.parametrize("min_acc", [-1, 100.5, float("nan")])
def test_min_acc_is_a_percentage(made, min_acc):
    with pytest.raises(ConfigError) as e:
        rqtool.evaluate(made / "m.rq", DATA, min_acc=min_acc)
    assert str(e.value) == f"--min-acc must be from 0 to 100 percent, not {min_acc:g}"


def test_the_ideal_program_has_no_adc(made):
    program = ideal_program(checkpoint.load(made / "m.rq"))
    assert {op.attrs["adc"]["kind"] for op in program.reads()} == {"ideal"}
    assert rqtool.evaluate(made / "m.rq", DATA, adc="ideal").macro.ideal


def test_export_is_the_same_bytes_each_time(made, tmp_path):
    again = rqtool.export_onnx(made / "m.rq", tmp_path / "again.onnx", verify=False)
    assert (tmp_path / "again.onnx").read_bytes() == (made / "m.onnx").read_bytes()
    assert (again.report, again.bytes) == (None, (made / "m.onnx").stat().st_size)


def test_plan_of_a_module_needs_its_input():
    planned = rqtool.plan(net(), Macro(wl=4), input_shape=(1, 6, 6))
    assert (planned.source, planned.totals["reads"]) == ("Sequential", 3 * 3 * 16 + 12 * 2)
    with pytest.raises(ConfigError) as e:
        rqtool.plan(net())
    assert (
        str(e.value) == "Sequential: a model file does not say what it takes; give --input "
        "C,H,W, for example --input 1,28,28"
    )


# -- inspect and verify ----------------------------------------------------------------------------
def test_inspect_names_every_tensor_of_every_kind_of_model_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = net().state_dict()
    torch.save(state, "state.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, "wrapped.pth"
    )
    torch.save(net(), "whole.pt")
    safetensors.torch.save_file(state, "state.safetensors")
    for name, prefix in (
        ("state.pt", ""),
        ("wrapped.pth", "module."),
        ("whole.pt", ""),
        ("state.safetensors", ""),
    ):
        assert {k: tuple(t.shape) for k, t in state_of(name).items()} == {
            prefix + k: tuple(t.shape) for k, t in state.items()
        }, name
        found = rqtool.inspect(name)
        assert (found["kind"], found["values"]) == (
            "weights",
            sum(t.numel() for t in state.values()),
        )
    assert [t["name"] for t in rqtool.inspect("state.safetensors")["tensors"]] == sorted(state)
    assert rqtool.inspect("state.pt")["tensors"][0] == {
        "name": "0.weight",
        "shape": [3, 1, 3, 3],
        "dtype": "float32",
    }


def test_inspect_builds_no_layer_of_a_whole_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "whole.pt")
    monkeypatch.setattr("rqtool.model.load.rebuild", lambda *args: pytest.fail("a layer was built"))
    assert len(rqtool.inspect("whole.pt")["tensors"]) == 9


def test_buffers_that_are_not_saved_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].register_buffer("hidden", torch.zeros(3), persistent=False)
    torch.save(model, "whole.pt")
    assert list(state_of("whole.pt")) == list(model.state_dict()) == ["0.weight"]


def test_a_network_that_holds_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = RECORDS["torch.nn.modules.container.Sequential"]()
    record.state = {"_parameters": {}, "_buffers": {}, "_modules": {"0": record}}
    monkeypatch.setattr("rqtool.model.load.read_torch", lambda data, where: record)
    Path("loop.pt").write_bytes(b"x")
    assert isinstance(record, Record)
    with pytest.raises(
        InputError, match=r"^loop\.pt: is refused, for its layer '0' contains itself; "
    ):
        rqtool.inspect("loop.pt")


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("wl", 0, "--wl must be a whole number from 1 to 4096, not 0"),
        ("volts\x1b", 1, "Macro.__init__() got an unexpected keyword argument 'volts\\x1b'"),
    ],
)
def test_inspect_refuses_metadata_of_an_impossible_macro(made, tmp_path, field, value, why):
    model = onnx.load(made / "m.onnx")
    entry = next(p for p in model.metadata_props if p.key == "rqtool.reram/1")
    document = json.loads(entry.value)
    document["macro"]["fields"][field] = value
    entry.value = json.dumps(document)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError) as e:
        rqtool.inspect(tmp_path / "x.onnx")
    assert (
        str(e.value) == f"{tmp_path}/x.onnx: its metadata describes no macro that can be "
        f"({why}); export the file again"
    )


def test_verify_finds_a_changed_weight_in_an_onnx_file(made, tmp_path):
    model = onnx.load(made / "m.onnx")
    cells = next(t for t in model.graph.initializer if t.name.endswith("/cells"))
    cells.raw_data = bytes([cells.raw_data[0] ^ 1]) + cells.raw_data[1:]
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        CheckError,
        match=f"^the sha256 of initializer {cells.name} is not the one in the metadata; ",
    ):
        rqtool.verify(tmp_path / "x.onnx")


def test_verify_finds_a_carrier_that_differs(made, monkeypatch):
    trace = Runner.trace

    def off_by_one(self: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        values = trace(self, x)
        values["0"][0, 0, 0, 0] += 1
        return values

    monkeypatch.setattr(Runner, "trace", off_by_one)
    with pytest.raises(CheckError) as e:
        rqtool.verify(made / "m.rq")
    assert (
        str(e.value) == f"{made}/m.rq: tensor 0 differs from the definition on a random "
        "image; please report this as a bug"
    )


# -- the package -----------------------------------------------------------------------------------
def test_every_public_name_is_there_and_documented():
    for name in rqtool.__all__:
        value = getattr(rqtool, name)
        assert name == "__version__" or value.__doc__, name
    assert set(rqtool.__all__) <= set(dir(rqtool))
    with pytest.raises(AttributeError, match="^module 'rqtool' has no attribute 'quantise'$"):
        rqtool.quantise  # noqa: B018
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    assert not [
        name for name in rqtool.__all__ if f"`{name}" not in text and f"rqtool.{name}" not in text
    ]


def test_presets_need_no_torch():
    program = "import sys, rqtool; rqtool.presets(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


# -- docs/json.md ----------------------------------------------------------------------------------
def documented() -> dict[str, dict[str, str]]:
    """{section: {path of a field: its type}} of docs/json.md."""
    sections: dict[str, dict[str, str]] = {}
    for line in (REPOSITORY / "docs" / "json.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            sections[line[3:]] = {}
        row = re.match(r"\| `([^`]+)` \| ([a-z ]+) \|", line)
        if row:
            sections[list(sections)[-1]][row[1]] = row[2]
    return sections


KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "list": list,
    "object": dict,
    "null": type(None),
}


def paths(value: Any, types: dict[str, str], path: str = "") -> set[str]:
    """The paths of all fields of a JSON object, down to those that the document describes as a
    whole; their types are checked."""
    found: set[str] = set()
    rows = value if isinstance(value, list) else [value]
    for row in rows:
        for key, inside in row.items() if isinstance(row, dict) else ():
            here = f"{path}.{key}".strip(".")
            kinds = types[here].split(" or ")
            assert any(isinstance(inside, KINDS.get(kind, object)) for kind in kinds), here
            found.add(here)
            if "object" in kinds or "list" in kinds:
                found |= paths(inside, types, here + "[]" if isinstance(inside, list) else here)
    return found


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("error", "plan nowhere.pt"), ("train", "train m.rq --data test_api:data --epochs 0 " "--out t.rq"), ("eval", "eval m.rq --data test_api:data"), ("export", "export m.rq " "--out " "x.onnx " "--images 1"), ("verify", "verify m.rq m.onnx"),
        ("plan", "plan demo"), ("inspect", "inspect m.pt"), ("inspect of a .rq file", "inspect m.rq"), ("inspect of an .onnx file", "inspect m.onnx"),
        ("presets", "presets"), ("ops", "ops"), ("doctor", "doctor"),
    ],
)  # fmt: skip
def test_the_document_lists_every_field(made, tmp_path, monkeypatch, capsys, section, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "test_api", sys.modules[__name__])
    for name in ("m.rq", "m.onnx"):
        os.symlink(made / name, name)
    torch.save(net().state_dict(), "m.pt")
    run([*line.split(), "--json"])
    assert paths(json.loads(capsys.readouterr().out), documented()[section]) == set(
        documented()[section]
    )


def data() -> Data:
    return DATA


def test_the_document_lists_every_field_of_quantize(made):
    result = json.loads((made / "m.json").read_text(encoding="utf-8"))
    assert paths(result, documented()["quantize"]) == set(documented()["quantize"])


def test_the_document_has_every_command():
    assert set(COMMANDS) <= set(documented())
