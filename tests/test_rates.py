"""The learning rate that is found: for its own run, and without a trace."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_finetune import RECIPE, TRAIN, started

from rqtool.train import rates as module
from rqtool.train.finetune import AUTO, Recipe
from rqtool.train.rates import RATES, find_rate, steps_of_a_test

ASKED = replace(RECIPE, epochs=1, lr=AUTO)


def test_the_network_is_left_as_it_came():
    network = started()
    before = deepcopy(network.state_dict())
    notes = []
    rate = find_rate(network, TRAIN, ASKED, None, lambda n, note: notes.append(note))
    assert rate in RATES and not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert len(notes) >= 2 and notes[0].split(":")[0] in {f"{r:g}" for r in RATES}
    assert find_rate(started(), TRAIN, ASKED, None) == rate


@pytest.mark.parametrize(
    ("losses", "found", "tests"),
    [
        ({1e-2: 3.0, 3e-3: 1.0, 1e-3: 2.0}, 3e-3, 3),
        ({3e-3: 0.95, 1e-3: 1.0, 3e-4: 2.0}, 1e-3, 3),
        ({3e-3: 5.0, 1e-3: 2.0, 3e-4: 1.0, 1e-4: 3.0}, 3e-4, 4),
        ({3e-3: float("inf"), 1e-3: float("inf"), 3e-4: 2.0, 1e-4: 2.0}, 3e-4, 4),
    ],
)
def test_neighbours_are_tried_as_long_as_they_are_better(monkeypatch, losses, found, tests):
    asked = []
    monkeypatch.setattr(
        module, "_tested", lambda *given: asked.append(given[-1]) or losses[given[-1]]
    )
    assert find_rate(started(), TRAIN, ASKED, None) == found
    assert len(asked) == len(set(asked)) == tests


def test_a_rate_at_which_training_diverges_is_not_found(monkeypatch):
    monkeypatch.setattr(module, "RATES", (1e-3, 1e30))
    monkeypatch.setattr(module, "FIRST", 1)
    assert find_rate(started(), TRAIN, ASKED, None) == 1e-3


def test_a_test_is_no_longer_than_the_run():
    assert steps_of_a_test(len(TRAIN), replace(ASKED, batch=len(TRAIN))) == 1
    assert steps_of_a_test(10**6, Recipe(epochs=3)) == module.STEPS
