"""How sure a loss is: the difference of two networks on the same images, and the mean of a figure
over seeds.

Two networks that see the same images agree on most of them, and what both get right or both get
wrong says nothing about their difference. What counts are the discordant images: `lost` that only
the first gets right, `gained` that only the second does. With d = 1, -1 or 0 per image the loss is
mean(d), and its standard error that of the mean of n such numbers:

    loss = 100 (lost - gained) / n points
    se   = 100 sqrt((mean(d**2) - mean(d)**2) / n) points

McNemar's test asks whether lost and gained differ by more than chance; its statistic (lost -
gained)**2 / (lost + gained) is (loss / se)**2 where mean(d)**2 is left out, as it is under "no
difference". Errors that treat the networks as if they had seen different images are several times
larger and hide real losses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NORMAL = 1.959964  # 97.5 % of a normal distribution lies below it
RULE_OF_THREE = 3.0  # of n images none showed it: with 95 % confidence fewer than 3 in n would
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """A difference in points of top-1. se: its standard error; interval: 95 %, from -100 to 100 at
    most."""

    points: float
    se: float
    interval: tuple[float, float]

    @property
    def significance(self) -> float:
        """How many standard errors it is from zero, with its sign."""
        return self.points / self.se

    def to_json(self) -> dict[str, Any]:
        return {"loss": self.points, "se": self.se, "interval": list(self.interval)}


def paired(before: np.ndarray, after: np.ndarray) -> Loss:
    """What `after` loses against `before`; both are bool [N], whether a network is right on each of
    the same images.

    Where no image differs (or every image does, the same way) the formula would give an error of 0,
    which n images cannot show: the error is then what one image is worth, 100 / n points, and the
    interval reaches 300 / n points to either side (the rule of three). Raises ValueError where the
    arrays do not belong together.

    >>> loss = paired(np.array([True] * 9 + [False]), np.array([True] * 7 + [False] * 3))
    >>> loss.points, round(loss.se, 3), [round(end, 2) for end in loss.interval]
    (20.0, 12.649, [-4.79, 44.79])
    """
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(
            f"hits must be two arrays of the same length, not {before.shape} and {after.shape}"
        )
    n, lost, gained = before.size, int((before & ~after).sum()), int((after & ~before).sum())
    points, variance = (
        100 * (lost - gained) / n,
        (n * (lost + gained) - (lost - gained) ** 2) / n**2,
    )
    se = 100 * math.sqrt(variance / n) if variance else 100 / n
    reach = NORMAL * se if variance else RULE_OF_THREE * se
    return Loss(points, se, (max(-100.0, points - reach), min(100.0, points + reach)))


@dataclass(frozen=True)
class Seeds:
    """A figure over seeds. se: the standard error of the mean, sd / sqrt(n) with n - 1 in sd;
    interval: 95 %, by Student's t. Both are None for a single seed, which says nothing about
    others; interval also where all seeds agree to the last digit, because an interval needs a
    spread to follow from."""

    mean: float
    se: float | None
    interval: tuple[float, float] | None


def over_seeds(values: Sequence[float]) -> Seeds:
    """The mean of one figure per seed. Raises statistics.StatisticsError where there is none.

    >>> three = over_seeds([1.0, 2.0, 3.0])
    >>> three.mean, round(three.se, 4), [round(end, 3) for end in three.interval]
    (2.0, 0.5774, [-0.484, 4.484])
    >>> over_seeds([0.5])
    Seeds(mean=0.5, se=None, interval=None)
    """
    mean = statistics.mean(values)
    if len(values) == 1:
        return Seeds(mean, None, None)
    se = statistics.stdev(values) / math.sqrt(len(values))
    reach = student(len(values) - 1) * se
    return Seeds(mean, se, (mean - reach, mean + reach) if se else None)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: from the table, and beyond it by the first terms of its
    expansion.

    >>> student(2), round(student(60), 4), round(student(10**6), 4)
    (4.3027, 2.0003, 1.96)
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
