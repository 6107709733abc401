"""PaliGemma (on Gemma and on Gemma 2) and Gemma 3, with windows shorter than the prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from . import Family, Inputs, family, loud, noise, pad_left, prompt, words

IMAGE, PAD, VOCAB = 98, 0, 99
WINDOW = 9
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": None, "query_pre_attn_scalar": 12,
}  # fmt: skip


def _tower() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8, vision_use_head=False,
    )  # fmt: skip


def paligemma(text: str) -> Any:
    """A random PaliGemma: 16 tokens an image."""
    if text == "gemma":
        config: Any = GemmaConfig(**{k: v for k, v in _SHARED.items() if k[:5] != "query"})
    else:
        config = Gemma2Config(**_SHARED, sliding_window=WINDOW)
    whole = PaliGemmaConfig(
        vision_config=_tower(), text_config=config, image_token_index=IMAGE, projection_dim=48,
        hidden_size=48, vocab_size=VOCAB,
    )  # fmt: skip
    model = loud(PaliGemmaForConditionalGeneration(whole), IMAGE)
    model.generation_config.pad_token_id = PAD
    return model


def gemma3() -> Any:
    """A random Gemma 3: 64 patches, 16 tokens an image."""
    text = Gemma3TextConfig(
        **_SHARED,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    config = Gemma3Config(
        vision_config=_tower().to_dict() | {"patch_size": 4}, text_config=text,
        image_token_index=IMAGE, mm_tokens_per_image=16,
    )  # fmt: skip
    model = loud(Gemma3ForConditionalGeneration(config), IMAGE)
    model.generation_config.pad_token_id = PAD
    return model


def sample(
    seed: int, images: int, *, suffix: int = 0, before: int = 1, after: int = 4, gap: int = 2,
    blocks: bool = False,
) -> Inputs:  # fmt: skip
    """Images with words before, between and after; token types are 1 for images (`blocks`), or for
    the last `suffix` words."""
    ids = [1, *words(before, 2, IMAGE, seed)]
    for at in range(images):
        count = after if at == images - 1 else gap
        ids += [IMAGE] * 16 + words(count, 2, IMAGE, seed + 10 * at)
    out = prompt(ids)
    types = torch.zeros_like(out["input_ids"])
    if blocks:
        types = (out["input_ids"] == IMAGE).long()
    elif suffix:
        types[:, -suffix:] = 1
    return out | {"token_type_ids": types, "pixel_values": noise(images, 3, 32, 32, seed=seed)}


def join(samples: list[Inputs]) -> Inputs:
    return pad_left(samples, PAD, {"token_type_ids": 0})


for _text in ("gemma", "gemma2"):
    family(
        Family(
            name=f"paligemma-{_text}",
            build=lambda text=_text: paligemma(text),
            # With a word of the answer: what follows it is causal. (Of a prompt that ends with the
            # prefix, transformers 5.17 takes what was generated for a part of it, without a cache.)
            samples=lambda: [sample(0, 1, suffix=1), sample(1, 2, suffix=2, before=3, after=6)],
            join=join,
        )
    )

family(
    Family(
        name="gemma3",
        build=gemma3,
        samples=lambda: [sample(0, 1, blocks=True), sample(1, 2, blocks=True, before=4, after=5)],
        join=join,
    )
)
