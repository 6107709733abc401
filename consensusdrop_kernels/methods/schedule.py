"""Where in the decoder a method prunes, and how many tokens are left after each stage."""

from __future__ import annotations

import functools
import itertools
from typing import Any


def check_stages_at(value: Any) -> None:
    """Raises ValueError unless `value` is a tuple of ascending shares in (0, 1)."""
    ok = isinstance(value, tuple) and all(
        isinstance(share, float) and 0.0 < share < 1.0 for share in value
    )
    if not ok or list(value) != sorted(set(value)):
        raise ValueError(
            f"stages_at must be a tuple of ascending shares of the layers in (0, 1), got {value!r}"
        )


def stage_layers(stages_at: tuple[float, ...], layers: int) -> tuple[int, ...]:
    """The layers before which to prune: distinct ones in `1..layers-1`, so fewer in a decoder of
    few layers."""
    found = {min(max(round(share * layers), 1), layers - 1) for share in stages_at}
    return tuple(sorted(found - {0}))


def fitted_stages(stages_at: tuple[float, ...], layers: int) -> tuple[float, ...]:
    """`stages_at` as the shares that a decoder of `layers` layers has."""
    return tuple(layer / layers for layer in stage_layers(stages_at, layers))


def step_budgets(
    first: float, mean: float, tokens: int, stages_at: tuple[float, ...]
) -> tuple[int, ...]:
    """Tokens of an image before the first stage and after each one: `first` and then always the
    same share of what was there, such that the layers see `mean` on average.

    Args:
        first: tokens before the first stage, at most `tokens`.
        mean: tokens that a layer sees on average, at most `first`.
        tokens: what the image has.
        stages_at: shares of the layers that are behind at each stage.

    Returns:
        Rounded counts in `1..tokens`, one more than there are stages.

    Raises:
        ValueError: the layers before the first stage alone see more.
    """
    alone = first * (stages_at[0] if stages_at else 1.0)
    if mean < first and mean <= alone:
        raise ValueError(
            f"keep must be more than {alone:g} tokens of N={tokens}, which the layers before the "
            f"first stage account for, got {mean:g}"
        )
    decay = _decay(mean / first, stages_at)
    steps = range(len(stages_at) + 1)
    return tuple(min(max(1, round(first * decay**step)), tokens) for step in steps)


@functools.lru_cache
def _decay(mean: float, stages_at: tuple[float, ...]) -> float:
    """The `r` in `(0, 1]` for which `sum(w_s * r ** s)` is `mean`, `w_s` the share of the layers
    between two stages."""
    widths = [b - a for a, b in itertools.pairwise((0.0, *stages_at, 1.0))]
    low, high = 0.0, 1.0
    for _ in range(60):  # halves the interval down to the last bit
        middle = (low + high) / 2
        if sum(width * middle**step for step, width in enumerate(widths)) < mean:
            low = middle
        else:
            high = middle
    return high
