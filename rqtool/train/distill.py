"""Distillation: a network that is already good teaches the one behind the ADC (Hinton et al., 2015,
arXiv 1503.02531).

    loss = (1 - weight) * CE(student, labels)  +  weight * T**2 * KL(softmax(teacher / T) || softmax(student / T))
         + r * match * mean over layers of |what enters the student's layer - what enters the teacher's|**2 / |what enters the teacher's|**2

T**2 keeps the second part's gradient as large as at T = 1, so that `weight` means the same at every
temperature. The last part (Romero et al., 2015, arXiv 1412.6550, without their regressors: both
networks have one graph) gives every layer a gradient that did not have to find its way back through
the ADCs of all later ones. r is the share of the steps still to be done: likeness is a way to the
scores, not what is wanted, so it counts less and less.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from rqtool.model.graph import Graph
from rqtool.model.network import Network

TEACHERS = ("none", "float", "ideal")


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T**2 * KL(teacher || student), the mean over images, of scores float32 [N, classes].

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]]), 4.0).item()  # only differences of scores count
    0.0
    """
    told, said = (F.log_softmax(scores / temperature, -1) for scores in (teacher, student))
    return temperature**2 * F.kl_div(said, told, reduction="batchmean", log_target=True)


Values = dict[str, torch.Tensor]  # float32 [N, ...] by the name of their node


def entering(graph: Graph) -> tuple[str, ...]:
    """Names of the values that enter layers with weights, each once; not the network's own input,
    which is what it is."""
    return tuple(
        dict.fromkeys(node.inputs[0] for node in graph.convs() if node.inputs[0] != graph.input)
    )


def distance(student: Values, teacher: Values) -> torch.Tensor:
    """The mean over values of the squared distance to the teacher's, relative to the teacher's own
    square.

    >>> distance({"a": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(1, 2)}, {"a": torch.tensor([[1.0, 3.0]]), "b": torch.ones(1, 2)}).item()
    0.550000011920929
    """
    tiny = torch.finfo(torch.float32).tiny  # a teacher's value can be 0 throughout a batch
    return sum(
        F.mse_loss(student[name], told) / told.square().mean().clamp(min=tiny)
        for name, told in teacher.items()
    ) / max(1, len(teacher))


def seen(network: Network, x: torch.Tensor, names: Collection[str]) -> tuple[torch.Tensor, Values]:
    """(the scores of real-valued images x, the values of the nodes `names` on the way to them)."""
    values: Values = {}
    scores = network(x, lambda name, value: values.update({name: value}) if name in names else None)
    return scores, values


@dataclass(frozen=True)
class Teacher:
    """A trained network whose scores are to be matched. weight: its share of the loss, 0 to 1;
    temperature: T above; match: how much what enters its layers counts at first. told: its scores
    float32 [images, classes] of all training images, where they are shown as they are; None where
    it is asked anew in each step."""

    network: Network
    weight: float
    temperature: float
    told: torch.Tensor | None = None
    match: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The values that are matched."""
        return entering(self.network.graph) if self.match else ()

    @torch.no_grad()
    def says(self, x: torch.Tensor, index: np.ndarray) -> tuple[torch.Tensor, Values]:
        """(scores float32 [N, classes], values to match) for real-valued images x, the training
        images at `index` [N]; in eval mode, without gradient."""
        return (
            seen(self.network.eval(), x, self.names)
            if self.told is None
            else (self.told[index], {})
        )

    def loss(self, scores: torch.Tensor, labels: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """The loss of the student's scores [N, classes] where the teacher's are `told`."""
        return (1 - self.weight) * F.cross_entropy(scores, labels) + self.weight * divergence(
            scores, told, self.temperature
        )

    def lesson(
        self,
        student: Network,
        x: torch.Tensor,
        labels: torch.Tensor,
        index: np.ndarray,
        remaining: float = 1.0,
    ) -> torch.Tensor:
        """The loss of a student on real-valued images x, the training images at `index` [N];
        remaining: r above, 1 to 0."""
        (told, wanted), (scores, found) = self.says(x, index), seen(student, x, self.names)
        loss = self.loss(scores, labels, told)
        return loss + remaining * self.match * distance(found, wanted) if wanted else loss
