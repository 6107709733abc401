"""What enters the decoder on a prefill, shortened: every input that has a place per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..methods.base import Selection
from .cache import attach
from .inputs import is_static
from .layout import Layout, Shortened, merge_alike

DEEPSTACK = "deepstack_visual_embeds"


def shortened_inputs(
    kwargs: dict[str, Any], layout: Layout, chosen: Sequence[Selection], short: Shortened,
    text: Any, blend: float,
) -> dict[str, Any]:  # fmt: skip
    """The keyword arguments of the decoder stack that differ on the shorter sequence.

    A cache, made here where one is wanted and none came, gets to know what was dropped.
    """
    cache = kwargs.get("past_key_values")
    if cache is None and wants_cache(kwargs, text):
        cache = DynamicCache(config=text.config)
    # The whole masks that `generate` makes for a static cache say nothing but what is padding.
    mask = short.mask if is_static(cache) else _mask(kwargs.get("attention_mask"), short)
    if cache is not None:
        attach(cache, layout.visual.shape[1], short)
    elif mask is None:
        # Without cache and mask, gaps in the positions would pass for packed sequences.
        mask = torch.ones(short.embeds.shape[:2], dtype=torch.bool, device=short.embeds.device)
    changed = {
        "inputs_embeds": short.embeds,
        "attention_mask": mask,
        "position_ids": decoder_positions(short),
        "past_key_values": cache,
    }
    if kwargs.get(DEEPSTACK) is not None:
        changed |= merged_deepstack(kwargs, layout, chosen, short, blend)
    return changed


def wants_cache(kwargs: dict[str, Any], text: Any) -> bool:
    """Whether a call of the decoder stack fills a cache."""
    wanted = kwargs.get("use_cache")
    wanted = text.config.use_cache if wanted is None else wanted
    return bool(wanted) or kwargs.get("past_key_values") is not None


def decoder_positions(short: Shortened) -> Tensor:
    """Positions of the shorter sequence, as the decoder stack takes them."""
    if short.positions.dim() == 3 and len(short.positions) == 4:
        # The first of four rows only tells packed sequences apart: here there is one.
        count = torch.arange(short.positions.shape[-1], device=short.positions.device)
        rows = short.positions.shape[1]
        return torch.cat([count.expand(1, rows, -1), short.positions[1:]])
    return short.positions


def _mask(given: Any, short: Shortened) -> Any:
    """The mask of the shorter sequence; whole masks `[B, 1, L, L]`, which hold more than padding
    (image blocks that see each other), keep what they say of the tokens left."""
    if isinstance(given, dict):
        return {kind: _mask(one, short) for kind, one in given.items()}
    if not isinstance(given, Tensor) or given.dim() != 4 or given.shape[2] == 1:
        return short.mask
    order = short.order[:, None]
    rows = order[..., None].expand(-1, given.shape[1], -1, given.shape[3])
    out = given.expand(len(order), -1, -1, -1).gather(2, rows)
    columns = order[:, :, None].expand(-1, given.shape[1], out.shape[2], -1)
    out = out.gather(3, columns)
    if short.mask is None:
        return out
    # Unused slots stand for tokens that were dropped; nobody may see those.
    hidden = ~short.mask[:, None, None]
    if out.dtype == torch.bool:
        return out & ~hidden
    return out.masked_fill(hidden, torch.finfo(out.dtype).min)


def merged_deepstack(
    kwargs: dict[str, Any], layout: Layout, chosen: Sequence[Selection], short: Shortened,
    blend: float,
) -> dict[str, Any]:  # fmt: skip
    """Features that early layers add to the visual tokens, merged as the tokens were."""
    batch, width = short.embeds.shape[:2]
    device = short.embeds.device
    number = layout.visual.flatten().cumsum(0).sub(1).to(device)  # of each visual token
    visual = torch.zeros(batch * width + 1, dtype=torch.bool, device=device)
    visual[torch.cat(short.slots)] = True
    visual = visual[:-1]
    merged = []
    for features in kwargs[DEEPSTACK]:
        out = features.new_zeros(batch * width + 1, features.shape[-1])
        for group, selection, where in zip(layout.groups, chosen, short.slots, strict=True):
            mine = merge_alike(selection, features[number[group.flat]], blend)
            out = out.index_copy(0, where, mine.flatten(0, 1))
        merged.append(out[:-1][visual])
    return {DEEPSTACK: merged, "visual_pos_masks": visual.view(batch, width)}
