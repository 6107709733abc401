"""Models to train: packing questions changes no answer, and a model starts as its seed says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.accuracy import data, models, train
from consensusdrop_kernels import ConsensusDrop, patch, scenes

TINY = {
    tower: models.Shape(tower, patch=28, layers=3, width=32, text_layers=2, text_width=32)
    for tower in ("clip", "siglip")
}


@pytest.mark.parametrize(
    ("name", "value"),
    [("tower", "dino"), ("patch", 9), ("patch", 0), ("width", 100), ("layers", 1)],
)
def test_a_shape_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        models.Shape(**{name: value})


def test_the_planned_models_fit_twelve_megabytes():
    for shape in (
        models.Shape("siglip", 8, 6, 128, 5, 160),
        models.Shape("clip", 7, 5, 128, 4, 192),
    ):
        count = sum(p.numel() for p in models.build(shape, 0).parameters())
        assert 2.5e6 < count < 12e6 / 4


def test_a_seed_fixes_the_start():
    first, again, other = (models.build(TINY["clip"], seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_place_of_a_grid_has_its_own_waves():
    table = models.sines(16, 64)
    apart = torch.cdist(table, table) + 9 * torch.eye(256)
    assert apart.min() > 0.1
    # Steps to the right look alike wherever they start.
    rows = table.reshape(16, 16, 64)
    torch.testing.assert_close(rows[3, 1] - rows[3, 0], rows[9, 1] - rows[9, 0])


@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_is_attention(masked):
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() if masked else None
    found, _ = models.plain_attention(torch.nn.Identity(), q, k, v, mask, 8**-0.5)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "accuracy_plain"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_packed_questions_are_answered_as_each_alone(tower, attention):
    shape = TINY[tower]
    model = models.build(shape, 0).eval()
    model.set_attn_implementation(attention)
    made = models.processor(shape)
    vocabulary = made.tokenizer.get_vocab()
    source = data.Batches(data.lane(0, 2), 2, shape.grid, vocabulary, 2)
    batch = source[0]
    pixels = (batch["pixels"].float() / 255 - train.MEAN) / train.STD
    answer, after, located = models.Packed(model, shape).eval()(pixels, batch)
    assert located is None
    model.set_attn_implementation("sdpa")
    for row, seed in enumerate(source.seeds[:2]):
        image = scenes.make_scene(seed).image
        for i in range(0, data.PACK, 5):
            turn = int(batch["turn"][row, i])
            words = made.tokenizer.convert_ids_to_tokens(batch["words"][row, i, : turn + 2])
            inputs = made(
                text="USER: <image> " + " ".join(words), images=image, return_tensors="pt"
            )
            assert inputs["input_ids"].shape[1] == 2 + shape.grid**2 + turn + 2
            logits = model(**inputs).logits[0]
            torch.testing.assert_close(answer[row, i], logits[-2], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after[row, i], logits[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tower_heads_reach_the_layers_that_llava_reads_and_the_contrast_the_last(tower):
    shape = TINY[tower]
    model = models.build(shape, 0)
    vocabulary = models.processor(shape).tokenizer.get_vocab()
    heads = models.TowerHeads(shape, len(vocabulary))
    batch = data.Batches(data.lane(0, 1), 4, shape.grid, vocabulary, 1)[0]
    output = model.model.vision_tower(batch["pixels"].float() / 255, output_hidden_states=True)
    contrast, _ = heads.contrast(output, batch["caption"])
    last = model.model.vision_tower.encoder.layers[-1].mlp.fc1.weight
    (grad,) = torch.autograd.grad(contrast, last, retain_graph=True)
    assert grad.abs().sum() > 0
    loss, figures = heads(output, batch)
    assert loss > figures["contrast"] > 0
    assert {"dense", "retrieved", "shape", "color", "digit", "size", "center"} <= figures.keys()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_a_model_can_be_patched(tower):
    shape = TINY[tower]
    model = models.build(shape, 0).eval()
    made = models.processor(shape)
    text = "USER: <image> what color is the star ? ASSISTANT:"
    inputs = made(text=text, images=scenes.make_scene(0).image, return_tensors="pt")
    with patch(model, ConsensusDrop(keep=4), processor=made) as handle:
        model(**inputs)
    assert list(handle.last.tokens_before) == [16]
    assert list(handle.last.tokens_after) == [4]
