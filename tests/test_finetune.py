"""Fine-tuning: a toy problem gets better through the ADC, the same bits for the same seed, and held-out images decide."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from rqtool.errors import CheckError, ConfigError
from rqtool.hardware.macro import Macro
from rqtool.model.capture import capture
from rqtool.model.data import Images
from rqtool.model.network import Network
from rqtool.train import finetune as module
from rqtool.train.calibrate import calibrate
from rqtool.train.finetune import Candidate, Feed, Recipe, consider, consider_norms, finetune, fitting, optimizer, rate, steps_per_epoch, temperature, top1
from rqtool.train.rewrite import read_layers, rewrite

pytestmark = pytest.mark.usefixtures("one_thread")


MULT, ADD = np.array([1 / 255]), np.array([-0.5])


def toy(count: int, seed: int) -> Feed:
    """Four patterns under noise, uint8 [count, 1, 6, 6]."""
    patterns = np.random.default_rng(0).integers(0, 256, (4, 1, 6, 6))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = patterns[labels] + rng.normal(0, 110, (count, 1, 6, 6))
    return Feed(Images(pixels.clip(0, 255).astype(np.uint8), labels), MULT, ADD)


TRAIN, HELD = toy(320, 1), toy(200, 2)


@cache
def float_network() -> Network:
    """A float network that has learned the patterns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(54, 4))
    optim = torch.optim.AdamW(model.parameters(), 1e-2)
    for n in range(60):
        part = slice(32 * (n % 10), 32 * (n % 10) + 32)
        optim.zero_grad()
        nn.functional.cross_entropy(model.train()(TRAIN.real(part)), TRAIN.labels(part)).backward()
        optim.step()
    return capture(model.eval(), (1, 6, 6))


@cache
def calibrated(macro: Macro) -> Network:
    network = rewrite(float_network(), macro)
    calibrate(network, TRAIN.real(slice(0, 64)))
    return network


FEW_BITS = Macro(adc_bits=2, in_bits=2, w_bits=2)


def started(macro: Macro = FEW_BITS) -> Network:
    """The toy network on a macro, calibrated."""
    return deepcopy(calibrated(macro))


def tuned(recipe: Recipe, macro: Macro = FEW_BITS) -> tuple[Network, Candidate, Candidate]:
    network = started(macro)
    before = consider("calibrated", network, HELD, None)
    return network, before, finetune(network, TRAIN, HELD, recipe, before)


RECIPE = Recipe(epochs=4, batch=32, lr=1e-2, norm_images=300)


# -- what comes out ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["relaxed", "ste"])
@pytest.mark.parametrize("macro", [FEW_BITS, Macro(adc_bits=2, in_bits=2, w_bits=3, sign_scheme="split", granularity="column"), Macro(levels="free", adc_bits=2, in_bits=2, w_bits=2)], ids=Macro.describe)
def test_a_toy_problem_gets_better(mode, macro):
    network, before, best = tuned(replace(RECIPE, mode=mode), macro)
    assert best.top1 >= before.top1 + 3
    assert best.loss < before.loss
    assert top1(network, HELD) == (best.top1, best.loss)  # the network is left in the best state
    assert not network.training and all(layer.relaxation is None for layer in read_layers(network).values())


@pytest.mark.parametrize("mode", ["relaxed", "ste"])
def test_the_same_seed_gives_the_same_bits(mode):
    recipe = replace(RECIPE, epochs=1, mode=mode)
    (one, _, first), (two, _, second) = tuned(recipe), tuned(recipe)
    assert first.name == second.name and first.state.keys() == second.state.keys()
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())
    other = tuned(replace(recipe, seed=1))[2]
    assert any(not torch.equal(value, other.state[name]) for name, value in first.state.items())


def test_a_large_seed_is_a_seed():
    assert tuned(replace(RECIPE, epochs=1, batch=160, seed=(1 << 40) + 5))[2].top1 > 25


def test_no_epochs_leave_the_calibrated_network():
    network, before, best = tuned(replace(RECIPE, epochs=0))
    assert best is before
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.state.items())


