"""A decode step of a patched model against the unpatched one at the same cache length.

A patch may cost a prefill something; it may not cost a token anything. A mid-size LLaVA with random
weights; `stock` has a text prompt as long as the pruned one, so that both attend to as many keys.
Run with `make bench`, on an otherwise idle machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from consensusdrop_kernels import ConsensusDrop, patch

IMAGE, TEXT, TOKENS, KEEP = 999, 24, 256, 64
CONTENDERS = ("stock", "patched", "patched, size_attention", "stock, padded", "patched, padded")


@cache
def model() -> Any:
    """About 60 M parameters in the decoder."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=128, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=12, num_key_value_heads=4,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2
    )
    return LlavaForConditionalGeneration(config).eval()


def prompts(contender: str) -> dict[str, torch.Tensor]:
    """A prompt with an image, two of different lengths, or text of the length that is left."""
    words = torch.arange(2, 2 + TEXT)
    if contender.startswith("stock"):
        ids = torch.arange(2, 2 + TEXT + KEEP)[None]
        mask = torch.ones_like(ids)
        if contender == "stock, padded":
            ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
            mask[1, :4] = 0
        return {"input_ids": ids, "attention_mask": mask}
    pictures = torch.full((TOKENS,), IMAGE)
    ids = torch.cat([words[:1], pictures, words[1:]])[None]
    mask = torch.ones_like(ids)
    if contender == "patched, padded":
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        ids[1, :4], ids[1, 4 : 4 + TOKENS] = 0, IMAGE
        ids[1, 4 + TOKENS :] = words[: TEXT - 4]
        mask[1, :4] = 0
    pixels = torch.randn(len(ids), 3, 128, 128)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def step(contender: str) -> Callable[[], torch.Tensor]:
    """One token on a cache that is as long before every call, as `generate` makes it."""
    whole = prompts(contender)
    places = (whole["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = model()(**whole, position_ids=places, use_cache=True, logits_to_keep=1)
    held = out.past_key_values
    rows, length = whole["input_ids"].shape
    mask = torch.cat([whole["attention_mask"], torch.ones(rows, 1, dtype=torch.long)], 1)
    word = torch.full((rows, 1), 7)
    place = places[:, -1:] + 1

    def one() -> torch.Tensor:
        logits = model()(
            input_ids=word, attention_mask=mask, position_ids=place, past_key_values=held
        ).logits
        held.crop(-1)
        return logits

    assert held.get_seq_length() == TEXT + KEEP
    return one


@pytest.mark.parametrize("contender", CONTENDERS)
@torch.no_grad()
def test_decode(benchmark, contender: str) -> None:
    sizes = contender.endswith("size_attention")
    method = ConsensusDrop(keep=KEEP, size_attention=sizes)
    stock = contender.startswith("stock")
    context = contextlib.nullcontext() if stock else patch(model(), method)
    with context:
        call = step(contender)
        torch.testing.assert_close(call(), call())
        rows = 2 if contender.endswith("padded") else 1
        benchmark.group = f"decode step, {rows} x {TEXT + KEEP} keys"
        benchmark.name = contender
        benchmark.pedantic(call, rounds=60, warmup_rounds=5)
