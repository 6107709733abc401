"""Uniform: the control that looks at nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from .base import POSITIONS, SCOPES, Card, Method, Selection, Signals, check_choice, check_keep
from .parts import picked, upload


@dataclass(frozen=True)
class Uniform(Method):
    """Keeps tokens spread evenly over the picture, without merging: coverage at no cost.

    Each crop (or frame) gets its part of the budget by its size, in rows about as far apart as the
    tokens within a row. Where the tokens are no whole grids, they are evenly spaced in a row.

    Args:
        keep: tokens kept per image: a count (int) or a share in (0, 1] (float).
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="Uniform",
        signals="none",
        stages=("pre-LLM",),
        text=False,
        merges="no",
        reference=None,
    )

    keep: int | float
    positions: str | None = None
    budget_scope: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the tokens."""
        return frozenset()

    def select(self, signals: Signals) -> Selection:
        """The same places of every image, in raster order, every slot of size 1."""
        rows, tokens = signals.x.shape[:2]
        if signals.valid is not None:
            raise ValueError("Uniform takes images of equal token counts only")
        grids = signals.crops or (signals.grid,)
        if sum(height * width for height, width in grids) != tokens:
            grids = ((1, tokens),)
        places = torch.tensor(_spread(grids, self.budget(tokens)))
        return picked(signals, upload(places, signals.x.device).expand(rows, -1))


@lru_cache(maxsize=64)
def _spread(grids: tuple[tuple[int, int], ...], count: int) -> tuple[int, ...]:
    """`count` places of the cells of grids that follow each other, ascending."""
    total = sum(height * width for height, width in grids)
    places: list[int] = []
    first = 0
    for height, width in grids:
        end = first + height * width
        share = _part(end, total, count) - _part(first, total, count)
        places += [first + place for place in _lattice(height, width, share)]
        first = end
    return tuple(places)


def _part(cells: int, total: int, count: int) -> int:
    """How many of `count` places go to the first `cells` of `total`, to the nearest."""
    return (2 * count * cells + total) // (2 * total)


def _lattice(height: int, width: int, count: int) -> list[int]:
    """`count` cells of a grid in about square distances, row by row."""
    rows = round(math.sqrt(count * height / width))
    rows = max(-(-count // width), min(rows, height, count))
    places: list[int] = []
    for row in range(rows):
        line = _centre(row, height, rows) * width
        here = (row + 1) * count // rows - row * count // rows
        places += [line + _centre(column, width, here) for column in range(here)]
    return places


def _centre(number: int, cells: int, parts: int) -> int:
    """The cell in the middle of part `number` of a line of `cells` cells cut in `parts`."""
    return (2 * number + 1) * cells // (2 * parts)
