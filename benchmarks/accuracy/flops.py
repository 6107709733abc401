"""What a prefill costs, counted from a model's configuration, and what a choice of tokens adds.

Counted are matrix products, two operations per multiply-add, as `torch.utils.flop_counter` does;
an attention of `n` tokens counts as the full square. With `n_l` the tokens (text and visual) that
decoder layer `l` sees:

| part | operations |
|---|---|
| patches | `2 N 3 p^2 W` |
| vision layer, all of them, `n` with the class token | `2 n (4 W^2 + 2 W I) + 4 n^2 W` |
| projector | `2 N (W D + D^2)` |
| decoder layer | `2 n_l (2 D H d + 2 D Hk d + 3 D I) + 4 n_l^2 H d` |
| head, one row | `2 D V` |

LLaVA-NeXT has the first three once for each tile of its picture. Qwen2.5-VL has its own:

| part | operations |
|---|---|
| patches, of two frames | `2 N 6 p^2 W` |
| vision layer; `n_w` the patches of a window, of the whole frame in a few layers | \
`2 N (4 W^2 + 3 W I) + 4 W sum(n_w^2)` |
| merger, `m = 4` patches to a token | `2 N / m ((m W)^2 + m W D)` |

Norms, activations, rotary angles and the resizing of pictures count nothing, nor does padding: the
figures are a question's own, whatever batch it came in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from consensusdrop_kernels import patch
from consensusdrop_kernels.methods import Method

#: Decoders whose layers are attention and one gated MLP.
_DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3")


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one question about one image.

    Attributes:
        vision: operations from the pixels to the projected tokens.
        layers: of the decoder.
        linear: operations of a token in a decoder layer, but for attention.
        square: operations of an attention of one token to one.
        head: operations of the logits of one row.
        kv: bytes of a token's keys and values in a layer.
    """

    vision: int
    layers: int
    linear: int
    square: int
    head: int
    kv: int

    @classmethod
    def of(cls, config: Any, itemsize: int, inputs: Mapping[str, Any] | None = None) -> Cost:
        """The cost of a LLaVA, a LLaVA-NeXT or a Qwen2.5-VL.

        Args:
            config: its configuration.
            itemsize: bytes of a key's element.
            inputs: a prompt, as the model takes it; only LLaVA, all of whose pictures have one
                size, can do without.

        Raises:
            ValueError: the model is built otherwise, or its pictures have no size; nothing is
                counted then.
        """
        text = config.get_text_config()
        if config.model_type not in _VISION or text.model_type not in _DECODERS:
            raise ValueError(
                f"operations are counted for {', '.join(_VISION)} with a decoder of "
                f"{', '.join(_DECODERS)}, not for {config.model_type} with {text.model_type}"
            )
        width, heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or width // heads
        keys = text.num_key_value_heads * head_dim
        linear = 2 * width * (2 * heads * head_dim + 2 * keys + 3 * text.intermediate_size)
        return cls(
            _VISION[config.model_type](config, width, inputs or {}),
            text.num_hidden_layers,
            linear,
            4 * heads * head_dim,
            2 * width * text.vocab_size,
            2 * keys * itemsize,
        )

    def prefill(self, tokens: Sequence[int]) -> int:
        """Operations of a prefill whose layers see so many tokens, without the choice of tokens."""
        decoder = sum(n * self.linear + n * n * self.square for n in tokens)
        return self.vision + decoder + self.head

    def kv_bytes(self, tokens: Sequence[int]) -> int:
        """Bytes of the KV cache after that prefill."""
        return self.kv * sum(tokens)


