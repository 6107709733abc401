"""Video-LLaVA: two towers, and class tokens among the features of frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from consensusdrop_kernels.hf import Encoded, patch, video_llava
from consensusdrop_kernels.hf.adapter import find

from . import test_contract as contract
from .best import best_of
from .contract import Unpatched, choices, pruned
from .families import Family, Inputs
from .families.video_llava import IMAGE, IMAGE_PIXELS, PATCHES, VIDEO, Part, build, join, sample

IMAGES: list[Part] = [2, ("image", 1), ("image", 1), 3]
VIDEOS: list[Part] = [2, ("video", 3), 1, ("video", 3), 3]
PIXELS = {"image": IMAGE_PIXELS, "video": "pixel_values_videos"}


def model_of(**options: Any) -> Any:
    return Family(f"video_llava-{options}", lambda: build(**options), list, join).model()


def features(model: Any, inputs: Inputs, modality: str) -> tuple[Any, dict[str, Any]]:
    given = {PIXELS[modality]: inputs[PIXELS[modality]]}
    return getattr(model.model, f"get_{modality}_features")(**given, return_dict=True), given


def encoded(model: Any, inputs: Inputs, modality: str) -> Encoded:
    """What a patched model notes of pictures."""
    with patch(model, best_of(keep=2)), torch.no_grad():
        return features(model, inputs, modality)[0]._cdrop


def pictures(modality: str) -> Inputs:
    return sample(5, *(IMAGES if modality == "image" else VIDEOS))


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_scores_are_those_of_the_eager_attention_map(modality: str, strategy: str) -> None:
    """Of the tower that saw them; a frame's class token is a feature, but no patch."""
    inputs = pictures(modality)
    found = encoded(model_of(vision_feature_select_strategy=strategy), inputs, modality)
    tower = getattr(model_of().model, f"{modality}_tower")
    layer = tower.encoder.layers[-2]
    keys: list[Tensor] = []
    layer.self_attn.k_proj.register_forward_hook(lambda m, i, out: keys.append(out))
    tower.set_attn_implementation("eager")
    pixels = inputs[PIXELS[modality]].view(-1, 3, 32, 32)
    with torch.no_grad():
        maps = tower(pixels, output_attentions=True, return_dict=True).attentions[-2]
    frames = len(pixels) // 2
    want = maps[:, :, 0, 1:].mean(1).view(2, -1)
    assert found.visual is not None
    assert found.metric is not None
    torch.testing.assert_close(torch.stack(found.visual), want, atol=1e-5, rtol=1e-5)
    key = keys[0][:, 1:].view(len(pixels), PATCHES, layer.self_attn.num_heads, -1).mean(2)
    torch.testing.assert_close(
        torch.stack(found.metric), key.reshape(2, frames * PATCHES, -1), atol=1e-5, rtol=1e-5
    )
    with_class = modality == "video" or strategy == "full"
    assert found.tokens == (frames * (PATCHES + with_class),) * 2
    assert found.crops == ((PATCHES,) * frames,) * 2
    assert found.grids == ((4, 4),) * 2
    assert (found.patches is None) == (not with_class)


