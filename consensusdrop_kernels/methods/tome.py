"""ToMe: merge tokens that are alike, whatever they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..reference import weighted_mean
from .base import (
    POSITIONS,
    SCOPES,
    Card,
    Method,
    Selection,
    Signals,
    check_choice,
    check_flag,
    check_keep,
)
from .parts import encoder_metric


@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching of the encoder's output, repeated until the budget is met.

    The paper's (arXiv 2210.09461): take the tokens alternately as sets A and B, join each of A with
    its most similar of B by the cosine of head-averaged keys, and merge the `r` most similar pairs
    into means weighted by what their tokens stand for. No token is dropped, none is looked at for
    importance.

    Different here: the paper merges a few tokens in every block of the encoder, where the next
    block computes new keys; here all rounds follow the encoder, each merges as many pairs as the
    budget asks for and at most half of the tokens, and a merged token has the mean of its tokens'
    keys. The paper's proportional attention is `size_attention`, here in the LLM.

    Args:
        keep: tokens left per image: a count (int) or a share in (0, 1] (float).
        positions, budget_scope, size_attention: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="ToMe-style",
        signals="encoder key similarity",
        stages=("encoder",),
        text=False,
        merges="yes",
        reference="arXiv 2210.09461",
    )

    keep: int | float
    positions: str | None = None
    budget_scope: str = "image"
    size_attention: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)
        check_flag("size_attention", self.size_attention)

    @property
    def needs(self) -> frozenset[str]:
        """The encoder, for its keys."""
        return frozenset({"encoder"})

    def select(self, signals: Signals) -> Selection:
        """A slot stands at its token of B; a token whose key is NaN joins none and is dropped."""
        metric = encoder_metric(signals).detach()
        rows, tokens = metric.shape[:2]
        keep = self.budget(tokens)
        weight = signals.size
        if weight is None:
            weight = torch.ones(rows, tokens, device=metric.device)
        own = torch.arange(tokens, device=metric.device).expand(rows, tokens)
        assign = own
        if signals.valid is not None:
            own = _first(own, signals.valid, tokens)
            assign = (signals.valid.cumsum(1) - 1).masked_fill(~signals.valid, -1)
        while own.shape[1] > keep:
            mean, _ = weighted_mean(metric, assign, own, weight, 1.0)
            own, assign = _round(mean, own, assign, keep)
        merged, size = weighted_mean(signals.x, assign, own, weight, 1.0)
        return Selection(merged, own, assign, size, padded=signals.valid is not None)


def _round(metric: Tensor, own: Tensor, assign: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """One matching: `own [R, W]` and `assign [R, N]` of the slots that are left.

    `metric` is `[R, W, F]`; even slots are A, odd ones B; unused slots come last.
    """
    width = own.shape[1]
    number = torch.arange(width, device=own.device).expand_as(own)
    used = own >= 0
    partners = number[:, 1::2].masked_fill(~used[:, 1::2], -1)
    near = torch.ops.cdrop.token_merge(metric, metric, partners)[1]
    partner = (2 * near + 1).clamp_min(0)
    there = metric.gather(1, partner[:, :, None].expand_as(metric))
    cosine = torch.cosine_similarity(metric, there, dim=2).masked_fill(near < 0, -2.0)
    cosine = cosine.masked_fill(~used | (number % 2 == 1), -3.0)
    place = cosine.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = used.sum(1, keepdim=True)
    joins = place < torch.minimum(count // 2, count - keep)
    left = used & ~joins
    slot = (left.cumsum(1) - 1).masked_fill(~left, -1)
    slot = torch.where(joins & (near >= 0), slot.gather(1, partner), slot)
    moved = slot.gather(1, assign.clamp_min(0)).masked_fill(assign < 0, -1)
    return _first(own, left, max(keep, width - width // 2)), moved


def _first(index: Tensor, left: Tensor, count: int) -> Tensor:
    """The first `count` of an ascending index `[R, W]` that are left, -1 behind the last."""
    end = torch.iinfo(index.dtype).max
    index = index.masked_fill(~left, end).sort(dim=1).values[:, :count]
    return index.masked_fill(index == end, -1)
