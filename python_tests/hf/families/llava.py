"""LLaVA: the random model of the other tests, and one with other towers and feature options."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from ..models import IMAGE, PAD, SIDE, TOKENS, VOCAB, pixels, random_llava
from . import Family, Inputs, family, loud, pad_left, prompt, words


def sample(seed: int, before: int, *after: int, tokens: int = TOKENS) -> Inputs:
    """A prompt of `before` words, then for every number an image and as many words."""
    ids = [1, *words(before, 2, IMAGE, seed)]
    for at, count in enumerate(after):
        ids += [IMAGE] * tokens + words(count, 2, IMAGE, seed + 10 * at)
    return prompt(ids) | {"pixel_values": pixels(len(after), seed)}


def build(tower: str, **options: Any) -> Any:
    """A LLaVA with a "clip" or "siglip" tower and random weights."""
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8,
    }  # fmt: skip
    vision: Any = CLIPVisionConfig(**sizes)
    if tower == "siglip":
        vision = SiglipVisionConfig(vision_use_head=False, **sizes)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1,
            eos_token_id=None,
        ),
        image_token_index=IMAGE, image_seq_length=TOKENS, **options,
    )  # fmt: skip
    model = loud(LlavaForConditionalGeneration(config), IMAGE)
    model.generation_config.pad_token_id = PAD
    return model


def _family(name: str, make: Any, tokens: int = TOKENS) -> None:
    family(
        Family(
            name=f"llava-{name}",
            build=make,
            samples=lambda: [sample(0, 3, 4, tokens=tokens), sample(1, 1, 2, 5, tokens=tokens)],
            join=lambda samples: pad_left(samples, PAD),
        )
    )


for _text in ("llama", "qwen3"):
    _family(_text, lambda text=_text: random_llava(text))
_family(
    "siglip",
    lambda: build("siglip", vision_feature_select_strategy="full", vision_feature_layer=-1),
)
_family("full", lambda: build("clip", vision_feature_select_strategy="full"), TOKENS + 1)
_family("layers", lambda: build("clip", vision_feature_layer=[-2, -4]))
