"""Idefics3 and SmolVLM: square tiles, 4, 9 or 16 patches to a token.

Text tokens (`<row_1_col_2>`, ...) stand between the tiles of an image, and only the processor knows
which of them begin another image: every tile, and every frame of a video, counts as an image with a
budget of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped


def _tap_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    """The last layer, whose normalised output becomes the features."""
    return config.vision_config.num_hidden_layers - 1


def _encode(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    config: Any = model.config
    patch, factor = config.vision_config.patch_size, config.scale_factor
    pixels = arguments["pixel_values"]
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    each = height * width // factor**2
    # One tensor of all tiles, or, from transformers 5.18 on, the tokens of each prompt.
    features = output.pooler_output
    total = sum(part.shape[:-1].numel() for part in features)
    tiles = total // each
    encoded = Encoded((each,) * tiles, ((height // factor, width // factor),) * tiles)
    if tapped is None:
        return encoded
    if len(tapped) != 1 or tapped[0].k.shape[::2] != (tiles, height * width):
        raise RuntimeError(
            f"the tapped attention must see {tiles} tiles of {height * width} patches once, got "
            f"keys {[tuple(t.k.shape) for t in tapped]}"
        )
    channels = _channels(tapped[0], _shown(arguments, tiles, patch))
    connector: Any = model.get_submodule("model.connector")
    shuffled = connector.pixel_shuffle(channels, factor)
    # The patches of a token lie one after another, each with all its channels.
    merged = shuffled.unflatten(-1, (-1, channels.shape[-1])).mean(2)
    return replace(encoded, visual=merged[..., 0].unbind(), metric=merged[..., 1:].unbind())


def _channels(tapped: Tapped, shown: Tensor | None) -> Tensor:
    """Saliency and metric side by side, `[tiles, patches, 1 + d]` float32."""
    q, k, scale, lse = tapped
    saliency = torch.ops.cdrop.attention_saliency(
        q,
        k,
        scale=scale,
        lse=lse,
        key_valid=shown,
        query_weight=None if shown is None else shown.float(),
    )
    return torch.cat([saliency[..., None], k.float().mean(1)], -1)


def _shown(arguments: Mapping[str, Any], tiles: int, patch: int) -> Tensor | None:
    """Which patches of the tiles that were encoded hold any picture, `[tiles, patches]` bool; None:
    all. Tiles that only fill a prompt up to the number of another's are black, and not encoded."""
    mask, pixels = arguments.get("pixel_attention_mask"), arguments["pixel_values"]
    if mask is None:
        return None
    black = ~pixels.flatten(0, 1).flatten(1).any(1)
    real = black.int().argsort(stable=True)[:tiles].sort().values
    shown = nn.functional.max_pool2d(mask.flatten(0, 1)[real].float()[:, None], patch)
    return shown.flatten(1) > 0


IDEFICS3 = register(
    Adapter(
        model_types=("idefics3", "smolvlm"),
        outer="model",
        text="model.text_model",
        sources=(
            Source(
                layers="model.vision_model.encoder.layers",
                attention="self_attn",
                tap_layer=_tap_layer,
                encode=_encode,
            ),
        ),
    )
)
