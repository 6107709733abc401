"""LLaVA's towers and feature options: with and without a class token, one layer or several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from consensusdrop_kernels.hf import patch

from .best import best_of
from .contract import Unpatched, choices, pruned
from .families import Inputs
from .families.llava import build, sample
from .models import IMAGE, TOKENS

OPTIONS: dict[str, tuple[str, dict[str, Any], int]] = {  # tower, options, tapped layer
    "clip": ("clip", {}, 2),
    "clip-full": ("clip", {"vision_feature_select_strategy": "full"}, 2),
    "clip-layers": ("clip", {"vision_feature_layer": [3, -4]}, 2),
    "siglip": ("siglip", {"vision_feature_select_strategy": "full"}, 2),
    "siglip-last": (
        "siglip", {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}, 3,
    ),
}  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(3)
    tower, options, _ = OPTIONS[kind]
    return build(tower, **options).eval()


def prompt_for(kind: str) -> Inputs:
    return sample(2, 2, 1, 4, tokens=TOKENS + (kind == "clip-full"))


@torch.no_grad()
@pytest.mark.parametrize("kind", OPTIONS)
def test_scores_are_those_of_the_eager_attention_map(kind: str) -> None:
    model, inputs = model_of(kind), prompt_for(kind)
    with patch(model, best_of(keep=4)) as handle:
        model(**inputs)
        visual = handle.last.scores.visual
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(inputs["pixel_values"], output_attentions=True, return_dict=True).attentions
    maps = maps[OPTIONS[kind][2]]
    want = maps.mean((1, 2)) if OPTIONS[kind][0] == "siglip" else maps[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(visual, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_score_goes_where_its_patch_goes(kind: str) -> None:
    """Each token depends on one row of the tower's features, the tokens that count as patches on
    the patches' rows, in order."""
    model, inputs = model_of(kind), prompt_for(kind)
    entered: list[Tensor] = []

    def enter(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        entered.append(args[0].detach().requires_grad_())
        return (entered[-1],)

    model.model.multi_modal_projector.register_forward_pre_hook(enter)
    with patch(model, best_of(keep=4)):
        output = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    found = output._cdrop
    for image, rows in enumerate(output.pooler_output):
        made_of = []
        for row in rows:
            (grad,) = torch.autograd.grad(row.sum(), entered[0], retain_graph=True)
            made_of.append(grad.abs().sum(-1).nonzero().tolist())
        extra = int(kind == "clip-full")  # the class token comes first
        assert made_of == [[[image, place]] for place in range(TOKENS + extra)]
        patches = found.is_patch(image)
        assert (patches is None) == (not extra)
        if patches is not None:
            assert patches.tolist() == [False] + [True] * TOKENS
    assert found.k_vis.shape[2] == found.prefix + TOKENS


@torch.no_grad()
@pytest.mark.parametrize("breaks", ["drop", "keep"])
def test_the_class_token_in_the_prompt(breaks: str) -> None:
    """Dropped with the strategy "full", or kept beyond the budget."""
    model, plain = model_of("clip-full"), Unpatched(model_of("clip-full"))
    inputs = prompt_for("clip-full")
    with patch(model, best_of(keep=4), breaks=breaks) as handle:
        logits = model(**inputs).logits[0, -1]
        assert handle.last.tokens_after == (8 + 2 * (breaks == "keep"),)
        chosen = choices(handle.last, 0, 0)
    here = inputs["input_ids"][0] == IMAGE
    if breaks == "keep":
        here[here.nonzero().flatten()[:: TOKENS + 1]] = False
    short = pruned(plain.inputs(inputs), chosen, here, compact=True)
    want = plain.model.get_output_embeddings()(plain.hidden(short)[-1])
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_strategy_of_a_call() -> None:
    """An argument of the call goes before the config."""
    model = model_of("clip")
    with patch(model, best_of(keep=4)) as handle:
        model(**prompt_for("clip-full"), vision_feature_select_strategy="full")
        assert handle.last.tokens_before == (2 * TOKENS + 2,)
        assert [len(c) for c in handle.last.columns] == [TOKENS, TOKENS]
        model(**prompt_for("clip"))
        assert handle.last.tokens_before == (2 * TOKENS,)
