"""Distillation: a network that is already good teaches the one behind the ADC (Hinton et al., 2015, arXiv 1503.02531).

    loss = (1 - weight) * CE(student, labels)  +  weight * T**2 * KL(softmax(teacher / T) || softmax(student / T))

T**2 keeps the second part's gradient as large as at T = 1, so that `weight` means the same at every temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from rqtool.model.network import Network

TEACHERS = ("none", "float", "ideal")


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T**2 * KL(teacher || student), the mean over images, of scores float32 [N, classes].

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]]), 4.0).item()  # only differences of scores count
    0.0
    """
    told, said = (F.log_softmax(scores / temperature, -1) for scores in (teacher, student))
    return temperature**2 * F.kl_div(said, told, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Teacher:
    """A trained network whose scores are to be matched. weight: its share of the loss, 0 to 1; temperature: T above. told: its scores
    float32 [images, classes] of all training images, where they are shown as they are; None where it is asked anew in each step."""

    network: Network
    weight: float
    temperature: float
    told: torch.Tensor | None = None

    @torch.no_grad()
    def scores(self, x: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        """float32 [N, classes] for real-valued images x, the training images at `index` [N]; in eval mode, without gradient."""
        return self.network.eval()(x) if self.told is None else self.told[index]

    def loss(self, scores: torch.Tensor, labels: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """The loss of the student's scores [N, classes] where the teacher's are `told`."""
        return (1 - self.weight) * F.cross_entropy(scores, labels) + self.weight * divergence(scores, told, self.temperature)