def test_every_parameter_that_can_learn_does():
    network = started()
    start = deepcopy(network.state_dict())
    finetune(network, TRAIN, HELD, replace(RECIPE, epochs=1), Candidate("worst", -1.0, 1e9, {}))
    unchanged = {name for name, value in network.state_dict().items() if torch.equal(value, start[name])}
    assert unchanged <= {f"layers.{layer}.{role}" for layer in "06" for role in ("zero", "input.zero")}


def test_more_than_one_batch_is_needed_for_nothing():
    """Fewer images than a batch make one smaller step."""
    few = toy(20, 3)
    assert steps_per_epoch(20, RECIPE) == 1 and steps_per_epoch(320, RECIPE) == 10 and steps_per_epoch(350, RECIPE) == 10
    losses = []
    finetune(started(), few, HELD, replace(RECIPE, epochs=2), Candidate("worst", -1.0, 1e9, {}), losses.append)
    assert len(losses) == 2


# -- selection -----------------------------------------------------------------------------------------------------------
def test_held_out_images_decide():
    """A candidate that is perfect on the held-out images stays, whatever training reaches."""
    network = started()
    state = deepcopy(network.state_dict())
    best = finetune(network, TRAIN, HELD, replace(RECIPE, epochs=1), Candidate("perfect", 100.0, 0.0, state))
    assert best.name == "perfect"
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


def test_only_the_held_out_images_are_scored(monkeypatch):
    scored = []
    right = module.top1
    monkeypatch.setattr(module, "top1", lambda network, feed: scored.append(feed) or right(network, feed))
    tuned(replace(RECIPE, epochs=2))
    assert len(scored) == 5 and all(feed is HELD for feed in scored)


def test_candidates_compare_by_accuracy_then_loss():
    a = Candidate("a", 90.0, 0.5, {})
    assert a.better_than(None) and a.better_than(Candidate("b", 89.0, 0.1, {})) and a.better_than(Candidate("b", 90.0, 0.6, {}))
    assert not a.better_than(a) and not a.better_than(Candidate("b", 90.0, 0.4, {}))
    assert not Candidate("n", 90.0, float("nan"), {}).better_than(a)


def test_norms_are_measured_anew_and_kept_only_if_better():
    network = started()
    with torch.no_grad():
        network.layer("1").running_mean.fill_(50.0)  # statistics that are far off
    state = deepcopy(network.state_dict())
    best = consider_norms("now", network, TRAIN, HELD, RECIPE, None)
    assert best.name == "now, batch norm re-estimated" and best.top1 > 40
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())  # left as it came


# -- schedules -----------------------------------------------------------------------------------------------------------
def test_the_temperature_falls_geometrically_and_ends_hard():
    recipe = Recipe(tau_start=0.4, tau_end=0.1, hard_share=0.2)
    assert temperature(recipe, 0.0) == 0.4
    assert temperature(recipe, 0.4) == pytest.approx(0.2)
    assert temperature(recipe, 0.79) == pytest.approx(0.1, rel=0.05)
    assert temperature(recipe, 0.8) is None and temperature(recipe, 1.0) is None
    assert temperature(replace(recipe, mode="ste"), 0.0) is None
    assert temperature(replace(recipe, hard_share=1), 0.0) is None
    assert temperature(replace(recipe, hard_share=0), 0.999) == pytest.approx(0.1, rel=0.01)


def test_the_last_steps_run_without_noise():
    network, seen = started(), []
    finetune(network, TRAIN, HELD, replace(RECIPE, epochs=1), Candidate("worst", -1.0, 1e9, {}), lambda loss: seen.append([layer.relaxation for layer in read_layers(network).values()]))
    taus = [[r.tau if r else None for r in step] for step in seen]
    assert len(taus) == 10 and taus[0] == [0.3, 0.3] and taus[7][0] > 0.08 and taus[8:] == [[None, None]] * 2
    seeds = [r.seed for step in seen[:8] for r in step]
    assert len(set(seeds)) == len(seeds)  # each layer and step has noise of its own


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(lr=0.1, warmup=0.2)
    assert [rate(recipe, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.05, 0.1, 0.05, 0])
    assert rate(replace(recipe, warmup=0), 0.0) == 0.1


