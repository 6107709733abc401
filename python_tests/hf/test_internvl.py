"""InternVL: the class row through the pixel shuffle, and tiles that are one image."""

from __future__ import annotations

import pytest
import torch

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop

from .families import FAMILIES
from .families.internvl import TILE, internvl, sample
from .geometry import check_map, last_hidden_state

FAMILY = FAMILIES["internvl-qwen3"]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_saliency_is_the_class_row_of_the_four_patches(attention: str) -> None:
    model, one = FAMILY.model(), sample(1, (3, 1))
    model.model.vision_tower.set_attn_implementation(attention)
    with patch(model, ConsensusDrop(keep=3, budget_scope="crop")) as handle:
        model(**one)
        visual = handle.last.scores.visual
    model.model.vision_tower.set_attn_implementation("eager")
    maps = model.model.vision_tower(one["pixel_values"], output_attentions=True).attentions[-1]
    rows = maps[:, :, 0, 1:].mean(1).view(4, 4, 2, 4, 2)
    torch.testing.assert_close(visual, rows.mean((2, 4)).flatten(1), atol=1e-6, rtol=1e-5)


def test_every_token_has_the_patches_that_the_map_says() -> None:
    model = internvl("qwen2")
    arguments = {"pixel_values": torch.randn(2, 3, 64, 64)}
    check_map(model, arguments, (2, 64), 32, last_hidden_state(model.model.vision_tower), 0.25, 1)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["image", "crop"])
def test_tiles_side_by_side_share_a_budget(scope: str) -> None:
    """Three tiles, two words, one tile; the saliency of each tile is its own in either case."""
    model, one = FAMILY.model(), sample(1, (3, 1))
    places = (one["input_ids"][0] == 98).nonzero()[:, 0]
    with patch(model, ConsensusDrop(keep=5, budget_scope=scope)) as handle:
        model(**one)
        last = handle.last
    tiles = [3, 1] if scope == "image" else [1, 1, 1, 1]
    assert last.grids == tuple((4 * n, 4) for n in tiles)
    assert torch.equal(torch.cat(last.columns), places)
    assert [len(columns) for columns in last.columns] == [TILE * n for n in tiles]
    assert last.tokens_after == (5 * len(tiles),)
    with patch(model, ConsensusDrop(keep=5, budget_scope="crop")) as handle:
        model(**one)
        single = handle.last.scores.visual
    mine = [row[: TILE * n] for row, n in zip(last.scores.visual, tiles, strict=True)]
    assert torch.equal(torch.cat(mine), single.flatten())


@torch.no_grad()
def test_what_is_refused() -> None:
    one = FAMILY.samples()[0]
    with patch(FAMILY.model(), ConsensusDrop(keep=3)) as handle:
        with pytest.raises(ValueError, match="must be 'default'.*got 'full'"):
            handle._model(**one, vision_feature_select_strategy="full")
        with pytest.raises(ValueError, match="features of encoder layer 1, but the patch listens"):
            handle._model(**one, vision_feature_layer=-2)
    model = FAMILY.model()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="must be 'default'.*got 'full'"):
        patch(model, ConsensusDrop(keep=3))
    model = FAMILY.model()
    model.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="must be an internvl_vision.*got siglip_vision_model"):
        patch(model, ConsensusDrop(keep=3))


@torch.no_grad()
def test_another_layer_of_the_config() -> None:
    model, one = FAMILY.model(), FAMILY.samples()[0]
    model.config.vision_feature_layer = -2
    with patch(model, ConsensusDrop(keep=3)) as handle:
        model(**one)
        visual = handle.last.scores.visual
    model.model.vision_tower.set_attn_implementation("eager")
    maps = model.model.vision_tower(one["pixel_values"], output_attentions=True).attentions[1]
    rows = maps[:, :, 0, 1:].mean(1).view(1, 4, 2, 4, 2)
    torch.testing.assert_close(visual, rows.mean((2, 4)).flatten(1), atol=1e-6, rtol=1e-5)
