"""Fine-tuning: a toy problem gets better through the ADC, the same bits for the same seed, and
held-out images decide."""

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
from rqtool.train.distill import Teacher
from rqtool.train.finetune import (
    Candidate,
    Feed,
    Recipe,
    Run,
    batch_order,
    consider,
    consider_norms,
    finetune,
    fitting,
    optimizer,
    rate,
    steps_per_epoch,
    temperature,
    top1,
)
from rqtool.train.relax import MODES
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
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(54, 4),
    )
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
    calibrate(network, TRAIN.real(slice(0, 64)), float_network())
    return network


FEW_BITS = Macro(adc_bits=2, in_bits=2, w_bits=2)


def started(macro: Macro = FEW_BITS) -> Network:
    """The toy network on a macro, calibrated."""
    return deepcopy(calibrated(macro))


def tuned(recipe: Recipe, macro: Macro = FEW_BITS) -> tuple[Network, Candidate, Candidate]:
    network = started(macro)
    before = consider("calibrated", network, HELD, None)
    return network, before, finetune(network, TRAIN, HELD, recipe, before).best


RECIPE = Recipe(epochs=6, batch=32, lr=1e-2, norm_images=300)
WORST = Candidate("worst", -1.0, 1e9, {})


# -- what comes out --------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "macro",
    [
        FEW_BITS,
        Macro(adc_bits=2, in_bits=2, w_bits=3, sign_scheme="split", granularity="column"),
        Macro(levels="free", adc_bits=2, in_bits=2, w_bits=2),
    ],
    ids=Macro.describe,
)
def test_a_toy_problem_gets_better(mode, macro):
    network, before, best = tuned(replace(RECIPE, mode=mode), macro)
    # gumbel's soft codes are far from the hard ones at 2 bits
    assert mode == "gumbel" or (best.name.startswith("epoch") and best.better_than(before))
    assert top1(network, HELD) == (best.top1, best.loss)  # the network is left in the best state
    assert not network.training and all(
        layer.relaxation is None for layer in read_layers(network).values()
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_bits(mode):
    recipe = replace(RECIPE, epochs=1, mode=mode)
    first, second, other = (
        finetune(started(), TRAIN, HELD, replace(recipe, seed=seed), WORST) for seed in (0, 0, 1)
    )
    assert first.best.name == second.best.name and same_states(first, second)
    assert not same_states(first, other)


def test_a_large_seed_is_a_seed():
    assert tuned(replace(RECIPE, epochs=1, batch=160, seed=(1 << 40) + 5))[2].top1 > 25


def test_no_epochs_leave_the_calibrated_network():
    network, before, best = tuned(replace(RECIPE, epochs=0))
    assert best is before
    assert all(
        torch.equal(value, network.state_dict()[name]) for name, value in before.state.items()
    )


STATIC = {f"layers.6.norm.{name}" for name in ("unit", "mean", "var")}  # of the scores


@pytest.mark.parametrize(
    "macro", [FEW_BITS, replace(FEW_BITS, levels="free", granularity="column")], ids=Macro.describe
)
def test_every_parameter_that_can_learn_does(macro):
    network = started(macro)
    start = deepcopy(network.state_dict())
    finetune(network, TRAIN, HELD, replace(RECIPE, epochs=1), WORST)
    unchanged = {
        name for name, value in network.state_dict().items() if torch.equal(value, start[name])
    }
    assert (
        unchanged
        <= {
            f"layers.{layer}.{role}"
            for layer in "06"
            for role in ("zero", "real_zero", "input.zero", "levels", "thresholds")
        }
        | STATIC
    )  # integers need not move


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_learns_where_it_is_asked_to(mode):
    """What is served is always the whole code next to what was learned, one step before the end."""
    network, seen = started(), []
    recipe = replace(RECIPE, epochs=2, zero="learned", mode=mode, lr=0.6)
    run = finetune(
        network,
        TRAIN,
        HELD,
        recipe,
        WORST,
        lambda loss: seen.append(
            [(layer.real_zero.item(), int(layer.zero)) for layer in read_layers(network).values()]
        ),
    )
    assert (
        len({real for step in seen for real, _ in step}) > 10
        and len({zero for step in seen for _, zero in step}) > 1
    )
    for before, after in zip(seen, seen[1:]):
        assert all(
            zero == min(3, max(0, np.floor(real + 0.5)))
            for (real, _), (_, zero) in zip(before, after)
        )
    assert same_states(run, finetune(started(), TRAIN, HELD, recipe, WORST))
    assert top1(network, HELD) == (run.best.top1, run.best.loss)


@pytest.mark.parametrize(
    "macro",
    [
        replace(FEW_BITS, codebook="sign-magnitude"),
        replace(FEW_BITS, range="full"),
        replace(FEW_BITS, levels="free"),
        FEW_BITS.with_ideal_adc(),
    ],
    ids=Macro.describe,
)
def test_a_zero_that_is_nobody_s_choice_stays(macro):
    network = started(macro)
    layers = read_layers(network).values()
    before = [] if macro.ideal else [int(layer.zero) for layer in layers]
    finetune(network, TRAIN, HELD, replace(RECIPE, epochs=1, zero="learned"), WORST)
    assert not any(layer.adc.zero_can_move() for layer in layers)
    assert before == ([] if macro.ideal else [int(layer.zero) for layer in layers])


def same_states(a: Run, b: Run) -> bool:
    return all(torch.equal(value, b.network[name]) for name, value in a.network.items())


def test_more_than_one_batch_is_needed_for_nothing():
    """Fewer images than a batch make one smaller step."""
    few = toy(20, 3)
    assert (
        steps_per_epoch(20, RECIPE) == 1
        and steps_per_epoch(320, RECIPE) == 10
        and steps_per_epoch(350, RECIPE) == 10
    )
    losses = []
    finetune(started(), few, HELD, replace(RECIPE, epochs=2), WORST, losses.append)
    assert len(losses) == 2


# -- selection -------------------------------------------------------------------------------------
def test_held_out_images_decide():
    """A candidate that is perfect on the held-out images stays, whatever training reaches."""
    network = started()
    state = deepcopy(network.state_dict())
    best = finetune(
        network, TRAIN, HELD, replace(RECIPE, epochs=1), Candidate("perfect", 100.0, 0.0, state)
    ).best
    assert best.name == "perfect"
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


def test_only_the_held_out_images_are_scored(monkeypatch):
    scored = []
    right = module.judged
    monkeypatch.setattr(
        module, "judged", lambda network, feed: scored.append(feed) or right(network, feed)
    )
    tuned(replace(RECIPE, epochs=2))
    assert len(scored) == 5 and all(feed is HELD for feed in scored)


def test_candidates_compare_by_accuracy_then_loss():
    a = Candidate("a", 90.0, 0.5, {})
    assert (
        a.better_than(None)
        and a.better_than(Candidate("b", 89.0, 0.1, {}))
        and a.better_than(Candidate("b", 90.0, 0.6, {}))
    )
    assert not a.better_than(a) and not a.better_than(Candidate("b", 90.0, 0.4, {}))
    assert not Candidate("n", 90.0, float("nan"), {}).better_than(a)


def test_a_top1_that_is_better_by_chance_alone_does_not_choose():
    """Three images won and one lost are within the paired error (2 > 2 is false); four are not."""
    one = torch.tensor([False] * 4 + [True] * 6)
    three = torch.tensor([True, True, True, False, False] + [True] * 5)
    four = torch.tensor([True] * 4 + [False] + [True] * 5)

    def candidate(right: torch.Tensor, loss: float) -> Candidate:
        return Candidate("c", 10.0 * int(right.sum()), loss, {}, right)

    assert not candidate(three, 0.6).better_than(candidate(one, 0.5))
    assert candidate(three, 0.4).better_than(candidate(one, 0.5))
    assert candidate(four, 0.6).better_than(candidate(one, 0.5))
    assert not candidate(one, 0.4).better_than(candidate(four, 0.5))


def test_norms_are_measured_anew_and_kept_only_if_better():
    network = started()
    with torch.no_grad():
        network.layer("1").running_mean.fill_(50.0)  # statistics that are far off
    state = deepcopy(network.state_dict())
    best = consider_norms("now", network, TRAIN, HELD, RECIPE, None)
    assert best.name == "now, batch norm re-estimated" and best.top1 > 40
    assert all(
        torch.equal(value, network.state_dict()[name]) for name, value in state.items()
    )  # left as it came


# -- schedules -------------------------------------------------------------------------------------
def test_the_temperature_falls_geometrically_and_ends_hard():
    recipe = Recipe(mode="relaxed", tau_start=0.4, tau_end=0.1, hard_share=0.2)
    assert temperature(recipe, 0.0) == 0.4
    assert temperature(recipe, 0.4) == pytest.approx(0.2)
    assert temperature(recipe, 0.79) == pytest.approx(0.1, rel=0.05)
    assert temperature(recipe, 0.8) is None and temperature(recipe, 1.0) is None
    assert temperature(replace(recipe, mode="ste"), 0.0) is None
    assert temperature(replace(recipe, hard_share=1), 0.0) is None
    assert temperature(replace(recipe, hard_share=0), 0.999) == pytest.approx(0.1, rel=0.01)


def test_the_last_steps_run_without_noise():
    network, seen = started(), []
    finetune(
        network,
        TRAIN,
        HELD,
        replace(RECIPE, epochs=1, mode="relaxed"),
        WORST,
        lambda loss: seen.append([layer.relaxation for layer in read_layers(network).values()]),
    )
    taus = [[r.tau if r else None for r in step] for step in seen]
    assert (
        len(taus) == 10
        and taus[0] == [0.3, 0.3]
        and taus[7][0] > 0.08
        and taus[8:] == [[None, None]] * 2
    )
    seeds = [r.seed for step in seen[:8] for r in step]
    assert len(set(seeds)) == len(seeds)  # each layer and step has noise of its own


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(lr=0.1, warmup=0.2)
    assert [rate(recipe.lr, recipe.warmup, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx(
        [0, 0.05, 0.1, 0.05, 0]
    )
    assert rate(0.1, 0, 0.0) == 0.1


def test_only_weight_matrices_decay():
    network = started()
    decayed, others = (
        group["params"] for group in optimizer(network, RECIPE.weight_decay).param_groups
    )
    assert {id(p) for p in decayed} == {id(layer.weight) for layer in read_layers(network).values()}
    assert len(decayed) + len(others) == sum(p.requires_grad for p in network.parameters())


# -- roll-backs ------------------------------------------------------------------------------------
class Poisoned(Feed):
    """Training images that come as NaN in certain batches, counted over the whole run."""

    def __init__(self, feed: Feed, batches: set[int]) -> None:
        self.images, self.mult, self.add = feed.images, feed.mult, feed.add
        self.poisoned, self.asked = batches, 0

    def real(self, index):
        training = (
            not isinstance(index, slice) and len(index) <= RECIPE.batch
        )  # batch norm is measured on more
        self.asked += training
        return super().real(index) * (
            float("nan") if training and self.asked - 1 in self.poisoned else 1
        )


class Rates(torch.optim.AdamW):
    """AdamW that remembers the rate of every step it makes."""

    def step(self, closure=None):
        self.rates = [*getattr(self, "rates", ()), self.param_groups[0]["lr"]]
        return super().step(closure)


@pytest.mark.parametrize("macro", [FEW_BITS, FEW_BITS.with_ideal_adc()], ids=["reads", "ideal"])
def test_an_epoch_that_diverges_is_done_again_at_half_the_rate(monkeypatch, macro):
    """Batch 14 is the fifth of the second epoch; its NaN never reaches a weight."""
    recipe, runs, optims = replace(RECIPE, epochs=2), [], []
    right = module.optimizer
    monkeypatch.setattr(torch.optim, "AdamW", Rates)
    monkeypatch.setattr(
        module, "optimizer", lambda *args: optims.append(right(*args)) or optims[-1]
    )
    run = finetune(
        started(macro), Poisoned(TRAIN, {14}), HELD, recipe, WORST, epoch_done=runs.append
    )
    assert [(r.epoch, r.roll_backs) for r in runs] == [
        (1, 0),
        (1, 1),
        (2, 1),
    ] and run.roll_backs == 1
    assert all(torch.equal(value, runs[1].network[name]) for name, value in runs[0].network.items())
    rates = optims[0].rates
    assert len(rates) == 10 + 4 + 10 and rates[14:18] == [r / 2 for r in rates[10:14]]
    assert all(torch.isfinite(value).all() for value in run.best.state.values())


def test_the_weights_stay_as_they_are_where_the_loss_is_no_number():
    network = started(FEW_BITS.with_ideal_adc())
    state, optim = deepcopy(network.state_dict()), optimizer(network, RECIPE.weight_decay)
    with pytest.raises(FloatingPointError, match="^the loss is not a number$"):
        module.train_step(
            network.train(), optim, lambda: network(torch.full((4, 1, 6, 6), torch.nan)).sum()
        )
    assert all(
        torch.equal(value, state[name])
        for name, value in network.state_dict().items()
        if "running" not in name and "num_batches" not in name
    )


def test_a_gradient_that_is_no_number_makes_no_step():
    network = started(FEW_BITS.with_ideal_adc())
    network.layer("6").weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(FloatingPointError, match="^the gradient is not a number$"):
        module.train_step(
            network.train(),
            optimizer(network, RECIPE.weight_decay),
            lambda: network(TRAIN.real(slice(8))).sum(),
        )
    assert torch.isfinite(network.layer("6").weight).all()


class Overflows(torch.optim.AdamW):
    """AdamW whose every step leaves one weight infinite."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = torch.inf


def test_a_last_step_that_overflows_is_rolled_back_too(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", Overflows)
    with pytest.raises(CheckError) as e:
        finetune(
            started(FEW_BITS.with_ideal_adc()), toy(20, 3), HELD, replace(RECIPE, epochs=1), WORST
        )
    assert str(e.value) == f"{GIVEN_UP}a weight is not a number after 1 of 1 steps; lower --lr 0.01"


def test_the_fourth_failure_ends_the_run():
    with pytest.raises(CheckError) as e:
        finetune(started(), Poisoned(TRAIN, {0, 3, 5, 7}), HELD, replace(RECIPE, epochs=1), WORST)
    assert str(e.value) == GIVEN_UP + NOT_FINITE
    assert (
        finetune(
            started(), Poisoned(TRAIN, {0, 3, 5}), HELD, replace(RECIPE, epochs=1), WORST
        ).roll_backs
        == 3
    )


# -- going on --------------------------------------------------------------------------------------
@pytest.mark.parametrize("macro", [FEW_BITS, Macro(adc_bits=None)], ids=Macro.describe)
def test_a_run_goes_on_to_the_same_bits(macro):
    """Also with a batch order, noise, dropout, augmentation and a teacher that depend on the step."""
    recipe, runs = replace(RECIPE, epochs=3, augment="shift-flip", zero="learned"), []
    teacher = Teacher(float_network(), 0.5, 2.0)
    whole = finetune(
        started(macro), TRAIN, HELD, recipe, WORST, teacher=teacher, epoch_done=runs.append
    )
    for start in runs:
        again = finetune(started(macro), TRAIN, HELD, recipe, WORST, teacher=teacher, start=start)
        assert (again.epoch, again.best.name, again.best.loss) == (
            3,
            whole.best.name,
            whole.best.loss,
        )
        for a, b in (
            (again.network, whole.network),
            (again.optim, whole.optim),
            (again.best.state, whole.best.state),
        ):
            assert a.keys() == b.keys() and all(
                torch.equal(value, b[name]) for name, value in a.items()
            )


def test_every_epoch_has_an_order_of_its_own():
    orders = [batch_order(50, 3, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert not np.array_equal(orders[0], batch_order(50, 4, 0)) and np.array_equal(
        orders[1], batch_order(50, 3, 1)
    )


# -- images ----------------------------------------------------------------------------------------
def test_a_feed_hands_out_real_values_and_labels():
    feed = Feed(
        Images(np.arange(12, dtype=np.uint8).reshape(3, 2, 1, 2), np.array([4, 5, 6])),
        np.array([2.0, 10.0]),
        np.array([0.5, -1.0]),
    )
    assert len(feed) == 3
    assert feed.real(slice(0, 1)).tolist() == [[[[0.5, 2.5]], [[19.0, 29.0]]]]
    assert feed.labels(np.array([0, 2])).tolist() == [4, 6]
    assert [len(x) for x in feed.batches(2)] == [2, 1] and [len(x) for x in feed.sampled(2, 2)] == [
        2
    ]
    assert fitting([(10,)], 250) == 250 and fitting([(1 << 26,)], 250) == 2


# -- errors ----------------------------------------------------------------------------------------
GIVEN_UP = "epoch 1 of 1 diverged, also after 3 roll-backs to half the rate each: "
NOT_FINITE = (
    "0: its inputs or weights are not finite numbers, so a read has no "
    "code for them; lower --lr, or check the model's weights and the "
    "images"
)


def test_a_loss_that_is_no_number_ends_training():
    broken = Feed(
        Images(np.full((64, 1, 6, 6), np.inf, np.float32), np.zeros(64, np.int64)), MULT, ADD
    )
    network = started(Macro(adc_bits=None))
    with torch.no_grad():
        network.layer("6").bias.fill_(float("nan"))
    with pytest.raises(CheckError) as e:
        finetune(network, TRAIN, HELD, replace(RECIPE, epochs=1), WORST)
    assert (
        str(e.value) == f"{GIVEN_UP}the loss is not a number after 0 of 10 steps; lower --lr "
        "0.01, or check the model's weights and the images"
    )
    with pytest.raises(CheckError) as e:
        finetune(started(), broken, HELD, replace(RECIPE, epochs=1), WORST)
    assert (
        str(e.value) == f"{GIVEN_UP}the gradient is not a number after 0 of 2 steps; lower "
        "--lr 0.01, or check the model's weights and the images"
    )


WRONG = {
    "--mode soft is not known; choose one of gumbel, mean, relaxed, ste": {"mode": "soft"},
    "--zero moves is not known; choose one of fixed, learned": {"zero": "moves"},
    "--teacher floats is not known; did you mean 'float'?": {"teacher": "floats"},
    "--calibration least is not known; choose one of error, peak, percentile": {
        "calibration": "least"
    },
    "--augment crop is not known; choose one of none, shift, shift-flip": {"augment": "crop"},
    "--ideal-epochs must be a whole number of at least 0, not -1": {"ideal_epochs": -1},
    "--distill-weight must be from 0 to 1, not 1.5": {"distill_weight": 1.5},
    "--distill-temperature must be a positive number, not 0": {"distill_temperature": 0},
    "--match must be a number of at least 0, not -1": {"match": -1, "teacher": "float"},
    "--match 30 compares with a teacher, but there is none; give --teacher float as well": {
        "match": 30,
        "teacher": "none",
    },
    "--mode relax is not known; did you mean 'relaxed'?": {"mode": "relax"},
    "--epochs must be a whole number of at least 0, not -1": {"epochs": -1},
    "--epochs must be a whole number of at least 0, not 1.5": {"epochs": 1.5},
    "--epochs must be a whole number of at least 0, not True": {"epochs": True},
    "--batch must be a whole number of at least 2, not 1": {"batch": 1},
    "--seed must be a whole number of at least 0, not -3": {"seed": -3},
    "--calibration-images must be a whole number of at least 2, not 0": {"calibration_images": 0},
    "--norm-images must be a whole number of at least 2, not 1": {"norm_images": 1},
    "--held-out must be a whole number of at least 1, not 0": {"held_out": 0},
    "--lr must be a positive number or auto, not 0": {"lr": 0},
    "--lr must be a positive number or auto, not nan": {"lr": float("nan")},
    "--lr must be a positive number or auto, not fast": {"lr": "fast"},
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
