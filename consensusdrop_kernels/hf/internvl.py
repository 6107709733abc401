"""InternVL: a tower with a class token, four patches to a token, images as tiles.

The model is given tiles and not told which belong to one image. In the prompt the tiles of an image
stand side by side, between a start and an end token: one run of placeholders is one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped
from .towers import feature_layer, option, tile_signals


def _tap_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    tower = config.vision_config
    if tower.model_type != "internvl_vision":
        raise ValueError(
            "the vision tower must be an internvl_vision (its class token weighs the patches), got "
            f"{tower.model_type}"
        )
    strategy = option(config, arguments, "vision_feature_select_strategy")
    if strategy != "default":
        raise ValueError(
            "vision_feature_select_strategy must be 'default' (the class token stays out of the "
            f"prompt), got {strategy!r}"
        )
    return feature_layer(config, arguments)


def _encode(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    config: Any = model.config
    outer: Any = model.get_submodule("model")
    tiles, tokens = output.pooler_output.shape[:2]
    grid = int(tokens**0.5)  # the model takes square tiles only
    encoded = Encoded((tokens,) * tiles, ((grid, grid),) * tiles)
    if tapped is None:
        return encoded
    ratio = config.downsample_ratio
    side = round(grid / ratio)
    visual, metric = tile_signals(tapped, tiles, side * side, 1)
    channels = torch.cat([visual[..., None], metric], -1).unflatten(1, (side, side))
    shuffled = outer.pixel_shuffle(channels, scale_factor=ratio)
    # The patches of a token lie one after another, each with all its channels.
    merged = shuffled.flatten(1, 2).unflatten(-1, (-1, channels.shape[-1])).mean(2)
    return replace(encoded, visual=merged[..., 0].unbind(), metric=merged[..., 1:].unbind())


INTERNVL = register(
    Adapter(
        model_types=("internvl",),
        outer="model",
        text="model.language_model",
        sources=(
            Source(
                layers="model.vision_tower.encoder.layer",
                attention="attention",
                tap_layer=_tap_layer,
                encode=_encode,
                joined=True,
            ),
        ),
    )
)
