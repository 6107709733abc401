"""What the patch must know of a model family: an `Adapter`, found by `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .tap import Tapped


class Encoded(NamedTuple):
    """The images of one encoder call, token by token.

    Attributes:
        tokens: `N`, visual tokens per image.
        images: `R`, images.
        grid: height and width of the patch grid.
        q_vis: `[R, Hv, Mv, dv]`, k_vis: `[R, Hv, P+N, dv]`, prefix: `P`, scale: as in
            `consensusdrop_kernels.methods.Signals`; without a tap None, None, 0, None.
    """

    tokens: int
    images: int
    grid: tuple[int, int]
    q_vis: Tensor | None = None
    k_vis: Tensor | None = None
    prefix: int = 0
    scale: float | None = None


@dataclass(frozen=True)
class Adapter:
    """A model family, as data and two small functions.

    Attributes:
        model_types: values of `config.model_type` it serves.
        outer: path from the model to the module that puts image features into the text.
        text: path from the model to the decoder stack (it has `layers`).
        layers: path from the model to the encoder's list of layers.
        attention: path from an encoder layer to its attention module.
        features: name of the outer module's method that encodes and projects images.
        pixels: names of the inputs that bring images.
        modality: their key in `mm_encoder_outputs`.
        visual_ids: names of the config entries that hold the placeholder token ids.
        tap_layer: `(config, arguments) -> int`, the encoder layer whose attention speaks for the
            features in use, as an index into `layers`; raises ValueError, with the reason, for a
            configuration that is not supported. `arguments` are those of `features`, or empty.
        encode: `(model, tapped or None, output, arguments) -> Encoded`: splits the tapped queries
            and keys of the whole batch into images of tokens as the LLM will see them.
    """

    model_types: tuple[str, ...]
    outer: str
    text: str
    layers: str
    attention: str
    tap_layer: Callable[[Any, Mapping[str, Any]], int]
    encode: Callable[[nn.Module, list[Tapped] | None, Any, Mapping[str, Any]], Encoded]
    features: str = "get_image_features"
    pixels: tuple[str, ...] = ("pixel_values",)
    modality: str = "image"
    visual_ids: tuple[str, ...] = ("image_token_id",)


_REGISTRY: dict[str, Adapter] = {}


def register(adapter: Adapter) -> Adapter:
    """Make an adapter known for its model types."""
    _REGISTRY.update(dict.fromkeys(adapter.model_types, adapter))
    return adapter


def supported() -> list[str]:
    """Model types with an adapter."""
    return sorted(_REGISTRY)


def find(config: Any) -> Adapter:
    """The adapter of a model, by its config.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in _REGISTRY:
        raise ValueError(
            f"model_type must be one of {', '.join(supported())}, got {model_type!r} "
            "(for another family pass adapter=Adapter(...))"
        )
    return _REGISTRY[model_type]
