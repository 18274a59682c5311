"""The stages of a job: who starts from what, who teaches whom, and that each training is done once
and only where it is asked for."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_api import DATA, net
from test_finetune import ADD, FEW_BITS, HELD, MULT, RECIPE, TRAIN, float_network

import rqtool
from rqtool.errors import ConfigError
from rqtool.hardware.macro import Macro
from rqtool.mapping.assign import assigned
from rqtool.model.data import Preprocess
from rqtool.program.freeze import Norm
from rqtool.train import stages as module
from rqtool.train.rewrite import read_layers
from rqtool.train.stages import Job, Stages

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = replace(RECIPE, epochs=1, calibration_images=64, teacher="none")


class Told:
    """A progress that remembers the names of its stages."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int):
        self.names.append(name)
        yield lambda n=1, note="": None


def stages(recipe, macro: Macro = FEW_BITS) -> Stages:
    job = Job(
        float_network(), TRAIN, HELD, HELD, "held-out", Preprocess(), Norm(MULT, ADD), True, 4
    )
    return Stages(job, assigned(macro), recipe, Told())


def ran(recipe, macro: Macro = FEW_BITS) -> tuple[Stages, torch.nn.Module, module.Run]:
    s = stages(recipe, macro)
    network, run = s.main(*s.calibrated(macro, "calibration"))
    return s, network, run


@pytest.fixture
def trainings(monkeypatch) -> list[dict]:
    """What every call of finetune got."""
    calls, right = [], module.finetune

    def recorded(network, train, held, recipe, *args, teacher=None, **kwargs):
        calls.append(
            {
                "ideal": next(iter(read_layers(network).values())).plan.macro.ideal,
                "epochs": recipe.epochs,
                "teacher": teacher,
            }
        )
        return right(network, train, held, recipe, *args, teacher=teacher, **kwargs)

    monkeypatch.setattr(module, "finetune", recorded)
    return calls


def test_by_default_nothing_else_is_trained(trainings):
    s, _, run = ran(QUICK)
    assert trainings == [{"ideal": False, "epochs": 1, "teacher": None}] and s.progress.names == [
        "calibration",
        "fine-tuning",
    ]
    assert (run.epoch, run.roll_backs) == (1, 0)
    assert s.twin is s.twin and trainings[1:] == [{"ideal": True, "epochs": 1, "teacher": None}]


def test_the_float_network_teaches_both(trainings):
    s, _, _ = ran(replace(QUICK, teacher="float", distill_weight=0.7, distill_temperature=3.0))
    s.twin  # noqa: B018
    assert [(t["ideal"], t["teacher"].network is s.job.network, t["teacher"].weight, t["teacher"].temperature) for t in trainings] == [
        (False, True, 0.7, 3.0), (True, True, 0.7, 3.0)
    ]  # fmt: skip


def test_a_teacher_is_asked_once_for_each_image(monkeypatch):
    """For both networks it teaches; anew in each step where images are moved, or where they are too
    many to keep what it says."""
    s, _, _ = ran(replace(QUICK, teacher="float", epochs=2))
    teacher, index = s.float_teacher, np.array([3, 300, 5])
    assert (
        torch.equal(teacher.told, torch.cat([s.job.network(x) for x in TRAIN.batches(250)]))
        and s.progress.names.count("the teacher's scores") == 1
    )
    assert torch.equal(
        teacher.says(torch.full_like(TRAIN.real(index), torch.nan), index)[0], teacher.told[index]
    )
    moved = stages(replace(QUICK, teacher="float", augment="shift"))
    assert moved.float_teacher.told is None and not moved.progress.names
    assert stages(replace(QUICK, teacher="float", match=1.0)).float_teacher.told is None
    assert torch.allclose(
        moved.float_teacher.says(TRAIN.real(index), index)[0], teacher.told[index], atol=1e-5
    )
    monkeypatch.setattr(module, "TOLD_VALUES", len(TRAIN) * 4 - 1)
    assert stages(replace(QUICK, teacher="float")).float_teacher.told is None


