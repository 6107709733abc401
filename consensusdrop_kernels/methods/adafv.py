"""AdaFV: share the budget between what the encoder and what the words point at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    POSITIONS,
    QUERIES,
    SCOPES,
    Card,
    Method,
    QueryRule,
    Scores,
    Selection,
    Signals,
    check_choice,
    check_flag,
    check_keep,
    check_range,
)
from .parts import encoder_metric, encoder_saliency, merged, picked, question_words, warn_unasked


@dataclass(frozen=True)
class AdaFV(Method):
    """Two rankings, each given as many of the places as its scores deserve.

    The paper's (arXiv 2501.09532, later named AdaV; ACL 2025 Findings):

    1. Visual saliency: attention of the encoder's CLS row over the patches, mean of heads, crop by
       crop.
    2. Text saliency: cosine of the LLM's own input embeddings of the question with the projected
       visual tokens, divided by a temperature, softmax over the tokens of all crops, maximum over
       the words: `torch.ops.cdrop.similarity_saliency`.
    3. A part of the budget is reserved for the head of each list; the rest is split where the
       product of the two lists' mass is largest: `torch.ops.cdrop.adaptive_split_select`.

    Different here: tokens in both lists take one place, and the place left over goes to the next
    token of the heavier list, so that the budget is kept exactly; merging is an option.

    Args:
        keep: tokens kept per image: a count (int) or a share in (0, 1] (float).
        reserve: share of the budget reserved for the head of each list, 0..0.5.
        temperature: of the text saliency, 1e-6..1e6.
        merge: merge the other tokens into those kept, by encoder keys; else they are dropped.
        positions, budget_scope, query: see `ConsensusDrop`.
        size_attention: see `ConsensusDrop`; only with `merge`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="AdaFV",
        signals="encoder attention, word similarity",
        stages=("pre-LLM",),
        text=True,
        merges="option",
        reference="arXiv 2501.09532",
    )

    keep: int | float
    reserve: float = 0.25
    temperature: float = 0.01
    merge: bool = False
    positions: str | None = None
    budget_scope: str = "image"
    size_attention: bool = False
    query: str | QueryRule = "after_image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_range("reserve", self.reserve, 0.0, 0.5)
        check_range("temperature", self.temperature, 1e-6, 1e6)
        check_flag("merge", self.merge)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)
        check_flag("size_attention", self.size_attention)
        if self.size_attention and not self.merge:
            raise ValueError("size_attention must be False without merge, got True")
        if not callable(self.query):
            check_choice("query", self.query, QUERIES)

    @property
    def needs(self) -> frozenset[str]:
        """The encoder's saliency and the question's embeddings."""
        return frozenset({"encoder", "words"})

    def select(self, signals: Signals) -> Selection:
        """Images whose prompt has no text at all go by the encoder alone, with a warning."""
        visual, textual, asked = self._lists(signals)
        warn_unasked(asked, "the encoder")
        index = self._choose(visual, textual, signals)
        if self.merge:
            return merged(signals, index, encoder_metric(signals))
        return picked(signals, index)

    def scores(self, signals: Signals) -> Scores:
        """The two saliencies; `fused` puts the tokens kept before all others, and orders each of
        the two by the better of a token's places in the lists."""
        visual, textual, asked = self._lists(signals)
        index = self._choose(visual, textual, signals)
        tokens = visual.shape[1]
        kept = torch.zeros(len(visual), tokens + 1, device=visual.device)
        kept = kept.scatter(1, index.masked_fill(index < 0, tokens), 1.0)[:, :tokens]
        fused = kept + 1.0 / (1.0 + torch.minimum(_places(visual), _places(textual)))
        if signals.valid is not None:
            fused = fused.masked_fill(~signals.valid, -torch.inf)
        return Scores(visual, textual if any(asked) else None, fused)

    def _lists(self, signals: Signals) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        """The two saliencies, the encoder's own in place of the text's where nothing is asked."""
        visual = encoder_saliency(signals)
        words = question_words(signals, self.query)
        textual = torch.ops.cdrop.similarity_saliency(
            words.embeds,
            signals.x.detach(),
            temperature=self.temperature,
            text_valid=words.valid,
            visual_valid=signals.valid,
            reduce="max",
        )
        return visual, torch.where(words.valid.any(1, keepdim=True), textual, visual), words.asked

    def _choose(self, visual: Tensor, textual: Tensor, signals: Signals) -> Tensor:
        index, _ = torch.ops.cdrop.adaptive_split_select(
            visual, textual, self.budget(visual.shape[1]), reserve=self.reserve, valid=signals.valid
        )
        return index


def _places(score: Tensor) -> Tensor:
    """The place of each token in the descending order of its row, from 0."""
    order = score.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)
