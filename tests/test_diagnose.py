"""The diagnosis: figures of reads by hand, the layer to blame and why, switches that are put back,
plots that are XML."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from test_api import documented, paths
from torch import nn

import rqtool
from rqtool import Data, Images, Macro, Recipe, checkpoint
from rqtool.cli.main import run
from rqtool.errors import ConfigError, StorageError
from rqtool.hardware import adc
from rqtool.model.capture import capture
from rqtool.report.plots import histogram_svg, plot_files
from rqtool.train.adc_numbers import group_shape
from rqtool.train.calibrate import calibrate
from rqtool.train.diagnose import (
    Table,
    judged,
    layer_rows,
    look,
    table,
    together,
    trials,
    tried,
    verdict,
)
from rqtool.train.finetune import Feed
from rqtool.train.histogram import partial_sum_histogram, tile_histograms
from rqtool.train.layers import ReadLayer
from rqtool.train.measure import clip_rate, ideal_adcs, layer_table, watched
from rqtool.train.paired import Loss, paired
from rqtool.train.rewrite import read_layers, rewrite

pytestmark = pytest.mark.usefixtures("one_thread")

SVG = "{http://www.w3.org/2000/svg}"
MACROS = {
    "layer": Macro(adc_bits=3), "column": Macro(adc_bits=3, granularity="column"), "tile": Macro(adc_bits=3, granularity="tile"), "free": Macro(adc_bits=3, levels="free"),
    "free column": Macro(adc_bits=3, levels="free", granularity="column"), "split": Macro(adc_bits=3, sign_scheme="split", dac_bits=2), "offset": Macro(adc_bits=4, sign_scheme="offset", cell_bits=2),
    "sign-magnitude": Macro(adc_bits=3, codebook="sign-magnitude"), "full": Macro(adc_bits=3, range="full"),
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).eval()


def inputs(count: int = 12) -> torch.Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def calibrated(macro: Macro):
    floating = capture(net(), (1, 6, 6))
    network = rewrite(floating, macro)
    calibrate(network, inputs(), floating)
    return network.eval()


# -- figures by hand -------------------------------------------------------------------------------
def by_hand() -> Table:
    """The ADC of the truth table in hardware/adc.py with step 4 for short: thresholds -6, -2, 3,
    zero 2, over p = -12 .. 12."""
    p = np.arange(-12, 13)
    code = adc.threshold_code(p, (-6, -2, 3))[None].astype(np.uint8)
    return Table(p, code, 4.0 * (code.astype(int) - 2), ((p < -10) | (p > 6))[None], 4)


def counts(**at: int) -> np.ndarray:
    """int64 [1, 25]: counts(m8=2, p1=3) has -8 twice and 1 three times."""
    h = np.zeros((1, 25), np.int64)
    for name, n in at.items():
        h[0, int(name[1:]) * (-1 if name[0] == "m" else 1) + 12] = n
    return h


def test_the_figures_of_a_tiny_histogram_by_hand():
    """-8 becomes -8; 1 becomes 0; 3 becomes 4; 9, beyond full scale, becomes 4."""
    figures = judged(counts(m8=2, p1=3, p3=4, p9=1), by_hand()).figures()
    signal, noise = 2 * 64 + 3 * 1 + 4 * 9 + 81, 3 * 1 + 4 * 1 + 25
    assert figures == {
        "clip_rate": 0.1,
        "clip_noise": 25 / noise,
        "sqnr": pytest.approx(10 * math.log10(signal / noise)),
        "codes_used": 0.75,
    }


def test_reads_that_are_not_changed_have_no_noise_to_measure():
    nothing = {"clip_rate": 0.0, "clip_noise": None, "sqnr": None}
    assert judged(counts(m8=5, m4=1, p0=9, p4=2), by_hand()).figures() == {
        **nothing,
        "codes_used": 1.0,
    }
    assert judged(counts(p0=9), by_hand()).figures() == {**nothing, "codes_used": 0.25}
    assert judged(counts(), by_hand()).figures() == {**nothing, "codes_used": 0.0}


def test_tiles_add_up_to_their_layer():
    parts = [judged(counts(m8=2, p1=3), by_hand()), judged(counts(p3=4, p9=1), by_hand())]
    whole = judged(counts(m8=2, p1=3, p3=4, p9=1), by_hand())
    assert together(parts, by_tile=False).figures() == whole.figures()
    assert [part.figures()["codes_used"] for part in parts] == [0.5, 0.25]
    assert together(parts, by_tile=True).figures() == {
        **whole.figures(),
        "codes_used": 3 / 8,
    }  # each of the two ADCs has four codes


@pytest.mark.parametrize("name", MACROS)
def test_the_converter_is_the_definition(name):
    """Codes of every partial sum in plain Python, and the values that reads add in the forward
    pass."""
    macro = MACROS[name]
    layer = read_layers(calibrated(macro))["2"]
    found = table(layer)
    assert found.codes == macro.top + 1 and found.p[[0, -1]].tolist() == [macro.p_min, macro.p_max]
    if macro.levels == "free":
        levels, units = layer.levels.tolist(), layer.unit.tolist()
        assert len(found.code) == len(units) == (6 if macro.granularity == "column" else 1)
        for code, value, thresholds, unit in zip(
            found.code.tolist(), found.value.tolist(), layer.thresholds.tolist(), units
        ):
            assert code == [adc.threshold_code(int(p), thresholds) for p in found.p]
            assert value == [levels[c] * unit for c in code]
        return
    numbers = layer.adc.numbers()
    mults, zeros = (
        a.expand(group_shape(layer.plan)).flatten().tolist() for a in (numbers.mult, numbers.zero)
    )
    assert found.code.tolist() == [
        [adc.uniform_code(int(p), m, macro.shift, zero, macro.top) for p in found.p]
        for m, zero in zip(mults, zeros)
    ]
    np.testing.assert_array_equal(
        found.value,
        numbers.step.reshape(-1, 1).numpy() * (found.code.astype(int) - np.array(zeros)[:, None]),
    )


@pytest.mark.parametrize("name", MACROS)
def test_the_histograms_of_the_tiles_sum_to_the_layer_s(name):
    network = calibrated(MACROS[name])
    seen = look(network, inputs())
    kept: dict[str, tuple] = {}
    with watched(network, lambda name, *call: kept.update({name: call})):
        network(inputs())
    for layer_name, (layer, codes, weight) in kept.items():
        parts, whole = (
            list(tile_histograms(codes, weight, layer.plan)),
            partial_sum_histogram(codes, weight, layer.plan),
        )
        if layer.plan.macro.granularity == "tile":
            np.testing.assert_array_equal(np.concatenate(parts), whole)
        else:
            np.testing.assert_array_equal(sum(parts), whole)
        np.testing.assert_array_equal(seen[layer_name].histogram, whole.sum(0))
        assert [row["tile"] for row in seen[layer_name].tiles] == list(range(len(layer.plan.tiles)))
        assert seen[layer_name].figures["clip_rate"] == clip_rate(whole, layer)
        assert seen[layer_name].figures["sqnr"] == pytest.approx(
            judged(whole, table(layer)).figures()["sqnr"]
        )
    assert [row["clip_rate"] for row in layer_table(network, inputs())] == [
        one.figures["clip_rate"] for one in seen.values()
    ]


# -- switches --------------------------------------------------------------------------------------
def test_an_ideal_switch_gives_what_an_ideal_macro_gives():
    network = calibrated(Macro(adc_bits=2))
    twin = checkpoint.build_network(
        network.graph, Macro(adc_bits=2).with_ideal_adc(), network.state_dict()
    )
    real = network(inputs())
    with ideal_adcs(network, read_layers(network)):
        assert torch.equal(network(inputs()), twin(inputs()))
    assert torch.equal(network(inputs()), real) and not torch.equal(real, twin(inputs()))


def test_switches_and_watches_are_put_back_after_an_error(monkeypatch):
    network = calibrated(Macro())
    layers = read_layers(network)
    layers["2"].ideal_adc = True
    with pytest.raises(ZeroDivisionError), ideal_adcs(network, ["0", "5"]):
        assert [layer.ideal_adc for layer in layers.values()] == [True, False, True]
        1 / 0  # noqa: B018
    assert [layer.ideal_adc for layer in layers.values()] == [False, True, False]

    def fails(self: ReadLayer, *args: torch.Tensor) -> None:
        raise MemoryError

    monkeypatch.setattr(ReadLayer, "exact", fails)
    with pytest.raises(MemoryError):
        look(network, inputs())
    with pytest.raises(MemoryError):
        tried(
            network, Feed(Images(inputs().numpy(), np.zeros(12, np.int64)), np.ones(1), np.zeros(1))
        )
    assert [(layer.ideal_adc, layer.watch) for layer in layers.values()] == [
        (False, None),
        (True, None),
        (False, None),
    ]


def test_what_is_tried():
    network = calibrated(Macro())
    assert [sorted(ideal) for ideal in trials(network)] == [
        [],
        ["0", "2", "5"],
        ["2", "5"],
        ["0", "5"],
        ["0", "2"],
        ["0"],
        ["2"],
        ["5"],
    ]
    twin = checkpoint.build_network(network.graph, Macro().with_ideal_adc(), network.state_dict())
    assert trials(twin) == [frozenset()] and look(twin, inputs()) == {}


# -- the layer to blame ----------------------------------------------------------------------------
def bars(count: int) -> Images:
    """A bright bar on the left, in the middle or on the right, [n, 1, 6, 6]."""
    labels = np.arange(count) % 3
    x = np.random.default_rng(count).integers(0, 40, (count, 1, 6, 6), dtype=np.uint8)
    for i, label in enumerate(labels):
        x[i, 0, :, 2 * label : 2 * label + 2] += 200
    return Images(x, labels)


DATA = Data("bars", bars(180), bars(90), 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """bars.rq, which knows its three classes, and demo.rq, the embedded network calibrated only."""
    folder = tmp_path_factory.mktemp("made")
    done = rqtool.quantize(
        net(),
        DATA,
        out=folder / "bars.rq",
        recipe=Recipe(epochs=8, batch=20, lr=0.02, teacher="none"),
        twin=False,
    )
    assert done.tuned_top1 == 100
    assert (
        run(
            [
                "quantize",
                "demo",
                "--data",
                "demo",
                "--epochs",
                "0",
                "--no-twin",
                "--out",
                str(folder / "demo.rq"),
            ]
        )
        == 0
    )
    return folder


def with_step(made: Path, tmp_path: Path, name: str, factor: float) -> Path:
    """bars.rq with the step of one layer that many times as large; the program in it stays, for a
    diagnosis does not run it."""
    saved = checkpoint.load(made / "bars.rq")
    with torch.no_grad():
        read_layers(saved.network)[name].log_step.add_(math.log(factor))
    saved.save(tmp_path / "bent.rq")
    return tmp_path / "bent.rq"


@pytest.mark.parametrize("name", ["0", "2", "5"])
@pytest.mark.parametrize(
    ("factor", "reason", "words"),
    [
        (1e-3, "range too small", "its range is too small"),
        (1e2, "range too large", "its range is too large"),
    ],
)
def test_an_absurd_step_is_found(made, tmp_path, name, factor, reason, words):
    found = rqtool.diagnose(with_step(made, tmp_path, name, factor), DATA)
    assert (found.worst, found.reason) == (name, reason)
    row = found.layers[["0", "2", "5"].index(name)]
    costs = {
        "loss_alone": f"its ADC alone loses {row['loss_alone']:.2f} points (standard error "
        f"{row['loss_alone_se']:.2f})",
        "regained": f"{row['regained']:.2f} points (standard error "
        f"{row['regained_se']:.2f}) come back when its ADC alone is ideal",
    }
    assert (
        found.sentence == f"layer {name} costs most: {costs[found.worst_by]}; clip "
        f"{100 * row['clip_rate']:.1f} %, SQNR {row['sqnr']:.1f} dB: "
        f"{words}"
    )
    assert (
        row["loss_alone"] > 30
        and row["regained"] > 30
        and found.ideal_top1 == 100
        and found.real_top1 < 70
    )
    others = [r for r in found.layers if r["layer"] != name]
    assert all(abs(r["loss_alone"]) < row["loss_alone"] / 2 for r in others)
    assert [r["layer"] for r in found.layers] == ["0", "2", "5"]


def test_a_network_that_loses_nothing_has_nobody_to_blame(made):
    found = rqtool.diagnose(made / "bars.rq", DATA)
    assert (found.worst, found.reason, found.images, found.sample_images, found.measured_on) == (
        None,
        None,
        90,
        90,
        "test",
    )
    assert found.adc_loss_same_weights == pytest.approx(found.ideal_top1 - found.real_top1)
    verb, lost, se = (
        "cost" if found.adc_loss_same_weights >= 0 else "gain",
        abs(found.adc_loss_same_weights),
        found.adc_loss_same_weights_se,
    )
    total = f"all ADCs together {verb} {lost:.2f} points (standard error {se:.2f})"
    assert (
        found.sentence == f"no layer stands out beyond two standard errors; {total}, which is "
        "not significant either"
    )


def test_an_ideal_adc_has_nothing_to_lose(tmp_path):
    rqtool.quantize(
        net(),
        DATA,
        Macro(adc_bits=None),
        out=tmp_path / "i.rq",
        recipe=Recipe(epochs=0, calibration_images=32),
    )
    found = rqtool.diagnose(tmp_path / "i.rq", DATA, limit=30)
    assert (found.worst, found.sentence, found.images) == (
        None,
        "every ADC is ideal, so none costs any accuracy",
        30,
    )
    assert [
        (r["sqnr"], r["clip_rate"], r["codes_used"], r["loss_alone"], r["tiles"])
        for r in found.layers
    ] == [(None, None, None, 0.0, [])] * 3
    assert [(r["loss_alone_se"], r["regained_se"]) for r in found.layers] == [(None, None)] * 3
    assert (found.adc_loss_same_weights, found.adc_loss_same_weights_se, found.worst_by) == (
        0.0,
        None,
        None,
    )
    with pytest.raises(ConfigError) as e:
        rqtool.diagnose(tmp_path / "i.rq", DATA, plots=tmp_path / "p")
    assert (
        str(e.value).endswith(
            "i.rq: its ADC is ideal and has no thresholds to draw; leave --plots out"
        )
        and not (tmp_path / "p").exists()
    )


def first(count: int, of: int = 100) -> np.ndarray:
    """bool [of]: the first `count` images are right."""
    return np.arange(of) < count


def test_losses_are_differences_of_what_was_tried():
    right = {
        frozenset(): first(50),
        frozenset("ab"): first(90),
        frozenset("b"): first(60),
        frozenset("a"): first(85),
    }
    rows = layer_rows({}, right, ["a", "b"])
    assert [(r["layer"], r["loss_alone"], r["regained"]) for r in rows] == [
        ("a", 30.0, 35.0),
        ("b", 5.0, 10.0),
    ]
    # 30 of 100 images lost, none gained: sqrt((.30 - .09) / 100)
    assert (
        rows[0]["loss_alone_se"]
        == pytest.approx(100 * math.sqrt((0.3 - 0.09) / 100))
        == 4.58257569495584
    )
    assert rows[1]["regained_se"] == pytest.approx(3.0)


def judged_row(name: str, **losses: float) -> dict:
    """A row whose columns not given are 0 +- 1."""
    columns = {
        "loss_alone": 0.0,
        "loss_alone_se": 1.0,
        "regained": 0.0,
        "regained_se": 1.0,
        **losses,
    }
    return {
        "layer": name,
        **columns,
        "clip_rate": 0.0,
        "clip_noise": None,
        "sqnr": 9.0,
        "codes_used": 1.0,
    }


def test_a_layer_that_gives_much_back_is_a_culprit_even_if_it_loses_little_alone():
    """Eleven layers of a depthwise network: 2.33 in all, 3.00 of them come back with layer 0."""
    rows = [
        judged_row("0", loss_alone=0.33, loss_alone_se=0.7, regained=3.0, regained_se=0.9),
        judged_row("1", loss_alone=1.2),
    ]
    said = verdict(rows, Loss(2.33, 0.8, (0.7, 3.9)))
    assert (said["worst"], said["worst_by"], said["reason"]) == (
        "0",
        "regained",
        "resolution too low",
    )
    assert said["sentence"] == (
        "layer 0 costs most: 3.00 points (standard error 0.90) come back "
        "when its ADC alone is ideal; clip 0.0 %, SQNR 9.0 dB: "
        "its range fits, but its resolution is too low"
    )


def test_the_worst_is_the_most_significant_and_not_the_largest():
    rows = [
        judged_row("wide", loss_alone=5.0, loss_alone_se=2.4),
        judged_row("sure", loss_alone=2.0, loss_alone_se=0.5),
    ]
    assert [verdict(rows[:n], Loss(6.0, 1.0, (4, 8)))["worst"] for n in (1, 2)] == ["wide", "sure"]


def test_two_standard_errors_are_not_enough():
    rows = [judged_row("a", loss_alone=2.0, regained=2.0)]
    said = verdict(rows, Loss(2.33, 0.8, (0.7, 3.9)))
    assert (said["worst"], said["worst_by"], said["reason"]) == (None, None, None)
    assert said["sentence"] == (
        "no layer stands out beyond two standard errors, but all ADCs "
        "together cost 2.33 points (standard error 0.80); "
        "use a larger --limit to tell the layers apart"
    )
    assert verdict([judged_row("a", loss_alone=2.01)], paired(first(9), first(8)))["worst"] == "a"


def test_a_hostile_name_cannot_steer_the_terminal():
    row = {**judged_row("a\x1b[2J", loss_alone=9.0), "sqnr": None}
    assert verdict([row], Loss(9.0, 1.0, (7, 11)))["sentence"] == (
        "layer a\\x1b[2J costs most: its ADC alone loses 9.00 points "
        "(standard error 1.00); clip 0.0 %, no error in the sample: "
        "its range fits, but its resolution is too low"
    )


# -- plots -----------------------------------------------------------------------------------------
def drawn(text: str, kind: str) -> list[ElementTree.Element]:
    return [
        line
        for line in ElementTree.fromstring(text).iter(f"{SVG}line")
        if line.get("class") == kind
    ]


def test_a_plot_has_a_line_for_each_threshold_in_sight():
    histogram = np.zeros(201, np.int64)  # of p = -100 .. 100
    histogram[[60, 100, 130]] = 1, 10**6, 50
    text = histogram_svg(
        "conv", histogram, -100, (-60, -41, -40, 0, 30, 31, 99), (-50, 20), "50 reads"
    )
    assert len(drawn(text, "threshold")) == 3 and len(drawn(text, "full-scale")) == 1
    words = [t.text for t in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert {"conv", "50 reads", "partial sum", "reads (log scale)", "1e6"} <= set(words)
    assert "red: 3 of 7 thresholds in sight; green, dashed: full scale, -50 to 20" in words
    assert text == histogram_svg(
        "conv", histogram, -100, (-60, -41, -40, 0, 30, 31, 99), (-50, 20), "50 reads"
    )


def test_bars_are_inside_the_page_and_as_high_as_their_logarithm():
    text = histogram_svg("c", np.array([1, 0, 100]), 0, (), (0, 2))
    path = ElementTree.fromstring(text).find(f"{SVG}path").get("d")
    bars = [
        [float(n) for n in bar.replace("V", " ").replace("H", " ").split()]
        for bar in path.replace("Z", "").split("M")[1:]
    ]
    (left, bottom, one, _, _), (_, _, hundred, right, _) = bars
    assert (left, bottom, hundred, right) == (64, 328, 66, 740) and (bottom - one) / (
        bottom - hundred
    ) == pytest.approx(math.log10(2) / math.log10(200), abs=1e-3)


@pytest.mark.parametrize(
    "histogram",
    [np.zeros(9, np.int64), np.eye(1, 9, 4, dtype=np.int64)[0], np.arange(30001)],
    ids=["nothing", "one sum", "many sums"],
)
def test_any_histogram_can_be_drawn(histogram):
    text = histogram_svg("c", histogram, -4, (0,), (-9, 9))
    ElementTree.fromstring(text)
    assert "nan" not in text and len(text) < 60_000


def test_a_hostile_name_stays_text(tmp_path):
    name = "../</text><script>&\x1b\ud800\ufffe" + "x" * 300
    root = ElementTree.fromstring(
        histogram_svg(name, np.ones(3, np.int64), 0, (1,), (0, 2)).encode()
    )
    assert root.find(f"{SVG}script") is None and next(root.iter(f"{SVG}text")).get("class") is None
    titles = [t.text for t in root.iter(f"{SVG}text") if t.get("class") == "title"]
    assert titles[0].startswith("../</text><script>&\\x1b\\ud800\\ufffe") and len(titles[0]) == 70
    first, second = plot_files(tmp_path / "p", [name, name])
    assert (
        first.parent == second.parent == tmp_path / "p"
        and first != second
        and set(first.name) <= set("0123456789-._textscripvgx")
    )


def test_where_plots_cannot_go(tmp_path):
    (tmp_path / "00-a_b.svg").write_text("kept", encoding="utf-8")
    with pytest.raises(ConfigError) as e:
        plot_files(tmp_path, ["a/b"])
    assert (
        str(e.value)
        == f"{tmp_path / '00-a_b.svg'}: exists already; move it away or give another --plots"
    )
    for folder in (tmp_path / "00-a_b.svg", tmp_path / "00-a_b.svg" / "p", "a\0b"):
        with pytest.raises(
            StorageError, match=r"cannot be made a folder \(.*\); give another --plots"
        ):
            plot_files(folder, ["a"])
    assert (tmp_path / "00-a_b.svg").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    ("name", "of"), [("tile", "tile"), ("free", None), ("free column", "column")]
)
def test_plots_of_a_layer_show_the_adc_with_the_median_step(tmp_path, name, of):
    macro = MACROS[name]
    rqtool.quantize(
        net(),
        DATA,
        macro,
        out=tmp_path / "m.rq",
        recipe=Recipe(epochs=0, calibration_images=32),
        twin=False,
    )
    found = rqtool.diagnose(tmp_path / "m.rq", DATA, limit=20, plots=tmp_path / "p")
    assert [Path(p).name for p in found.plots] == ["00-0.svg", "01-2.svg", "02-5.svg"]
    text = Path(found.plots[2]).read_text(encoding="utf-8")
    shared = f"the thresholds are those of the {of} with the median step, one of 3"
    assert drawn(text, "threshold") and (shared in text if of else "median" not in text)


# -- the command -----------------------------------------------------------------------------------
def test_the_command_prints_every_documented_field(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(made / "demo.rq", "demo.rq")
    assert (
        run(
            [
                "eval",
                "demo.rq",
                "--data",
                "demo",
                "--limit",
                "60",
                "--diagnose",
                "--plots",
                "p",
                "--json",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    result = json.loads(out)
    found = result.pop("diagnosis")
    assert (
        set(result) == {path for path in documented()["eval"] if "." not in path}
        and result["metrics"]["images"] == found["images"] == 60
    )
    assert paths(found, documented()["diagnosis"]) == set(documented()["diagnosis"])
    assert "diagnosis: " in err and found["sentence"] in err
    assert sorted(found["plots"]) == sorted(f"p/{p.name}" for p in Path("p").iterdir())
    again = rqtool.diagnose("demo.rq", "demo", limit=60).to_json()
    assert {**again, "plots": [], "seconds": 0} == {**found, "plots": [], "seconds": 0}
    for row, file in zip(found["layers"], found["plots"]):
        assert (
            len(drawn(Path(file).read_text(encoding="utf-8"), "threshold"))
            == round(16 * row["codes_used"]) - 1
            == 15
        )
        assert row["tiles"][row["worst_tile"]]["sqnr"] == min(tile["sqnr"] for tile in row["tiles"])
    assert (
        run(["eval", "demo.rq", "--data", "demo", "--limit", "60", "--diagnose", "--plots", "p"])
        == 2
    )
    assert capsys.readouterr().err.endswith(
        "error: p/00-0.svg: exists already; move it away or give another --plots\n"
    )


def test_the_command_prints_a_table_in_network_order(made, capsys):
    assert (
        run(["eval", str(made / "demo.rq"), "--data", "demo", "--limit", "40", "--diagnose"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert lines[at].split() == [
        "layer",
        "loss",
        "alone",
        "std.",
        "error",
        "regained",
        "std.",
        "error",
        "clipped",
        "%",
        "SQNR",
        "dB",
        "codes",
        "used",
        "%",
        "worst",
        "tile",
    ]
    assert [line.split()[0] for line in lines[at + 1 : at + 5]] == ["0", "4", "8", "13"]
    assert lines[at - 4].split() == [
        "40",
        "test",
        "images",
        "top-1",
        "%",
        "cost,",
        "same",
        "weights",
        "std.",
        "error",
    ] and lines[at + 6].startswith("diagnosis  ")


def test_the_culprit_is_named_even_where_the_check_fails(made, capsys):
    assert (
        run(
            [
                "eval",
                str(made / "demo.rq"),
                "--data",
                "demo",
                "--limit",
                "40",
                "--min-acc",
                "100",
                "--diagnose",
            ]
        )
        == 5
    )
    err = capsys.readouterr().err.splitlines()
    assert (
        err[0].startswith("diagnosis: ") and "layer" in err[0] and "below --min-acc 100" in err[-1]
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--plots p", "--plots draws what --diagnose counts; give both"),
        (
            "--diagnose --adc ideal",
            "--diagnose compares the macro's ADC with an ideal one; leave --adc out",
        ),
        ("--diagnose --limit 0", "--limit must be at least 1, not 0"),
    ],
)
def test_refusals(made, capsys, options, sentence):
    assert run(["eval", str(made / "demo.rq"), "--data", "demo", *options.split()]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
