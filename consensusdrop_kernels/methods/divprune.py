"""DivPrune: keep tokens that are unlike one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import POSITIONS, SCOPES, Card, Method, Selection, Signals, check_choice, check_keep
from .parts import picked


@dataclass(frozen=True)
class DivPrune(Method):
    """A subset whose closest pair is as far apart as a greedy choice makes it.

    The paper's (arXiv 2503.02175): max-min diversity of the projected visual tokens by cosine
    distance. The first token is the one farthest from its nearest neighbour, each next one is the
    farthest from those chosen: `torch.ops.cdrop.greedy_diverse_select`, objective "maxmin". Nothing
    is merged. Different here: ties go to the lower token.

    Args:
        keep: tokens kept per image: a count (int) or a share in (0, 1] (float).
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="DivPrune",
        signals="token similarity",
        stages=("pre-LLM",),
        text=False,
        merges="no",
        reference="arXiv 2503.02175",
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
        """The subset in raster order, every slot of size 1."""
        index = torch.ops.cdrop.greedy_diverse_select(
            signals.x.detach(),
            self.budget(signals.x.shape[1]),
            objective="maxmin",
            valid=signals.valid,
        )
        return picked(signals, index)
