"""Mistral 3: images of several sizes in one batch, a break after each row."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from . import Family, Inputs, family, loud, noise, pad_left, prompt, words

END, BREAK, IMAGE, PAD, VOCAB = 96, 97, 98, 0, 99
STEP = 8  # pixels: patches of 4, two by two to a token


def mistral3() -> Any:
    """A random Mistral 3."""
    text = MistralConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=None, sliding_window=None,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=64, patch_size=4,
    )  # fmt: skip
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = loud(Mistral3ForConditionalGeneration(config), IMAGE)
    model.generation_config.pad_token_id = PAD
    return model


def image_ids(height: int, width: int) -> list[int]:
    """Placeholders of an image of `height * width` tokens, a break after each row but the last."""
    rows = [[IMAGE] * width + [BREAK] for _ in range(height)]
    return [*sum(rows, [])[:-1], END]


def sample(
    seed: int, sizes: list[tuple[int, int]], before: int = 1, after: int = 4, canvas: int = 5
) -> Inputs:
    """Images of so many rows and columns of tokens, padded to one canvas."""
    ids = [1, *words(before, 2, END, seed)]
    for at, size in enumerate(sizes):
        last = at == len(sizes) - 1
        ids += image_ids(*size) + words(after if last else 2, 2, END, seed + 10 * at)
    pixels = noise(len(sizes), 3, STEP * canvas, STEP * canvas, seed=seed)
    sides = torch.tensor(sizes) * STEP
    return prompt(ids) | {"pixel_values": pixels, "image_sizes": sides}


family(
    Family(
        name="mistral3",
        build=mistral3,
        samples=lambda: [sample(0, [(3, 4)]), sample(1, [(2, 3), (4, 5)], before=3, after=6)],
        join=lambda samples: pad_left(samples, PAD),
        # Before 5.18 generate repeats each picture, not each prompt's pictures: with two of
        # different sizes they no longer fit their places.
        beams=not transformers.__version__.startswith("5.17."),
    )
)
