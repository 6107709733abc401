"""PaliGemma and Gemma 3: a SigLIP tower, and image tokens that see each other in the decoder.

PaliGemma has one token per patch, and its whole prompt sees itself in both directions; Gemma 3
averages blocks of patches, and the tokens of an image see each other. Both therefore hand whole
masks to the decoder; what is left of a prompt sees what it saw. Windows of sliding layers count the
tokens that are left, as the KV cache of such a layer does.

The question probe goes by plain causal attention: of `probe_context="all"`, that is what layer 0
computes only for text after the image that no window cuts off (and up to Gemma 2's soft cap).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped
from .towers import tile_signals


def _tap_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    """The last layer, whose normalised output becomes the features."""
    tower = config.vision_config
    if tower.model_type != "siglip_vision_model":
        raise ValueError(f"the vision tower must be a siglip_vision_model, got {tower.model_type}")
    return tower.num_hidden_layers - 1


def _encode_patches(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    images, patches = output.pooler_output.shape[:2]
    side = _side(model)
    encoded = Encoded((patches,) * images, ((side, patches // side),) * images)
    if tapped is None:
        return encoded
    visual, metric = tile_signals(tapped, images, patches, 0)
    return replace(encoded, visual=visual.unbind(), metric=metric.unbind())


def _encode_pooled(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    images, tokens = output.pooler_output.shape[:2]
    projector: Any = model.get_submodule("model.multi_modal_projector")
    grid = projector.tokens_per_side
    encoded = Encoded((tokens,) * images, ((grid, tokens // grid),) * images)
    if tapped is None:
        return encoded
    side = _side(model)
    visual, metric = tile_signals(tapped, images, side * side, 0)
    channels = torch.cat([visual[..., None], metric], -1)
    pooled: Tensor = projector.avg_pool(channels.transpose(1, 2).unflatten(2, (side, side)))
    pooled = pooled.flatten(2).transpose(1, 2)
    return replace(encoded, visual=pooled[..., 0].unbind(), metric=pooled[..., 1:].unbind())


def _side(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.vision_config.image_size // config.vision_config.patch_size)


PALIGEMMA = register(
    Adapter(
        model_types=("paligemma",),
        outer="model",
        text="model.language_model",
        sources=(
            Source(
                layers="model.vision_tower.encoder.layers",
                attention="self_attn",
                tap_layer=_tap_layer,
                encode=_encode_patches,
            ),
        ),
        whole_masks=True,
        required=("token_type_ids",),
    )
)

GEMMA3 = register(
    Adapter(
        model_types=("gemma3",),
        outer="model",
        text="model.language_model",
        sources=(
            Source(
                layers="model.vision_tower.encoder.layers",
                attention="self_attn",
                tap_layer=_tap_layer,
                encode=_encode_pooled,
            ),
        ),
        whole_masks=True,
    )
)