def test_the_twin_is_trained_first_where_it_teaches(trainings):
    s, _, _ = ran(replace(QUICK, teacher="ideal"))
    assert [
        (t["ideal"], t["teacher"].network is (s.twin if n else s.job.network))
        for n, t in enumerate(trainings)
    ] == [(True, True), (False, True)]
    assert len(trainings) == 2


def test_an_ideal_macro_has_no_better_teacher_than_the_float_network(trainings):
    s, _, _ = ran(replace(QUICK, teacher="ideal"), FEW_BITS.with_ideal_adc())
    assert [t["teacher"].network is s.job.network for t in trainings] == [True]


def test_without_epochs_nobody_is_taught(trainings):
    ran(replace(QUICK, epochs=0, teacher="ideal"))
    assert [t["epochs"] for t in trainings] == [0]


def test_epochs_with_an_ideal_adc_come_first_for_both(trainings):
    s, network, _ = ran(replace(QUICK, ideal_epochs=2))
    s.twin  # noqa: B018
    assert [(t["ideal"], t["epochs"]) for t in trainings] == [(True, 2), (False, 1), (True, 1)]
    assert s.progress.names == [
        "calibration", "ideal-ADC epochs: calibration", "ideal-ADC epochs", "calibration of the ADC", "fine-tuning", "ideal-ADC twin: fine-tuning",
    ]  # fmt: skip


def test_the_adc_is_calibrated_on_what_the_ideal_epochs_gave():
    """Weights and scales are those that were trained; only steps and zeros are new."""
    s = stages(replace(QUICK, epochs=0, ideal_epochs=1))
    network, best = s.calibrated(assigned(FEW_BITS), "calibration of the ADC", s.ideal_stage)
    trained, there = s.ideal_stage.state_dict(), network.state_dict()
    same = {name for name in trained if torch.equal(trained[name], there[name])}
    fitted = {
        name for name in trained if ".norm." in name or name.startswith("layers.1.")
    }  # to what the ideal network's columns give
    assert set(trained) - same <= fitted
    assert {name.rsplit(".", 1)[1] for name in set(there) - set(trained)} == {
        "log_step",
        "zero",
        "real_zero",
    }
    assert all(layer.log_step.item() > 0 for layer in read_layers(network).values())
    assert best.name.startswith("ideal-ADC epochs")


def test_the_better_of_both_starts_is_kept():
    """With no epochs after the ideal ones, the result is the calibrated network or the one after
    them, by held-out images."""
    s = stages(replace(QUICK, epochs=0, ideal_epochs=1))
    network, best = s.calibrated(assigned(FEW_BITS), "calibration")
    _, run = s.main(network, best)
    assert run.best.name.startswith(("post-training", "ideal-ADC epochs")) and not best.better_than(
        run.best
    )


@pytest.mark.parametrize(
    "recipe",
    [
        {"teacher": "float"},
        {"teacher": "ideal"},
        {"teacher": "ideal", "match": 2.0},
        {"ideal_epochs": 1},
        {"augment": "shift"},
    ],
)
def test_quantize_does_all_of_it(recipe):
    result = rqtool.quantize(net(), DATA, recipe=rqtool.Recipe(epochs=1, batch=20, **recipe))
    assert result.ideal_top1 is not None and result.roll_backs == 0
    assert {key: result.to_json()["recipe"][key] for key in recipe} == recipe


def test_what_is_no_image_is_not_moved():
    flat = torch.nn.Sequential(torch.nn.Linear(36, 2)).eval()
    with pytest.raises(ConfigError) as e:
        rqtool.quantize(flat, DATA, recipe=rqtool.Recipe(augment="shift"), input_shape=(36,))
    assert (
        str(e.value)
        == "--augment shift moves images, but the model takes shape [36]; give --augment none"
    )
