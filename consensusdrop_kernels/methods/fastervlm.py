"""FasterVLM: keep what the encoder attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import (
    POSITIONS,
    SCOPES,
    Card,
    Method,
    Scores,
    Selection,
    Signals,
    check_choice,
    check_keep,
)
from .parts import encoder_saliency, most_attended, picked


@dataclass(frozen=True)
class FasterVLM(Method):
    """The tokens that get most attention in the encoder, the others dropped before the LLM.

    The paper's (arXiv 2412.01818): rank the patches by the attention of the CLS row, mean of
    heads, and keep the first; nothing is merged. Different here: the layer is the one whose
    features the model uses, and encoders without a CLS row rank by the attention that a patch gets
    from all rows.

    Args:
        keep: tokens kept per image: a count (int) or a share in (0, 1] (float).
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="FasterVLM",
        signals="encoder attention",
        stages=("encoder",),
        text=False,
        merges="no",
        reference="arXiv 2412.01818",
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
        """The encoder alone."""
        return frozenset({"encoder"})

    def select(self, signals: Signals) -> Selection:
        """The first of the ranking, in raster order."""
        return picked(signals, most_attended(signals, self.budget(signals.x.shape[1]))[0])

    def scores(self, signals: Signals) -> Scores:
        """The encoder's saliency."""
        _, fused = most_attended(signals, self.budget(signals.x.shape[1]))
        return Scores(encoder_saliency(signals), None, fused)
