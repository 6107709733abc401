"""VisionDrop: visual tokens choose among themselves, before the LLM and again inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    POSITIONS,
    SCOPES,
    Card,
    Method,
    Scores,
    Selection,
    Signals,
    check_choice,
    check_flag,
    check_keep,
    check_range,
    keep_count,
)
from .parts import encoder_metric, encoder_saliency, merged, picked
from .schedule import check_stages_at, fitted_stages, stage_layers, step_budgets

ARITHMETICS = ("corrected", "released")


@dataclass(frozen=True)
class VisionDrop(Method):
    """Progressive reduction by visual attention alone: the encoder's output, then three times more
    between layers of the LLM, without a look at the question.

    The paper's (arXiv 2506.22283), at every stage: dominant tokens are those that get most
    attention, contextual ones an even stride of the others, and what is left joins the contextual
    token whose key is most similar. The attention is the encoder's (its CLS row, else the mean of
    all rows) before the LLM, and inside it that of the visual rows. The totals of the stages fall
    geometrically; of 32 tokens on average they are 42 + 6, 30 + 5, 22 + 4 and 16 + 3.

    What is corrected here (`arithmetic="corrected"`): inside the LLM a token is seen by those after
    it alone, so the first get most of the attention whatever they show; a token's score is divided
    by the number of visual rows that can see it (`causal_correction`). A contextual token is the
    true mean of the patches it stands for, those of earlier stages included. The layer asked is the
    one about to run: its input norm, projections and rotation, normalised over every key a row
    sees; keys are compared before rotation.

    `arithmetic="released"` is for parity with the released code alone: no causal correction; the
    references are every n-th of the tokens left over, from the first on (n the whole part of their
    number by that of the references); a contextual token is its reference plus the mean of those
    that joined it, which about doubles its norm, each counted once whatever it stands for. That
    code also sums over heads, which orders tokens as the mean here does.

    Args:
        keep: tokens per image that a layer of the LLM sees on average: a count (int) or a share in
            (0, 1] (float).
        start: the total before the LLM as a multiple of `keep`, but at most what there is; the
            paper takes 1.5 for images, 3 for videos. Less than 1 over the first of `stages_at`.
        stages_at: shares of the LLM's layers that are behind at its stages; in an LLM of few layers
            stages that would coincide are one.
        contextual: share of each total that is contextual, rounded up, in 0..0.5.
        arithmetic: "corrected" or "released".
        causal_correction: see above; without effect if released.
        positions, budget_scope: see `ConsensusDrop`.

    Raises:
        ValueError: an option is not as above.
    """

    card: ClassVar[Card] = Card(
        name="VisionDrop",
        signals="encoder attention, visual attention in the LLM",
        stages=("encoder", "in-LLM"),
        text=False,
        merges="yes",
        reference="arXiv 2506.22283",
    )

    keep: int | float
    start: float = 1.5
    stages_at: tuple[float, ...] = (0.25, 0.5, 0.75)
    contextual: float = 0.125
    arithmetic: str = "corrected"
    causal_correction: bool = True
    positions: str | None = None
    budget_scope: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_stages_at(self.stages_at)
        most = 1 / self.stages_at[0] if self.stages_at else math.inf
        check_range("start", self.start, 1.0, math.inf)
        if self.start >= most:
            raise ValueError(
                f"start must be less than {most:g}, as a share of {1 / most:g} of the layers comes "
                f"before the first stage, got {self.start!r}"
            )
        check_range("contextual", self.contextual, 0.0, 0.5)
        check_choice("arithmetic", self.arithmetic, ARITHMETICS)
        check_flag("causal_correction", self.causal_correction)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("budget_scope", self.budget_scope, SCOPES)

    @property
    def needs(self) -> frozenset[str]:
        """The encoder alone; a stage asks the layer it stands before."""
        return frozenset({"encoder"})

    def fitted(self, layers: int) -> VisionDrop:
        """With the stages that a decoder of `layers` layers has, and totals for as many."""
        return replace(self, stages_at=fitted_stages(self.stages_at, layers))

    def stages(self, layers: int) -> tuple[int, ...]:
        """The layers nearest to `stages_at`."""
        return stage_layers(self.stages_at, layers)

    def budget(self, tokens: int) -> int:
        """The total before the LLM of an image of `tokens` tokens.

        Raises:
            ValueError: `keep` is more than there are.
        """
        return self._totals(tokens)[0]

    def stage_budget(self, stage: int, tokens: int) -> int:
        """The total after a stage of the LLM."""
        return self._totals(tokens)[stage + 1]

    def _totals(self, tokens: int) -> tuple[int, ...]:
        share = isinstance(self.keep, float)
        mean = self.keep * tokens if share else float(keep_count(self.keep, tokens))
        first = min(self.start * mean, tokens) if self.stages_at else mean
        return step_budgets(first, mean, tokens, self.stages_at)

    def select(self, signals: Signals) -> Selection:
        """By what the encoder attends to, merged by its keys."""
        total = self.budget(signals.x.shape[1])
        return self._reduced(signals, encoder_saliency(signals), encoder_metric(signals), total)

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        """By what the visual tokens attend to in the layer about to run, merged by its keys."""
        assert signals.probe is not None
        assert signals.original is not None
        probe = signals.probe(layer=0, rotary=True, context="all", query="visual")
        score = torch.ops.cdrop.attention_saliency(
            probe.q, probe.k, scale=probe.scale, lse=probe.lse, key_valid=signals.valid,
            query_weight=probe.weight, causal=probe.causal,
        )  # fmt: skip
        if probe.causal and self.causal_correction and self.arithmetic == "corrected":
            score = score / _seeing(signals)
        flat = signals.probe(layer=0, rotary=False, context="visual", query="visual")
        metric = flat.k.mean(1, dtype=torch.float32)
        return self._reduced(signals, score, metric, self.stage_budget(stage, signals.original))

    def _reduced(self, signals: Signals, score: Tensor, metric: Tensor, total: int) -> Selection:
        """`total` slots, some of them contextual; the single slot of a tiny total is dominant."""
        total = min(total, signals.x.shape[1])
        contextual = min(math.ceil(total * self.contextual - 1e-9), total - 1)
        index, _ = torch.ops.cdrop.consensus_select(
            score, None, total - contextual, valid=signals.valid
        )
        if contextual == 0:
            return picked(signals, index)
        if self.arithmetic == "released":
            return _released(signals, index, metric, contextual)
        return merged(signals, index, metric, contextual=contextual)

    def scores(self, signals: Signals) -> Scores:
        """The encoder's saliency, which the first stage goes by."""
        visual = encoder_saliency(signals)
        if signals.valid is None:
            return Scores(visual, None, visual)
        return Scores(visual, None, visual.masked_fill(~signals.valid, -torch.inf))


