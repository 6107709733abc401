"""LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video: images as tiles, videos as pooled frames.

An image is one small tile and, cut into more tiles, a large one; the model pastes the large one
together, cuts its padding off and puts a line break after each row of patches. What the encoder
says of a patch goes through the same functions of the model, one channel per number.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped
from .towers import (
    check_only_patches,
    class_tokens,
    feature_layer,
    option,
    tile_side,
    tile_signals,
)

Arguments = Mapping[str, Any]
Size = tuple[int, int]


def _tap_layer(config: Any, arguments: Arguments) -> int:
    check_only_patches(config, arguments)
    return feature_layer(config, arguments)


def _pooled_tap_layer(config: Any, arguments: Arguments) -> int:
    if config.spatial_pool_mode == "conv":
        raise ValueError(
            "spatial_pool_mode must be 'average' or 'max' (a convolution has no saliency to pool), "
            "got 'conv'"
        )
    return _tap_layer(config, arguments)


# Images.


def _tiles(outer: Any, sizes: list[list[int]], arguments: Arguments) -> list[int]:
    """How many tiles each image has, the small one included."""
    config = outer.config
    count = sys.modules[type(outer).__module__].image_size_to_num_patches
    tile = config.vision_config.image_size
    tiles = [
        count(image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=tile)
        for size in sizes
    ]
    prompts = arguments.get("batch_num_images")  # images among several stay whole
    if prompts is None:
        return tiles
    prompts = torch.as_tensor(prompts).tolist()
    alone = [images == 1 for images in prompts for _ in range(images)]
    return [count if cut else 1 for count, cut in zip(tiles, alone, strict=True)]


def _next_options(config: Any, arguments: Arguments) -> dict[str, Any]:
    return {"vision_feature_select_strategy": "default"}  # where it only chooses a warning


def _onevision_options(config: Any, arguments: Arguments) -> dict[str, Any]:
    return {"vision_aspect_ratio": option(config, arguments, "vision_aspect_ratio")}


def _encode_images(
    options: Callable[[Any, Arguments], dict[str, Any]],
    model: nn.Module,
    tapped: list[Tapped] | None,
    output: Any,
    arguments: Arguments,
) -> Encoded:
    config: Any = model.config
    outer: Any = model.get_submodule("model")
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    tiles = _tiles(outer, sizes, arguments)
    side = tile_side(config)

    def pack(channels: Tensor) -> list[Tensor]:
        """`[tokens_i, C]` of each image of `[tiles, side * side, C]`, 0 at line breaks."""
        packed, _ = outer.pack_image_features(
            channels.split(tiles),
            sizes,
            image_newline=channels.new_zeros(channels.shape[-1]),
            **options(outer.config, arguments),
        )
        return packed

    # Ones stay ones wherever patches are blended. On the CPU, so that no device is waited for.
    patches = tuple(part[:, 0] > 0.5 for part in pack(torch.ones(sum(tiles), side * side, 1)))
    tokens = tuple(len(image) for image in output.pooler_output)
    if tokens != tuple(map(len, patches)):
        raise RuntimeError(
            f"{list(tokens)} features must be as many as the tiles give when packed, got "
            f"{[len(image) for image in patches]}"
        )
    crops, grids = [], []
    for image, count in zip(patches, tiles, strict=True):
        shapes = _crop_shapes(image, side, count)
        crops.append(tuple(height * width for height, width in shapes))
        grids.append(tuple(shapes))
    encoded = Encoded(
        tokens,
        tuple(shapes[-1] for shapes in grids),
        patches=patches,
        crops=tuple(crops),
        crop_grids=tuple(grids),
    )
    if tapped is None:
        return encoded
    visual, metric = _by_image(pack(_channels(tapped, sum(tiles), config)), patches)
    return replace(encoded, visual=visual, metric=metric)


def _crop_shapes(patches: Tensor, side: int, tiles: int) -> list[Size]:
    """Height and width of the small tile and of the large one, by the breaks after its rows."""
    if tiles == 1:
        return [(side, side)]
    rows = int((~patches).sum())
    return [(side, side), (rows, (int(patches.sum()) - side * side) // rows)]


def _channels(tapped: list[Tapped], tiles: int, config: Any) -> Tensor:
    """Saliency and metric side by side, `[tiles, patches, 1 + d]` float32."""
    saliency, metric = tile_signals(tapped, tiles, tile_side(config) ** 2, class_tokens(config))
    return torch.cat([saliency[..., None], metric], -1)


def _by_image(
    packed: list[Tensor], patches: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Saliency and metric of the patches of each image, without its breaks."""
    counts = [int(image.sum()) for image in patches]
    here = torch.cat(patches).nonzero().flatten()
    whole = torch.cat(packed)
    whole = whole[here.to(whole.device)]
    return whole[:, 0].split(counts), whole[:, 1:].split(counts)


