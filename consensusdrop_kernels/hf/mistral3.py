"""Mistral 3 (Small 3.1 and later): a Pixtral tower, all images packed, four patches to a token.

After each row of an image the prompt has an [IMG_BREAK] and after the last an [IMG_END]: these are
text tokens, which stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped
from .towers import feature_layer, option


def _tap_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    tower = config.vision_config
    if tower.model_type != "pixtral":
        raise ValueError(f"the vision tower must be a pixtral, got {tower.model_type}")
    feature = option(config, arguments, "vision_feature_layer")
    if not isinstance(feature, int):
        raise ValueError(
            f"vision_feature_layer must be one layer (a list has no one attention), got {feature}"
        )
    return feature_layer(config, arguments)


def _encode(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    config: Any = model.config
    patch, merge = config.vision_config.patch_size, config.spatial_merge_size
    pixels = torch.as_tensor(arguments["image_sizes"]).tolist()
    sizes = [(height // patch, width // patch) for height, width in pixels]
    grids = tuple((height // merge, width // merge) for height, width in sizes)
    encoded = Encoded(tuple(len(image) for image in output.pooler_output), grids)
    if tapped is None:
        return encoded
    channels = _channels(tapped, [height * width for height, width in sizes])
    merged = [
        nn.functional.avg_pool2d(image.T.unflatten(1, size), merge).flatten(1).T
        for image, size in zip(channels, sizes, strict=True)
    ]
    return replace(
        encoded,
        visual=tuple(image[:, 0] for image in merged),
        metric=tuple(image[:, 1:] for image in merged),
    )


def _channels(tapped: list[Tapped], counts: list[int]) -> tuple[Tensor, ...]:
    """Saliency and metric side by side, `[patches_i, 1 + d]` float32 of each image.

    All images are one sequence; a patch attends to those of its own image.
    """
    total = sum(counts)
    if len(tapped) != 1 or tapped[0].k.shape[::2] != (1, total):
        raise RuntimeError(
            f"the tapped attention must see {total} patches in one sequence once, got keys "
            f"{[tuple(t.k.shape) for t in tapped]}"
        )
    q, k, scale, lse = tapped[0]
    starts = torch.tensor([0, *counts]).cumsum(0).to(k.device, torch.int32)
    saliency = torch.ops.cdrop.attention_saliency.varlen(
        q[0].transpose(0, 1), k[0].transpose(0, 1), starts, max(counts), scale=scale,
        lse=None if lse is None else lse[0],
    )  # fmt: skip
    return torch.cat([saliency[:, None], k[0].float().mean(0)], 1).split(counts)


MISTRAL3 = register(
    Adapter(
        model_types=("mistral3",),
        outer="model",
        text="model.language_model",
        sources=(
            Source(
                layers="model.vision_tower.transformer.layers",
                attention="attention",
                tap_layer=_tap_layer,
                encode=_encode,
            ),
        ),
    )
)
