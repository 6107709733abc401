"""Counts from the configuration against what torch counts while the real model runs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import Qwen2VLConfig

from benchmarks.accuracy import flops
from benchmarks.accuracy.models import Shape, build
from consensusdrop_kernels import patch
from consensusdrop_kernels.methods import (
    AdaFV,
    ConsensusDrop,
    DivPrune,
    FastV,
    Random,
    VisionDrop,
)
from python_tests.hf.models import TOKENS, batch, pixels, prompt, random_llava


def clip():
    """Grouped heads; features of the last layer but one."""
    inputs = {**batch(prompt(2, 5)), "pixel_values": pixels(1)}
    return random_llava(), inputs, TOKENS, 8


def siglip():
    shape = Shape("siglip", patch=14, layers=3, width=64, text_layers=4, text_width=96)
    model = build(shape, seed=0).eval()
    image = model.config.image_token_id
    ids = torch.tensor([[1, 5, *[image] * 64, 9, 10, 11, 12]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 112, 112),
    }
    return model, inputs, 64, 6


@torch.no_grad()
def run(model, inputs, method=None):
    """What torch counts, and the cache."""
    patched = contextlib.nullcontext() if method is None else patch(model, method)
    with patched, flops.counter() as count:
        cache = model(**inputs, logits_to_keep=1).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return count.get_total_flops(), held


@pytest.mark.parametrize("made", [clip, siglip])
def test_a_prefill_by_formula_and_as_it_runs(made):
    model, inputs, visual, text = made()
    cost = flops.Cost.of(model.config, 4)
    ways = {
        None: [visual] * cost.layers,
        Random(keep=5): [5] * cost.layers,
        FastV(keep=3, layer=1): [visual] + [3] * (cost.layers - 1),
    }
    for method, seen in ways.items():
        tokens = [text + n for n in seen]
        counted, held = run(model, inputs, method)
        # Rotary angles are products too, and the stage asks for queries and keys once more.
        slack = 0.05 if isinstance(method, FastV) else 0.001
        assert counted == pytest.approx(cost.prefill(tokens), rel=slack)
        assert held == cost.kv_bytes(tokens)
    assert cost.prefill([text + 5] * cost.layers) < cost.prefill([text + visual] * cost.layers)


def test_what_a_choice_adds():
    """By the formulas of docs/methods.md."""
    model, inputs, n, text = siglip()
    cost = flops.Cost.of(model.config, 4)
    keep, rows, width, heads, d = 8, 4, 96, 3, 32
    tower, inner = 64, 32
    received = 2 * tower * n * n  # of the encoder, every row of it
    merge = 2 * (n - keep) * keep * inner
    probe = 2 * n * width * heads * d + 2 * rows * width * heads * d + 2 * rows * heads * d * n
    stage = 2 * (n + text) * width * heads * d + 2 * width * heads * d
    stage += 2 * 2 * heads * d * (n + text)
    expected = {
        ConsensusDrop(keep=keep): received + probe + 2 * keep * n * inner + merge,
        ConsensusDrop(keep=keep, diversity=0.0): received + probe + merge,
        ConsensusDrop(keep=keep, diversity=0.0, alpha=0.0): received + merge,
        AdaFV(keep=keep): received + 2 * rows * n * width,
        DivPrune(keep=keep): 2 * keep * n * width + 2 * n * n * width,
        FastV(keep=keep, layer=1): stage,
    }
    for method, wanted in expected.items():
        found = flops.selection(model, inputs, method, cost)
        assert found == pytest.approx(wanted, rel=0.05), method
    plain, diverse = (
        flops.selection(model, inputs, ConsensusDrop(keep=keep, diversity=d), cost)
        for d in (0.0, 0.5)
    )
    assert diverse - plain == 2 * keep * n * inner


def test_stages_shorten_what_later_layers_see():
    assert flops.layer_tokens(10, 40, (), (), 3) == [50, 50, 50]
    assert flops.layer_tokens(10, 40, (20, 5), (1, 3), 4) == [50, 30, 30, 15]
    model, inputs, visual, text = siglip()
    cost = flops.Cost.of(model.config, 4)
    method = VisionDrop(keep=16)
    with torch.no_grad(), patch(model, method) as handle:
        cache = model(**inputs).past_key_values
    left = [after[0] for after in handle.last.stages]
    seen = flops.layer_tokens(
        text, handle.last.tokens_after[0], left, handle.method.stages(cost.layers), cost.layers
    )
    assert len(set(seen)) > 2
    assert seen == [layer.keys.shape[2] for layer in cache.layers]
    average = sum(seen) / cost.layers - text
    assert average == pytest.approx(method.average_tokens(visual, cost.layers))


def test_what_is_not_counted_is_said():
    with pytest.raises(ValueError, match="not for qwen2_vl with qwen2_vl_text"):
        flops.Cost.of(Qwen2VLConfig(), 2)
    config = siglip()[0].config
    config.vision_config.vision_use_head = True
    with pytest.raises(ValueError, match="without a pooling head, not for this siglip"):
        flops.Cost.of(config, 2)
