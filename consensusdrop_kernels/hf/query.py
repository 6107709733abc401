"""Which tokens of a prompt are the question."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.base import QueryRule


def question_mask(
    rule: str | QueryRule,
    ids: Tensor,
    visual: Tensor,
    valid: Tensor,
    special: Tensor | None,
) -> Tensor:
    """The question's tokens, bool `[B, L]`, all on the CPU.

    Text is what is valid, not visual and not special. "after_image" is the text after the last
    visual token, or all text where none follows; "all_text" all of it; "last_token" the last valid
    token. A row without any text has no question.

    Args:
        rule: one of these names, or a callable of `(ids, visual, valid)`.
        ids: `[B, L]` int64.
        visual, valid: bool `[B, L]`; `valid` leaves out answers that are to be predicted.
        special: ids that are no question (tokenizer control tokens), or None.

    Raises:
        ValueError: a callable returned something else than bool `[B, L]`.
    """
    if not isinstance(rule, str):
        mask = rule(ids, visual, valid)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != valid.shape:
            raise ValueError(
                f"query must return a bool tensor {list(valid.shape)}, got "
                f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        return mask.cpu() & valid & ~visual
    if rule == "last_token":
        return valid & (_seen_from_the_right(valid) == 1)
    text = valid & ~visual
    if special is not None:
        text &= ~torch.isin(ids, special)
    if rule == "all_text":
        return text
    after = text & (_seen_from_the_right(visual) == 0)
    return torch.where(after.any(1, keepdim=True), after, text)


def _seen_from_the_right(mask: Tensor) -> Tensor:
    """How many true entries are at or after each place."""
    return mask.flip(1).cumsum(1).flip(1)


def padded_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the true entries per row, padded at the left.

    Returns `index [B, M]` int64 (0 on padding) and `live [B, M]` bool; `M >= 1`.
    """
    count = int(mask.sum(1).amax().clamp_min(1)) if len(mask) else 1
    index = mask.int().argsort(dim=1, stable=True)[:, -count:]
    live = mask.gather(1, index)
    return index.masked_fill(~live, 0), live
