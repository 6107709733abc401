"""LLaVA 1.5 and its like: a CLIP or SigLIP tower, one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped
from .towers import check_only_patches, class_tokens, feature_layer, option


def _tap_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    if not class_tokens(config):
        check_only_patches(config, arguments)
    return feature_layer(config, arguments)


def _encode(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    """The class token's row speaks, or, without one, every patch's. With the strategy "full" the
    class token is a feature, but no patch."""
    features = output.pooler_output
    tokens = tuple(len(image) for image in features)
    config: Any = model.config
    prefix = class_tokens(config)
    strategy = option(config, arguments, "vision_feature_select_strategy")
    others = prefix if strategy == "full" else 0
    pixels = arguments["pixel_values"]
    size = config.vision_config.patch_size
    grid = (pixels.shape[-2] // size, pixels.shape[-1] // size)
    grids, patches = (grid,) * len(tokens), None
    if others and tokens:
        patches = (torch.arange(tokens[0]) >= others,) * len(tokens)
    if tapped is None:
        return Encoded(tokens, grids, patches=patches)
    each = tokens[0] - others if tokens else 0
    if len(tapped) != 1 or tapped[0].k.shape[::2] != (len(tokens), prefix + each):
        raise RuntimeError(
            f"the tapped attention must see {len(tokens)} images of {each} patches after {prefix} "
            f"class tokens once, got keys {[tuple(t.k.shape) for t in tapped]}"
        )
    q, k, scale, lse = tapped[0]
    if prefix:  # cloned: a view of the class row would hold the queries of all patches alive
        q, lse = q[:, :, :prefix].clone(), None if lse is None else lse[:, :, :prefix]
    return Encoded(tokens, grids, q, k, prefix, scale, lse, patches=patches)


LLAVA = register(
    Adapter(
        model_types=("llava",),
        outer="model",
        text="model.language_model",
        sources=(
            Source(
                layers="model.vision_tower.encoder.layers",
                attention="self_attn",
                tap_layer=_tap_layer,
                encode=_encode,
            ),
        ),
    )
)
