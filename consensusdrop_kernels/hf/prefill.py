"""What enters the decoder on a prefill, shortened: every input that has a place per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..methods.base import Selection
from ..methods.parts import upload
from .cache import attach
from .inputs import is_static
from .layout import Layout, Shortened, merge_alike, slot_counts
from .sizes import FULL, SLIDING

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
    mask = short.mask if is_static(cache) else _mask(kwargs.get("attention_mask"), short, text)
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


def _mask(given: Any, short: Shortened, text: Any) -> Any:
    """The mask of the shorter sequence; whole masks, which hold more than padding (image tokens
    that see each other), keep what they say of the tokens left.

    Raises:
        NotImplementedError: whole masks that are no tensors, those of flex attention.
    """
    masks = given if isinstance(given, dict) else {FULL: given}
    if not all(mask is None or isinstance(mask, Tensor) for mask in masks.values()):
        raise NotImplementedError(
            "attn_implementation must be sdpa, eager or a flash attention for a model that makes "
            "whole masks, got flex_attention, whose block masks can't be shortened"
        )
    if not all(_is_whole(mask) for mask in masks.values()):
        return short.mask  # plain causal attention: the decoder makes what it needs of the padding
    seen = {kind: _seen(mask, short) for kind, mask in masks.items()}
    if SLIDING in seen and FULL in seen:
        # A window counts the tokens left, like the cache of its layers; those it held stay in it.
        place = torch.arange(short.embeds.shape[1], device=short.embeds.device)
        near = place > place[:, None] - text.config.sliding_window
        seen[SLIDING] = seen[SLIDING] | (seen[FULL] & near)
    out = {kind: _like(masks[kind], mask) for kind, mask in seen.items()}
    return out if isinstance(given, dict) else out[FULL]


def _is_whole(mask: Any) -> bool:
    return mask is not None and mask.dim() == 4 and mask.shape[2] > 1


def _seen(whole: Tensor, short: Shortened) -> Tensor:
    """What the tokens left see of each other, `[B, 1, K, K]` bool, by a mask `[B, 1, L, L]`."""
    seen = whole if whole.dtype == torch.bool else whole == 0
    order = short.order[:, None]
    rows = order[..., None].expand(-1, seen.shape[1], -1, seen.shape[3])
    out = seen.expand(len(order), -1, -1, -1).gather(2, rows)
    columns = order[:, :, None].expand(-1, seen.shape[1], out.shape[2], -1)
    out = out.gather(3, columns)
    # Unused slots stand for tokens that were dropped; nobody may see those.
    return out if short.mask is None else out & short.mask[:, None, None]


def _like(mask: Tensor, seen: Tensor) -> Tensor:
    """`seen` in the form of a mask: bool, or what is added to the logits."""
    if mask.dtype == torch.bool:
        return seen
    lowest = torch.finfo(mask.dtype).min
    return torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, lowest)


def merged_deepstack(
    kwargs: dict[str, Any], layout: Layout, chosen: Sequence[Selection], short: Shortened,
    blend: float,
) -> dict[str, Any]:  # fmt: skip
    """Features that early layers add to the visual tokens, merged as the tokens were."""
    batch, width = short.embeds.shape[:2]
    device = short.embeds.device
    number = upload(layout.visual.flatten().cumsum(0).sub(1), device)  # of each visual token
    used = sum(sum(slot_counts(selection)) for selection in chosen)
    there = torch.cat(short.slots).sort().values[:used]  # unused slots are past the end
    visual = torch.zeros(batch * width, dtype=torch.bool, device=device)
    visual = visual.index_fill(0, there, True)
    merged = []
    for features in kwargs[DEEPSTACK]:
        out = features.new_zeros(batch * width + 1, features.shape[-1])
        for group, selection, where in zip(layout.groups, chosen, short.slots, strict=True):
            mine = merge_alike(selection, features[number[group.flat]], blend)
            out = out.index_copy(0, where, mine.flatten(0, 1))
        merged.append(out[there])
    return {DEEPSTACK: merged, "visual_pos_masks": visual.view(batch, width)}
