"""Which tokens of a prompt are the question."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..methods.base import QueryRule
from .layout import Group


def question_rows(
    rule: str | QueryRule, group: Group, special: Tensor | None, seeing: bool = False
) -> tuple[Tensor, Tensor]:
    """Where the questions of a group's images stand, all on the CPU.

    Args:
        rule, special: as in `question_places`.
        group: the images.
        seeing: whether only rows count that come after the image.

    Returns:
        `index [B, M]` int64, the places in each prompt, padded at the left; and `live [R, M]` bool,
        which of them count for each image.
    """
    prompt = group.layout
    places = question_places(rule, prompt.ids, prompt.visual, prompt.asking, special)
    if group.own is not None:
        here = set(group.sample_list)
        places = [row if at in here else [] for at, row in enumerate(places)]
    longest = max([1, *map(len, places)])
    before = [longest - len(row) for row in places]
    index = torch.tensor(
        [[0] * n + row for n, row in zip(before, places, strict=True)], device="cpu"
    )
    live = torch.tensor([[at >= n for at in range(longest)] for n in before], device="cpu")
    live = group.of_prompts(live)
    if seeing:
        live = live & (group.of_prompts(index) >= torch.tensor(group.end_list)[:, None])
    return index, live


def question_places(
    rule: str | QueryRule,
    ids: Tensor,
    visual: Tensor,
    valid: Tensor,
    special: Tensor | None,
) -> list[list[int]]:
    """Where the question's tokens stand in each row, ascending.

    Text is what is valid, not visual and not special. "after_image" is the text after the last
    visual token, or all text where none follows; "all_text" all of it; "last_token" the last valid
    token. A row without any text has no question.

    In Python: a prefill waits for this, and of a prompt of some hundred tokens each tensor
    operation takes as long as all of it does so.

    Args:
        rule: one of these names, or a callable of `(ids, visual, valid)`.
        ids: `[B, L]` int64 on the CPU.
        visual, valid: bool `[B, L]` there; `valid` leaves out answers that are to be predicted.
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
        return [_true(row) for row in (mask.cpu() & valid & ~visual).tolist()]
    if rule == "last_token":
        return [_true(row)[-1:] for row in valid.tolist()]
    if special is not None:
        valid = valid & ~torch.isin(ids, special)
    found = []
    for can, image in zip(valid.tolist(), visual.tolist(), strict=True):
        behind = len(image) - image[::-1].index(True) if True in image else 0
        after = [at for at in range(behind, len(can)) if can[at]]
        if rule == "all_text" or not after:
            after = [at for at in _true(can) if not image[at]]
        found.append(after)
    return found


def _true(row: list[bool]) -> list[int]:
    return [at for at, here in enumerate(row) if here]


def padded_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the true entries per row, padded at the left.

    Returns `index [B, M]` int64 (0 on padding) and `live [B, M]` bool; `M >= 1`.
    """
    rows = [row.nonzero().flatten() for row in mask]
    lengths = {len(row) for row in rows}
    if not any(lengths):
        return torch.zeros(len(rows), 1, dtype=torch.long), mask.new_zeros(len(rows), 1)
    if len(lengths) == 1:
        return torch.stack(rows), mask.new_ones(len(rows), *lengths)
    index = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    return index.clamp_min(0), index >= 0
