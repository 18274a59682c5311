"""What each step of a job cost, whether training and the twin's brought anything, and the twin's
own file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_api import CALIBRATED, DATA, images, net

import rqtool
from rqtool import Data, Macro, Recipe, checkpoint
from rqtool.errors import ConfigError
from rqtool.jobs.alarms import Alarms
from rqtool.jobs.chain import (
    Step,
    chain_rows,
    epoch_rows,
    say_what_the_twin_is,
    say_what_training_brought,
)
from rqtool.train.finetune import Candidate, Epoch, Run
from rqtool.train.measure import hits, ideal_adcs
from rqtool.train.paired import Loss, paired
from rqtool.train.rewrite import read_layers
from rqtool.train.state import kept_runs

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = ["float", "ideal ADC", "ADC", "tuned", "frozen"]


def right(*wrong: int) -> np.ndarray:
    return ~np.isin(np.arange(100), wrong)


# -- the chain -------------------------------------------------------------------------------------
def test_a_step_costs_what_it_loses_against_the_one_before():
    steps = [
        Step("float", right(1)),
        Step("ideal ADC", right(1, 2, 3)),
        Step("ADC", right(1, 2, 3, 4, 5, 6), 91.0),
        Step("tuned", right(2, 9), 92.0),
    ]
    rows = chain_rows([*steps, Step("frozen", right(2))])
    assert [(r["step"], r["top1"], r["loss"], r["held_out_top1"]) for r in rows] == [
        ("float", 99.0, None, None), ("ideal ADC", 97.0, 2.0, None), ("ADC", 94.0, 3.0, 91.0), ("tuned", 98.0, -4.0, 92.0), ("frozen", 99.0, -1.0, None)
    ]  # fmt: skip
    # tuned: 1 lost, 5 gained of 100
    assert (rows[0]["se"], rows[0]["interval"]) == (None, None) and rows[3]["se"] == pytest.approx(
        100 * ((0.06 - 0.0016) / 100) ** 0.5
    )
    assert rows[3]["interval"] == list(paired(right(1, 2, 3, 4, 5, 6), right(2, 9)).interval)


def test_a_step_that_changed_nothing_costs_nothing_for_sure():
    rows = chain_rows(
        [
            Step("float", right()),
            Step("ADC", right(1)),
            Step("tuned", None, 90.0),
            Step("frozen", right(1, 2)),
        ]
    )
    assert rows[2] == {
        "step": "tuned",
        "top1": 99.0,
        "loss": 0.0,
        "se": None,
        "interval": None,
        "held_out_top1": 90.0,
    }
    assert (rows[3]["loss"], rows[3]["top1"]) == (1.0, 98.0)


@pytest.fixture(scope="module")
def noisy() -> Data:
    """Halves whose labels are wrong for a third of the images, so that no network is right about
    all of them."""
    parts = []
    for part in (images(80), images(60)):
        labels = part.y.copy()
        labels[::3] = 1 - labels[::3]
        parts.append(replace(part, y=labels))
    return Data("noisy halves", *parts, 2)


@pytest.fixture(scope="module")
def result(noisy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    recipe = Recipe(epochs=2, batch=20, lr=1e-2)
    return rqtool.quantize(
        net(),
        noisy,
        Macro(adc_bits=2),
        out=folder / "m.rq",
        recipe=recipe,
        twin_out=folder / "twin.rq",
    )


def test_the_chain_begins_with_the_float_model_and_ends_with_the_saved_program(result):
    chain = {row["step"]: row for row in result.chain}
    assert list(chain) == STEPS
    assert (chain["float"]["top1"], chain["frozen"]["top1"]) == (
        result.float_top1,
        result.tuned_top1,
    )
    assert sum(row["loss"] or 0 for row in result.chain) == pytest.approx(
        result.float_top1 - result.tuned_top1
    )
    assert all(
        row["se"] > 0 and row["interval"][0] <= row["loss"] <= row["interval"][1]
        for row in result.chain[1:]
        if row["se"]
    )


def test_each_step_is_measured_on_what_it_made(result, noisy):
    """The saved network is the tuned one: in floating point, before its numbers are fixed."""
    saved = checkpoint.load(result.out)
    feed = rqtool.jobs.serve.Feed(noisy.test, *saved.preprocess.affine(1))
    chain = {row["step"]: row for row in result.chain}
    assert chain["tuned"]["top1"] == pytest.approx(100 * hits(saved.network, feed).mean())


def test_the_calibrated_network_is_measured_with_its_adcs_ideal_and_with_its_own(noisy, tmp_path):
    done = rqtool.quantize(
        net(), noisy, Macro(adc_bits=1), out=tmp_path / "m.rq", recipe=CALIBRATED, twin=False
    )
    saved = checkpoint.load(tmp_path / "m.rq")
    feed = rqtool.jobs.serve.Feed(noisy.test, *saved.preprocess.affine(1))
    with ideal_adcs(saved.network, read_layers(saved.network)):
        ideal = hits(saved.network, feed)
    real = hits(saved.network, feed)
    chain = {row["step"]: row for row in done.chain}
    assert chain["ideal ADC"]["top1"] == pytest.approx(100 * ideal.mean()) and chain["ADC"][
        "top1"
    ] == pytest.approx(100 * real.mean())
    assert (chain["ADC"]["loss"], chain["ADC"]["se"]) == (
        paired(ideal, real).points,
        paired(ideal, real).se,
    )
    assert (chain["tuned"]["loss"], chain["tuned"]["se"]) == (0.0, None) and chain["tuned"][
        "held_out_top1"
    ] == chain["ADC"]["held_out_top1"]


def test_where_the_macro_s_adc_is_ideal_the_adc_step_changed_nothing(noisy):
    done = rqtool.quantize(net(), noisy, Macro(adc_bits=None), recipe=CALIBRATED)
    assert (
        [row["step"] for row in done.chain] == STEPS
        and done.chain[2]["se"] is None
        and done.chain[2]["loss"] == 0.0
    )
    metrics = done.to_json()["metrics"]
    assert (metrics["adc_loss"], metrics["adc_loss_se"], metrics["adc_loss_interval"]) == (
        0.0,
        None,
        None,
    )


def test_the_loss_to_the_adc_is_paired_with_the_twin(result, noisy):
    """The two files give the two arrays of hits that the loss compares."""
    programs = [checkpoint.load(path).program for path in (result.twin_out, result.out)]
    twin, own = (
        rqtool.jobs.serve.predictions(program, noisy.test) == noisy.test.y for program in programs
    )
    assert result.adc_loss == paired(twin, own)
    metrics = result.to_json()["metrics"]
    assert (
        metrics["adc_loss"]
        == result.ideal_top1 - result.tuned_top1
        == pytest.approx(result.adc_loss.points)
    )
    assert (metrics["adc_loss_se"], metrics["adc_loss_interval"]) == (
        result.adc_loss.se,
        list(result.adc_loss.interval),
    )


def test_more_epochs_have_a_gain_with_its_error(result, noisy):
    more = rqtool.train_more(result.out, noisy, recipe={"epochs": 1})
    metrics = more.to_json()["metrics"]
    assert (
        metrics["gain"] == pytest.approx(more.tuned_top1 - more.before_top1)
        and metrics["gain_se"] == more.gain.se > 0
    )
    assert [row["epoch"] for row in more.epochs] == [1]


# -- epochs ----------------------------------------------------------------------------------------
def test_every_epoch_leaves_a_row(result):
    rows = result.to_json()["epochs"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert set(rows[0]) == {
        "epoch",
        "held_out_top1",
        "held_out_loss",
        "train_loss_start",
        "train_loss_end",
    }
    assert all(
        0 <= row["held_out_top1"] <= 100
        and row["held_out_loss"] > 0
        and row["train_loss_start"] > 0
        for row in rows
    )
    if result.chosen.startswith("epoch"):
        assert result.chain[3]["held_out_top1"] in {row["held_out_top1"] for row in rows}


def test_a_loss_that_is_no_number_is_null():
    run = Run(
        1, 0, candidate("epoch 1"), {}, {}, (Epoch(1, 50.0, float("nan"), float("inf"), 1.0),)
    )
    assert json.loads(json.dumps(epoch_rows(run), allow_nan=False)) == [
        {"epoch": 1, "held_out_top1": 50.0, "held_out_loss": None, "train_loss_start": None, "train_loss_end": 1.0}
    ]  # fmt: skip


def test_the_rows_are_kept_over_an_interruption(tmp_path):
    run = Run(
        2,
        0,
        candidate("epoch 1"),
        {},
        {},
        (Epoch(1, 200 / 3, 0.1, 1 / 3, 0.2), Epoch(2, 60.0, float("nan"), 0.3, 0.1)),
    )
    kept_runs(tmp_path / "s", {}).keep("stage", run)
    again = kept_runs(tmp_path / "s", {}).runs["stage"].history
    assert again[0] == run.history[0] and (
        again[1].number,
        again[1].top1,
        np.isnan(again[1].loss),
    ) == (2, 60.0, True)


def test_a_job_that_went_on_from_its_state_has_the_same_chain_and_rows(noisy, tmp_path):
    job = {"recipe": Recipe(epochs=2, batch=20), "state": tmp_path / "state"}
    first, again = (rqtool.quantize(net(), noisy, **job).to_json() for _ in range(2))
    assert {**again, "seconds": 0} == {**first, "seconds": 0} and len(first["epochs"]) == 2


# -- training that brought nothing -----------------------------------------------------------------
def candidate(name: str, top1: float = 70.0) -> Candidate:
    return Candidate(name, top1, 1.0, {})


def told(
    history: list[Epoch],
    recipe: Recipe,
    images: int = 64_000,
    to_gain: Loss | None = None,
    ways: str = "",
) -> list[str]:
    alarms = Alarms()
    run = Run(len(history), 0, candidate("post-training"), {}, {}, tuple(history))
    say_what_training_brought(alarms, run, recipe, images, to_gain, ways)
    return alarms.sentences


BEFORE = (
    "training brought nothing, so the network from before it was kept: "
    "held-out top-1 was 70.00 % before and "
)


@pytest.mark.parametrize(
    ("history", "about", "sentence"),
    [
        ([(69.0, 1.5, 1.9)], {"epochs": 1}, "69.00 % after its only epoch; the training loss " "went from 1.500 to 1.900, so --lr 0.001 is probably " "too high; try --lr 0.00033"),
        (
            [(50.0, 1.5, 1.0), (69.5, 1.0, 0.9)], {},
            "69.50 % after the best of 2 epochs; accuracy was still rising in " "the last epoch and the training loss went from 1.500 to 0.900; use " "more --epochs",
        ),
        (
            [(69.0, 1.5, 1.5), (68.0, 1.5, 1.49)], {},
            "69.00 % after the best of 2 epochs; the training loss went from " "1.500 to 1.490, hardly at all, so --lr 0.001 is probably too low; " "try --lr 0.003",
        ),
        (
            [(69.0, 1.5, 1.0), (68.0, 1.0, 0.5)], {},
            "69.00 % after the best of 2 epochs; the training loss went from " "1.500 to 0.500, but held-out accuracy did not follow; try --lr " "0.00033, or --teacher float",
        ),
    ],
)  # fmt: skip
def test_training_that_brought_nothing_says_so_and_why(history, about, sentence):
    epochs = [Epoch(n + 1, top1, 1.0, first, last) for n, (top1, first, last) in enumerate(history)]
    assert told(epochs, Recipe(**{"lr": 1e-3, **about}), ways=", or --teacher float") == [
        BEFORE + sentence
    ]


def test_few_steps_are_a_reason():
    assert told([Epoch(1, 69.0, 1.0, 1.5, 1.0)], Recipe(epochs=1, lr=1e-3), images=640) == [
        BEFORE + "69.00 % after its only epoch; 10 training steps are few; use more "
        "--epochs, a smaller --batch or more training images"
    ]


def test_where_calibration_loses_nothing_there_is_little_to_gain():
    sentence = (
        "69.00 % after its only epoch; calibration lost nothing significant "
        "against the float model, so there was little to gain; --epochs 0 "
        "saves the time"
    )
    assert told(
        [Epoch(1, 69.0, 1.0, 1.5, 1.9)],
        Recipe(epochs=1, lr=1e-3),
        to_gain=paired(right(1), right(2, 3)),
    ) == [BEFORE + sentence]
    assert told(
        [Epoch(1, 69.0, 1.0, 1.5, 1.9)],
        Recipe(epochs=1, lr=1e-3),
        to_gain=paired(right(), right(*range(20))),
    ) != [BEFORE + sentence]


def test_nothing_is_said_where_an_epoch_was_chosen_or_none_was_done():
    alarms = Alarms()
    for run in (
        Run(1, 0, candidate("epoch 1"), {}, {}, (Epoch(1, 71.0, 1.0, 1.0, 0.5),)),
        Run(0, 0, candidate("post-training"), {}, {}),
    ):
        say_what_training_brought(alarms, run, Recipe(epochs=1, lr=1e-3), 640, None, "")
        say_what_the_twin_is(alarms, run)
    assert not alarms.sentences


class Told:
    """A progress that keeps its warnings."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def stage(self, name: str, total: int):
        return rqtool.jobs.prepare.Silent().stage(name, total)

    def warn(self, sentence: str) -> None:
        self.sentences.append(sentence)


