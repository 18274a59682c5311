"""The command line from outside: every command, every option, every sentence and exit code of what
can go wrong."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from rqtool import Assignment, Data, Images, Preprocess, Recipe, api, checkpoint, make_macro
from rqtool.cli import options
from rqtool.cli.main import COMMANDS, explain, run
from rqtool.errors import CheckError, ConfigError, CoverageError, InputError, RqError, StorageError
from rqtool.hardware.macro import FIELDS, Macro, flag
from rqtool.jobs import prepare
from rqtool.jobs.tune import STAYS

HERE = "test_cli"  # this module, as --arch and --data name it
NET = ["--arch", f"{HERE}:net", "--data", f"{HERE}:data"]
QUICK = [*NET, "--epochs", "0", "--no-twin"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def stripes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 8x8 with a bright stripe, in one of three places."""
    labels = np.arange(count) % 3
    x = np.random.default_rng(count).integers(0, 60, (count, 8, 8))
    for i, label in enumerate(labels):
        x[i, :, 2 * label : 2 * label + 3] += 150
    return x.astype(np.uint8), labels


def data() -> tuple[np.ndarray, ...]:
    return (*stripes(90), *stripes(30))


def many_classes() -> tuple[np.ndarray, np.ndarray]:
    x, labels = stripes(30)
    return x, labels + 7


