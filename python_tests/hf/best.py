"""A method whose choice and effect can be computed on paper."""

from __future__ import annotations

from typing import Any

from consensusdrop_kernels.methods import ConsensusDrop


def best_of(keep: int | float, **options: Any) -> ConsensusDrop:
    """ConsensusDrop that keeps the best of the consensus and adds nothing to attention, its
    positions those of the model's kind."""
    own: dict[str, Any] = {"diversity": 0.0, "size_attention": False, "positions": None}
    return ConsensusDrop(keep, **own | options)
