"""Idefics3 and SmolVLM: tiles with text tokens between, a ragged number of them in each prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from . import Family, Inputs, family, loud, noise, pad_left, prompt, words

ROW, IMAGE, PAD, VOCAB = 97, 98, 0, 99
TILE = 16  # tokens: 64 x 64 pixels, patches of 8, four to a token


def idefics3(kind: str) -> Any:
    """A random Idefics3 or SmolVLM."""
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
    }  # fmt: skip
    config, model = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    }[kind]
    made = config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
    made = loud(model(made), IMAGE)
    made.generation_config.pad_token_id = PAD
    return made


def sample(
    seed: int, tiles: int, before: int = 1, after: int = 4, side: tuple[int, int] = (64, 64)
) -> Inputs:
    """Tiles one after another, each after a row token; the last is `side` large and padded."""
    ids = [1, *words(before, 2, ROW, seed)]
    for _ in range(tiles):
        ids += [ROW] + [IMAGE] * TILE
    pixels = noise(1, tiles, 3, 64, 64, seed=seed)
    mask = torch.ones(1, tiles, 64, 64, dtype=torch.long)
    height, width = side
    mask[:, -1, height:] = 0
    mask[:, -1, :, width:] = 0
    pixels = pixels * mask[:, :, None]
    return prompt(ids + words(after, 2, ROW, seed)) | {
        "pixel_values": pixels, "pixel_attention_mask": mask,
    }  # fmt: skip


def join(samples: list[Inputs]) -> Inputs:
    """Padded at the left; prompts with fewer tiles get black ones."""
    most = max(s["pixel_values"].shape[1] for s in samples)
    padded = []
    for one in samples:
        more = most - one["pixel_values"].shape[1]
        pixels = torch.nn.functional.pad(one["pixel_values"], (0, 0) * 3 + (0, more))
        mask = torch.nn.functional.pad(one["pixel_attention_mask"], (0, 0) * 2 + (0, more))
        padded.append(one | {"pixel_values": pixels, "pixel_attention_mask": mask})
    return pad_left(padded, PAD)


for _kind in ("idefics3", "smolvlm"):
    family(
        Family(
            name=_kind,
            build=lambda kind=_kind: idefics3(kind),
            samples=lambda: [sample(0, 1), sample(1, 3, before=3, after=6, side=(64, 40))],
            join=join,
        )
    )