def quits() -> None:
    sys.exit("enough")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with m.pt, and m.rq and m.onnx made of it from the command line."""
    folder = tmp_path_factory.mktemp("made")
    torch.save(net().state_dict(), folder / "m.pt")
    before = Path.cwd()
    os.chdir(folder)
    sys.modules[HERE] = sys.modules[__name__]
    try:
        assert run(["quantize", "m.pt", *QUICK]) == 0
        assert run(["export", "m.rq", "--onnx", "--images", "1"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """The current folder, with links to what was made; nothing here reaches another test."""
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    return tmp_path


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that stdout holds."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def rqtool(folder, capsys):
    def call(*args: str) -> Ran:
        capsys.readouterr()
        code = run(list(args))
        return Ran(code, *capsys.readouterr())

    return call


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    line = command.replace("rqtool ", f"{sys.executable} -m rqtool ", 1)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=cwd, env=env, capture_output=True, text=True
    )


# -- each command does its work --------------------------------------------------------------------
METRICS = {
    "float_top1",
    "ptq_top1",
    "tuned_top1",
    "ideal_top1",
    "adc_loss",
    "adc_loss_se",
    "adc_loss_interval",
    "agreement",
    "images",
    "reads_per_mac",
}


def test_quantize_writes_a_file_and_says_what_it_is_worth(rqtool):
    ran = rqtool(
        "quantize",
        "m.pt",
        *NET,
        "--epochs",
        "1",
        "--batch",
        "30",
        "--out",
        "a.rq",
        "--macro",
        "nthu-2019",
        "--io",
        "4",
        "--json",
    )
    assert ran.code == 0
    result = ran.json
    assert result["out"] == "a.rq" and Path("a.rq").exists()
    assert set(result["metrics"]) == METRICS and result["metrics"]["images"] == 30
    assert result["macro"] == make_macro("nthu-2019", io=4).to_dict()
    assert (result["fully_integer"], result["layers_off_macro"], result["recipe"]["batch"]) == (
        True,
        [],
        30,
    )
    assert "ideal-ADC twin: fine-tuning: " in ran.err


def test_quantize_prints_a_table(rqtool):
    ran = rqtool("quantize", "m.pt", *QUICK, "--out", "a.rq")
    lines = ran.out.splitlines()
    assert lines[0] == f"macro  {make_macro().describe()}"
    assert lines[2].split() == [
        "30",
        "test",
        "images",
        "top-1",
        "%",
        "cost",
        "std.",
        "error",
        "held-out",
        "%",
    ]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[3:8]] == [
        "float model",
        "quantized, ideal ADC",
        "quantized, ADC",
        "fine-tuned",
        "integer program",
    ]
    assert lines[9].split() == ["integer", "program", "top-1", "%", "chosen", "state"]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[10:12]] == [
        "post-training",
        "fine-tuned",
    ]
    assert lines[13].split() == [
        "layer",
        "rows",
        "columns",
        "tiles",
        "reads/MAC",
        "step",
        "zero",
        "clipped",
        "%",
    ]
    assert [line.split()[:5] for line in lines[14:16]] == [
        ["0", "9", "4", "1", "0.11"],
        ["5", "64", "3", "8", "0.12"],
    ]
    assert "loss to the ADC       not measured (--no-twin)" in lines
    assert (
        "fully integer         yes" in lines
        and "layers off the macro  none" in lines
        and "file                  a.rq" in lines
    )
    assert [line.split(":")[0] for line in ran.err.splitlines() if not line.startswith("warning: ")] == [
        "reading", "kernels (compiled on first use)", "float model", "calibration", "accuracy after calibration", "post-training"
    ]  # fmt: skip


def test_train_goes_on_where_a_file_is(rqtool):
    ran = rqtool(
        "train", "m.rq", "--data", f"{HERE}:data", "--epochs", "1", "--batch", "30", "--out", "t.rq"
    )
    lines = ran.out.splitlines()
    assert ran.code == 0 and lines[0] == f"macro  {make_macro().describe()}"
    assert [line.rsplit(maxsplit=1)[0] for line in lines[3:5]] == ["before", "after"]
    assert (
        "trained before  0 epochs" in lines
        and any(line.startswith("trained         1 epoch on 81 images, seed 0") for line in lines)
        and "file            t.rq" in lines
    )
    again = rqtool(
        "train", "t.rq", "--data", f"{HERE}:data", "--json"
    ).json  # the recipe is the file's: one epoch
    assert (again["out"], again["recipe"]["epochs"], again["recipe"]["batch"]) == (
        "t-trained.rq",
        1,
        30,
    )
    assert [recipe["epochs"] for recipe in again["history"]] == [0, 1] and Path(
        "t-trained.rq"
    ).exists()
    assert (
        rqtool("train", "m.rq", "--data", f"{HERE}:data", "--out", "t.rq").err
        == "error: t.rq: exists already; give --force to replace it or another --out\n"
    )


def test_the_same_command_goes_on_from_its_state(rqtool, monkeypatch):
    line = [
        "quantize",
        "m.pt",
        *NET,
        "--epochs",
        "2",
        "--batch",
        "30",
        "--no-twin",
        "--out",
        "a.rq",
    ]
    assert rqtool(*line, "--state", "s").code == 0 and Path("s").exists()
    ran = rqtool(*line, "--state", "s", "--force")
    assert ran.code == 0 and "2 epochs were done before" in ran.err
    assert (
        rqtool("eval", "s", "--data", "demo").err
        == "error: s: holds a training state (--state); give the .rq file that "
        "was written at the end\n"
    )
    told = (
        "s: is the state of another job (--lr was auto and is 0.1); give "
        "the command it was made with, or another --state"
    )
    ran = rqtool(*line, "--state", "s", "--force", "--lr", "0.1")
    assert (ran.code, ran.err.splitlines()[-1]) == (2, f"error: {told}")


def test_quantize_names_the_file_after_the_model(rqtool):
    assert (
        rqtool("quantize", "m.pt", *QUICK).err
        == "error: m.rq: exists already; give --force to replace it or another --out\n"
    )


def test_eval_measures_the_integer_program(rqtool):
    ran = rqtool("eval", "m.rq", "--data", f"{HERE}:data", "--json")
    assert ran.code == 0
    assert ran.json["metrics"] == {
        "top1": json.loads(rqtool("inspect", "m.rq", "--json").out)["results"]["metrics"][
            "tuned_top1"
        ],
        "images": 30,
    }
    assert (ran.json["adc"], ran.json["measured_on"], ran.json["fused_layers"]) == (
        "real",
        "test",
        {"0": True, "5": True},
    )
    assert (
        rqtool(
            "eval",
            "m.rq",
            "--data",
            f"{HERE}:data",
            "--limit",
            "7",
            "--adc",
            "ideal",
            "--min-acc",
            "0",
            "--json",
        ).json["metrics"]["images"]
        == 7
    )
    assert (
        " % of 30 test images, real ADC\n" in rqtool("eval", "m.rq", "--data", f"{HERE}:data").out
    )


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["m.rq", "--onnx", "out.onnx"], "out.onnx"),
        (["--onnx", "out.onnx", "m.rq"], "out.onnx"),
        (["m.rq", "--onnx=out.onnx"], "out.onnx"),
        (["m.rq", "--out", "out.onnx"], "out.onnx"),
        (["m.rq", "out.onnx", "--onnx"], "out.onnx"),
        (["m.rq", "--onnx", "--force"], "m.onnx"),
        (["--onnx", "m.rq", "--force"], "m.onnx"),
        (["m.rq", "--force"], "m.onnx"),
    ],
)
def test_export_takes_the_name_of_the_file_or_not(rqtool, folder, made, words, written):
    (folder / "m.onnx").unlink()
    (folder / "m.onnx").write_bytes(
        (made / "m.onnx").read_bytes()
    )  # not a link: --force replaces it
    ran = rqtool("export", *words, "--no-verify", "--json")
    assert (ran.code, ran.json["out"], ran.json["report"]) == (0, written, None)
    assert Path(written).read_bytes() == (made / "m.onnx").read_bytes()


def test_export_proves_the_file_and_writes_vectors(rqtool):
    ran = rqtool(
        "export",
        "m.rq",
        "--out",
        "e.onnx",
        "--body",
        "explicit",
        "--data",
        f"{HERE}:data",
        "--images",
        "2",
        "--vectors",
        "v",
        "--json",
    )
    assert ran.code == 0
    assert ran.json["report"]["images"] == 2 and ran.json["report"]["integers"] > 0
    assert (ran.json["body"], ran.json["vectors"], ran.json["bytes"]) == (
        "explicit",
        "v",
        Path("e.onnx").stat().st_size,
    )
    assert list(Path("v").iterdir())
    assert rqtool("export", "m.rq", "--out", "f.onnx", "--no-verify").out.endswith(
        "\nverified  no (--no-verify)\n"
    )


def test_verify_checks_every_file(rqtool):
    ran = rqtool("verify", "m.rq", "m.onnx", "--json")
    assert ran.code == 0
    rq, onnx = ran.json["files"]
    assert rq["program_sha256"] == onnx["program_sha256"]
    assert rq["integers"] > 0 and onnx["accumulators"] > 0
    assert [line.split()[:2] for line in rqtool("verify", "m.rq", "m.onnx").out.splitlines()] == [
        ["m.rq", "right:"],
        ["m.onnx", "right:"],
    ]


PLAN = """\
model  demo
input  1x28x28
macro  9 wordlines, 8 I/O, 4-bit ADC (twos, column, calibrated), 4-bit inputs, 4-bit weights, signed, rows spread
MACs   1924992

