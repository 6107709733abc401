"""What callers pass in, in its several forms, brought into one or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .layout import Layout, Shortened

IGNORED = -100  # the label of a token that no loss is taken of


def padding(mask: Any, cache: Any, embeds: Tensor) -> Tensor | None:
    """The mask of a prefill as `[B, L]`, or None if there is none.

    Raises:
        NotImplementedError: a mask of another form.
    """
    batch, length = embeds.shape[:2]
    if isinstance(mask, dict) and set(mask) == {"full_attention"} and is_static(cache):
        mask = mask["full_attention"]  # of decoders that might have other kinds, but don't
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 4 and is_static(cache):
        # What generate builds for a static cache; the last row sees all but the padding.
        row = mask[:, 0, -1, :length]
        return row if row.dtype == torch.bool else row == 0
    if not isinstance(mask, Tensor) or mask.shape != (batch, length):
        raise NotImplementedError(
            f"attention_mask must be [B, L]=[{batch}, {length}] with images, got "
            f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__} "
            "(chunked prefill, or images on a cache that already holds tokens?)"
        )
    return mask


def supervised(labels: Tensor, ids: Tensor) -> Tensor:
    """The tokens `[B, L]` that a loss is taken of, bool on the CPU.

    With `logits_to_keep` the labels may be those of the last tokens alone.

    Raises:
        ValueError: labels of other prompts.
    """
    rows, length = ids.shape
    if labels.dim() != 2 or len(labels) != rows or labels.shape[1] > length:
        raise ValueError(f"labels must be [B, L]=[{rows}, {length}], got {list(labels.shape)}")
    before = length - labels.shape[1]
    return torch.nn.functional.pad((labels != IGNORED).cpu(), (before, 0), value=False)


def full_positions(given: Tensor | None, embeds: Tensor, spatial: bool = False) -> Tensor:
    """The positions `[B, L]` of a call, or `[3, B, L]`, `[4, B, L]` with height and width; without
    any, those the decoder would give itself. `spatial`: height and width where only one is given.
    """
    batch, length = embeds.shape[:2]
    if given is None:
        given = torch.arange(length, device=embeds.device)[None]
    has_rows = given.dim() == 3 and len(given) in (3, 4)
    if given.shape[-1] != length or not (given.dim() == 2 or has_rows):
        raise NotImplementedError(
            f"position_ids must be [B, L]=[{batch}, {length}], got {list(given.shape)}"
        )
    if spatial and not has_rows:
        given = given.expand(3, -1, -1)
    return given.expand(*given.shape[:-2], batch, length)


def is_dispatched(model: Any) -> bool:
    """Whether accelerate moves inputs between the modules of this model."""
    return hasattr(model, "_hf_hook") or hasattr(model, "hf_device_map")


def token_count(given: dict[str, Any]) -> int:
    """How many tokens of each prompt a call brings; 0 where it brings none at all."""
    ids = given.get("input_ids")
    tokens: Tensor | None = given.get("inputs_embeds") if ids is None else ids
    return 0 if tokens is None else tokens.shape[1]


def first_tokens(output: Any) -> Tensor:
    """The first feature of every image, `[R, D]`: enough to know the images again."""
    return torch.stack([features[0] for features in output.pooler_output]).detach()


def is_static(cache: Any) -> bool:
    """Whether the cache has a fixed size, for which `generate` builds whole masks."""
    return bool(getattr(cache, "is_compileable", False))


def check_cache(cache: Any, text: Any) -> None:
    """Raises NotImplementedError for a call with images whose cache can't be pruned."""
    implementation = text.config._attn_implementation or ""
    if implementation.startswith("paged|"):
        raise NotImplementedError("paged attention (continuous batching) can't be pruned")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise NotImplementedError(
            "images can't be pruned on a cache that already holds tokens (another turn, or chunked "
            "prefill); start without past_key_values"
        )


def check_prompt(given: dict[str, Any], cache: Any, adapter: Adapter) -> None:
    """Raises for inputs with images that a model family can't do with, or without."""
    missing = [name for name in adapter.required if given.get(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must come with the images (the processor makes them): they say "
            "which tokens see each other"
        )
    if adapter.whole_masks and is_static(cache):
        raise NotImplementedError(
            "a static cache can't be pruned in a model whose image tokens see each other; use the "
            "default cache"
        )


def check_static(cache: Any, layout: Layout, short: Shortened) -> None:
    """Raises NotImplementedError for a static cache together with padding."""
    if is_static(cache) and (short.mask is not None or not bool(layout.valid.all())):
        raise NotImplementedError(
            "a static cache takes only prompts of one length without padding here; use the default "
            "cache, or one prompt at a time"
        )