@pytest.mark.parametrize(
    ("modality", "strategy"), [("image", "default"), ("image", "full"), ("video", "default")]
)
def test_a_score_goes_where_its_patch_goes(
    modality: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is made of one row of the tower's features: a class token's, or the patch's whose
    score it has."""
    model = model_of(vision_feature_select_strategy=strategy)
    entered: list[Tensor] = []

    def enter(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        entered.append(args[0].detach().requires_grad_())
        return (entered[0],)

    hook = model.model.multi_modal_projector.register_forward_pre_hook(enter)
    output, given = features(model, pictures(modality), modality)
    hook.remove()
    count = len(entered[0])
    number = torch.arange(count * PATCHES, dtype=torch.float32).view(count, PATCHES)
    signals = number, torch.zeros(count, PATCHES, 1)
    monkeypatch.setattr(video_llava, "tile_signals", lambda *_: signals)
    source = next(s for s in find(model.config).sources if s.modality == modality)
    found = source.encode(model, [], output, given)
    rows = output.pooler_output.reshape(-1, 48)
    assert len(rows) == sum(found.tokens)
    width = entered[0].shape[1]
    made_of = []
    for row in rows:
        (grad,) = torch.autograd.grad(row.sum(), entered[0], retain_graph=True)
        places = grad.flatten(0, 1).abs().sum(1).nonzero().flatten().tolist()
        assert len(places) == 1
        made_of.append(divmod(places[0], width))
    with_class = width > PATCHES
    patches = torch.ones(len(rows), dtype=torch.bool)
    if with_class:
        assert found.patches is not None
        patches = torch.cat(found.patches)
        assert patches.tolist() == [place > 0 for _, place in made_of]
    assert found.visual is not None
    want = [t * PATCHES + place - with_class for t, place in made_of if not with_class or place]
    assert torch.cat(found.visual).tolist() == want
    assert int(patches.sum()) == len(want)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_images_with_their_class_token(strategy: str) -> None:
    made = Family(
        name=f"video_llava-{strategy}",
        build=lambda: build(vision_feature_select_strategy=strategy),
        samples=lambda: [
            sample(20 * i, *parts, with_class=strategy == "full")
            for i, parts in enumerate(([2, ("image", 1), 3], [*IMAGES, ("video", 3), 2], [4]))
        ],
        join=join,
    )
    contract.test_a_padded_batch_is_what_each_prompt_is_alone(made, "consensus")
    contract.test_the_saliency_of_a_prompt_does_not_depend_on_its_batch(made)


@torch.no_grad()
@pytest.mark.parametrize("breaks", ["drop", "keep"])
def test_class_tokens_of_frames(breaks: str) -> None:
    """Dropped, or kept beyond the budget, where they stood."""
    model, plain = model_of(), Unpatched(model_of())
    inputs = sample(4, 2, ("video", 3), 3)
    with patch(model, best_of(keep=6), breaks=breaks) as handle:
        logits = model(**inputs).logits[0, -1]
        assert handle.last.tokens_after == (6 + 3 * (breaks == "keep"),)
        chosen = choices(handle.last, 0, 0)
    here = inputs["input_ids"][0] == VIDEO
    if breaks == "keep":
        here[here.nonzero().flatten()[:: PATCHES + 1]] = False
    short = pruned(plain.inputs(inputs), chosen, here, compact=True)
    want = plain.model.get_output_embeddings()(plain.hidden(short)[-1])
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_frames_have_budgets_of_their_own() -> None:
    model = model_of()
    inputs = sample(4, 2, ("video", 3), ("image", 1), 3)
    with patch(model, best_of(keep=5, budget_scope="crop")) as handle:
        model(**inputs)
    assert handle.last.tokens_after == (20,)
    assert handle.last.grids == ((4, 4),) * 4
    ids = inputs["input_ids"][0]
    assert [ids[c[0]].item() for c in handle.last.columns] == [VIDEO] * 3 + [IMAGE]


@torch.no_grad()
def test_the_older_name_of_the_pixels() -> None:
    """`pixel_values_images` is still taken from transformers 5.23 on."""
    model, inputs = model_of(), sample(5, *IMAGES)
    older = {("pixel_values_images" if k == IMAGE_PIXELS else k): v for k, v in inputs.items()}
    with patch(model, best_of(keep=5)) as handle:
        want = model(**inputs).logits
        torch.testing.assert_close(model(**older).logits, want)
        assert handle.last.tokens_after == (10,)
        call = model.model.get_image_features
        assert call(pixel_values_images=inputs[IMAGE_PIXELS])._cdrop.images == 2


def test_several_feature_layers() -> None:
    made = Family(
        name="video_llava-layers",
        build=lambda: build(vision_feature_layer=[-2, -3]),
        samples=lambda: [sample(0, 2, ("image", 1), 3), sample(20, *VIDEOS)],
        join=join,
    )
    contract.test_a_padded_batch_is_what_each_prompt_is_alone(made, "consensus")


def test_what_is_refused() -> None:
    model = model_of()
    model.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="must be a clip_vision_model"):
        patch(model, best_of(keep=2))
    model = model_of()
    with (
        patch(model, best_of(keep=2)),
        pytest.raises(ValueError, match="features of encoder layer 3"),
    ):
        model(**pictures("video"), vision_feature_layer=-1)