# Videos.


def _video_pixels(arguments: Arguments) -> Tensor:
    given = arguments.get("pixel_values_videos")  # the name from transformers 5.18 on
    return arguments["pixel_values"] if given is None else given


def _pooled_by_resampler(outer: Any, channels: Tensor) -> Tensor:
    return outer.vision_resampler(channels)


def _pooled_bilinear(outer: Any, channels: Tensor) -> Tensor:
    return outer.apply_pooling(channels)


def _encode_videos(
    pool: Callable[[Any, Tensor], Tensor],
    breaks: int,
    model: nn.Module,
    tapped: list[Tapped] | None,
    output: Any,
    arguments: Arguments,
) -> Encoded:
    """Frames one after another, and after each video `breaks` line breaks."""
    config: Any = model.config
    outer: Any = model.get_submodule("model")
    videos, frames = _video_pixels(arguments).shape[:2]
    height, width = _pooled_shape(pool, outer, tile_side(config))
    each = height * width
    patches = torch.ones(frames * each + breaks, dtype=torch.bool)
    patches[frames * each :] = False
    encoded = Encoded(
        (len(patches),) * videos,
        ((height, width),) * videos,
        patches=(patches,) * videos if breaks else None,
        crops=((each,) * frames,) * videos,
    )
    if tapped is None:
        return encoded
    channels = pool(outer, _channels(tapped, videos * frames, config))
    channels = channels.reshape(videos, frames * each, -1)
    return replace(encoded, visual=channels[..., 0].unbind(), metric=channels[..., 1:].unbind())


def _pooled_shape(pool: Callable[[Any, Tensor], Tensor], outer: Any, side: int) -> Size:
    pooled = math.isqrt(pool(outer, torch.ones(1, side * side, 1)).shape[1])
    return pooled, pooled


def _image_source(
    options: Callable[[Any, Arguments], dict[str, Any]],
    tap_layer: Callable[[Any, Arguments], int] = _tap_layer,
) -> Source:
    return Source(
        layers="model.vision_tower.encoder.layers",
        attention="self_attn",
        tap_layer=tap_layer,
        encode=partial(_encode_images, options),
    )


def _video_source(
    pool: Callable[[Any, Tensor], Tensor],
    breaks: int,
    tap_layer: Callable[[Any, Arguments], int] = _tap_layer,
) -> Source:
    return Source(
        layers="model.vision_tower.encoder.layers",
        attention="self_attn",
        tap_layer=tap_layer,
        encode=partial(_encode_videos, pool, breaks),
        features="get_video_features",
        pixels=("pixel_values_videos",),
        modality="video",
        visual_id="video_token_id",
    )


def _adapter(model_type: str, *sources: Source) -> Adapter:
    return Adapter((model_type,), "model", "model.language_model", sources)


LLAVA_NEXT = register(_adapter("llava_next", _image_source(_next_options)))
LLAVA_ONEVISION = register(
    _adapter(
        "llava_onevision",
        _image_source(_onevision_options),
        _video_source(_pooled_bilinear, 1),
    )
)
LLAVA_NEXT_VIDEO = register(
    _adapter(
        "llava_next_video",
        _image_source(_next_options),
        _video_source(_pooled_by_resampler, 0, _pooled_tap_layer),
    )
)
