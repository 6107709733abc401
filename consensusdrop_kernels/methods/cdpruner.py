"""CDPruner: keep tokens that are relevant to the question and unlike one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import (
    POSITIONS,
    QUERIES,
    SCOPES,
    Card,
    Method,
    QueryRule,
    Selection,
    Signals,
    check_choice,
    check_keep,
)
from .parts import picked, question_words, warn_unasked


@dataclass(frozen=True)
class CDPruner(Method):
    """The most probable subset of a determinantal point process conditioned on the question.

    The paper's (arXiv 2506.10967): the kernel is `diag(r) S diag(r)`, with `S` the cosines of the
    visual tokens and `r` their relevance to the question, a cosine scaled to 0..1 by its minimum
    and maximum over the image; greedy maximum a posteriori inference:
    `torch.ops.cdrop.greedy_diverse_select`, objective "dpp". Nothing is merged.

    Different here: the paper has relevance from CLIP's text encoder, which vision-language models
    do not carry. Here it is the mean cosine of a projected visual token with the LLM's input
    embeddings of the question, scaled in the same way. Where all tokens are equally relevant, they
    all count in full.

    Args:
        keep: tokens kept per image: a count (int) or a share in (0, 1] (float).
        positions, budget_scope, query: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="CDPruner",
        signals="token similarity, word similarity",
        stages=("pre-LLM",),
        text=True,
        merges="no",
        reference="arXiv 2506.10967",
    )

    keep: int | float
    positions: str | None = None
    budget_scope: str = "image"
    query: str | QueryRule = "after_image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)
        if not callable(self.query):
            check_choice("query", self.query, QUERIES)

    @property
    def needs(self) -> frozenset[str]:
        """The question's embeddings."""
        return frozenset({"words"})

    def select(self, signals: Signals) -> Selection:
        """Images whose prompt has no text at all go by diversity alone, with a warning."""
        relevance, asked = self._relevance(signals)
        warn_unasked(asked, "diversity")
        index = torch.ops.cdrop.greedy_diverse_select(
            signals.x.detach(),
            self.budget(signals.x.shape[1]),
            relevance=relevance,
            objective="dpp",
            valid=signals.valid,
        )
        return picked(signals, index)

    def _relevance(self, signals: Signals) -> tuple[Tensor, tuple[bool, ...]]:
        """`[R, N]` float32 in 0..1, and which images have a question."""
        words = question_words(signals, self.query)
        embeds = normalize(words.embeds.float(), dim=2)
        question = torch.where(words.valid[:, :, None], embeds, 0.0).sum(1, keepdim=True)
        # The sum over the words: their number falls out of the scaling.
        cosine = (normalize(signals.x.detach().float(), dim=2) @ question.transpose(1, 2))[..., 0]
        absent = torch.zeros_like(cosine, dtype=torch.bool)
        absent = absent if signals.valid is None else ~signals.valid
        low = cosine.masked_fill(absent, torch.inf).amin(1, keepdim=True)
        high = cosine.masked_fill(absent, -torch.inf).amax(1, keepdim=True)
        share = torch.where(low < high, (cosine - low) / (high - low), 1.0)
        return share.masked_fill(absent, 0.0), words.asked
