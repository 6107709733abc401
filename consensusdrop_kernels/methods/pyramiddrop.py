"""PyramidDrop: the deeper the layer of the LLM, the fewer visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import POSITIONS, QUERIES, SCOPES, Card, QueryRule, check_choice, check_keep
from .in_llm import Progressive
from .schedule import check_stages_at


@dataclass(frozen=True)
class PyramidDrop(Progressive):
    """The same share is dropped after 1/4, 1/2 and 3/4 of the layers; nothing is merged.

    The paper's (arXiv 2410.17247): the LLM is cut into stages of equal depth, and at the end of
    each the visual tokens are ranked by the attention of the last token of the instruction, and a
    share of them (a half) stays. Different here: the share follows from `keep`, so that methods can
    be compared at the same average, and the attention is that of the layer about to run, mean of
    heads.

    Args:
        keep: tokens per image that a layer of the LLM sees on average: a count (int) or a share in
            (0, 1] (float). The default is the paper's halving: (1 + 1/2 + 1/4 + 1/8) / 4. It must
            be more than the layers before the first stage account for, a quarter by default, as
            they see all tokens.
        stages_at: shares of the layers that are behind at the stages; in an LLM of few layers
            stages that would coincide are one.
        query: whose attention, see `ConsensusDrop`; the last token's by default.
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="PyramidDrop",
        signals="the last token's attention in the LLM",
        stages=("in-LLM",),
        text=True,
        merges="no",
        reference="arXiv 2410.17247",
    )

    keep: int | float = 0.46875
    stages_at: tuple[float, ...] = (0.25, 0.5, 0.75)
    query: str | QueryRule = "last_token"
    positions: str | None = None
    budget_scope: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_stages_at(self.stages_at)
        if not callable(self.query):
            check_choice("query", self.query, QUERIES)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)
