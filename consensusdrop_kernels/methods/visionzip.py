"""VisionZip: keep what the encoder attends to, gather the rest in a few contextual tokens."""

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
    check_count,
    check_flag,
    check_keep,
    keep_count,
)
from .parts import encoder_metric, encoder_saliency, merged, most_attended


@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant and contextual tokens of the encoder's output; no question asked.

    The paper's (arXiv 2412.04467): the dominant tokens are those that get most attention in the
    encoder, from the CLS row where there is one, else from all rows. Of the others, evenly spaced
    ones become contextual tokens, and each that is left is merged into the contextual token whose
    key is most similar. 64, 128 and 192 tokens are 54 + 10, 108 + 20 and 162 + 30 there.

    Different here: similarity is the cosine of head-averaged keys, and a contextual token is the
    true mean of what it stands for. The fine-tuned projector of the paper is no part of it.

    Args:
        keep: tokens kept per image, contextual ones included: a count (int) or a share in (0, 1]
            (float).
        contextual: how many of them are contextual: a count >= 0 (int) or a share of `keep` in
            0..0.5 (float).
        positions, budget_scope, size_attention: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above, or no place is left for a dominant token.
    """

    card: ClassVar[Card] = Card(
        name="VisionZip",
        signals="encoder attention",
        stages=("encoder",),
        text=False,
        merges="yes",
        reference="arXiv 2412.04467",
    )

    keep: int | float
    contextual: int | float = 10 / 64
    positions: str | None = None
    budget_scope: str = "image"
    size_attention: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not isinstance(self.contextual, float):
            check_count("contextual", self.contextual)
        elif not 0.0 <= self.contextual <= 0.5:
            raise ValueError(
                "contextual must be a count >= 0 (int) or a share in 0..0.5 (float), "
                f"got {self.contextual!r}"
            )
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)
        check_flag("size_attention", self.size_attention)

    @property
    def needs(self) -> frozenset[str]:
        """The encoder alone."""
        return frozenset({"encoder"})

    def budget(self, tokens: int) -> int:
        """Dominant and contextual slots of an image of `tokens` tokens.

        Raises:
            ValueError: more than there are, or none of them dominant.
        """
        return sum(self._parts(tokens))

    def _parts(self, tokens: int) -> tuple[int, int]:
        keep = keep_count(self.keep, tokens)
        share = isinstance(self.contextual, float)
        contextual = round(self.contextual * keep) if share else int(self.contextual)
        if contextual >= keep:
            raise ValueError(f"contextual must be less than keep={keep}, got {contextual}")
        return keep - contextual, contextual

    def select(self, signals: Signals) -> Selection:
        """The dominant tokens as they are, then the contextual slots."""
        dominant, contextual = self._parts(signals.x.shape[1])
        index, _ = most_attended(signals, dominant)
        return merged(signals, index, encoder_metric(signals), contextual=contextual)

    def scores(self, signals: Signals) -> Scores:
        """The encoder's saliency, which ranks the dominant tokens."""
        _, fused = most_attended(signals, self._parts(signals.x.shape[1])[0])
        return Scores(encoder_saliency(signals), None, fused)
