"""InternVL: one image of three tiles, another of one, text between."""

from __future__ import annotations

from typing import Any

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
    Qwen3Config,
)

from . import Family, Inputs, family, loud, noise, pad_left, prompt, words

IMAGE, PAD, VOCAB = 98, 0, 99
TILE = 16  # tokens: 64 x 64 pixels, patches of 8, four to a token


def internvl(text: str, *, qk_norm: bool = False) -> Any:
    """A random InternVL."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=[64, 64], patch_size=[8, 8], use_qk_norm=qk_norm, layer_scale_init_value=0.5,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**shared)
        if text == "qwen2"
        else Qwen3Config(**shared, head_dim=12),
        image_token_id=IMAGE,
        image_seq_length=TILE,
    )
    model = loud(InternVLForConditionalGeneration(config), IMAGE)
    model.generation_config.pad_token_id = PAD
    return model


def sample(seed: int, tiles: tuple[int, ...], before: int = 1, after: int = 4) -> Inputs:
    """Images of so many tiles each, two words between them."""
    ids = [1, *words(before, 2, IMAGE, seed)]
    for at, count in enumerate(tiles):
        last = at == len(tiles) - 1
        ids += [IMAGE] * TILE * count + words(after if last else 2, 2, IMAGE, seed + 10 * at)
    return prompt(ids) | {"pixel_values": noise(sum(tiles), 3, 64, 64, seed=seed)}


for _text in ("qwen2", "qwen3"):
    family(
        Family(
            name=f"internvl-{_text}",
            build=lambda text=_text: internvl(text, qk_norm=text == "qwen3"),
            samples=lambda: [sample(0, (1,)), sample(1, (3, 1), before=3, after=5)],
            join=lambda samples: pad_left(samples, PAD),
        )
    )
