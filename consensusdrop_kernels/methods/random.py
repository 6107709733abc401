"""Random: the control every comparison needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import (
    POSITIONS,
    SCOPES,
    Card,
    Method,
    Selection,
    Signals,
    check_choice,
    check_count,
    check_keep,
)
from .parts import picked, upload


@dataclass(frozen=True)
class Random(Method):
    """Keeps tokens drawn at random, without merging: the floor at a given budget.

    Needs no saliency, so it costs hardly more than a gather. The draw depends only on `seed`, the
    number of tokens and the budget: every image, in whatever batch, keeps the same places.

    Args:
        keep: tokens kept per image: a count (int) or a share in (0, 1] (float).
        seed: of the draw, >= 0.
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="Random",
        signals="none",
        stages=("pre-LLM",),
        text=False,
        merges="no",
        reference=None,
    )

    keep: int | float
    seed: int = 0
    positions: str | None = None
    budget_scope: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count("seed", self.seed)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the tokens."""
        return frozenset()

    def select(self, signals: Signals) -> Selection:
        """The drawn tokens in raster order, every slot of size 1."""
        rows, tokens = signals.x.shape[:2]
        if signals.valid is not None:
            raise ValueError("Random takes images of equal token counts only")
        # Drawn on the CPU, so that a seed means the same places on every device.
        draw = torch.randperm(tokens, generator=torch.Generator().manual_seed(self.seed))
        places = draw[: self.budget(tokens)].sort().values
        return picked(signals, upload(places, signals.x.device).expand(rows, -1))
