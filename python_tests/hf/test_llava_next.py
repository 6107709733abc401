"""LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video: what the tiles and frames say of each token."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from consensusdrop_kernels.hf import Encoded, llava_next, patch
from consensusdrop_kernels.hf.adapter import find
from consensusdrop_kernels.methods import Random

from . import test_contract as contract
from .best import best_of
from .contract import Unpatched, choices, pruned
from .families import Family, Inputs
from .families.llava_next import (
    IMAGE,
    ROWS,
    SIDE,
    Part,
    build,
    features,
    join,
    sample,
    tiles,
)

NAMES = ("llava_next", "llava_onevision", "llava_next_video")
WITH_VIDEO = NAMES[1:]
ABOVE = {(20, 64): 1, (50, 70): 1}  # rows of patches over an image that are padding
BLENDED = (50, 70)  # the size that LLaVA-OneVision makes smaller here
SIZES = list(ROWS)
PARTS: list[Part] = [3, *(("image", size) for size in SIZES), 4]


def family(name: str, *prompts: list[Part], keep: int | float = 0.4, **options: Any) -> Family:
    """Some prompts of a family, for single tests of the contract."""
    return Family(
        name=f"{name}-{sorted(options.items())}-here",
        build=lambda: build(name, **options),
        samples=lambda: [sample(name, 20 * i, *parts) for i, parts in enumerate(prompts)],
        join=join,
        keep=keep,
    )


def model_of(name: str, **options: Any) -> Any:
    return family(name, **options).model()


def arguments(model: Any, inputs: Inputs, modality: str) -> dict[str, Any]:
    """Those of the feature function, under the names of the installed transformers."""
    if modality == "image":
        names: tuple[str, ...] = ("pixel_values", "image_sizes", "batch_num_images")
        return {name: inputs[name] for name in names if name in inputs}
    known = inspect.signature(model.model.get_video_features).parameters
    name = "pixel_values_videos" if "pixel_values_videos" in known else "pixel_values"
    return {name: inputs["pixel_values_videos"]}


def encoded(model: Any, inputs: Inputs, modality: str = "image") -> Encoded:
    """What a patched model notes of pictures."""
    with patch(model, best_of(keep=2)), torch.no_grad():
        call = getattr(model.model, f"get_{modality}_features")
        return call(**arguments(model, inputs, modality), return_dict=True)._cdrop


def one_each(name: str) -> Inputs:
    """Images of all sizes, each in a prompt of its own (so that each is cut into tiles)."""
    return join([sample(name, 9 * i, ("image", size), 2) for i, size in enumerate(SIZES)])


def tile_pixels(inputs: Inputs, sizes: list[tuple[int, int]]) -> Tensor:
    picked = [p[: tiles(s)] for p, s in zip(inputs["pixel_values"], sizes, strict=True)]
    return torch.cat(picked)


def eager_scores(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Saliency and metric of each tile, by the attention map and the key projection."""
    tower = model.model.vision_tower
    feature = model.config.vision_feature_layer
    layer = tower.encoder.layers[feature]
    keys: list[Tensor] = []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda m, i, out: keys.append(out))
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(pixels, output_attentions=True, return_dict=True).attentions[feature]
    hook.remove()
    key = keys[0].view(*keys[0].shape[:2], layer.self_attn.num_heads, -1).mean(2)
    if maps.shape[-1] == SIDE**2:  # no class token: what each patch receives
        return maps.mean((1, 2)), key
    return maps[:, :, 0, 1:].mean(1), key[:, 1:]