def _llava(config: Any, out: int, inputs: Mapping[str, Any]) -> int:
    """One tile: tower and projector."""
    tower = config.vision_config
    clip = tower.model_type == "clip_vision_model"
    if not clip and (tower.model_type != "siglip_vision_model" or tower.vision_use_head):
        raise ValueError(
            "operations are counted for towers of CLIP, and of SigLIP without a pooling head, "
            f"not for this {tower.model_type}"
        )
    width, patch_size = tower.hidden_size, tower.patch_size
    patches = (tower.image_size // patch_size) ** 2
    rows = patches + clip
    read = config.vision_feature_layer
    features = width * (1 if isinstance(read, int) else len(read))
    tokens = patches if config.vision_feature_select_strategy == "default" else rows
    linear = 2 * rows * (4 * width**2 + 2 * width * tower.intermediate_size)
    return (
        2 * patches * tower.num_channels * patch_size**2 * width
        + tower.num_hidden_layers * (linear + 4 * rows**2 * width)
        + 2 * tokens * (features * out + out**2)
    )


def _llava_next(config: Any, out: int, inputs: Mapping[str, Any]) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = _sizes(config, inputs, "image_sizes")
    side, grids = config.vision_config.image_size, config.image_grid_pinpoints
    tiles = sum(image_size_to_num_patches(size, grids, side) for size in sizes)
    return tiles * _llava(config, out, inputs)


def _qwen2_5_vl(config: Any, out: int, inputs: Mapping[str, Any]) -> int:
    tower = config.vision_config
    width, merge = tower.hidden_size, tower.spatial_merge_size
    window = tower.window_size // tower.patch_size
    patches = whole = windowed = 0
    for frames, *sides in _sizes(config, inputs, "image_grid_thw"):
        high, wide = sides
        patches += frames * high * wide
        whole += frames * (high * wide) ** 2
        high, wide = (_squares(side, window) for side in sides)
        windowed += frames * high * wide
    full = len(tower.fullatt_block_indexes)
    attended = full * whole + (tower.depth - full) * windowed
    pixels = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    inner = merge**2 * width
    return (
        2 * patches * pixels * width
        + 2 * tower.depth * patches * (4 * width**2 + 3 * width * tower.intermediate_size)
        + 4 * attended * width
        + 2 * patches // merge**2 * (inner**2 + inner * out)
    )


def _squares(side: int, window: int) -> int:
    """Sum of the squares of the lengths of windows along a side; the last may be a short one."""
    return side // window * window**2 + (side % window) ** 2


def _sizes(config: Any, inputs: Mapping[str, Any], name: str) -> list[list[int]]:
    if name not in inputs:
        raise ValueError(
            f"operations of {config.model_type} depend on its pictures: they are counted where "
            f"{name} is known"
        )
    found: list[list[int]] = inputs[name].tolist()
    return found


#: By the model type: operations from the pixels to tokens of the decoder's width.
_VISION = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen2_5_vl}


def layer_tokens(
    text: int, visual: int, stages: Sequence[int], at: Sequence[int], layers: int
) -> list[int]:
    """Tokens that each of the decoder's layers sees.

    Args:
        text: tokens of the prompt that are no image.
        visual: visual tokens that enter the decoder.
        stages, at: visual tokens after each stage inside it, and the layers before which these are.
        layers: of the decoder.
    """
    seen = [text + visual] * layers
    for left, first in zip(stages, at, strict=True):
        seen[first:] = [text + left] * (layers - first)
    return seen


def counter() -> FlopCounterMode:
    """Counts what runs under it, the ops of this package and attention on the CPU included.

    An op counts as the mathematics of its definition does, whatever a kernel computes again.
    """
    ops, aten = torch.ops.cdrop, torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
            ops.attention_saliency: _saliency,
            ops.similarity_saliency: _similarity,
            ops.greedy_diverse_select: _greedy,
            ops.token_merge: _merge,
            ops.select_merge: _select_merge,
        },
    )


# Called with the shapes of tensors in their place.


def _sdpa(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _saliency(q: Any, k: Any, *_: Any, **__: Any) -> int:
    batch, heads, rows, width = q
    return 2 * batch * heads * rows * width * k[2]


def _similarity(text: Any, visual: Any, *_: Any, **__: Any) -> int:
    return 2 * text[0] * text[1] * text[2] * visual[1]


def _greedy(features: Any, keep: int, *, objective: str = "maxmin", **_: Any) -> int:
    batch, tokens, width = features
    first = tokens**2 if objective == "maxmin" else 0
    return 2 * batch * width * (keep * tokens + first)


def _merge(x: Any, metric: Any, index: Any, *, contextual: int = 0, **_: Any) -> int:
    batch, tokens, width = metric
    slots = contextual or index[1]
    return 2 * batch * (tokens - index[1] - contextual) * slots * width


def _select_merge(
    x: Any, q_vis: Any, k_vis: Any, q_txt: Any = None, k_txt: Any = None, *, keep: int,
    contextual: int = 0, metric: Any = None, diversity: float = 0.0, **_: Any,
) -> int:  # fmt: skip
    by_text = 0 if q_txt is None else _saliency(q_txt, k_txt)
    metric = metric or (*x[:2], k_vis[3])
    merging = _merge(x, metric, (x[0], keep), contextual=contextual)
    choice = _greedy(metric, keep, objective="dpp") if diversity > 0 else 0
    return _saliency(q_vis, k_vis) + by_text + choice + merging


@torch.no_grad()
def selection(model: Any, inputs: Any, method: Method, cost: Cost) -> int:
    """Operations that a method adds to a prefill: what runs of it, less what `Cost` says.

    Args:
        model: what `cost` is of, without a patch.
        inputs: one prompt with one image.
        method: to patch it with.
        cost: the model's.
    """
    with patch(model, method) as handle, counter() as count:
        model(**inputs, logits_to_keep=1)
    assert handle.last is not None
    text = int(inputs["attention_mask"].sum()) - handle.last.tokens_before[0]
    at = handle.method.stages(cost.layers) if handle.last.stages else ()
    left = [after[0] for after in handle.last.stages]
    seen = layer_tokens(text, handle.last.tokens_after[0], left, at, cost.layers)
    return count.get_total_flops() - cost.prefill(seen)