def test_only_weight_matrices_decay():
    network = started()
    decayed, others = (group["params"] for group in optimizer(network, RECIPE).param_groups)
    assert {id(p) for p in decayed} == {id(layer.weight) for layer in read_layers(network).values()}
    assert len(decayed) + len(others) == sum(p.requires_grad for p in network.parameters())


# -- images --------------------------------------------------------------------------------------------------------------
def test_a_feed_hands_out_real_values_and_labels():
    feed = Feed(Images(np.arange(12, dtype=np.uint8).reshape(3, 2, 1, 2), np.array([4, 5, 6])), np.array([2.0, 10.0]), np.array([0.5, -1.0]))
    assert len(feed) == 3
    assert feed.real(slice(0, 1)).tolist() == [[[[0.5, 2.5]], [[19.0, 29.0]]]]
    assert feed.labels(np.array([0, 2])).tolist() == [4, 6]
    assert [len(x) for x in feed.batches(2)] == [2, 1] and [len(x) for x in feed.batches(2, 2)] == [2]
    assert fitting([(10,)], 250) == 250 and fitting([(1 << 26,)], 250) == 2


# -- errors --------------------------------------------------------------------------------------------------------------
def test_a_loss_that_is_no_number_ends_training():
    broken = Feed(Images(np.full((64, 1, 6, 6), np.inf, np.float32), np.zeros(64, np.int64)), MULT, ADD)
    network = started(Macro(adc_bits=None))
    with torch.no_grad():
        network.layer("6").bias.fill_(float("nan"))
    with pytest.raises(CheckError) as e:
        finetune(network, TRAIN, HELD, replace(RECIPE, epochs=1), Candidate("worst", -1.0, 1e9, {}))
    assert str(e.value) == "the loss is not a number after 1 of 10 steps; lower --lr 0.01"
    with pytest.raises(CheckError) as e:
        finetune(started(), broken, HELD, replace(RECIPE, epochs=1), Candidate("worst", -1.0, 1e9, {}))
    assert str(e.value) == "0: its inputs or weights are not finite numbers, so a read has no code for them; lower --lr, or check the model's weights and the images"


WRONG = {
    "--mode soft is not known; choose one of relaxed, ste": {"mode": "soft"},
    "--mode relax is not known; did you mean 'relaxed'?": {"mode": "relax"},
    "--epochs must be a whole number of at least 0, not -1": {"epochs": -1},
    "--epochs must be a whole number of at least 0, not 1.5": {"epochs": 1.5},
    "--epochs must be a whole number of at least 0, not True": {"epochs": True},
    "--batch must be a whole number of at least 2, not 1": {"batch": 1},
    "--seed must be a whole number of at least 0, not -3": {"seed": -3},
    "--calibration-images must be a whole number of at least 2, not 0": {"calibration_images": 0},
    "--norm-images must be a whole number of at least 2, not 1": {"norm_images": 1},
    "--held-out must be a whole number of at least 1, not 0": {"held_out": 0},
    "--lr must be a positive number, not 0": {"lr": 0},
    "--lr must be a positive number, not nan": {"lr": float("nan")},
    "--lr must be a positive number, not fast": {"lr": "fast"},
    "--weight-decay must be a number of at least 0, not -0.1": {"weight_decay": -0.1},
    "--tau-start must be a positive number, not 0": {"tau_start": 0},
    "--tau-end must be a positive number, not inf": {"tau_end": float("inf")},
    "--hard-share must be from 0 to 1, not 1.2": {"hard_share": 1.2},
    "--warmup must be from 0 to 0.99, not 1": {"warmup": 1},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_recipe_that_cannot_be_followed_is_refused(sentence):
    with pytest.raises(ConfigError) as e:
        Recipe(**WRONG[sentence])
    assert str(e.value) == sentence


def test_a_recipe_is_plain_data():
    assert Recipe(**Recipe(epochs=3, held_out=100).to_dict()) == Recipe(epochs=3, held_out=100)
