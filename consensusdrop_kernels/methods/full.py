"""Full: the control that keeps everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .base import Card, Method, Selection, Signals
from .parts import picked


@dataclass(frozen=True)
class Full(Method):
    """Every token, as it is: the ceiling, and what others are measured against.

    Takes no options; `keep` is 1.0.
    """

    card: ClassVar[Card] = Card(
        name="Full",
        signals="none",
        stages=(),
        text=False,
        merges="no",
        reference=None,
    )

    keep: float = field(default=1.0, init=False)

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the tokens."""
        return frozenset()

    def select(self, signals: Signals) -> Selection:
        """All tokens; padding goes behind them."""
        if signals.valid is None:
            return self.identity(signals)
        nothing = torch.zeros(signals.valid.shape, device=signals.x.device)
        index, _ = torch.ops.cdrop.consensus_select(
            nothing, None, nothing.shape[1], valid=signals.valid
        )
        return picked(signals, index)
