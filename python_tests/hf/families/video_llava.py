"""Video-LLaVA with random weights: images, videos, and both."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from . import Family, Inputs, family, loud, noise, prompt, words

PAD, IMAGE, VIDEO, VOCAB = 0, 97, 98, 99
PATCHES, PIXELS = 16, 32  # of an image or a frame, and along its side
Part = int | tuple[str, int]  # so many words, or an image or a video of so many frames

# The name of the images' pixels changed in transformers 5.23.
_NAMES = inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
IMAGE_PIXELS = "pixel_values" if "pixel_values" in _NAMES else "pixel_values_images"


def build(**options: Any) -> Any:
    """A model with random weights."""
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            image_size=PIXELS, patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1,
            eos_token_id=None,
        ),
        image_token_index=IMAGE, video_token_index=VIDEO, **options,
    )  # fmt: skip
    model = loud(VideoLlavaForConditionalGeneration(config), IMAGE, VIDEO)
    model.generation_config.pad_token_id = PAD
    return model


def sample(seed: int, *parts: Part, with_class: bool = False) -> Inputs:
    """A prompt of words, images (their class token a feature of its own or not) and videos."""
    ids: list[int] = [1]
    pixels: dict[str, list[Any]] = {}
    for at, part in enumerate(parts):
        if isinstance(part, int):
            ids += words(part, 2, IMAGE, seed + at)
            continue
        kind, frames = part
        made = noise(frames, 3, PIXELS, PIXELS, seed=seed + 50 + at)
        if kind == "image":
            ids += [IMAGE] * (PATCHES + with_class) * frames
            pixels.setdefault(IMAGE_PIXELS, []).append(made)
        else:
            ids += [VIDEO] * (PATCHES + 1) * frames
            pixels.setdefault("pixel_values_videos", []).append(made[None])
    return prompt(ids) | {name: torch.cat(values) for name, values in pixels.items()}


def join(samples: list[Inputs]) -> Inputs:
    """One batch, padded at the left; pictures in order, of whichever samples have any."""
    length = max(s["input_ids"].shape[1] for s in samples)
    out: Inputs = {}
    for key in dict.fromkeys(key for s in samples for key in s):
        parts = [s[key] for s in samples if key in s]
        if key in ("input_ids", "attention_mask"):
            parts = [torch.nn.functional.pad(p, (length - p.shape[1], 0)) for p in parts]
        out[key] = torch.cat(parts)
    return out


IMAGES: list[list[Part]] = [[3, ("image", 1), 4], [1, ("image", 1), 2, ("image", 1), 5]]
VIDEOS: list[list[Part]] = [[2, ("video", 3), 4], [1, ("video", 3), ("video", 3), 6]]
MIXED: list[list[Part]] = [
    [2, ("image", 1), 4],
    [3, ("video", 3), 2],
    [1, ("video", 3), 1, ("image", 1), 4],
]

for _kind, _prompts in (("images", IMAGES), ("videos", VIDEOS), ("mixed", MIXED)):
    family(
        Family(
            name=f"video_llava-{_kind}",
            build=build,
            samples=lambda prompts=_prompts: [sample(20 * i, *p) for i, p in enumerate(prompts)],
            join=join,
        )
    )
