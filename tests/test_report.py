"""Results as text: aligned, escaped, never wider than the terminal, and right about what is
missing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rqtool.hardware.macro import Macro
from rqtool.kernels import choose
from rqtool.model.data import Preprocess
from rqtool.report import results
from rqtool.report.doctor import doctor
from rqtool.report.text import number, pairs, paragraphs, table

LAYER = {
    "layer": "conv1", "kind": "conv2d", "kernel": [3, 3], "groups": 1, "rows": 27, "columns": 16, "tiles": 3, "input_planes": 1, "weight_planes": 1, "p_min": -945,
    "p_max": 945, "acc_bound": 45, "positions": 4, "macs": 1728, "reads": 192, "reads_per_mac": 1 / 9, "cycles": 24, "input_scale": 0.1, "input_zero": 0, "step": 33.456,
    "zero": 8, "clip_rate": 0.01234,
}  # fmt: skip
CHAIN = [
    {
        "step": "float",
        "top1": 92.1,
        "loss": None,
        "se": None,
        "interval": None,
        "held_out_top1": None,
    },
    {
        "step": "ideal ADC",
        "top1": 91.6,
        "loss": 0.5,
        "se": 0.25,
        "interval": [0.0, 1.0],
        "held_out_top1": None,
    },
    {
        "step": "ADC",
        "top1": 88.9,
        "loss": 2.7,
        "se": 0.7,
        "interval": [1.3, 4.1],
        "held_out_top1": 89.0,
    },
    {
        "step": "tuned",
        "top1": 90.1,
        "loss": -1.2,
        "se": 0.8,
        "interval": [-2.8, 0.4],
        "held_out_top1": 91.0,
    },
    {
        "step": "frozen",
        "top1": 90.0,
        "loss": 0.1,
        "se": 0.1,
        "interval": [-0.1, 0.3],
        "held_out_top1": None,
    },
]
QUANTIZED = {
    "command": "quantize", "out": "m.rq", "macro": Macro().to_dict(), "macros": {}, "recipe": {"epochs": 1, "seed": 3, "ideal_epochs": 0, "teacher": "none", "augment": "none"},
    "roll_backs": 0, "learning_rate": None, "chain": CHAIN, "epochs": [], "warnings": [], "twin_chosen": "epoch 1, batch norm re-estimated", "twin_out": None,
    "metrics": {"float_top1": 92.1, "ptq_top1": 88.888, "tuned_top1": 90.0, "ideal_top1": 91.5, "adc_loss": 1.5, "adc_loss_se": 0.6, "adc_loss_interval": [0.324, 2.676], "agreement": 99.9, "images": 1000, "reads_per_mac": 1 / 9},
    "measured_on": "test", "train_images": 900, "held_out_images": 100, "chosen": "epoch 1", "fully_integer": True, "islands": [], "layers_off_macro": [],
    "layers": [LAYER], "seconds": 12.34,
}  # fmt: skip


def test_the_closing_table_of_quantize():
    assert (
        results.quantized(QUANTIZED)
        == """\
macro  9 wordlines, 8 I/O, 4-bit ADC (twos, layer, calibrated), 4-bit inputs, 4-bit weights, signed

1000 test images      top-1 %   cost  std. error  held-out %
float model             92.10      -           -           -
quantized, ideal ADC    91.60   0.50        0.25           -
quantized, ADC          88.90   2.70        0.70       89.00
fine-tuned              90.10  -1.20        0.80       91.00
integer program         90.00   0.10        0.10           -

integer program  top-1 %  chosen state
post-training      88.89  -
fine-tuned         90.00  epoch 1
ideal-ADC twin     91.50  epoch 1, batch norm re-estimated

layer  rows  columns  tiles  reads/MAC   step  zero  clipped %
conv1    27       16      3       0.11  33.46     8       1.23

