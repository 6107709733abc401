"""CLIP and SigLIP towers of the LLaVA families: which layer speaks, and what it says of a patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .tap import Tapped

# Class tokens before the patches, by the tower's model type.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def option(config: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """An argument of a feature call, or what the config says where it is not given."""
    given = arguments.get(name)
    return getattr(config, name) if given is None else given


def class_tokens(config: Any) -> int:
    """Class tokens of the vision tower: 1 for CLIP, 0 for SigLIP.

    Raises:
        ValueError: another tower.
    """
    kind = config.vision_config.model_type
    if kind not in _CLASS_TOKENS:
        raise ValueError(f"the vision tower must be one of {', '.join(_CLASS_TOKENS)}, got {kind}")
    return _CLASS_TOKENS[kind]


def check_only_patches(config: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError unless the patches, all of them and nothing else, become features."""
    strategy = option(config, arguments, "vision_feature_select_strategy")
    right = "default" if class_tokens(config) else "full"
    if strategy != right:
        raise ValueError(
            f"vision_feature_select_strategy must be {right!r} with a "
            f"{config.vision_config.model_type} (the features are then all its patches), got "
            f"{strategy!r}"
        )


def feature_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    """The layer that produced `hidden_states[vision_feature_layer]`; entry 0 is the embedding.

    Of several feature layers the deepest: the other features of a patch went through it.

    Raises:
        ValueError: there is no such layer.
    """
    count = config.vision_config.num_hidden_layers
    feature = option(config, arguments, "vision_feature_layer")
    features = [feature] if isinstance(feature, int) else list(feature)
    layers = [entry - 1 if entry >= 0 else count + entry for entry in features]
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ValueError(
            f"vision_feature_layer must name one of the {count} layers of the tower, got {feature}"
        )
    return max(layers)


def tile_side(config: Any) -> int:
    """Patches along each side of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def tile_signals(
    tapped: list[Tapped], tiles: int, patches: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Saliency `[tiles, patches]` float32 and metric `[tiles, patches, d]` float32 of each tile.

    The saliency is what the class token attends to; without one, what a patch receives from all
    patches on average. The metric is the mean of the heads' keys.

    Args:
        tapped: calls of the tower's attention, one of them.
        tiles: how many tiles (images, crops or frames) it must have seen.
        patches: how many patches of each.
        prefix: class tokens before them.

    Raises:
        RuntimeError: it saw something else.
    """
    if len(tapped) != 1 or tapped[0].k.shape[::2] != (tiles, prefix + patches):
        raise RuntimeError(
            f"the tapped attention must see {tiles} tiles of {patches} patches after {prefix} "
            f"class tokens once, got keys {[tuple(t.k.shape) for t in tapped]}"
        )
    q, k, scale, lse = tapped[0]
    if prefix:
        q, lse = q[:, :, :prefix], None if lse is None else lse[:, :, :prefix]
    saliency = torch.ops.cdrop.attention_saliency(q, k, scale=scale, lse=lse, prefix=prefix)
    return saliency, k[:, :, prefix:].float().mean(1)
