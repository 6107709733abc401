"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V and their like with random weights: images and videos."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from . import Family, Inputs, family, loud, noise, prompt, words

PAD, START, END, IMAGE, VIDEO, VIDEO_START, VIDEO_END, VOCAB = 0, 93, 94, 95, 96, 97, 98, 99
MERGE, PATCH = 2, 3 * 2 * 4 * 4  # patches of 4 x 4 pixels, two frames, three channels
Grid = tuple[int, int, int]  # frames, height, width in patches
Part = int | tuple[str, Grid]  # so many words, or an image or a video

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
}  # fmt: skip
TOWER: dict[str, Any] = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": MERGE}
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
IDS: dict[str, Any] = {
    "image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END,
    "video_token_id": VIDEO, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip


def build(name: str) -> Any:
    """A model of the family `name`, with random weights."""
    config: Any
    make: Any
    if name == "qwen2_vl":
        tower = TOWER | {"embed_dim": 32, "hidden_size": 48}
        config = Qwen2VLConfig(text_config=TEXT, vision_config=tower, **IDS)
        make = Qwen2VLForConditionalGeneration
    elif name == "qwen2_5_vl":
        # Windows of 2 x 2 tokens; only the block in the middle sees whole frames.
        tower = TOWER | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48, "window_size": 16,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=tower, **IDS)
        make = Qwen2_5_VLForConditionalGeneration
    elif name.startswith("qwen3_vl"):
        tower = TOWER | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        text = TEXT | {"head_dim": 12, "num_hidden_layers": 4}
        config = Qwen3VLConfig(text_config=text, vision_config=tower, **IDS)
        make = Qwen3VLForConditionalGeneration
        if name == "qwen3_vl_moe":
            text = text | EXPERTS
            config = Qwen3VLMoeConfig(text_config=text, vision_config=tower, **IDS)
            make = Qwen3VLMoeForConditionalGeneration
    else:
        tower = TOWER | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48, "image_size": 32,
        }  # fmt: skip
        ids = IDS | {
            "image_start_token_id": START, "image_end_token_id": END,
            "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
        }  # fmt: skip
        config = Glm4vConfig(text_config=TEXT, vision_config=tower, **ids)
        make = Glm4vForConditionalGeneration
        if name == "glm46v":
            tower, text = (
                tower | {"model_type": "glm4v_vision"},
                TEXT | {"model_type": "glm4v_text"},
            )
            config = Glm46VConfig(text_config=text, vision_config=tower, **ids)
            make = Glm46VForConditionalGeneration
        elif name == "glm4v_moe":
            text = TEXT | EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1}
            text |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
            rope = TEXT["rope_parameters"] | {"mrope_section": [1, 1, 1]}  # of half a head
            text |= {"rope_parameters": rope}
            config = Glm4vMoeConfig(text_config=text, vision_config=tower, **ids)
            make = Glm4vMoeForConditionalGeneration
    model = loud(make(config), START, END, IMAGE, VIDEO, VIDEO_START, VIDEO_END)
    model.generation_config.pad_token_id = PAD
    return model


def sample(name: str, seed: int, *parts: Part) -> Inputs:
    """A prompt of words, images and videos, as the processor of the family would lay it out."""
    ids, kinds = [1], [0]
    pixels: dict[str, list[Any]] = {"image": [], "video": []}
    grids: dict[str, list[Grid]] = {"image": [], "video": []}
    for at, part in enumerate(parts):
        if isinstance(part, int):
            ids += words(part, 2, START, seed + at)
            kinds += [0] * part
            continue
        kind, grid = part
        new = _picture(name, kind, grid)
        ids += new
        kinds += [(1 if kind == "image" else 2) * (i in (IMAGE, VIDEO)) for i in new]
        frames, height, width = grid
        pixels[kind].append(noise(frames * height * width, PATCH, seed=seed + 50 + at))
        grids[kind].append(grid)
    made = prompt(ids) | {"mm_token_type_ids": torch.tensor([kinds])}
    for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            made[values] = torch.cat(pixels[kind])
            made[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    return made


def _picture(name: str, kind: str, grid: Grid) -> list[int]:
    """Placeholders with what stands around them: Qwen3-VL and GLM-4V write a time per frame."""
    frames, height, width = grid
    each = height * width // MERGE**2
    if kind == "image":
        return [START, *[IMAGE] * (frames * each), END]
    if name.startswith("qwen3_vl"):
        return [i for f in range(frames) for i in (3 + f, START, *[VIDEO] * each, END)]
    if name.startswith("glm"):
        parts = [i for f in range(frames) for i in (START, *[IMAGE] * each, END, 3 + f)]
        return [VIDEO_START, *parts, VIDEO_END]
    return [START, *[VIDEO] * (frames * each), END]


def join(samples: list[Inputs]) -> Inputs:
    """One batch, padded at the left; pictures in order, of whichever samples have any."""
    length = max(s["input_ids"].shape[1] for s in samples)
    out: Inputs = {}
    for key in dict.fromkeys(key for s in samples for key in s):
        parts = [s[key] for s in samples if key in s]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            parts = [torch.nn.functional.pad(p, (length - p.shape[1], 0)) for p in parts]
        out[key] = torch.cat(parts)
    return out


IMAGES: list[list[Part]] = [
    [3, ("image", (1, 6, 8)), 4],
    [1, ("image", (1, 4, 8)), 2, ("image", (1, 6, 4)), 5],
    [2, ("image", (1, 6, 8)), 7],
]
VIDEOS: list[list[Part]] = [[2, ("video", (2, 6, 4)), 4], [3, ("video", (3, 4, 6)), 5]]
MIXED: list[list[Part]] = [
    *IMAGES[:2],
    [2, ("video", (2, 6, 8)), 3],
    [1, ("video", (3, 4, 6)), 1, ("image", (1, 6, 4)), 4],
]


def _family(name: str, kind: str, prompts: list[list[Part]], beams: bool = True) -> None:
    family(
        Family(
            name=f"{name}-{kind}",
            build=lambda: build(name),
            samples=lambda: [sample(name, 20 * i, *p) for i, p in enumerate(prompts)],
            join=join,
            spatial=True,
            beams=beams,
        )
    )


for _name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
    _family(_name, "images", IMAGES)
    _family(_name, "mixed", MIXED)
for _name in ("qwen3_vl_moe", "glm4v_moe", "glm46v"):
    _family(_name, "images", IMAGES[:2])
_family("glm4v", "images", IMAGES)  # images and videos of one call share a placeholder there
# From 5.18 on generate looks for as many video placeholders as there are features, and finds none.
_family("glm4v", "videos", VIDEOS, beams=transformers.__version__.startswith("5.17."))
