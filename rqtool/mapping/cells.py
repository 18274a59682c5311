"""Weights as the cells of a macro: the only place where a weight becomes what columns hold.

A carrier asks for the cells of a layer and reads those; none of them takes a weight apart itself.
"""

from __future__ import annotations

from typing import Any

from rqtool.mapping.plan import Plan
from rqtool.mapping.planes import extract


def cells(plan: Plan, weight: Any) -> list[Any]:
    """What the cells of a layer hold: J integer matrices [O, K], one for each weight plane of the
    plan, of the kind and type of `weight`.

    weight: -Qw..Qw, [O, K] with the rows in order (channel, ky, kx), of an integer type that holds
    2 * Qw + 1 (16 bits always do): a numpy array or a torch tensor.

    >>> import numpy as np
    >>> from rqtool.hardware.macro import Macro
    >>> from rqtool.mapping.plan import Geometry
    >>> plan = Plan.make("fc", Geometry(3, 1), Macro(sign_scheme="split"))
    >>> [held.tolist() for held in cells(plan, np.array([[-6, 0, 7]]))]
    [[[0, 0, 7]], [[6, 0, 0]]]
    """
    return [extract(weight, plane) for plane in plan.weight_planes]
