"""Operations of a prefill, of every family that `cdrop bench` builds: by the formulas, against what
torch's counter sees while a tiny model of the family runs. LLaVA alone is in `accuracy`.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.accuracy import flops
from benchmarks.end_to_end import models
from consensusdrop_kernels import patch
from consensusdrop_kernels.methods import FastV, Random
from python_tests.hf.families import FAMILIES, llava_next, qwen_vl

#: Prompts with a picture, one with tiles that are padding, and how many of their tokens are words.
NEXT = [
    (llava_next.sample("llava_next", 0, 3, ("image", size), 4), 8) for size in ((20, 64), (50, 70))
]
#: A frame that windows of 4 x 4 patches divide, and one that they don't.
QWEN = [
    (qwen_vl.sample("qwen2_5_vl", 0, 3, ("image", (1, *grid)), 4), 10) for grid in ((4, 8), (6, 10))
]


@torch.no_grad()
def run(model, inputs, method=None):
    """What torch counts, the tokens that each layer saw, and the bytes of the cache."""
    patched = contextlib.nullcontext() if method is None else patch(model, method)
    with patched, flops.counter() as count:
        cache = model(**inputs, logits_to_keep=1).past_key_values
    seen = [layer.keys.shape[2] for layer in cache.layers]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return count.get_total_flops(), seen, held


@pytest.mark.parametrize(
    ("name", "inputs", "words"),
    [
        *(("llava_next-images", *each) for each in NEXT),
        *(("qwen2_5_vl-images", *each) for each in QWEN),
    ],
)
def test_a_prefill_by_formula_and_as_it_runs(name, inputs, words):
    model = FAMILIES[name].model()
    cost = flops.Cost.of(model.config, 4, inputs)
    whole = inputs["input_ids"].shape[1]
    counted, seen, held = run(model, inputs)
    assert seen == [whole] * cost.layers
    # The formula leaves out rotary angles, a product for each token and axis; nothing else.
    text = model.config.get_text_config()
    axes = 3 if name.startswith("qwen") else 1
    angles = 2 * axes * whole * text.hidden_size // text.num_attention_heads // 2
    assert counted == cost.prefill(seen) + angles
    assert held == cost.kv_bytes(seen)

    counted, seen, _ = run(model, inputs, Random(keep=5))
    assert seen == [words + 5] * cost.layers
    assert counted == pytest.approx(cost.prefill(seen), rel=2e-4)
    # The stage asks for queries and keys once more.
    counted, seen, _ = run(model, inputs, FastV(keep=3, layer=1))
    assert seen[1:] == [words + 3] * (cost.layers - 1)
    assert 0 < counted - cost.prefill(seen) < 0.02 * counted


@pytest.mark.parametrize("name", models.RANDOM)
def test_every_model_that_is_built_is_counted(name):
    made = models.RANDOM[name]
    config = made.config()
    inputs, visual = made.picture(config, torch.Generator())
    cost = flops.Cost.of(config, 2, inputs)
    every, some = ([60 + n] * cost.layers for n in (visual, 64))
    assert 0 < cost.vision < cost.prefill(some) < cost.prefill(every)


def test_pictures_without_a_size_are_not_guessed():
    with pytest.raises(ValueError, match="where image_grid_thw is known"):
        flops.Cost.of(models.RANDOM["qwen2.5-vl-7b"].config(), 2)
