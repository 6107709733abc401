"""SparseVLM: the words that the image answers to rate its tokens, inside the LLM."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    POSITIONS,
    QUERIES,
    SCOPES,
    Card,
    QueryRule,
    Selection,
    Signals,
    check_choice,
    check_keep,
    check_range,
)
from .in_llm import Progressive, or_last_row, question_rows, row_attention
from .parts import merged, picked, question_words
from .schedule import check_stages_at


@dataclass(frozen=True)
class SparseVLM(Progressive):
    """Progressive reduction by the attention of those words that are relevant to the image.

    The paper's (arXiv 2410.04417): a word's relevance is the mean over the visual tokens of their
    softmax over the words, of plain dot products; words of at least mean relevance are raters, and
    the visual tokens rank by the raters' mean attention. Of the tokens that a stage drops the best
    are recycled: clustered, and each cluster merged into one token.

    Different here: the paper asks the rank of the attention map how many tokens a layer can spare;
    here the counts follow from `keep`, recycled tokens included, so that methods can be compared at
    the same average. Relevance is that of the stage's hidden states, attention that of the layer
    about to run. A cluster is one of evenly spaced recycled tokens and those whose hidden states
    are most similar to it (cosine), merged into their true mean.

    Args:
        keep: tokens per image that a layer of the LLM sees on average: a count (int) or a share in
            (0, 1] (float). It must be more than the layers before the first stage account for, a
            sixteenth by default, as they see all tokens.
        stages_at: shares of the layers that are behind at the stages, by default layers 2, 6 and 15
            of 32; in an LLM of few layers stages that would coincide are one.
        recycle: share of a stage's dropped tokens that is recycled, in 0..1; 0 drops them all.
        clusters: how many tokens they become, as a share of their number in 0..1, rounded up.
        query: which words may be raters, see `ConsensusDrop`.
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="SparseVLM",
        signals="relevant words' attention in the LLM",
        stages=("in-LLM",),
        text=True,
        merges="yes",
        reference="arXiv 2410.04417",
    )

    keep: int | float
    stages_at: tuple[float, ...] = (0.0625, 0.1875, 0.46875)
    recycle: float = 0.3
    clusters: float = 0.1
    query: str | QueryRule = "after_image"
    positions: str | None = None
    budget_scope: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_stages_at(self.stages_at)
        check_range("recycle", self.recycle, 0.0, 1.0)
        check_range("clusters", self.clusters, 0.0, 1.0)
        if not callable(self.query):
            check_choice("query", self.query, QUERIES)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        """The best by the raters, then the clusters."""
        words = question_words(signals, self.query)
        probe = question_rows(signals, self.query)
        raters = _raters(signals, words.embeds, probe.weight > 0)
        probe = or_last_row(signals, probe._replace(weight=probe.weight * raters))
        score = row_attention(signals, probe)

        total = self._left(stage, signals)
        assert signals.original is not None
        before = self.stage_budget(stage - 1, signals.original) if stage else signals.original
        dropped = before - total
        share = self.clusters * self.recycle
        clusters = min(math.ceil(share * dropped - 1e-9), total - 1)
        index = _best(score, total - clusters, signals)
        if clusters == 0:
            return picked(signals, index)
        # The clusters' places come out of the total, so as many more tokens are left over.
        pool = max(round(self.recycle * (dropped + clusters)), clusters)
        within = replace(
            signals, valid=_mask(_best(score, total - clusters + pool, signals), score)
        )
        chosen = merged(within, index, signals.x, contextual=clusters)
        return replace(chosen, padded=signals.valid is not None)


def _best(score: Tensor, count: int, signals: Signals) -> Tensor:
    index, _ = torch.ops.cdrop.consensus_select(score, None, count, valid=signals.valid)
    return index


def _mask(index: Tensor, like: Tensor) -> Tensor:
    """The tokens that an index with -1 names, as bool."""
    rows, tokens = like.shape
    named = torch.zeros(rows, tokens + 1, dtype=torch.bool, device=like.device)
    return named.scatter(1, index.masked_fill(index < 0, tokens), True)[:, :tokens]


def _raters(signals: Signals, words: Tensor, asks: Tensor) -> Tensor:
    """Which of the words `[R, T, D]` that ask `[R, T]` are of at least mean relevance, bool."""
    with torch.no_grad(), torch.autocast(words.device.type, enabled=False):
        likeness = signals.x.float() @ words.float().transpose(1, 2)
    # A finite number, so that rows without any word are no NaN.
    share = likeness.masked_fill(~asks[:, None], torch.finfo(likeness.dtype).min).softmax(2)
    if signals.valid is not None:
        share = share * signals.valid[..., None]
    relevance = share.sum(1)
    # Relevances add up to their number; the mean is taken a little low, as they may all be alike.
    mean = relevance.sum(1, keepdim=True) / asks.sum(1, keepdim=True).clamp_min(1)
    return asks & (relevance >= (1 - 1e-6) * mean)
