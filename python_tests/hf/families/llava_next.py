"""LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video with random weights: tiles and pooled frames."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from . import Family, Inputs, family, loud, noise, prompt, words

PAD, IMAGE, VIDEO, VOCAB = 0, 97, 98, 99
SIDE, TILE, MOST = 4, 32, 5  # patches and pixels along a tile, tiles of the largest image
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
Size = tuple[int, int]
Part = int | tuple[str, Any]  # so many words, ("image", its size) or ("video", its frames)

# Features of an image of some size (height, width): the small tile, then rows of the large one
# with a break each. Written down by hand, so that they check what the models' functions give.
ROWS: dict[Size, Size] = {
    (30, 60): (4, 8),  # one tile high, two wide, no padding
    (60, 26): (8, 4),  # padded by less than a patch on either side, which takes nothing off
    (20, 64): (2, 8),  # a row of patches above and one below are padding
    (50, 70): (6, 8),
}


def features(name: str, size: Size, among: int) -> int:
    """Placeholders of an image, one `among` so many of its prompt."""
    if name == "llava_onevision" and among > 1:
        return SIDE**2 + 1
    height, width = ROWS[size]
    if name == "llava_onevision" and (height, width) == (6, 8):
        height, width = 4, 6  # 48 patches are blended into at most 2 * 16 (a ratio of 1.22)
    return SIDE**2 + height * (width + 1)


def video_features(name: str, frames: int) -> int:
    """Placeholders of a video."""
    return frames * (SIDE // 2) ** 2 + (name == "llava_onevision")


def tiles(size: Size) -> int:
    """How many tiles an image is cut into, the small one included."""
    height, width = ROWS[size]
    return 1 + -(-height // SIDE) * -(-width // SIDE)


def build(name: str, **options: Any) -> Any:
    """A model of the family `name`, with random weights."""
    text: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": 1,
        "eos_token_id": None,
    }  # fmt: skip
    tower: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": TILE, "patch_size": TILE // SIDE,
    }  # fmt: skip
    shared: dict[str, Any] = {"image_grid_pinpoints": PINPOINTS, "image_token_index": IMAGE}
    config: Any
    make: Any
    if name == "llava_next":
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**tower), text_config=LlamaConfig(**text),
            **(shared | options),
        )  # fmt: skip
        make = LlavaNextForConditionalGeneration
    elif name == "llava_next_video":
        config = LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**tower), text_config=LlamaConfig(**text),
            video_token_index=VIDEO, **(shared | options),
        )  # fmt: skip
        make = LlavaNextVideoForConditionalGeneration
    else:
        siglip = {"vision_config": SiglipVisionConfig(vision_use_head=False, **tower)}
        config = LlavaOnevisionConfig(
            text_config=Qwen2Config(**text), video_token_index=VIDEO,
            vision_aspect_ratio="anyres_max_2", **(siglip | shared | options),
        )  # fmt: skip
        make = LlavaOnevisionForConditionalGeneration
    model = loud(make(config), IMAGE, VIDEO)
    with torch.no_grad():
        model.model.image_newline.normal_()
    model.generation_config.pad_token_id = PAD
    return model


def sample(name: str, seed: int, *parts: Part) -> Inputs:
    """A prompt of words, images and videos."""
    sizes = [part[1] for part in parts if isinstance(part, tuple) and part[0] == "image"]
    ids, pixels, videos = [1], [], []
    for at, part in enumerate(parts):
        if isinstance(part, int):
            ids += words(part, 2, IMAGE, seed + at)
        elif part[0] == "image":
            ids += [IMAGE] * features(name, part[1], len(sizes))
            pixels.append(noise(1, MOST, 3, TILE, TILE, seed=seed + 50 + at))
        else:
            ids += [VIDEO] * video_features(name, part[1])
            videos.append(noise(1, part[1], 3, TILE, TILE, seed=seed + 50 + at))
    made = prompt(ids)
    if pixels:
        made |= {"pixel_values": torch.cat(pixels), "image_sizes": torch.tensor(sizes)}
        if name == "llava_onevision":
            made["batch_num_images"] = torch.tensor([len(sizes)])
    if videos:
        made["pixel_values_videos"] = torch.cat(videos)
    return made


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


# Images of one prompt have one size here: transformers 5.17 mixes up those of beams.
IMAGES: list[list[Part]] = [
    [3, ("image", (30, 60)), 4],
    [1, ("image", (20, 64)), 2, ("image", (20, 64)), 5],
    [2, ("image", (60, 26)), ("image", (60, 26)), 7],
    [4, ("image", (50, 70)), 3],
]
VIDEOS: list[list[Part]] = [[2, ("video", 3), 4], [5, ("video", 3), 6]]
MIXED: list[list[Part]] = [
    [2, ("image", (20, 64)), 4],
    [3, ("video", 3), 2],
    [1, ("video", 3), 1, ("image", (50, 70)), 4],
]


def _family(name: str, kind: str, prompts: list[list[Part]]) -> None:
    family(
        Family(
            name=f"{name}-{kind}",
            build=lambda: build(name),
            samples=lambda: [sample(name, 20 * i, *p) for i, p in enumerate(prompts)],
            join=join,
        )
    )


for _name in ("llava_next", "llava_onevision", "llava_next_video"):
    _family(_name, "images", IMAGES)
    if _name != "llava_next":
        _family(_name, "videos", VIDEOS)
        _family(_name, "mixed", MIXED)
