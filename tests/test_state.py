"""The training state: an interrupted job goes on to the same bits, and nothing but its own file is
taken for it."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_api import DATA, net
from test_finetune import FEW_BITS, HELD, RECIPE, TRAIN, WORST, started

import rqtool
from rqtool import Data, Macro, Recipe, checkpoint
from rqtool.errors import ConfigError, InputError, StorageError
from rqtool.storage import load_tensors, save_tensors
from rqtool.train.finetune import Run, finetune
from rqtool.train.state import Runs, about_job, kept_runs

pytestmark = pytest.mark.usefixtures("one_thread")
ABOUT = about_job(started(), FEW_BITS, RECIPE, [TRAIN, HELD])


class Interrupted(Exception):
    """What stops a job here."""


class Stops:
    """A progress that ends the job after `ticks` steps of any training."""

    def __init__(self, ticks: int) -> None:
        self.left, self.stages = ticks, []

    @contextmanager
    def stage(self, name: str, total: int):
        self.stages.append(name)

        def done(n: int = 1, note: str = "") -> None:
            if note.startswith("loss"):
                self.left -= 1
                if self.left == 0:
                    raise Interrupted

        yield done


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name]) and value.dtype == b[name].dtype for name, value in a.items()
    )


# -- the file --------------------------------------------------------------------------------------
def test_runs_come_back_as_they_were(tmp_path):
    runs, kept = kept_runs(tmp_path / "s", ABOUT), []
    finetune(
        started(),
        TRAIN,
        HELD,
        replace(RECIPE, epochs=2),
        WORST,
        epoch_done=lambda run: (runs.keep("some stage", run), kept.append(run)),
    )
    runs.keep(
        "odd",
        Run(
            3,
            1,
            replace(
                WORST, loss=float("nan"), state={"a/b.c": torch.tensor(1.5, dtype=torch.float64)}
            ),
            {},
            {},
        ),
    )
    again = kept_runs(tmp_path / "s", ABOUT).runs
    assert list(again) == ["odd", "some stage"] and np.isnan(again["odd"].best.loss)
    run, before = again["some stage"], kept[-1]
    assert (run.epoch, run.roll_backs, run.best.name, run.best.top1, run.best.loss) == (
        2,
        0,
        before.best.name,
        before.best.top1,
        before.best.loss,
    )
    assert (
        same(run.network, before.network)
        and same(run.optim, before.optim)
        and same(run.best.state, before.best.state)
    )
    assert same(again["odd"].best.state, {"a/b.c": torch.tensor(1.5, dtype=torch.float64)})


def test_without_a_name_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Runs()
    runs.keep("stage", Run(1, 0, WORST, {}, {}))
    assert runs.runs == {} and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    runs = kept_runs(tmp_path / "s", ABOUT)
    runs.keep("stage", Run(1, 0, replace(WORST, state={}), {}, {}))

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr("rqtool.storage.os.fsync", full)
        runs.keep("stage", Run(2, 0, WORST, {}, {}))
    assert kept_runs(tmp_path / "s", ABOUT).runs["stage"].epoch == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


DIFFERENT = {
    "--lr was 0.01 and is 0.5": about_job(
        started(), FEW_BITS, replace(RECIPE, lr=0.5), [TRAIN, HELD]
    ),
    "--io was 8 and is 4": about_job(started(), replace(FEW_BITS, io=4), RECIPE, [TRAIN, HELD]),
    "its images had another content": about_job(started(), FEW_BITS, RECIPE, [HELD, TRAIN]),
    "its model had another content": about_job(
        started(FEW_BITS.with_ideal_adc()), FEW_BITS, RECIPE, [TRAIN, HELD]
    ),
    "made by rqtool 0.0": None,
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_state_of_another_job_is_refused(tmp_path, what):
    old, new = (ABOUT, DIFFERENT[what]) if DIFFERENT[what] else ({**ABOUT, "rqtool": "0.0"}, ABOUT)
    kept_runs(tmp_path / "s", old).keep("stage", Run(1, 0, WORST, {}, {}))
    with pytest.raises(ConfigError) as e:
        kept_runs(tmp_path / "s", new)
    assert (
        str(e.value) == f"{tmp_path}/s: is the state of another job ({what}); give the "
        "command it was made with, or another --state"
    )


def test_pixels_that_are_worth_something_else_are_another_job():
    other = type(TRAIN)(TRAIN.images, np.array([1.0]), np.array([0.0]))
    assert about_job(started(), FEW_BITS, RECIPE, [other, HELD])["images"] != ABOUT["images"]


def test_a_state_with_missing_parts_is_refused(tmp_path):
    kept_runs(tmp_path / "s", ABOUT).keep("stage", Run(1, 0, WORST, {}, {}))
    tensors, document = load_tensors(tmp_path / "s")
    del document["runs"]["stage"]["loss"]
    save_tensors(tmp_path / "t", tensors, document)
    with pytest.raises(
        InputError,
        match=re.escape(
            "t: its parts do not fit together ('loss'); delete the file and start again"
        ),
    ):
        kept_runs(tmp_path / "t", ABOUT)


# -- a whole job -----------------------------------------------------------------------------------
def result_of(path: Path) -> tuple:
    """What of a .rq file must not depend on interruptions."""
    saved = checkpoint.load(path)
    return (
        saved.program.sha256(),
        saved.results["metrics"],
        saved.results["chosen"],
        {name: value.numpy().tobytes() for name, value in saved.network.state_dict().items()},
    )


@pytest.mark.parametrize(
    "about",
    [{}, {"teacher": "ideal", "augment": "shift"}, {"ideal_epochs": 2, "mode": "ste"}],
    ids=str,
)
def test_an_interrupted_job_ends_in_the_same_bits(tmp_path, about):
    """Stopped in the middle of an epoch of every training in turn."""
    recipe = Recipe(epochs=2, batch=9, lr=1e-2, **about)  # four steps an epoch
    rqtool.quantize(net(), DATA, out=tmp_path / "whole.rq", recipe=recipe)
    job = {"out": tmp_path / "parts.rq", "recipe": recipe, "state": tmp_path / "state"}
    progress, stops = Stops(6), 0
    while True:
        try:
            rqtool.quantize(net(), DATA, progress=progress, **job)
            break
        except Interrupted:
            progress, stops = Stops(6), stops + 1
    assert stops >= 3 and result_of(tmp_path / "parts.rq") == result_of(tmp_path / "whole.rq")


def test_an_interrupted_job_of_train_does_too(tmp_path):
    rqtool.quantize(
        net(),
        DATA,
        Macro(adc_bits=3),
        out=tmp_path / "m.rq",
        recipe=Recipe(epochs=1, batch=20),
        twin=False,
    )
    job = {"recipe": {"epochs": 3, "batch": 9}, "state": tmp_path / "state"}
    rqtool.train_more(tmp_path / "m.rq", DATA, out=tmp_path / "whole.rq", recipe=job["recipe"])
    with pytest.raises(Interrupted):
        rqtool.train_more(tmp_path / "m.rq", DATA, progress=Stops(7), **job)
    rqtool.train_more(tmp_path / "m.rq", DATA, out=tmp_path / "parts.rq", **job)
    assert result_of(tmp_path / "parts.rq") == result_of(tmp_path / "whole.rq")


def test_a_finished_job_only_measures_again(tmp_path):
    job = {"recipe": Recipe(epochs=1, batch=20), "state": tmp_path / "state"}
    first = rqtool.quantize(net(), DATA, **job)
    again = rqtool.quantize(net(), DATA, progress=Stops(1), **job)
    assert again.to_json()["metrics"] == first.to_json()["metrics"]


def test_other_images_are_another_job(tmp_path):
    job = {"recipe": Recipe(epochs=1, batch=20), "state": tmp_path / "state", "twin": False}
    rqtool.quantize(net(), DATA, **job)
    other = Data("fewer", DATA.train[:39], DATA.test, 2)
    with pytest.raises(
        ConfigError, match="is the state of another job \\(its images had another content\\)"
    ):
        rqtool.quantize(net(), other, **job)
