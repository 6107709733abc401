"""Idefics3 and SmolVLM: shuffled patches, patches that are padding, tiles that are images."""

from __future__ import annotations

import pytest
import torch

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop

from .families import FAMILIES, Family
from .families.idefics3 import TILE, join, sample
from .geometry import check_map, last_hidden_state, received

KINDS = [FAMILIES["idefics3"], FAMILIES["smolvlm"]]
pytestmark = pytest.mark.parametrize("family", KINDS, ids=lambda f: f.name)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_saliency_is_what_the_patches_receive(family: Family, attention: str) -> None:
    """Of a batch with black tiles, and a tile of which three columns of patches are padding."""
    model = family.model()
    model.model.vision_model.set_attn_implementation(attention)
    batch = join([sample(0, 1), sample(1, 3, side=(64, 40))])
    with patch(model, ConsensusDrop(keep=3)) as handle:
        model(**batch)
        visual = handle.last.scores.visual
    model.model.vision_model.set_attn_implementation("eager")
    shown = torch.ones(4, 8, 8, dtype=torch.bool)
    shown[3, :, 5:] = False
    tiles = torch.cat([batch["pixel_values"][0, :1], batch["pixel_values"][1]])
    tower = model.model.vision_model(tiles, patch_attention_mask=shown, output_attentions=True)
    want = received(tower.attentions[-1], shown.flatten(1))
    assert want[3].view(8, 8)[:, 5:].sum() == 0
    want = want.view(4, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    torch.testing.assert_close(visual, want, atol=1e-6, rtol=1e-5)
    assert visual[3].view(4, 4)[:, 3].sum() == 0  # both columns of these tokens are padding


def test_every_token_has_the_patches_that_the_map_says(family: Family) -> None:
    model = family.model()
    arguments = {"pixel_values": torch.randn(1, 2, 3, 64, 64)}
    stand_in = last_hidden_state(model.model.vision_model)
    check_map(model, arguments, (2, 64), 32, stand_in, 0.25)


@torch.no_grad()
def test_every_tile_is_an_image(family: Family) -> None:
    model, one = family.model(), sample(1, 3)
    with patch(model, ConsensusDrop(keep=5)) as handle:
        model(**one)
        last = handle.last
    assert last.grids == ((4, 4),) * 3
    assert [len(columns) for columns in last.columns] == [TILE] * 3
    assert last.tokens_after == (15,)
    assert last.keep_mask[one["input_ids"] != 98].all()  # the row tokens between them stay


@torch.no_grad()
def test_features_from_elsewhere_are_refused(family: Family) -> None:
    model, one = family.model(), sample(1, 2)
    pixels = one.pop("pixel_values"), one.pop("pixel_attention_mask")
    features = model.model.get_image_features(*pixels, return_dict=True)
    whole = torch.cat([part.flatten(0, -2) for part in features.pooler_output])
    with patch(model, ConsensusDrop(keep=3)):
        with pytest.raises(ValueError, match="no image came with it"):
            model(**one, image_hidden_states=whole)
        with pytest.raises(NotImplementedError, match="computed outside the patched model"):
            model(**one, mm_encoder_outputs=whole)
