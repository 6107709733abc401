"""How sure a comparison on a few thousand questions is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_Z = 1.959964  # of a two-sided 95 %

Flags = npt.NDArray[np.bool_]


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One way of answering against another on the same questions.

    Attributes:
        difference: of the accuracies.
        p: two-sided, that such a difference is chance.
        ratio: of the accuracies; None where the other never is right.
    """

    difference: Interval
    p: float
    ratio: Interval | None


def share(right: Flags) -> Interval:
    """The share of right answers `[n]`, by Wilson's interval.

    Over types in fixed equal parts it is a little wide, as it takes them for drawn at random.

    Raises:
        ValueError: there is no answer.
    """
    count = len(right)
    if count == 0:
        raise ValueError("right must hold at least one answer, got none")
    mean = float(np.mean(right))
    spread = _Z * _Z / count
    middle = (mean + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(mean * (1 - mean) / count + spread / count / 4) / (1 + spread)
    # Of none or all right an end is the mean itself, but for rounding.
    return Interval(mean, min(max(0.0, middle - half), mean), max(min(1.0, middle + half), mean))


def compare(
    ours: Flags,
    other: Flags,
    kinds: npt.NDArray[Any],
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """A paired bootstrap: questions are drawn again, within each type, with both answers to them.

    A question has one of four outcomes (both right, one of the two, none), so the counts of a
    resample are multinomial, and are drawn as such. `p` is twice the smaller share of resamples
    on one side of 0, ties on both.

    Args:
        ours, other: `[n]` bool, who was right.
        kinds: `[n]`, the type of each question.
        resamples: how many.
        seed: of the resamples.

    Raises:
        ValueError: the three are not of one length, or empty.
    """
    count = len(ours)
    if count == 0 or len(other) != count or len(kinds) != count:
        raise ValueError(
            f"ours, other and kinds must have one length above 0, got {count}, {len(other)} and "
            f"{len(kinds)}"
        )
    rng = np.random.default_rng(seed)
    outcome = 2 * ours.astype(np.int64) + other
    drawn = np.zeros((resamples, 4), np.int64)
    for kind in np.unique(kinds):
        cells = np.bincount(outcome[kinds == kind], minlength=4)
        drawn += rng.multinomial(cells.sum(), cells / cells.sum(), resamples)
    mine, theirs = drawn[:, 2] + drawn[:, 3], drawn[:, 1] + drawn[:, 3]
    gap = mine - theirs
    sides = 1 + np.array([(gap <= 0).sum(), (gap >= 0).sum()])
    own, others = int(ours.sum()), int(other.sum())
    some = theirs > 0
    return Comparison(
        _around((own - others) / count, gap / count),
        min(1.0, 2 * float(sides.min()) / (resamples + 1)),
        _around(own / others, mine[some] / theirs[some]) if others else None,
    )


def _around(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975), method="nearest")
    return Interval(value, float(low), float(high))
