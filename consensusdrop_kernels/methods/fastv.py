"""FastV: after the first layers of the LLM, keep what the prompt's last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import (
    POSITIONS,
    QUERIES,
    SCOPES,
    Card,
    QueryRule,
    check_choice,
    check_count,
    check_keep,
    keep_count,
)
from .in_llm import InLLM


@dataclass(frozen=True)
class FastV(InLLM):
    """One cut after layer 2, by the attention of the last token of the prompt; nothing is merged.

    The paper's (arXiv 2403.06764): behind layer K (2) rank the visual tokens by the attention they
    get, mean of heads, and drop the last R percent. Different here: the attention is that of the
    layer about to run, so that no layer has to give up its attention map, and the last row's alone
    unless `query` names others.

    Args:
        keep: tokens left of each image behind the cut: a count (int) or a share in (0, 1] (float).
            The layers before it see all: `average_tokens` says what that makes on average.
        layer: layers that run before the cut.
        query: whose attention, see `ConsensusDrop`; the last token's by default.
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="FastV",
        signals="the last token's attention in the LLM",
        stages=("in-LLM",),
        text=True,
        merges="no",
        reference="arXiv 2403.06764",
    )

    keep: int | float
    layer: int = 2
    query: str | QueryRule = "last_token"
    positions: str | None = None
    budget_scope: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count("layer", self.layer, 1)
        if not callable(self.query):
            check_choice("query", self.query, QUERIES)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)

    def stages(self, layers: int) -> tuple[int, ...]:
        """The one cut.

        Raises:
            ValueError: the decoder has no layer behind it.
        """
        if self.layer >= layers:
            raise ValueError(
                f"layer must be less than the decoder's {layers} layers, got {self.layer}"
            )
        return (self.layer,)

    def stage_budget(self, stage: int, tokens: int) -> int:
        """What is kept of an image of `tokens` tokens."""
        return keep_count(self.keep, tokens)