def sources_of(name: str, size: tuple[int, int]) -> list[dict[tuple[int, int], float]]:
    """For each patch feature of an image the `(tile, patch)` it is made of and their weights."""
    found = [{(0, patch): 1.0} for patch in range(SIDE**2)]
    rows, columns = ROWS[size]
    wide = -(-columns // SIDE)

    def at(row: int, column: int) -> tuple[int, int]:
        row += ABOVE.get(size, 0)
        tile = 1 + (row // SIDE) * wide + column // SIDE
        return tile, (row % SIDE) * SIDE + column % SIDE

    if name != "llava_onevision" or size != BLENDED:
        return found + [{at(r, c): 1.0} for r in range(rows) for c in range(columns)]
    for r in range(4):
        for c in range(6):
            cell: dict[tuple[int, int], float] = {}
            for row, by_row in linear(r, rows, 4):
                for column, by_column in linear(c, columns, 6):
                    place = at(row, column)
                    cell[place] = cell.get(place, 0.0) + by_row * by_column
            found.append(cell)
    return found


def linear(at: int, before: int, after: int) -> list[tuple[int, float]]:
    """The two of `before` cells that cell `at` of `after` lies between, and their weights."""
    center = max((at + 0.5) * before / after - 0.5, 0.0)
    low = math.floor(center)
    return [(low, 1 - center + low), (min(low + 1, before - 1), center - low)]


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_images_are_those_of_the_eager_attention_map(name: str) -> None:
    """Each token's saliency and key, laid out by hand from the attention map of each tile."""
    inputs = one_each(name)
    found = encoded(model_of(name), inputs)
    scores, keys = eager_scores(model_of(name), tile_pixels(inputs, SIZES))
    assert found.visual is not None
    assert found.metric is not None
    first = 0
    for image, size in enumerate(SIZES):
        cells = sources_of(name, size)
        weights = torch.zeros(len(cells), tiles(size), SIDE**2)
        for cell, parts in enumerate(cells):
            for (tile, place), weight in parts.items():
                weights[cell, tile, place] = weight
        here = slice(first, first + tiles(size))
        want = torch.einsum("ctp,tp->c", weights, scores[here])
        torch.testing.assert_close(found.visual[image], want, atol=1e-5, rtol=1e-5)
        want = torch.einsum("ctp,tpd->cd", weights, keys[here])
        torch.testing.assert_close(found.metric[image], want, atol=1e-5, rtol=1e-5)
        first += tiles(size)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_scores_of_videos_are_those_of_the_eager_attention_map(name: str) -> None:
    inputs = sample(name, 0, ("video", 3), 2)
    found = encoded(model_of(name), inputs, "video")
    scores, keys = eager_scores(model_of(name), inputs["pixel_values_videos"][0])

    def pooled(values: Tensor) -> Tensor:  # [3, 16, F] -> [12, F], by the mean of 2 x 2
        return values.view(3, 2, 2, 2, 2, -1).mean((2, 4)).flatten(0, 2)

    assert found.visual is not None
    assert found.metric is not None
    torch.testing.assert_close(
        found.visual[0], pooled(scores[..., None])[:, 0], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(found.metric[0], pooled(keys), atol=1e-5, rtol=1e-5)
    assert found.tokens == (12 + (name == "llava_onevision"),)
    assert found.crops == ((4, 4, 4),)
    assert found.grids == ((2, 2),)


def support(outputs: Tensor, leaf: Tensor) -> list[set[int]]:
    """For each output row the tiles' patches that it depends on, by autograd."""
    found = []
    for row in outputs:
        (grad,) = torch.autograd.grad(row.sum(), leaf, retain_graph=True, allow_unused=True)
        grad = torch.zeros(len(leaf.flatten(0, 1)), 1) if grad is None else grad.flatten(0, 1)
        found.append(set(grad.reshape(len(grad), -1).abs().sum(1).nonzero().flatten().tolist()))
    return found


@pytest.mark.parametrize(
    ("name", "modality", "entry"),
    [
        ("llava_next", "image", "multi_modal_projector"),
        ("llava_onevision", "image", "multi_modal_projector"),
        ("llava_next_video", "image", "multi_modal_projector"),
        ("llava_onevision", "video", "multi_modal_projector"),
        ("llava_next_video", "video", "vision_resampler"),
    ],
)
def test_a_score_goes_where_its_patch_goes(
    name: str, modality: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which patches each token is made of, and which scores its saliency is made of: the same.
    Features that depend on no patch are breaks."""
    model = model_of(name)
    inputs = one_each(name) if modality == "image" else sample(name, 0, ("video", 3), 2)
    entered: list[Tensor] = []

    def enter(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        entered.append(args[0].detach().requires_grad_())
        return (entered[0],)

    hook = getattr(model.model, entry).register_forward_pre_hook(enter)
    given = arguments(model, inputs, modality)
    output = getattr(model.model, f"get_{modality}_features")(**given, return_dict=True)
    hook.remove()
    count = len(entered[0])
    leaf = torch.rand(count, SIDE**2).requires_grad_()
    monkeypatch.setattr(
        llava_next, "tile_signals", lambda *_: (leaf, torch.zeros(count, SIDE**2, 1))
    )
    source = next(s for s in find(model.config).sources if s.modality == modality)
    found = source.encode(model, [], output, given)
    assert found.visual is not None
    for image, length in enumerate(found.tokens):
        rows = output.pooler_output[image].reshape(-1, 48)
        if len(rows) < length:  # transformers 5.17 adds a video's break later
            rows = torch.cat([rows, model.model.image_newline[None]])
        assert len(rows) == length
        made_of = support(rows, entered[0])
        patches = found.is_patch(image)
        patches = torch.ones(length, dtype=torch.bool) if patches is None else patches
        assert [bool(cells) for cells in made_of] == patches.tolist()
        assert support(found.visual[image], leaf) == [cells for cells in made_of if cells]
        newline = (rows == model.model.image_newline).all(1)
        assert newline.tolist() == (~patches).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_grids_and_crops(name: str) -> None:
    found = encoded(model_of(name), one_each(name))
    small = (SIDE, SIDE)
    want = [ROWS[size] for size in SIZES]
    if name == "llava_onevision":
        want[SIZES.index(BLENDED)] = (4, 6)
    assert found.tokens == tuple(features(name, size, 1) for size in SIZES)
    assert found.grids == tuple(want)
    assert found.crop_grids == tuple((small, grid) for grid in want)
    assert found.crops == tuple((SIDE**2, h * w) for h, w in want)


def test_images_among_several_are_one_tile() -> None:
    """LLaVA-OneVision does not cut them; each has one break, after its only tile."""
    inputs = sample("llava_onevision", 3, *PARTS)
    found = encoded(model_of("llava_onevision"), inputs)
    assert found.tokens == (SIDE**2 + 1,) * len(SIZES)
    assert found.crops == ((SIDE**2,),) * len(SIZES)
    assert found.patches is not None
    assert all(p.tolist() == [True] * SIDE**2 + [False] for p in found.patches)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_several_sizes_in_a_prompt_and_a_prompt_without(name: str) -> None:
    several = family(name, PARTS, [5], [2, ("image", SIZES[2]), ("image", SIZES[0]), 1])
    contract.test_a_padded_batch_is_what_each_prompt_is_alone(several, "consensus")
    contract.test_the_saliency_of_a_prompt_does_not_depend_on_its_batch(several)
    contract.test_without_a_cache_the_tokens_are_the_same(several, "sdpa")


@torch.no_grad()
def test_beams_over_images_of_several_sizes_in_a_prompt() -> None:
    """Before transformers 5.18 `generate` repeats each image by itself, [A, A, B, B], and a row of
    the prompts gets another's images: refused where their sizes show it."""
    model = model_of("llava_next")
    inputs = sample("llava_next", 0, 1, ("image", SIZES[0]), 2, ("image", SIZES[2]), 3)
    options: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with patch(model, best_of(keep=5)) as handle:
        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            with pytest.raises(ValueError, match="must be whole images"):
                model.generate(**inputs, **options)
            return
        model.generate(**inputs, **options)
        assert handle.last.tokens_after == (10, 10)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_crops_have_budgets_of_their_own(name: str) -> None:
    model = model_of(name)
    inputs = sample(name, 0, 2, ("image", SIZES[0]), 3)
    with patch(model, best_of(keep=3, budget_scope="crop")) as handle:
        model(**inputs)
        assert handle.last.grids == ((4, 4), (4, 8))
        assert handle.last.tokens_after == (6,)
        small, large = handle.last.columns
        first = inputs["input_ids"][0].tolist().index(IMAGE)
        assert small.tolist() == list(range(first, first + 16))
        rows = [first + 16 + 9 * row + column for row in range(4) for column in range(8)]
        assert large.tolist() == rows
    with patch(model, best_of(keep=3)) as handle:
        model(**inputs)
        assert handle.last.tokens_after == (3,)
        assert handle.last.grid == (4, 8)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("breaks", ["drop", "keep"])
def test_breaks(name: str, breaks: str) -> None:
    """Dropped, or kept beyond the budget, where they stood."""
    model, plain = model_of(name), Unpatched(model_of(name))
    inputs = sample(name, 4, 2, ("image", SIZES[0]), 3)
    with patch(model, best_of(keep=6), breaks=breaks) as handle:
        logits = model(**inputs).logits[0, -1]
        assert handle.last.tokens_after == (6 + 4 * (breaks == "keep"),)
        chosen = choices(handle.last, 0, 0)
    here = inputs["input_ids"][0] == IMAGE
    if breaks == "keep":
        lines = here.nonzero().flatten()[16:].view(4, 9)[:, 8]
        here[lines] = False
    short = pruned(plain.inputs(inputs), chosen, here, compact=True)
    want = plain.model.get_output_embeddings()(plain.hidden(short)[-1])
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", [best_of(keep=16), Random(keep=16)])
def test_an_image_that_stays_whole_keeps_its_breaks(method: Any) -> None:
    """Whatever becomes of the others in its batch or its prompt."""
    name = "llava_onevision"
    model = model_of(name)
    small = sample(name, 0, 2, ("image", SIZES[0]), ("image", SIZES[1]), 3)  # a tile each
    large = sample(name, 1, 2, ("image", SIZES[0]), 3)
    want = model(**small).logits[0, -1]
    with patch(model, method) as handle:
        alone = model(**small).logits[0, -1]
        assert handle.last.tokens_after == (34,)
        batch = model(**join([small, large])).logits[0, -1]
        assert handle.last.tokens_after == (34, 16)
    torch.testing.assert_close(alone, want)
    torch.testing.assert_close(batch, want, atol=1e-4, rtol=1e-4)
    with patch(model, best_of(keep=16, budget_scope="crop")) as handle:
        model(**large)  # the small tile is whole, the image is not
        assert handle.last.tokens_after == (32,)


@pytest.mark.parametrize("name", NAMES)
def test_several_feature_layers(name: str) -> None:
    """The deepest of them is tapped, whatever their order."""
    layers = [-2, -4]
    made = family(name, [2, ("image", SIZES[0]), 3], PARTS, vision_feature_layer=layers)
    contract.test_a_padded_batch_is_what_each_prompt_is_alone(made, "consensus")
    source = find(made.model().config).sources[0]
    assert source.tap_layer(made.model().config, {}) == 2
    assert source.tap_layer(made.model().config, {"vision_feature_layer": [1, 4, 2]}) == 3
    model = made.model()
    model.config.vision_feature_layer = -2
    want = encoded(model_of(name, vision_feature_layer=-2), one_each(name)).visual
    model = model_of(name, vision_feature_layer=layers)
    model.model.vision_tower.load_state_dict(
        model_of(name, vision_feature_layer=-2).model.vision_tower.state_dict()
    )
    got = encoded(model, one_each(name)).visual
    assert want is not None
    assert got is not None
    torch.testing.assert_close(torch.cat(got), torch.cat(want))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_runs(name: str) -> None:
    model = model_of(name).to(torch.bfloat16)
    inputs = one_each(name)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with patch(model, best_of(keep=6)) as handle:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert handle.last.tokens_after == (6,) * len(SIZES)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


@torch.no_grad()
def test_tiles_without_padding_and_sizes_as_a_list() -> None:
    """Other forms that the model takes its inputs in."""
    model, name = model_of("llava_next"), "llava_next"
    inputs = one_each(name)
    tight = inputs | {
        "pixel_values": tile_pixels(inputs, SIZES),
        "image_sizes": [list(size) for size in SIZES],
    }
    with patch(model, best_of(keep=6)):
        want, got = model(**inputs).logits, model(**tight).logits
    torch.testing.assert_close(got, want)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["average", "max"])
def test_pooling_modes(mode: str) -> None:
    videos: list[list[Part]] = [[2, ("video", 3), 4], [5, ("video", 3), 6]]
    made = family("llava_next_video", *videos, spatial_pool_mode=mode)
    contract.test_a_padded_batch_is_what_each_prompt_is_alone(made, "consensus")


def test_what_is_refused() -> None:
    method = best_of(keep=2)
    with pytest.raises(ValueError, match="spatial_pool_mode must be 'average' or 'max'"):
        patch(model_of("llava_next_video", spatial_pool_mode="conv"), method)
    cases = [
        ("llava_next", {"vision_feature_select_strategy": "full"}, "must be 'default' with a clip"),
        ("llava_next_video", {"vision_feature_select_strategy": "full"}, "must be 'default'"),
        (
            "llava_onevision",
            {"vision_feature_select_strategy": "default"},
            "must be 'full' with a siglip",
        ),
        ("llava_next", {"vision_feature_layer": 0}, "must name one of the 4 layers"),
        ("llava_next", {"vision_feature_layer": [-2, -5]}, "must name one of the 4 layers"),
        ("llava_next", {"vision_feature_layer": []}, "must name one of the 4 layers"),
    ]
    for name, options, reason in cases:
        model = model_of(name)
        for option, value in options.items():
            setattr(model.config, option, value)
        with pytest.raises(ValueError, match=reason):
            patch(model, method)
    model = model_of("llava_onevision")
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="must be one of clip_vision_model, siglip_vision_model"):
        patch(model, method)
    model = model_of("llava_next")
    with patch(model, method), pytest.raises(ValueError, match="features of encoder layer 0"):
        model(**one_each("llava_next"), vision_feature_layer=1)


def test_a_tower_with_a_class_token_in_onevision() -> None:
    """Its token weighs the patches, as anywhere."""
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    made = Family(
        name="llava_onevision-clip",
        build=lambda: build(
            "llava_onevision", vision_config=tower, vision_feature_select_strategy="default"
        ),
        samples=lambda: [
            sample("llava_onevision", 0, 2, ("image", SIZES[0]), 3),
            sample("llava_onevision", 20, *PARTS),
        ],
        join=join,
    )
    contract.test_a_padded_batch_is_what_each_prompt_is_alone(made, "consensus")
