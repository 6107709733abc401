"""Video-LLaVA: one CLIP tower for images, another for frames, one token per patch.

Frames of a video keep their class token as a feature of its own, images only with the strategy
"full"; those are no patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped
from .towers import class_tokens, feature_layer, option, tile_signals


def _tap_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    if not class_tokens(config):
        raise ValueError(
            "the vision towers must be a clip_vision_model (images are cut down by its class "
            f"token), got {config.vision_config.model_type}"
        )
    return feature_layer(config, arguments)


def _encode_images(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    pixels = arguments.get("pixel_values")  # the name from transformers 5.23 on
    pixels = arguments["pixel_values_images"] if pixels is None else pixels
    strategy = option(model.config, arguments, "vision_feature_select_strategy")
    return _encoded(model, tapped, pixels[:, None], strategy == "full")


def _encode_videos(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    return _encoded(model, tapped, arguments["pixel_values_videos"], True)


def _encoded(
    model: nn.Module, tapped: list[Tapped] | None, pixels: Tensor, with_class: bool
) -> Encoded:
    """Of `pixels [videos, frames, 3, height, width]`; features have a class token per frame or
    none at all."""
    config: Any = model.config
    videos, frames = pixels.shape[:2]
    size = config.vision_config.patch_size
    grid = (pixels.shape[-2] // size, pixels.shape[-1] // size)
    each = grid[0] * grid[1]
    patches = torch.ones(frames, with_class + each, dtype=torch.bool)
    patches[:, : int(with_class)] = False
    encoded = Encoded(
        (patches.numel(),) * videos,
        (grid,) * videos,
        patches=(patches.flatten(),) * videos if with_class else None,
        crops=((each,) * frames,) * videos,
    )
    if tapped is None:
        return encoded
    visual, metric = tile_signals(tapped, videos * frames, each, class_tokens(config))
    return replace(
        encoded,
        visual=visual.view(videos, -1).unbind(),
        metric=metric.view(videos, frames * each, -1).unbind(),
    )


VIDEO_LLAVA = register(
    Adapter(
        model_types=("video_llava",),
        outer="model",
        text="model.language_model",
        sources=(
            Source(
                layers="model.image_tower.encoder.layers",
                attention="self_attn",
                tap_layer=_tap_layer,
                encode=_encode_images,
                pixels=("pixel_values", "pixel_values_images"),
            ),
            Source(
                layers="model.video_tower.encoder.layers",
                attention="self_attn",
                tap_layer=_tap_layer,
                encode=_encode_videos,
                features="get_video_features",
                pixels=("pixel_values_videos",),
                modality="video",
                visual_id="video_token_id",
            ),
        ),
    )
)
