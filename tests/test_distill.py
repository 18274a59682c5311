"""Teachers: the divergence against its formula, the loss at both ends of its weight, and a student that learns from nothing else."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_finetune import ADD, FEW_BITS, HELD, MULT, RECIPE, TRAIN, WORST, float_network, started
from torch.nn import functional as F

from rqtool.model.data import Images
from rqtool.train.distill import Teacher, divergence
from rqtool.train.finetune import Feed, finetune, top1

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_that_of_the_softened_probabilities(temperature):
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = ((scores / temperature).exp() / (scores / temperature).exp().sum(1, keepdim=True) for scores in (teacher, student))
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    assert divergence(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-12)
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
    assert torch.equal(Teacher(network, 0.5, 2.0).scores(x, np.arange(16)), told)
    assert torch.equal(Teacher(network, 0.0, 2.0).loss(scores, labels, told), alone)
    assert torch.equal(Teacher(network, 1.0, 2.0).loss(scores, labels, told), divergence(scores, told, 2.0))
    mixed = Teacher(network, 0.25, 2.0).loss(scores, labels, told)
    assert mixed.item() == pytest.approx((0.75 * alone + 0.25 * divergence(scores, told, 2.0)).item(), rel=1e-6)


def test_the_teacher_runs_in_eval_mode_and_learns_nothing():
    network = deepcopy(float_network())
    network.zero_grad()
    network.train()  # whoever had it before
    state = {name: value.clone() for name, value in network.state_dict().items()}
    scores = torch.zeros(8, 4, requires_grad=True)
    teacher = Teacher(network, 0.5, 2.0)
    teacher.loss(scores, TRAIN.labels(slice(8)), teacher.scores(TRAIN.real(slice(8)), np.arange(8))).backward()
    assert scores.grad is not None and all(p.grad is None for p in network.layer("6").parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_student_learns_from_its_teacher_alone():
    """All labels are wrong, and count for nothing."""
    mislabelled = Feed(Images(TRAIN.images.x, (TRAIN.images.y + 1) % 4), MULT, ADD)
    network = started(FEW_BITS)
    before = top1(network, HELD)[0]
    best = finetune(network, mislabelled, HELD, RECIPE, WORST, teacher=Teacher(float_network(), 1.0, 2.0)).best
    assert best.top1 >= before + 3
