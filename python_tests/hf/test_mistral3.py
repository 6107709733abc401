"""Mistral 3: images packed in one sequence, merged two by two, rows that end with a text token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop

from .families import FAMILIES
from .families.mistral3 import BREAK, END, IMAGE, STEP, sample
from .geometry import check_map

FAMILY = FAMILIES["mistral3"]
SIZES = [(2, 3), (4, 5), (3, 1)]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_saliency_is_what_a_patch_receives_in_its_image(attention: str) -> None:
    model, one = FAMILY.model(), sample(1, SIZES)
    model.model.vision_tower.set_attn_implementation(attention)
    with patch(model, ConsensusDrop(keep=3)) as handle:
        model(**one)
        visual = handle.last.scores.visual
    model.model.vision_tower.set_attn_implementation("eager")
    maps = model.model.vision_tower(
        one["pixel_values"], one["image_sizes"], output_attentions=True
    ).attentions[-1].mean((0, 1))  # fmt: skip
    first = 0
    for image, (height, width) in enumerate(SIZES):
        here = slice(first, first + 4 * height * width)
        first = here.stop
        want = maps[here, here].mean(0).view(height, 2, width, 2).mean((1, 3)).flatten()
        got = visual[image, : height * width]
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_every_token_has_the_patches_that_the_map_says() -> None:
    model = FAMILY.model()
    sizes = torch.tensor(SIZES) * STEP
    arguments = {"pixel_values": torch.randn(3, 3, 40, 40), "image_sizes": sizes}
    patches = sum(4 * height * width for height, width in SIZES)

    def stand_in(leaf: Tensor) -> Any:
        projector = model.model.multi_modal_projector
        return projector.register_forward_pre_hook(lambda module, args: (leaf[0], args[1]))

    check_map(model, arguments, (1, patches), 32, stand_in, 0.25)


@torch.no_grad()
def test_breaks_are_text_that_stays() -> None:
    model, one = FAMILY.model(), sample(1, SIZES)
    ids = one["input_ids"][0]
    with patch(model, ConsensusDrop(keep=2)) as handle:
        model(**one)
        last = handle.last
    assert last.grids == tuple(SIZES)
    assert [len(columns) for columns in last.columns] == [6, 20, 3]
    assert torch.equal(torch.cat(last.columns), (ids == IMAGE).nonzero()[:, 0])
    kept = last.keep_mask[0]
    assert kept[(ids == BREAK) | (ids == END)].all()
    assert int((ids == BREAK).sum()) == 1 + 3 + 2
    assert kept.sum() == 3 * 2 + (ids != IMAGE).sum()


def test_what_is_refused() -> None:
    model = FAMILY.model()
    model.config.vision_feature_layer = [-1, -2]
    with pytest.raises(ValueError, match="must be one layer"):
        patch(model, ConsensusDrop(keep=3))
    model = FAMILY.model()
    model.config.vision_config.model_type = "clip_vision_model"
    with pytest.raises(ValueError, match="must be a pixtral, got clip_vision_model"):
        patch(model, ConsensusDrop(keep=3))