loss to the ADC       1.50 points, standard error 0.60, 95 % interval 0.32 to 2.68, against the twin trained with an ideal ADC
fully integer         yes
layers off the macro  none
reads per MAC         0.11
trained               1 epoch on 900 images, seed 3
chosen                epoch 1, by 100 held-out images
agreement             integer program and network in floating point name the same class on 99.90 % of the images
file                  m.rq
seconds               12.34"""
    )


def test_what_is_not_there_is_a_dash_or_a_word():
    metrics = {
        **QUANTIZED["metrics"],
        "ideal_top1": None,
        "adc_loss": None,
        "adc_loss_se": None,
        "adc_loss_interval": None,
    }
    layer = {**LAYER, "step": None, "zero": None}
    lines = results.quantized(
        {
            **QUANTIZED,
            "metrics": metrics,
            "layers": [layer],
            "out": None,
            "islands": ["softmax"],
            "fully_integer": False,
        }
    ).splitlines()
    assert (
        not [line for line in lines if line.startswith("ideal")]
        and "loss to the ADC       not measured (--no-twin)" in lines
    )
    assert lines[14].split() == ["conv1", "27", "16", "3", "0.11", "-", "-", "1.23"]
    assert (
        "file                  not saved" in lines
        and "fully integer         no, but for softmax" in lines
    )


def test_a_macro_that_is_its_own_twin_has_a_loss_without_an_error():
    metrics = {
        **QUANTIZED["metrics"],
        "ideal_top1": 90.0,
        "adc_loss": 0.0,
        "adc_loss_se": None,
        "adc_loss_interval": None,
    }
    assert (
        "loss to the ADC       0.00 points, against the twin trained with an ideal ADC"
        in results.quantized({**QUANTIZED, "metrics": metrics}).splitlines()
    )


def test_warnings_and_the_twin_s_file_are_told_last():
    lines = results.quantized(
        {**QUANTIZED, "twin_out": "twin.rq", "warnings": ["training brought nothing"]}
    ).splitlines()
    assert lines[-4:] == [
        "file                  m.rq",
        "twin's file           twin.rq",
        "seconds               12.34",
        "warning               training brought nothing",
    ]


def test_what_is_not_the_default_of_the_recipe_is_told():
    recipe = {"epochs": 2, "seed": 0, "ideal_epochs": 1, "teacher": "float", "augment": "shift"}
    lines = results.quantized(
        {**QUANTIZED, "recipe": recipe, "roll_backs": 2, "learning_rate": 1e-3}
    ).splitlines()
    assert (
        "trained               2 epochs on 900 images, seed 0, after 1 epoch "
        "with an ideal ADC, float teacher, shift, learning rate 0.001; rolled back 2 times, each "
        "to half the rate" in lines
    )


def test_the_closing_table_of_train():
    history = [{"epochs": 2, "ideal_epochs": 1}, {"epochs": 1, "ideal_epochs": 0}]
    data = {
        **QUANTIZED,
        "command": "train",
        "source": "m.rq",
        "out": "t.rq",
        "history": history,
        "metrics": {
            "before_top1": 90.0,
            "tuned_top1": 90.25,
            "gain": 0.25,
            "gain_se": 0.2,
            "gain_interval": [-0.142, 0.642],
            "agreement": 100.0,
            "images": 1000,
        },
    }
    assert (
        results.trained(data)
        == """\
macro  9 wordlines, 8 I/O, 4-bit ADC (twos, layer, calibrated), 4-bit inputs, 4-bit weights, signed

1000 test images  top-1 %
before              90.00
after               90.25

layer  rows  columns  tiles  reads/MAC   step  zero  clipped %
conv1    27       16      3       0.11  33.46     8       1.23

gain            0.25 points, standard error 0.20, 95 % interval -0.14 to 0.64
trained before  4 epochs
trained         1 epoch on 900 images, seed 3
chosen          epoch 1, by 100 held-out images
agreement       integer program and network in floating point name the same class on 100.00 % of the images
file            t.rq
seconds         12.34"""
    )


def diagnosis(**figures) -> dict:
    """A result of eval --diagnose with two layers, the first with these figures."""
    row = {
        "layer": "conv1",
        "loss_alone": 3.4,
        "loss_alone_se": 0.8,
        "regained": -0.1,
        "regained_se": 0.5,
        "clip_rate": 0.12,
        "clip_noise": 0.8,
        "sqnr": 9.123,
        "codes_used": 0.9375,
        "worst_tile": 1,
    }
    row["tiles"] = [
        {"tile": 0, "clip_rate": 0.0, "clip_noise": 0.0, "sqnr": 12.0, "codes_used": 0.5},
        {"tile": 1, "clip_rate": 0.2, "clip_noise": 0.9, "sqnr": 7.0, "codes_used": 0.9},
    ]
    dashes = {
        "layer": "fc",
        "loss_alone": 0.0,
        "loss_alone_se": None,
        "regained": 0.0,
        "regained_se": None,
        "clip_rate": None,
        "clip_noise": None,
        "sqnr": None,
        "codes_used": None,
        "worst_tile": None,
        "tiles": [],
    }
    found = {
        "images": 500,
        "measured_on": "test",
        "real_top1": 80.0,
        "ideal_top1": 83.5,
        "adc_loss_same_weights": 3.5,
        "adc_loss_same_weights_se": 0.9,
        "sentence": "layer conv1 costs most",
        "layers": [{**row, **figures}, dashes],
        "plots": [],
        "seconds": 1.5,
    }
    metrics = {"top1": 80.2, "images": 1000}
    return {
        "source": "m.rq",
        "macro": Macro().to_dict(),
        "macros": {},
        "metrics": metrics,
        "measured_on": "test",
        "adc": "real",
        "fused_layers": {"conv1": True},
        "seconds": 0.5,
        "diagnosis": found,
    }


def test_the_table_of_a_diagnosis():
    data = diagnosis()
    plain = results.evaluated({name: value for name, value in data.items() if name != "diagnosis"})
    assert (
        results.evaluated(data)
        == f"""\
{plain}

