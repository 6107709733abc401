"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V and their like: packed patches, several to a token.

Their towers see the patches of all images as one packed sequence in which each frame attends to
itself, without a class token, and a merger makes `spatial_merge_size ** 2` neighbours into one
token. So a token's saliency is the mean of what its patches receive, its metric the mean of their
keys. Rotary positions have time, height and width: tokens keep their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped

# From the grids and the sizes in the config to the token that each merged group of patches is, or
# None where they stand in order.
Order = Callable[[Tensor, Any, dict[str, Any]], Tensor | None]


def _last_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    return int(config.vision_config.depth) - 1


def _last_whole_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    """The last block that attends to whole frames; the others see windows of them."""
    tower = config.vision_config
    whole = [i for i in tower.fullatt_block_indexes or () if 0 <= i < tower.depth]
    if not whole:
        raise ValueError(
            f"vision_config.fullatt_block_indexes must name one of the {tower.depth} blocks (one "
            f"that attends to whole frames), got {tower.fullatt_block_indexes}"
        )
    return max(whole)


def _in_order(grid: Tensor, tower: Any, computed: dict[str, Any]) -> Tensor | None:
    return None


def _by_windows(grid: Tensor, tower: Any, computed: dict[str, Any]) -> Tensor | None:
    index, _ = get_vision_window_index(
        grid, tower.spatial_merge_size, tower.window_size, tower.patch_size, kwargs=computed
    )
    return index.argsort()


def _encode(
    modality: str,
    order: Order,
    model: nn.Module,
    tapped: list[Tapped] | None,
    output: Any,
    arguments: Mapping[str, Any],
) -> Encoded:
    config: Any = model.config
    tower = config.vision_config
    side = tower.spatial_merge_size
    grid = arguments[f"{modality}_grid_thw"].cpu()
    sizes = grid.tolist()
    frames = [(height // side) * (width // side) for _, height, width in sizes]
    tokens = tuple(size[0] * frame for size, frame in zip(sizes, frames, strict=True))
    if tokens != tuple(len(features) for features in output.pooler_output):
        raise RuntimeError(
            f"grids {sizes} must give as many tokens as there are features, got "
            f"{[len(features) for features in output.pooler_output]}"
        )
    grids = tuple((height // side, width // side) for _, height, width in sizes)
    crops = tuple((frame,) * size[0] for size, frame in zip(sizes, frames, strict=True))
    if tapped is None:
        return Encoded(tokens, grids, crops=crops)
    # What a caller may have computed ahead for the tower, by the names it has there.
    prefix = f"{modality}_"
    extra = arguments.get("kwargs", {})
    computed = {n.removeprefix(prefix): v for n, v in extra.items() if n.startswith(prefix)}
    segments = get_vision_cu_seqlens(grid, kwargs=computed)
    visual, keys = _received(tapped, segments.cpu())
    visual = visual.view(-1, side * side).mean(1)
    keys = keys.view(len(visual), side * side, -1).mean(1)
    back = order(grid, tower, computed)
    if back is not None:
        back = back.to(visual.device)
        visual, keys = visual[back], keys[back]
    return Encoded(
        tokens, grids, visual=visual.split(tokens), metric=keys.split(tokens), crops=crops
    )


def _received(tapped: list[Tapped], segments: Tensor) -> tuple[Tensor, Tensor]:
    """What each patch receives from those of its frame, `[T]` float32, and its key, `[T, d]`.

    Flash attention takes all frames in one call, the others one by one; `segments [S+1]` on the CPU
    is where each starts.
    """
    q, k, scale, lse = tapped[0]
    if len(tapped) > 1:
        q, k = torch.cat([t.q for t in tapped], 2), torch.cat([t.k for t in tapped], 2)
        parts = [t.lse for t in tapped if t.lse is not None]
        lse = torch.cat(parts, 2) if len(parts) == len(tapped) else None
    if int(segments[-1]) != k.shape[2] or len(k) != 1:
        raise RuntimeError(
            f"the tapped attention must see the {int(segments[-1])} patches of the grids, got keys "
            f"{[tuple(t.k.shape) for t in tapped]}"
        )
    received = torch.ops.cdrop.attention_saliency.varlen(
        q[0].transpose(0, 1),
        k[0].transpose(0, 1),
        segments.to(k.device),
        int(segments.diff().max()),
        scale=scale,
        lse=None if lse is None else lse[0],
    )
    return received, k[0].mean(0)


def _sources(
    tap_layer: Callable[[Any, Mapping[str, Any]], int] = _last_layer,
    order: Order = _in_order,
    video_id: str = "video_token_id",
) -> tuple[Source, ...]:
    image = Source(
        layers="model.visual.blocks",
        attention="attn",
        tap_layer=tap_layer,
        encode=partial(_encode, "image", order),
    )
    video = Source(
        layers="model.visual.blocks",
        attention="attn",
        tap_layer=tap_layer,
        encode=partial(_encode, "video", order),
        features="get_video_features",
        pixels=("pixel_values_videos",),
        modality="video",
        visual_id=video_id,
    )
    return image, video


def _adapter(sources: tuple[Source, ...], *model_types: str) -> Adapter:
    return Adapter(
        model_types=model_types,
        outer="model",
        text="model.language_model",
        sources=sources,
        spatial_positions=True,
        first_stage=_past_deepstack,
    )


def _past_deepstack(config: Any) -> int:
    """Each of the first layers adds features to all visual tokens, as many as there are."""
    return max(1, len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ()))


QWEN2_VL = register(_adapter(_sources(), "qwen2_vl"))
QWEN2_5_VL = register(_adapter(_sources(_last_whole_layer, _by_windows), "qwen2_5_vl"))
QWEN3_VL = register(_adapter(_sources(), "qwen3_vl", "qwen3_vl_moe"))
# Frames of a video have the placeholder of images here.
GLM4V = register(_adapter(_sources(video_id="image_token_id"), "glm4v", "glm4v_moe", "glm46v"))
