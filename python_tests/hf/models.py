"""Small models for the tests: random ones made here, and the trained one of the package."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
)

from consensusdrop_kernels.data import tiny_llava_path
from consensusdrop_kernels.scenes import sample_questions

IMAGE, PAD, BOS, VOCAB = 98, 0, 1, 99
TOKENS = 16  # 32 x 32 pixels, patches of 8
SIDE = 32


@functools.cache
def _random_llava(text: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(7)
    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": PAD,
        "bos_token_id": BOS, "eos_token_id": None, "initializer_range": 0.25,
    }  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIDE, patch_size=8, initializer_range=0.25,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**shared) if text == "llama" else Qwen3Config(**shared),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # the stock start is too small for any token to matter
        for name, weight in model.named_parameters():
            if "vision_tower" in name and weight.dim() > 1:
                weight.normal_(0, 0.4)
        model.lm_head.weight[IMAGE] = 0.0  # so that it never writes a placeholder
    model.generation_config.pad_token_id = PAD
    return model


def random_llava(text: str = "llama") -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, always the same ones; a copy of its own for every caller."""
    return copy.deepcopy(_random_llava(text))


def pixels(images: int, seed: int = 0) -> Tensor:
    """`[images, 3, 32, 32]` of noise."""
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def prompt(before: int, *after: int, seed: int = 0) -> list[int]:
    """Token ids: BOS, `before` words, then for every number an image and as many words."""
    words = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(2, IMAGE, (count,), generator=words).tolist()

    ids = [BOS, *text(before)]
    for count in after:
        ids += [IMAGE] * TOKENS + text(count)
    return ids


def batch(*prompts: list[int], side: str = "left") -> dict[str, Tensor]:
    """The prompts padded to one length: `input_ids` and `attention_mask`."""
    length = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, words in enumerate(prompts):
        here = slice(length - len(words), None) if side == "left" else slice(len(words))
        ids[row, here] = torch.tensor(words)
        mask[row, here] = 1
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def _trained() -> tuple[LlavaForConditionalGeneration, Any]:
    path = tiny_llava_path()
    return LlavaForConditionalGeneration.from_pretrained(
        path
    ).eval(), AutoProcessor.from_pretrained(path)


def trained() -> tuple[LlavaForConditionalGeneration, Any]:
    """The trained tiny LLaVA, a copy for every caller, and its processor."""
    model, processor = _trained()
    return copy.deepcopy(model), processor


def exam(count: int, seed: int, kinds: tuple[str, ...]) -> tuple[Any, list[str], list[str]]:
    """Scenes the model never saw, one question each as a prompt, and the right answers."""
    asked = sample_questions(count, seed, kinds)
    prompts = [f"USER: <image> {question.text} ASSISTANT:" for _, question in asked]
    return [scene.image for scene, _ in asked], prompts, [q.answer for _, q in asked]
