"""Teachers: the divergence against its formula, the loss at both ends of its weight, and a student
that learns from nothing else."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_finetune import ADD, FEW_BITS, HELD, MULT, RECIPE, TRAIN, WORST, float_network, started
from torch.nn import functional as F

from rqtool.model.data import Images
from rqtool.train.distill import Teacher, distance, divergence, entering, seen
from rqtool.train.finetune import Feed, finetune, steps_per_epoch, top1
from rqtool.train.rewrite import read_layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_that_of_the_softened_probabilities(temperature):
    student, teacher = torch.randn(
        2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    p, q = (
        (scores / temperature).exp() / (scores / temperature).exp().sum(1, keepdim=True)
        for scores in (teacher, student)
    )
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    assert divergence(student, teacher, temperature).item() == pytest.approx(
        expected.item(), rel=1e-12
    )
    assert divergence(student, student, temperature).item() == pytest.approx(0, abs=1e-12)


def test_the_gradient_is_as_large_at_every_temperature():
    """For scores close together T**2 KL has the limit 1/2 |difference|**2 / classes, whatever T."""
    teacher = torch.zeros(1, 4, dtype=torch.float64)
    for temperature in (10.0, 100.0):
        student = torch.tensor([[0.1, -0.1, 0.2, -0.2]], dtype=torch.float64, requires_grad=True)
        divergence(student, teacher, temperature).backward()
        assert student.grad[0].tolist() == pytest.approx([0.025, -0.025, 0.05, -0.05], rel=0.05)


def test_the_weight_shares_out_the_loss():
    network, x, labels = float_network(), TRAIN.real(slice(16)), TRAIN.labels(slice(16))
    scores = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    told = network.eval()(x).detach()
    alone = F.cross_entropy(scores, labels)
    assert torch.equal(Teacher(network, 0.5, 2.0).says(x, np.arange(16))[0], told)
    assert torch.equal(Teacher(network, 0.0, 2.0).loss(scores, labels, told), alone)
    assert torch.equal(
        Teacher(network, 1.0, 2.0).loss(scores, labels, told), divergence(scores, told, 2.0)
    )
    mixed = Teacher(network, 0.25, 2.0).loss(scores, labels, told)
    assert mixed.item() == pytest.approx(
        (0.75 * alone + 0.25 * divergence(scores, told, 2.0)).item(), rel=1e-6
    )


def test_the_teacher_runs_in_eval_mode_and_learns_nothing():
    network = deepcopy(float_network())
    network.zero_grad()
    network.train()  # whoever had it before
    state = {name: value.clone() for name, value in network.state_dict().items()}
    scores = torch.zeros(8, 4, requires_grad=True)
    teacher = Teacher(network, 0.5, 2.0)
    teacher.loss(
        scores, TRAIN.labels(slice(8)), teacher.says(TRAIN.real(slice(8)), np.arange(8))[0]
    ).backward()
    assert scores.grad is not None and all(p.grad is None for p in network.layer("6").parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_student_learns_from_its_teacher_alone():
    """All labels are wrong, and count for nothing."""
    mislabelled = Feed(Images(TRAIN.images.x, (TRAIN.images.y + 1) % 4), MULT, ADD)
    network = started(FEW_BITS)
    before = top1(network, HELD)[0]
    best = finetune(
        network, mislabelled, HELD, RECIPE, WORST, teacher=Teacher(float_network(), 1.0, 2.0)
    ).best
    assert best.top1 >= before + 3


def test_what_enters_each_layer_is_matched_but_not_the_image():
    """Of the float network: what the flattening gives, in front of the linear layer."""
    network = float_network()
    names = entering(network.graph)
    assert names == (network.graph.convs()[1].inputs[0],) and network.graph.input not in names
    scores, values = seen(network.eval(), TRAIN.real(slice(8)), names)
    assert (
        torch.equal(scores, network(TRAIN.real(slice(8))))
        and list(values) == list(names)
        and values[names[0]].shape == (8, 54)
    )


def test_the_distance_is_relative_and_a_mean_over_layers():
    student, teacher = (
        {"a": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "b": torch.tensor([[4.0]])},
        {"a": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([[2.0]])},
    )
    assert distance(student, teacher).item() == pytest.approx(
        (5 / 2 + 1) / 2
    )  # (4 + 1) / (1 + 1), and 4 / 4
    assert distance(teacher, teacher).item() == 0
    assert torch.isfinite(distance({"a": torch.zeros(2)}, {"a": torch.zeros(2)}))


def test_the_lesson_adds_the_distance_times_its_weight():
    network, student, x, labels, index = (
        float_network(),
        started(FEW_BITS).eval(),
        TRAIN.real(slice(16)),
        TRAIN.labels(slice(16)),
        np.arange(16),
    )
    plain, matched = (
        Teacher(network, 0.5, 2.0, match=match).lesson(student, x, labels, index)
        for match in (0.0, 3.0)
    )
    names = entering(network.graph)
    (_, theirs), (_, mine) = seen(network.eval(), x, names), seen(student, x, names)
    assert (
        matched.item() == pytest.approx((plain + 3 * distance(mine, theirs)).item(), rel=1e-6)
        and matched > plain
    )
    later = Teacher(network, 0.5, 2.0, match=3.0).lesson(student, x, labels, index, remaining=0.25)
    assert later.item() == pytest.approx((plain + 0.75 * distance(mine, theirs)).item(), rel=1e-6)


def test_the_distance_counts_less_with_every_step():
    class Watched(Teacher):
        def lesson(self, *args, remaining, **kwargs):
            shares.append(remaining)
            return super().lesson(*args, remaining=remaining, **kwargs)

    shares: list[float] = []
    finetune(
        started(FEW_BITS),
        TRAIN,
        HELD,
        RECIPE,
        WORST,
        teacher=Watched(float_network(), 0.5, 2.0, match=1.0),
    )
    steps = RECIPE.epochs * steps_per_epoch(len(TRAIN), RECIPE)
    assert shares == [1 - n / steps for n in range(steps)]


def test_matching_brings_what_enters_the_layers_closer():
    """Labels and scores count for nothing, nearly: the distance alone teaches."""
    network, x = float_network(), TRAIN.real(slice(64))
    names = entering(network.graph)
    _, wanted = seen(network.eval(), x, names)
    apart = []
    for match in (0.0, 1e3):
        student = started(FEW_BITS)
        state = finetune(
            student, TRAIN, HELD, RECIPE, WORST, teacher=Teacher(network, 1.0, 2.0, match=match)
        ).network
        student.load_state_dict(state)
        apart.append(distance(seen(student.eval(), x, names)[1], wanted).item())
    assert apart[1] < 0.8 * apart[0]


def test_the_first_layer_learns_from_the_distance_too():
    network, student, x = float_network(), started(FEW_BITS).train(), TRAIN.real(slice(16))
    told, found = (
        seen(network.eval(), x, entering(network.graph))[1],
        seen(student, x, entering(network.graph))[1],
    )
    distance(found, {name: value.detach() for name, value in told.items()}).backward()
    first, last = read_layers(student).values()
    assert first.weight.grad.abs().sum() > 0 and last.weight.grad is None
