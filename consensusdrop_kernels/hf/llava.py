"""LLaVA 1.5: a CLIP tower with CLS, one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter import Adapter, Encoded, Source, register
from .tap import Tapped


def _tap_layer(config: Any, arguments: Mapping[str, Any]) -> int:
    """The layer that produced `hidden_states[vision_feature_layer]`; entry 0 is the embedding."""
    tower = config.vision_config
    if tower.model_type != "clip_vision_model":
        raise ValueError(
            f"the vision tower must be a clip_vision_model (its class token weighs the patches), "
            f"got {tower.model_type}"
        )
    strategy = arguments.get("vision_feature_select_strategy")
    strategy = config.vision_feature_select_strategy if strategy is None else strategy
    if strategy != "default":
        raise ValueError(
            "vision_feature_select_strategy must be 'default' (the class token stays out of the "
            f"prompt), got {strategy!r}"
        )
    feature = arguments.get("vision_feature_layer")
    feature = config.vision_feature_layer if feature is None else feature
    if not isinstance(feature, int):
        raise ValueError(
            f"vision_feature_layer must be one layer (a list has no one attention), got {feature}"
        )
    layer = feature - 1 if feature >= 0 else tower.num_hidden_layers + feature
    if not 0 <= layer < tower.num_hidden_layers:
        raise ValueError(
            f"vision_feature_layer must name one of the {tower.num_hidden_layers} layers of the "
            f"tower, got {feature}"
        )
    return layer


def _encode(
    model: nn.Module, tapped: list[Tapped] | None, output: Any, arguments: Mapping[str, Any]
) -> Encoded:
    features = output.pooler_output
    tokens = tuple(len(image) for image in features)
    config: Any = model.config
    pixels = arguments["pixel_values"]
    patch = config.vision_config.patch_size
    grids = ((pixels.shape[-2] // patch, pixels.shape[-1] // patch),) * len(tokens)
    if tapped is None:
        return Encoded(tokens, grids)
    each = tokens[0] if tokens else 0
    if len(tapped) != 1 or tapped[0].k.shape[::2] != (len(tokens), each + 1):
        raise RuntimeError(
            f"the tapped attention must see {len(tokens)} images of {each} patches and a class "
            f"token once, got keys {[tuple(t.k.shape) for t in tapped]}"
        )
    q, k, scale = tapped[0]
    # Cloned: a view of the class row would hold the queries of all patches alive.
    return Encoded(tokens, grids, q[:, :, :1].clone(), k, 1, scale)


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