layer  kind    kernel  rows  columns  tiles  planes    p range  acc bits  positions   reads  reads/MAC  cycles
0      conv2d     3x3     9       16      1     1x1  -945..945         5        784   12544       0.11    1568
4      conv2d     3x3   144       32     16     1x1  -945..945         9        196  100352       0.11   12544
8      conv2d     3x3   288       64     32     1x1  -945..945        10         49  100352       0.11   12544
13     linear     1x1   576       10     64     1x1  -945..945        11          1     640       0.11     128
total                                   113                                          213888       0.11   26784
"""


def test_plan_shows_reads_and_cycles(rqtool):
    assert rqtool("plan", "demo") == Ran(0, PLAN, "")
    totals = rqtool(
        "plan", "m.pt", "--arch", f"{HERE}:net", "--input", "1,8,8", "--wl", "16", "--json"
    ).json["totals"]
    assert totals == {
        "tiles": 5,
        "macs": 2496,
        "reads": 268,
        "cycles": 68,
        "reads_per_mac": 268 / 2496,
    }


def test_plan_of_a_finished_file_uses_its_own_macro(rqtool):
    assert rqtool("plan", "m.rq", "--json").json["macro"] == make_macro().to_dict()
    assert (
        rqtool("plan", "m.rq", "--sign-scheme", "split", "--json").json["layers"][0][
            "weight_planes"
        ]
        == 2
    )


def test_inspect_shows_what_a_file_holds(rqtool):
    assert rqtool("inspect", "m.pt").out.splitlines()[:7] == [
        "file  m.pt", "kind  weights", "", "values  252", "", "tensor                   shape  " "type", "0.weight    " "           " "4x1x3x3  " "float32"
    ]  # fmt: skip
    assert rqtool("inspect", "m.rq", "--json").json["kind"] == "rq"
    assert (
        "fine-tuned" not in rqtool("inspect", "m.rq").out
        and "tuned_top1" in rqtool("inspect", "m.rq").out
    )
    assert rqtool("inspect", "m.onnx", "--json").json["metadata"]["format"] == "rqtool.reram/1"
    assert "rqtool.reram/1" in rqtool("inspect", "m.onnx").out


def test_presets_ops_and_doctor(rqtool):
    assert [row["name"] for row in rqtool("presets", "--json").json["presets"]] == [
        "default",
        "nthu-2019",
    ]
    assert rqtool("presets").out.count("preset  ") == 2
    ops = rqtool("ops", "--json").json
    assert "conv2d.default" in ops["model"] and ops["program"]["requant"] == ["hi", "lo", "shift"]
    assert " conv2d, " in rqtool("ops").out
    doctor = rqtool("doctor", "--json").json
    assert doctor["versions"]["torch"] == torch.__version__ and doctor["carrier"] in (
        "fused (numba)",
        "chunked (torch)",
    )
    assert f"\ntorch threads  {torch.get_num_threads()}\n" in rqtool("doctor").out


def test_demo_does_the_whole_job(rqtool, monkeypatch):
    small = Data("demo", *(Images(x[:, None], y) for x, y in (stripes(90), stripes(30))), 3)
    monkeypatch.setattr(prepare, "load_data", lambda *given: small)
    monkeypatch.setattr(prepare, "load_model", lambda source, arch, **chosen: net().eval())
    ran = rqtool("demo", "--folder", "d", "--epochs", "0", "--json")
    assert ran.code == 0
    assert (
        set(ran.json) == {"command", "quantize", "eval", "export"}
        and ran.json["quantize"]["recipe"]["epochs"] == 0
    )
    assert sorted(p.name for p in Path("d").iterdir()) == ["demo.onnx", "demo.rq"]
    assert (
        "loss to the ADC" in rqtool("demo", "--folder", "d", "--epochs", "0").out
    )  # and replaces its own files


# -- every option reaches the public function ------------------------------------------------------
class Done:
    def to_json(self) -> dict[str, Any]:
        return {"done": True}


@pytest.fixture
def called(monkeypatch):
    """Public functions that do nothing but remember what they were called with."""

    def record(name: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def function(*args: Any, **kwargs: Any) -> Done:
            bound = signature(original).bind(*args, **kwargs)
            seen.update(bound.arguments)
            return Done()

        original = getattr(api, name)
        monkeypatch.setattr(api, name, function)
        return seen

    return record


LAYERS = ("layer", "keep")
MACRO_VALUES = {
    "macro": ("nthu-2019", None), "wl": ("16", 16), "io": ("4", 4), "adc_bits": ("5", 5), "in_bits": ("3", 3), "w_bits": ("5", 5), "dac_bits": ("1", 1),
    "cell_bits": ("2", 2), "sign_scheme": ("split", "split"), "codebook": ("unsigned", "unsigned"), "granularity": ("tile", "tile"), "range": ("fixed", "fixed"),
    "step": ("2.5", 2.5), "levels": ("uniform", "uniform"), "pack": ("kernels", "kernels"),
}  # fmt: skip
RECIPE_VALUES = {
    "ideal_epochs": ("2", 2), "teacher": ("float", "float"), "distill_weight": ("0.7", 0.7), "distill_temperature": ("4", 4.0), "match": ("20", 20.0), "augment": ("shift", "shift"),
    "epochs": ("3", 3), "batch": ("32", 32), "lr": ("1e-4", 1e-4), "weight_decay": ("0.5", 0.5), "mode": ("ste", "ste"), "zero": ("learned", "learned"), "seed": ("7", 7), "tau_start": ("0.5", 0.5),
    "tau_end": ("0.1", 0.1), "hard_share": ("0.3", 0.3), "warmup": ("0.2", 0.2), "calibration": ("peak", "peak"), "rounding": ("nearest", "nearest"), "calibration_images": ("11", 11), "norm_images": ("12", 12), "held_out": ("13", 13),
}  # fmt: skip
AGAIN_VALUES = {name: value for name, value in RECIPE_VALUES.items() if name not in STAYS}
PIXEL_VALUES = {
    "mean": ("0.5,0.25", (0.5, 0.25)),
    "std": ("2", (2.0,)),
    "scale": ("0.125", 0.125),
    "resize": ("40", 40),
    "crop": ("32", 32),
}


def words(values: dict[str, tuple[str, Any]]) -> list[str]:
    return [word for name, (text, _) in values.items() for word in (flag(name), text)]


def meant(values: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, (_, value) in values.items()}


def test_there_is_an_option_for_every_field():
    assert [f.name for f in options.MACRO] == ["macro", *FIELDS, *LAYERS]
    assert ["macro", *FIELDS] == list(MACRO_VALUES)
    assert {f.name for f in options.RECIPE} == set(Recipe().to_dict()) == set(RECIPE_VALUES)
    assert {f.name for f in options.AGAIN} == set(AGAIN_VALUES) and set(options.FIRST_TIME) == set(
        STAYS
    )
    assert (
        {f.name for f in options.PIXELS}
        == set(Preprocess().to_dict()) - {"axes"}
        == set(PIXEL_VALUES)
    )


def test_the_help_tells_the_defaults():
    recipe, macro = Recipe(), make_macro()
    for f in options.RECIPE:
        default = getattr(recipe, f.name)
        assert (
            "(default "
            f"{'a tenth' if default is None else f'{default:g}' if isinstance(default, float) else default}"
            in f.help
        )
    for f in options.MACRO[1 : -len(LAYERS)]:
        default = Macro.__dataclass_fields__[f.name].default
        assert default is None or f"(default {getattr(macro, f.name)})" in f.help


def test_quantize_reaches_every_parameter(rqtool, called):
    seen = called("quantize")
    everything = [*words(MACRO_VALUES), *words(RECIPE_VALUES), *words(PIXEL_VALUES), "--arch", "a.b:c", "--input", "3,32,32", "--out", "o.rq", "--twin-out", "t.rq", "--state", "s", "--no-twin", "--force",
                  "--weights", "w", "--prefix", "p", "--task", "classify"]  # fmt: skip
    assert rqtool(
        "quantize",
        "m.pt",
        "--data",
        "d.npz",
        *everything,
        "--threads",
        str(torch.get_num_threads()),
        "--json",
    ) == Ran(0, '{"done": true}\n', "")
    macro = make_macro(
        "nthu-2019",
        **{name: value for name, value in meant(MACRO_VALUES).items() if name != "macro"},
    )
    progress = seen.pop("progress")
    assert hasattr(progress, "stage")
    assert seen == {
        "model": "m.pt", "data": "d.npz", "macro": Assignment(macro), "arch": "a.b:c", "out": "o.rq", "recipe": Recipe(**meant(RECIPE_VALUES)),
        "preprocess": meant(PIXEL_VALUES), "input_shape": (3, 32, 32), "weights": "w", "prefix": "p", "task": "classify", "twin": False, "twin_out": "t.rq", "state": "s", "force": True,
    }  # fmt: skip


def test_quantize_without_options_leaves_every_default(rqtool, called):
    seen = called("quantize")
    assert (
        rqtool(
            "quantize", "nets/my.net.pt", "--data", "d.npz", "--adc-bits", "ideal", "--json"
        ).code
        == 0
    )
    seen.pop("progress")
    assert seen == {
        "model": "nets/my.net.pt", "data": "d.npz", "macro": Assignment(make_macro(adc_bits="ideal")), "arch": None, "out": "my.net.rq", "recipe": Recipe(), "preprocess": {},
        "input_shape": None, "weights": None, "prefix": None, "task": None, "twin": True, "twin_out": None, "state": None, "force": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "function", "expected"),
    [
        ("train m.rq --data d", "train_more", {"source": "m.rq", "data": "d", "out": "m-trained.rq", "recipe": {}, "state": None, "force": False}),
        (
            "train a/m.rq --data d --out o.rq --state s --force " f"{' '.join(words(AGAIN_VALUES))}", "train_more",
            {"source": "a/m.rq", "data": "d", "out": "o.rq", "recipe": meant(AGAIN_VALUES), "state": "s", "force": True},
        ),
        ("eval m.rq --data d --adc ideal --limit 5 --min-acc " "98.5", "evaluate", {"source": "m.rq", "data": "d", "adc": "ideal", "limit": 5, "min_acc": 98.5}),
        ("eval m.rq --data d", "evaluate", {"source": "m.rq", "data": "d", "adc": "real", "limit": None, "min_acc": None}),
        (
            "export m.rq o.onnx --body explicit --no-verify --data d --images 3 " "--vectors v --force", "export_onnx",
            {"source": "m.rq", "out": "o.onnx", "body": "explicit", "verify": False, "data": "d", "images": 3, "vectors": "v", "force": True},
        ),
        (
            "export m.rq", "export_onnx",
            {"source": "m.rq", "out": None, "body": "qlinear", "verify": True, "data": None, "images": 8, "vectors": None, "force": False},
        ),
        ("plan m.pt --arch a.b:c --input 1,8,8 --wl 4 --weights w --prefix p", "plan",
         {"model": "m.pt", "macro": Assignment(make_macro(wl=4)), "arch": "a.b:c", "input_shape": (1, 8, 8), "weights": "w", "prefix": "p"}),
        ("plan m.rq", "plan", {"model": "m.rq", "macro": None, "arch": None, "input_shape": None, "weights": None, "prefix": None}),
        ("demo --folder f --epochs 1", "run_demo", {"folder": "f", "recipe": Recipe(epochs=1)}),
        ("demo", "run_demo", {"folder": "rqtool-demo", "recipe": Recipe(epochs=6)}),
    ],
)  # fmt: skip
def test_the_other_commands_reach_theirs(rqtool, called, line, function, expected):
    seen = called(function)
    assert rqtool(*line.split(), "--json") == Ran(0, '{"done": true}\n', "")
    seen.pop("progress", None)
    assert seen == expected


def test_threads_are_torch_s_threads(rqtool, called):
    called("evaluate")
    before = torch.get_num_threads()
    try:
        assert rqtool("eval", "m.rq", "--data", "d", "--threads", "1", "--json").code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# -- what goes wrong -------------------------------------------------------------------------------
WRITE = [*QUICK, "--out", "a.rq"]
REFUSALS = {
    # usage: 2
    "quantise": (2, "there is no command 'quantise'; did you mean 'quantize'?"),
    "xyz": (2, "there is no command 'xyz'; choose one of demo, doctor, eval, " "export, inspect, ops, plan, presets, quantize, train, verify"),
    "plan demo --adc-bit 3": (2, "rqtool plan has no option --adc-bit; did you mean '--adc-bits'?"),
    "plan demo --xyz": (2, "rqtool plan has no option --xyz; see rqtool plan --help"),
    "--xyz": (2, "rqtool has no option --xyz; see rqtool --help"),
    "plan": (2, "rqtool plan needs MODEL; see rqtool plan --help"),
    "quantize m.pt": (2, "rqtool quantize needs --data SRC; see rqtool quantize --help"),
    "verify": (2, "rqtool verify needs FILE...; see rqtool verify --help"),
    "plan demo --wl": (2, "--wl needs a value; see rqtool plan --help"),
    "presets --json=yes": (2, "--json takes no value; see rqtool presets --help"),
    # values: 2
    "plan demo --wl x": (2, "--wl must be a whole number from 1 to 4096, not x"),
    "plan demo --wl 0": (2, "--wl must be a whole number from 1 to 4096, not 0"),
    "plan demo --wl 9.5": (2, "--wl must be a whole number from 1 to 4096, not 9.5"),
    "plan demo --adc-bits perfect": (2, "--adc-bits must be a whole number from 1 to 8, not " "perfect"),
    "plan demo --step big --range fixed": (2, "--step must be from 1 to 32767 partial-sum units " "per code, not big"),
    "plan demo --sign-scheme splt": (2, "--sign-scheme splt is not known; did you mean 'split'?"),
    "plan demo --macro nthu2019": (2, "there is no preset 'nthu2019'; did you mean 'nthu-2019'?"),
    "plan demo --range fixed": (2, "--range fixed and --step S belong together; give both or " "neither"),
    "plan demo --input 3,x": (2, "--input must be sizes with commas between them, for example " "3,32,32, not 3,x"),
    f"plan m.pt --arch {HERE}:net": (2, "m.pt: a model file does not say what it takes; give " "--input C,H,W, for example --input 1,28,28"),
    "plan m.pt --input 1,8,8": (2, "m.pt: holds weights without their network; give --arch " "package.module:factory or one of demo, lenet"),
    "quantize m.pt --data d --epochs x": (2, "--epochs must be a whole number, not x"),
    "quantize m.pt --data d --epochs -1": (2, "--epochs must be a whole number of at least 0, " "not -1"),
    "quantize m.pt --data d --seed -1": (2, "--seed must be a whole number of at least 0, not -1"),
    "quantize m.pt --data d --lr fast": (2, "--lr must be a positive number or auto, not fast"),
    "quantize m.pt --data d --mean 1,x": (2, "--mean must be numbers with commas between them, " "not x"),
    "quantize m.pt --data d --mode " "relax": (2, "--mode relax is not known; did you mean " "'relaxed'?"),
    "quantize m.pt --data d --threads 0": (2, "--threads must be a whole number of at least 1, " "not 0"),
    "eval m.rq --data d --adc idel": (2, "--adc idel is not known; did you mean 'ideal'?"),
    "eval m.rq --data d --min-acc 101": (2, "--min-acc must be from 0 to 100 percent, not 101"),
    "eval m.rq --data d --min-acc nan": (2, "--min-acc must be from 0 to 100 percent, not nan"),
    f"eval m.rq --data {HERE}:data --limit 0": (2, "--limit must be at least 1, not 0"),
    "export m.rq --force --images 0": (2, "--images must be at least 1, not 0"),
    "export m.rq --force --body qlin": (2, "--body qlin is not known; did you mean 'qlinear'?"),
    "export m.rq a.onnx --out b.onnx": (2, "--out and a file after --onnx both name what to " "write; give one of them"),
    "export m.rq --onnx": (2, "m.onnx: exists already; give --force to replace it or another " "--out"),
    "plan demo --macro key.toml": (2, "a macro has no 'adc_bit'; did you mean 'adc_bits'?"),
    f"quantize m.pt --data {HERE}:data --arch {HERE}:net --out a.rq " "--state .": (2, ".: is a " "folder; " "give " "--state the " "name of a " "file"),
    f"train m.rq --data {HERE}:data --augment " "crop": (2, "--augment crop is not known; choose " "one of none, shift, shift-flip"),
    "train m.rq --data d --ideal-epochs " "3": (2, "rqtool train has no option --ideal-epochs; did " "you mean '--epochs'?"),
    # files: 3
    f"quantize m.pt --data {HERE}:data --arch {HERE}:net --out a.rq --state text.rq": (
        3, "text.rq: is not an rqtool file, or is damaged (its first bytes are " "no safetensors header); give a .rq file",
    ),
    f"quantize m.pt --data {HERE}:data --arch {HERE}:net --out a.rq --state m.rq": (
        3, "m.rq: holds no training state; give --state the name of a file that is not there yet",
    ),
    "train m.rq --data demo": (3, "demo: images have shape [1, 28, 28], but the model takes [1, " "8, 8]; give the data set it was made for"),
    "plan demo --macro bad.toml": (3, "bad.toml: is not TOML (Expected ']' at the end of a table " "declaration (at line 1, column 7)); see docs/hardware.md " "for an example"),
    "plan demo --macro none.toml": (3, "none.toml: has no [macro] table; see docs/hardware.md " "for an example"),
    "plan demo --macro gone.toml": (3, "gone.toml: cannot be read (No such file or directory); " "give a readable TOML file"),
    "eval mm.rq --data demo": (3, "mm.rq: no such file; did you mean 'm.rq'?"),
    "quantize zzzzzzzzzz.pt --data " f"{HERE}:data": (3, "zzzzzzzzzz.pt: no such file; check the " "name"),
    "eval m.rq --data gone.npz": (3, "gone.npz: no such file; check the name"),
    "eval text.rq --data demo": (3, "text.rq: is not an rqtool file, or is damaged (its first " "bytes are no safetensors header); give a .rq file"),
    "eval changed.rq --data demo": (3, "changed.rq: is damaged (the sha256 of tensor " "program/output.mult0 differs); copy or make it again"),
    "verify changed.rq": (3, "changed.rq: is damaged (the sha256 of tensor program/output.mult0 " "differs); copy or make it again"),
    "verify text.txt": (3, "text.txt: is no kind of file that rqtool writes; give a .rq or " ".onnx file"),
    "inspect text.pt": (3, "text.pt: is not a readable torch file; make or fetch it again"),
    "inspect text.onnx": (3, "text.onnx: is not an ONNX file, or is damaged; give a file that " "rqtool export wrote"),
    "eval m.rq --data demo": (3, "demo: images have shape [1, 28, 28], but the model takes [1, " "8, 8]; give the data set it was made for"),
    "eval m.rq --data " f"{HERE}:many_classes": (3, f"{HERE}:many_classes: labels go up to 9, but " "the model scores 3 classes; give the data set " "the model was trained for"),
    "quantize bare.pt --data " f"{HERE}:data": (3, "the model has no convolution and no linear " "layer, so there is nothing for a macro to do; " "check the model file"),
    f"quantize m.pt --arch {HERE}:net --data {HERE}:many_classes --out a.rq": (
        3, f"{HERE}:many_classes: labels go up to 9, but the model scores 3 " "classes; give the data set the model was trained for",
    ),
    f"quantize m.pt --arch {HERE}:nett --data {HERE}:data --out " "a.rq": (3, f"{HERE}:nett: {HERE} " "has no 'nett'; did " "you mean 'net'?"),
    f"eval m.rq --data {HERE}:quits": (3, "code that --arch or --data names ended the program " "(enough); let it return instead"),
    # checks: 5; places: 6
    f"eval m.rq --data {HERE}:data --min-acc 100": (5, None),
    f"quantize m.pt --data {HERE}:data --out no/such/a.rq": (
        6, "no/such/a.rq: cannot be written (No such file or directory); free " "or create the place, or give another --out",
    ),
    "demo --folder m.pt": (6, "m.pt: cannot be made (File exists); name another folder"),
}  # fmt: skip


@pytest.fixture
def odd_files(folder, made) -> None:
    for name in ("text.rq", "text.pt", "text.onnx", "text.txt"):
        Path(name).write_text("hello, no file of any kind", encoding="utf-8")
    Path("bad.toml").write_text("[macro\n", encoding="utf-8")
    Path("none.toml").write_text("wl = 9\n", encoding="utf-8")
    Path("key.toml").write_text("[macro]\nadc_bit = 3\n", encoding="utf-8")
    torch.save(nn.Sequential(nn.ReLU(), nn.Flatten()), "bare.pt")
    blob = bytearray((made / "m.rq").read_bytes())
    blob[-1] ^= 1
    Path("changed.rq").write_bytes(blob)


@pytest.mark.parametrize("line", REFUSALS)
def test_a_refusal_is_one_sentence_and_an_exit_code(rqtool, odd_files, line):
    code, sentence = REFUSALS[line]
    before = sorted(Path.cwd().iterdir())
    ran = rqtool(*line.split())
    errors = [text for text in ran.err.splitlines() if text.startswith("error: ")]
    assert (ran.code, ran.out, len(errors)) == (code, "", 1)
    assert sentence is None or errors == [f"error: {sentence}"]
    assert "Traceback" not in ran.err
    assert sorted(Path.cwd().iterdir()) == before


def test_what_is_too_much_is_named(rqtool):
    ran = rqtool("plan", "demo", "too", "much")
    assert (
        ran.code == 2
        and "too much" in ran.err
        and ran.err.startswith("error: rqtool plan: got unexpected extra argument")
    )


def test_min_acc_says_what_was_reached(rqtool):
    top1 = rqtool("eval", "m.rq", "--data", f"{HERE}:data", "--json").json["metrics"]["top1"]
    ran = rqtool("eval", "m.rq", "--data", f"{HERE}:data", "--min-acc", "100", "--json")
    sentence = f"m.rq: top-1 is {top1:.2f} % on 30 images, below --min-acc 100"
    assert (ran.code, ran.json) == (
        5,
        {"error": {"kind": "CheckError", "message": sentence, "exit_code": 5}},
    )
    assert ran.err.endswith(f"error: {sentence}\n")


@pytest.mark.parametrize(
    "line",
    [
        "plan demo --wl x --json",
        "plan --json",
        "nothing --json",
        "plan demo --jsn --json",
        "eval gone.rq --data demo --json",
    ],
)
def test_an_error_is_one_json_object_too(rqtool, line):
    ran = rqtool(*line.split())
    error = ran.json["error"]
    assert set(ran.json) == {"error"} and set(error) == {"kind", "message", "exit_code"}
    assert error["exit_code"] == ran.code and ran.err == f"error: {error['message']}\n"


def test_names_cannot_steer_the_terminal(rqtool):
    evil = "a\x1b[2J[red]b.rq"
    ran = rqtool("eval", evil, "--data", "demo")
    assert ran == Ran(3, "", "error: a\\x1b[2J[red]b.rq: no such file; check the name\n")
    torch.save({"w\x1b[2J[bold]": torch.zeros(2)}, "w.pt")
    assert "w\\x1b[2J[bold]" in rqtool("inspect", "w.pt").out


ENDS = [
    (RqError("a"), 1, "a"),
    (ConfigError("a"), 2, "a"),
    (InputError("a"), 3, "a"),
    (CoverageError("a"), 4, "a"),
    (CheckError("a"), 5, "a"),
    (StorageError("a"), 6, "a"),
    (MemoryError(), 6, "the memory does not suffice; give a smaller --batch, or free memory"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        6,
        "the memory does not suffice; give a smaller --batch, or free memory",
    ),
    (
        OSError(errno.ENOSPC, "No space"),
        6,
        "there is no space left on the disk; free some and run the command again",
    ),
    (KeyboardInterrupt(), 130, "interrupted; files that were not finished are not there"),
    (
        ValueError("x\ny"),
        1,
        "this is a bug in rqtool (ValueError: x); please report it with what "
        "the same command prints with --debug",
    ),
    (
        ValueError(),
        1,
        "this is a bug in rqtool (ValueError); please report it with what "
        "the same command prints with --debug",
    ),
]


@pytest.mark.parametrize(("exception", "code", "sentence"), ENDS)
def test_whatever_ends_a_command(rqtool, monkeypatch, exception, code, sentence):
    def fails(*args: Any, **kwargs: Any) -> None:
        raise exception

    monkeypatch.setattr(api, "plan", fails)
    assert explain(exception, "rqtool") == (code, sentence)
    assert rqtool("plan", "demo") == Ran(code, "", f"error: {sentence}\n")
    debug = rqtool("plan", "demo", "--debug")
    assert debug.err.startswith("Traceback") and debug.err.endswith(f"error: {sentence}\n")


def test_sigterm_ends_a_command_in_order(rqtool, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(api, "plan", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    assert rqtool("plan", "demo") == Ran(
        143, "", "error: terminated; files that were not finished are not there\n"
    )
    assert signal.getsignal(signal.SIGTERM) is before


# -- the shell -------------------------------------------------------------------------------------
def test_what_needs_no_torch_does_not_import_it(tmp_path):
    lines = [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        ["presets"],
        ["presets", "--json"],
        [],
    ]
    program = (
        f"import sys; from rqtool.cli.main import run\nfor line in {lines}: "
        f"assert run(line) == 0\nassert not {{'torch', 'rich', 'numba'}} & "
        "set(sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_version_and_plain_start(tmp_path):
    assert shell("rqtool --version", tmp_path).stdout == "rqtool 0.1.0\n"
    assert shell("rqtool ", tmp_path).stdout == shell("rqtool --help", tmp_path).stdout


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, "1000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_threads_that_wait_sleep_soon_unless_told_how(given, then):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in names} | given
    program = (
        "import os; from rqtool.cli.main import run; run(['--version']); "
        f"print(*map(os.environ.get, {names}))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, env=env, capture_output=True, text=True
        ).stdout
        == f"rqtool 0.1.0\n{then}\n"
    )


def test_eval_from_the_shell_keeps_the_streams_apart(folder):
    Path("few.npz").touch()
    x, y = stripes(30)
    np.savez("few.npz", images=x, labels=y)
    ran = shell("rqtool eval m.rq --data few.npz --json", folder)
    assert (
        ran.returncode == 0
        and json.loads(ran.stdout)["metrics"]["images"] == 30
        and ran.stdout.count("\n") == 1
    )
    assert [line.split(":")[0] for line in ran.stderr.splitlines()] == [
        "kernels (compiled on first use)",
        "integer program",
    ]


def test_a_killed_training_goes_on_to_the_same_bits(folder):
    """Killed without a word as soon as there is a state; the epochs after that are done by the
    second call."""
    job = [
        sys.executable,
        "-m",
        "rqtool",
        "quantize",
        "m.pt",
        *NET,
        "--epochs",
        "20",
        "--batch",
        "10",
        "--no-twin",
        "--threads",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}"}
    started = subprocess.Popen(
        [*job, "--out", "killed.rq", "--state", "s"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while started.poll() is None and not Path("s").exists():
        time.sleep(0.01)
    started.kill()
    started.wait()
    assert Path("s").exists() and not Path("killed.rq").exists()
    for out, state in (("killed.rq", ["--state", "s"]), ("whole.rq", [])):
        subprocess.run([*job, "--out", out, *state], env=env, check=True, capture_output=True)
    killed, whole = (checkpoint.load(name) for name in ("killed.rq", "whole.rq"))
    assert (
        killed.program.sha256() == whole.program.sha256()
        and killed.results["metrics"] == whole.results["metrics"]
    )


@pytest.mark.parametrize("line", ["presets", "--help"])
def test_a_reader_that_goes_away_is_no_error(tmp_path, line):
    ran = shell(f"rqtool {line} | head -1", tmp_path)
    assert (ran.returncode, ran.stdout.count("\n"), ran.stderr) == (0, 1, "")


def test_closed_streams_are_no_error(tmp_path):
    assert (
        shell("rqtool presets >&-", tmp_path).returncode,
        shell("rqtool presets 2>&-", tmp_path).returncode,
    ) == (0, 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_a_sentence(tmp_path):
    ran = shell("rqtool presets > /dev/full", tmp_path)
    assert (ran.returncode, ran.stderr) == (
        6,
        "error: the output cannot be written (No space left on device); free "
        "the place it goes to\n",
    )
    assert shell("rqtool --help > /dev/full", tmp_path).returncode == 6


def test_forty_columns_are_enough(tmp_path):
    for line in ("presets", "--help", "quantize --help"):
        assert (
            max(map(len, shell(f"rqtool {line}", tmp_path, COLUMNS="40").stdout.splitlines())) <= 40
        )


STAGES = """
from rqtool.cli.progress import make_progress
with make_progress().stage("a [b] stage", 2) as done:
    done()
    done(1, "loss 0.5")
"""


def on_a_terminal(**environment: str) -> str:
    """What STAGES shows on a terminal of 40 columns."""
    outer, inner = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "40", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGES], env=env, stdout=inner, stderr=inner, stdin=inner
    )
    os.close(inner)
    shown = b""
    try:
        while part := os.read(outer, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(outer)
    assert process.wait() == 0
    return shown.decode()


def test_progress_on_terminals():
    coloured, plain, dumb = (
        on_a_terminal(TERM="xterm"),
        on_a_terminal(TERM="xterm", NO_COLOR="1"),
        on_a_terminal(TERM="dumb"),
    )
    assert "a [b] stage" in coloured and "loss 0.5" in coloured and "\x1b[36m" in coloured
    assert "\x1b[36m" not in plain and "\x1b[?25l" in plain
    assert (
        "\x1b" not in dumb
        and dumb.startswith("a [b] stage: ")
        and dumb.endswith(" s, loss 0.5\r\n")
    )


def test_progress_without_a_terminal_is_a_line_a_stage(capsys):
    exec(STAGES, {})
    shown = capsys.readouterr()
    assert (
        shown.out == ""
        and shown.err.startswith("a [b] stage: 0.")
        and shown.err.endswith(" s, loss 0.5\n")
    )
