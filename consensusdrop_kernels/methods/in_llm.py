"""What methods share that leave an image whole until it is inside the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from .base import Method, QueryRule, Selection, Signals, TextProbe, keep_count
from .parts import picked
from .schedule import fitted_stages, stage_layers, step_budgets


class InLLM(Method):
    """Base of methods that prune between decoder layers alone, by the attention of the rows of
    `query` in the layer about to run: override `stages` and `stage_budget`."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the tokens: a stage asks the layer it stands before."""
        return frozenset()

    def budget(self, tokens: int) -> int:
        """All of an image's tokens enter the decoder.

        Raises:
            ValueError: `keep` is more than there are.
        """
        keep_count(self.keep, tokens)
        return tokens

    def select(self, signals: Signals) -> Selection:
        """Every token as it is."""
        return self.identity(signals)

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        """The tokens that get most attention, the others dropped."""
        rows = or_last_row(signals, question_rows(signals, self.query))
        keep = self._left(stage, signals)
        index, _ = torch.ops.cdrop.consensus_select(
            row_attention(signals, rows), None, keep, valid=signals.valid
        )
        return picked(signals, index)

    def _left(self, stage: int, signals: Signals) -> int:
        assert signals.original is not None
        return min(self.stage_budget(stage, signals.original), signals.x.shape[1])


class Progressive(InLLM):
    """Base of those that keep the same share at each of several stages, so many that the layers
    see `keep` tokens on average; a subclass has a field `stages_at`."""

    stages_at: tuple[float, ...]

    def fitted(self, layers: int) -> Method:
        """With the stages that a decoder of `layers` layers has."""
        own = cast(Any, self)
        return cast(Method, replace(own, stages_at=fitted_stages(self.stages_at, layers)))

    def stages(self, layers: int) -> tuple[int, ...]:
        """The layers nearest to `stages_at`."""
        return stage_layers(self.stages_at, layers)

    def stage_budget(self, stage: int, tokens: int) -> int:
        """What a stage leaves of an image of `tokens` tokens.

        Raises:
            ValueError: the layers before the first stage alone account for more than `keep`.
        """
        share = isinstance(self.keep, float)
        mean = self.keep * tokens if share else float(keep_count(self.keep, tokens))
        return step_budgets(tokens, mean, tokens, self.stages_at)[stage + 1]


def question_rows(signals: Signals, query: str | QueryRule) -> TextProbe:
    """The question's rows in the layer about to run, normalised over every key they see."""
    assert signals.probe is not None
    return signals.probe(layer=0, rotary=True, context="all", query=query)


def or_last_row(signals: Signals, probe: TextProbe) -> TextProbe:
    """The same rows, and for an image that none of them follows the last token of the prompt."""
    if all(probe.asked):
        return probe
    last = question_rows(signals, "last_token")
    asked = torch.tensor(probe.asked, device=probe.q.device)[:, None]
    assert probe.lse is not None
    assert last.lse is not None
    return probe._replace(
        q=torch.cat([probe.q, last.q], 2),
        lse=torch.cat([probe.lse, last.lse], 2),
        weight=torch.cat([probe.weight * asked, last.weight * ~asked], 1),
        asked=tuple(map(any, zip(probe.asked, last.asked, strict=True))),
    )


def row_attention(signals: Signals, probe: TextProbe) -> Tensor:
    """Attention of a probe's rows to the tokens, mean of heads and rows, `[R, N]` float32."""
    return torch.ops.cdrop.attention_saliency(
        probe.q, probe.k, scale=probe.scale, lse=probe.lse, key_valid=signals.valid,
        query_weight=probe.weight,
    )  # fmt: skip