500 test images  top-1 %  cost, same weights  std. error
all ADCs ideal     83.50                   -           -
all ADCs real      80.00                3.50        0.90

layer  loss alone  std. error  regained  std. error  clipped %  SQNR dB  codes used %    worst tile
conv1        3.40        0.80     -0.10        0.50      12.00     9.12         93.75  1 at 7.00 dB
fc           0.00           -      0.00           -          -        -             -             -

diagnosis  layer conv1 costs most
seconds    1.50"""
    )


def test_results_that_a_file_claims_are_only_data():
    data = {
        "source": "m.rq", "kind": "rq", "macro": Macro().to_dict(), "macros": {}, "preprocess": Preprocess(1.0).to_dict(), "program_sha256": "ab",
        "ops": [{"name": "conv\x1b[2J", "kind": "reads", "output": [1, 2]}],
    }  # fmt: skip
    for claimed in (None, [], {}, {"metrics": 5}, {"metrics": {}}):
        assert "top1" not in results.inspected({**data, "results": claimed})
    shown = results.inspected(
        {**data, "results": {"metrics": {"x\x1b": "\x07", "y": None, "z": 1.239}}}
    )
    assert (
        "x\\x1b    \\x07\ny        None\nz        1.24\n" in shown
        and "conv\\x1b[2J" in shown
        and "\x1b" not in shown
    )


@pytest.mark.parametrize("width", [40, 60, 80])
def test_nothing_is_wider_than_the_terminal(width):
    texts = [
        results.quantized(QUANTIZED, width),
        results.doctor({**doctor(), "reason": "word " * 30, "cache": None}, width),
    ]
    planned = {
        "source": "m",
        "macro": Macro().to_dict(),
        "macros": {},
        "input_shape": [3, 8, 8],
        "layers": [LAYER],
        "totals": {"tiles": 3, "macs": 1, "reads": 2, "cycles": 3, "reads_per_mac": 2.0},
    }
    texts += [
        results.planned(planned, width),
        results.evaluated(diagnosis(layer="a" * (width // 2)), width),
    ]
    assert max(len(line) for text in texts for line in text.splitlines()) <= width


def test_a_narrow_table_becomes_paragraphs():
    assert (
        table(["layer", "rows"], [["a", 1], ["b", 22]], 11)
        == "layer  rows\na         1\nb        22"
    )
    assert (
        table(["layer", "rows"], [["a", 1], ["b", 22]], 10)
        == "layer  a\nrows   1\n\nlayer  b\nrows   22"
    )


def test_words_stand_left_and_figures_right():
    assert (
        table(["name", "kind", "n"], [["x", "conv2d", 5], ["y", "fc", 10]])
        == "name  kind     n\nx     conv2d   5\ny     fc      10"
    )


def test_a_table_without_rows_is_its_head():
    assert table(["name", "n"], []) == "name  n"


@given(
    st.lists(st.tuples(st.text(max_size=8), st.text(max_size=60)), min_size=1, max_size=4),
    st.integers(30, 90),
)
def test_pairs_keep_every_value_and_no_control_character(items, width):
    text = pairs(items, width)
    assert all(c == "\n" or c.isprintable() for c in text)
    assert pairs(items).count("\n") == len(items) - 1


def test_numbers_and_paragraphs():
    assert [number(x) for x in (1, 0.125, 99.995, None)] == ["1.00", "0.12", "100.00", "-"]
    assert paragraphs("a", "", "b") == "a\n\nb"


def test_the_doctor_without_numba(monkeypatch):
    monkeypatch.setattr("rqtool.kernels.choose.find_spec", lambda name: None)
    found = doctor()
    assert (found["carrier"], found["reason"], found["cache"]) == (
        "chunked (torch)",
        "numba is not installed",
        None,
    )


def test_the_doctor_where_numba_fails_or_differs(monkeypatch):
    def fails(*args: object) -> None:
        raise RuntimeError("no locator available\nmore")

    with monkeypatch.context() as patch:
        patch.setattr("rqtool.kernels.certify.codes", fails)
        patch.setattr("rqtool.kernels.choose._compile_failure", choose._compile_failure.__wrapped__)
        assert (doctor()["carrier"], doctor()["reason"]) == (
            "chunked (torch)",
            "numba cannot compile here (RuntimeError: no locator available)",
        )
        assert choose.for_training(torch.zeros(1), None) is choose.Chunked
    monkeypatch.setattr("rqtool.program.run.certified", lambda *args: False)
    assert (doctor()["carrier"], doctor()["reason"]) == (
        "chunked (torch)",
        "a code of the compiled converter differs from the definition",
    )