def _seeing(signals: Signals) -> Tensor:
    """How many visual rows see each token, `[R, N]`: itself and those after it."""
    rows, tokens = signals.x.shape[:2]
    if signals.valid is None:
        return torch.arange(tokens, 0, -1, device=signals.x.device).expand(rows, tokens)
    return signals.valid.flip(1).cumsum(1).flip(1).clamp_min(1)


def _released(signals: Signals, index: Tensor, metric: Tensor, contextual: int) -> Selection:
    """`merged` as the released code does it, see `VisionDrop`."""
    x, dominant = signals.x, index.shape[1]
    rows, tokens, width = x.shape
    rest = torch.ones(rows, tokens + 1, dtype=torch.bool, device=x.device)
    if signals.valid is not None:
        rest[:, :-1] = signals.valid
    rest = rest.scatter(1, index.masked_fill(index < 0, tokens), False)[:, :-1]
    count = rest.sum(1, keepdim=True)
    step = (count // contextual).clamp_min(1)
    number = step * torch.arange(contextual, device=x.device)
    raster = (~rest).int().sort(dim=1, stable=True).indices
    reference = raster.gather(1, number.clamp_max(tokens - 1)).masked_fill(number >= count, -1)

    own = x.gather(1, reference.clamp_min(0)[..., None].expand(-1, -1, width)).float()
    mean, assign, size = torch.ops.cdrop.token_merge(x.float(), metric, reference, valid=rest)
    joined = (size - 1).clamp_min(1)[..., None]  # without any, the reference is its own mean
    added = own + (size[..., None] * mean - own) / joined
    added = added.masked_fill((reference < 0)[..., None], 0.0).to(x.dtype)

    kept = picked(signals, index)
    return Selection(
        torch.cat([kept.tokens, added], 1),
        torch.cat([index, reference], 1),
        torch.where(rest, (assign + dominant).masked_fill(assign < 0, -1), kept.assign),
        torch.cat([kept.size, size], 1),
        padded=kept.padded,
    )
