"""What the patch must know of a model family: an `Adapter`, found by `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .tap import Tapped


@dataclass(frozen=True)
class Encoded:
    """The images of one encoder call (or its videos), token by token as the LLM will see them.

    Two ways to say what the encoder found. Where one patch is one token: the queries and keys
    themselves, `q_vis`, `k_vis`, `prefix`, `scale`. Where patches are pooled, shuffled or cut and
    pasted on their way to the LLM: `visual` and `metric`, sent the same way. None of them without a
    tap.

    Attributes:
        tokens: features of each image, `[R]`, as many as it has placeholders.
        grids: height and width of the patch grid of each image.
        q_vis: `[R, Hv, Mv, dv]`, k_vis: `[R, Hv, P+N, dv]`, prefix: `P`, scale, lse_vis: as in
            `consensusdrop_kernels.methods.Signals`; only where all images have `N` tokens.
        visual: saliency of each patch feature, `[N_i]` float32 per image.
        metric: what to merge by, `[N_i, F]` per image.
        patches: which features are patches, bool `[tokens_i]` on the CPU per image; the others (a
            line break, a class token) are no candidates, see `patch(..., breaks=)`. None: all.
        crops: how the patches of each image divide into crops or frames, in order.
        crop_grids: height and width of each of them; None: they divide `grids`.
    """

    tokens: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    q_vis: Tensor | None = None
    k_vis: Tensor | None = None
    prefix: int = 0
    scale: float | None = None
    lse_vis: Tensor | None = None
    visual: tuple[Tensor, ...] | None = None
    metric: tuple[Tensor, ...] | None = None
    patches: tuple[Tensor, ...] | None = None
    crops: tuple[tuple[int, ...], ...] | None = None
    crop_grids: tuple[tuple[tuple[int, int], ...], ...] | None = None

    @property
    def images(self) -> int:
        """`R`."""
        return len(self.tokens)

    def is_patch(self, image: int) -> Tensor | None:
        """Which features of an image are patches; None: all."""
        return None if self.patches is None else self.patches[image]


@dataclass(frozen=True)
class Source:
    """One way for pictures into a model: its image path, or its video path.

    Attributes:
        layers: path from the model to the encoder's list of layers.
        attention: path from an encoder layer to its attention module.
        tap_layer: `(config, arguments) -> int`, the encoder layer whose attention speaks for the
            features in use, as an index into `layers`; raises ValueError, with the reason, for a
            configuration that is not supported. `arguments` are those of `features`, or empty.
        encode: `(model, tapped or None, output, arguments) -> Encoded`: splits the tapped queries
            and keys of the whole batch into images of tokens as the LLM will see them.
        features: name of the outer module's method that encodes and projects.
        pixels: names of the inputs that bring the pictures.
        modality: their key in `mm_encoder_outputs`.
        visual_id: name of the config entry that holds the placeholder token id.
        joined: the encoder is given crops, not told whose they are: those that stand side by side
            in a prompt are of one image.
    """

    layers: str
    attention: str
    tap_layer: Callable[[Any, Mapping[str, Any]], int]
    encode: Callable[[nn.Module, list[Tapped] | None, Any, Mapping[str, Any]], Encoded]
    features: str = "get_image_features"
    pixels: tuple[str, ...] = ("pixel_values",)
    modality: str = "image"
    visual_id: str = "image_token_id"
    joined: bool = False


@dataclass(frozen=True)
class Adapter:
    """A model family, as data and the two small functions of each source.

    Attributes:
        model_types: values of `config.model_type` it serves.
        outer: path from the model to the module that puts image features into the text.
        text: path from the model to the decoder stack (it has `layers`).
        sources: where pictures come in.
        spatial_positions: rotary positions have height and width (M-RoPE): tokens keep their own.
        first_stage: `config -> int`, the first decoder layer before which tokens may be dropped: 1,
            or past the layers that features are added to.
        whole_masks: image tokens see each other, so that masks say more than what is padding.
        required: names of inputs without which a prompt with images is not what it should be.
    """

    model_types: tuple[str, ...]
    outer: str
    text: str
    sources: tuple[Source, ...]
    spatial_positions: bool = False
    first_stage: Callable[[Any], int] = lambda config: 1
    whole_masks: bool = False
    required: tuple[str, ...] = ()


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