TWIN_KEPT = (
    "no epoch improved the ideal-ADC twin, which kept its state from "
    "before training (post-training), so the loss to the ADC compares "
    "with a "
    "network that training did not help; try another --lr or more --epochs"
)


def test_a_job_whose_training_brought_nothing(tmp_path):
    """A network that is right about every image, and a rate that makes it worse."""
    progress = Told()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2)).eval()
    with torch.no_grad():
        model[1].weight[:] = (
            torch.tensor([[0.5, -0.5], [-0.5, 0.5]]).repeat_interleave(3, 1).repeat(1, 6)
        )
        model[1].bias.zero_()
    done = rqtool.quantize(
        model, DATA, recipe=Recipe(epochs=1, batch=18, lr=5.0), progress=progress
    )
    assert (done.chosen, done.twin_chosen) == ("post-training", "post-training")
    assert done.warnings == tuple(progress.sentences) and done.warnings[-1] == TWIN_KEPT
    assert done.warnings[-2].startswith(
        "training brought nothing, so the network from before it was kept: "
        "held-out top-1 was 100.00 % before and "
    )
    assert done.chain[3] == {**done.chain[3], "loss": 0.0, "se": None}


# -- the twin's file -------------------------------------------------------------------------------
def test_the_twin_is_kept(result, noisy):
    assert rqtool.evaluate(result.twin_out, noisy).top1 == result.ideal_top1
    saved = checkpoint.load(result.twin_out)
    assert (
        saved.macro == Macro(adc_bits=2).with_ideal_adc()
        and saved.results["chosen"] == result.twin_chosen
    )
    assert saved.results["metrics"] == {
        "float_top1": result.float_top1,
        "tuned_top1": result.ideal_top1,
        "images": 60,
    }
    assert rqtool.verify(result.twin_out)["integers"] > 0
    assert (
        rqtool.train_more(result.twin_out, noisy, recipe={"epochs": 1}).before_top1
        == result.ideal_top1
    )


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (
            {"twin": False},
            "--twin-out saves the ideal-ADC twin, which --no-twin leaves out; use one of the two",
        ),
        (
            {"macro": Macro(adc_bits=None)},
            "--twin-out: with --adc-bits ideal the network is its own twin; leave --twin-out out",
        ),
        ({"out": "t.rq"}, "t.rq: is the file of --out, too; give another --twin-out"),
    ],
)
def test_a_twin_s_file_that_cannot_be(tmp_path, monkeypatch, about, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as e:
        rqtool.quantize(net(), DATA, **{"out": "m.rq", "twin_out": "t.rq", **about})
    assert str(e.value) == sentence and not list(tmp_path.iterdir())


def test_a_twin_s_file_is_not_replaced(tmp_path):
    (tmp_path / "t.rq").write_text("kept", encoding="utf-8")
    with pytest.raises(ConfigError) as e:
        rqtool.quantize(net(), DATA, out=tmp_path / "m.rq", twin_out=tmp_path / "t.rq")
    assert (
        str(e.value)
        == f"{tmp_path}/t.rq: exists already; give --force to replace it or another --twin-out"
    )
