"""A model and its teacher on other examples than those of the evaluation set, or on the same ones made harder.

Shapes: N examples.
"""

import math

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from potstill.validate.calibration import Calibration
from potstill.validate.metrics import Interval, Z
from potstill.validate.scorecard import Scorecard
from potstill.validate.slices import Slice

SHIFTED = "shifted"


@dataclass(frozen=True)
class Shift:
    """A model on a second set of examples.

    Attributes:
        by: `shifted`, a set of its own which the gate judges too; or the name of a perturbation of the evaluation set.
        what: the set or the perturbation in words.
        scorecard: there, against the teacher there.
        slices, calibration: there; None of a perturbation, and where examples have no class.
        change: of a perturbation: what the model lost by it less what the teacher lost by it, as a share of 1; negative
            where the model is the more fragile one. None where examples have no class.
        interval: of `change`, 95 %.
        p: of the hypothesis that both lost alike.
    """

    by: str
    what: str
    scorecard: Scorecard
    slices: list[Slice] | None = None
    calibration: Calibration | None = None
    change: float | None = None
    interval: Interval | None = None
    p: float | None = None


def fragility(
    as_is: tuple[NDArray[np.bool_], NDArray[np.bool_]], perturbed: tuple[NDArray[np.bool_], NDArray[np.bool_]]
) -> tuple[float, Interval, float]:
    """How much more accuracy a model loses by a perturbation than its teacher, with a 95 % interval and a p-value.

    The mean of N differences of differences, each of one example and −2 to 2; its interval as Agresti and Min's of a
    difference (2005): Wald's after two examples are added, one without a change and half a one of ±1 each.

    Args:
        as_is: whether the model and its teacher are right on each example (N,).
        perturbed: the same on the same examples after the perturbation.

    Returns:
        A share of 1, negative where the model loses more; its interval; and the two-sided p of the hypothesis that both
        lose alike.
    """
    from scipy.special import ndtr

    (before, theirs_before), (after, theirs_after) = (
        [one.astype(np.float64) for one in both] for both in (as_is, perturbed)
    )
    each = (after - before) - (theirs_after - theirs_before)
    n = len(each) + 2
    middle, square = float(each.sum()) / n, (float((each**2).sum()) + 1) / n
    error = math.sqrt((square - middle**2) / n)
    interval = Interval(max(-2.0, middle - Z * error), min(2.0, middle + Z * error))
    return float(each.mean()), interval, float(2 * ndtr(-abs(middle) / error))
