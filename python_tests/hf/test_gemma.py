"""PaliGemma and Gemma 3: pooled saliency, whole masks, windows, positions that start at 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from consensusdrop_kernels.hf import patch, prefill

from . import test_contract as promises
from .best import best_of
from .families import FAMILIES, Family
from .families.gemma import gemma3, join, paligemma, sample
from .geometry import check_map, last_hidden_state, received

GEMMA3, PALIGEMMA = FAMILIES["gemma3"], FAMILIES["paligemma-gemma"]
PREFIX = Family(  # prompts as they are asked: all of it prefix, no word of an answer
    name="paligemma-prefix",
    build=lambda: paligemma("gemma"),
    samples=lambda: [sample(0, 1), sample(1, 2, before=3, after=6)],
    join=join,
)


def pooled(saliency: torch.Tensor, side: int) -> torch.Tensor:
    """Means of squares of patches, down to 4 by 4."""
    blocks = saliency.view(-1, 4, side // 4, 4, side // 4)
    return blocks.mean((2, 4)).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [GEMMA3, PALIGEMMA], ids=lambda f: f.name)
def test_saliency_is_the_attention_that_a_token_receives(family: Family, attention: str) -> None:
    model, batch = family.model(), family.samples()[1]
    model.model.vision_tower.set_attn_implementation(attention)
    with patch(model, best_of(keep=3)) as handle:
        model(**batch)
        visual = handle.last.scores.visual
    model.model.vision_tower.set_attn_implementation("eager")
    tower = model.model.vision_tower(batch["pixel_values"], output_attentions=True)
    want = received(tower.attentions[-1])
    side = int(want.shape[1] ** 0.5)
    torch.testing.assert_close(visual, pooled(want, side), atol=1e-6, rtol=1e-5)


def test_every_token_has_the_patches_that_the_map_says() -> None:
    for model, patches, share in ((gemma3(), 64, 0.25), (paligemma("gemma"), 16, 1.0)):
        pixels = torch.randn(2, 3, 32, 32)
        stand_in = last_hidden_state(model.model.vision_tower)
        check_map(model, {"pixel_values": pixels}, (2, patches), 32, stand_in, share)


@torch.no_grad()
@pytest.mark.parametrize("family", [GEMMA3, PALIGEMMA, PREFIX], ids=lambda f: f.name)
def test_causal_masks_would_be_seen(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """That image tokens, or the prefix, see each other must not go unnoticed in these tests."""
    promises.test_a_padded_batch_is_what_each_prompt_is_alone(family, "consensus")
    monkeypatch.setattr(prefill, "_mask", lambda given, short, text: short.mask)
    with pytest.raises(AssertionError):
        promises.test_a_padded_batch_is_what_each_prompt_is_alone(family, "consensus")


def test_prompts_that_are_all_prefix() -> None:
    promises.test_a_padded_batch_is_what_each_prompt_is_alone(PREFIX, "random")
    promises.test_the_saliency_of_a_prompt_does_not_depend_on_its_batch(PREFIX)
    promises.test_beams_and_several_answers(PREFIX)


@torch.no_grad()
@pytest.mark.parametrize("size_attention", [False, True])
def test_without_token_types_images_are_causal(size_attention: bool) -> None:
    """Then there are no whole masks, or only those of sliding layers."""
    model = GEMMA3.model()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    samples = [dict(one) for one in GEMMA3.samples()]
    for one in samples:
        one.pop("token_type_ids")
    batch = {k: v for k, v in join(GEMMA3.samples()).items() if k != "token_type_ids"}
    method = best_of(keep=0.4, size_attention=size_attention)
    with patch(model, method):
        whole = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        again = model.generate(**batch, **options, use_cache=False)
        assert torch.equal(again[:, batch["input_ids"].shape[1] :], whole)
        for row, one in enumerate(samples):
            alone = model.generate(**one, **options)[0, one["input_ids"].shape[1] :]
            assert torch.equal(whole[row], alone)
        both = [one["input_ids"].shape[1] for one in samples]
        assert len(set(both)) == 2
        # No padding at first, but rows of several lengths once they are pruned.
        short, long = samples
        more = [long["input_ids"][:, :1]] * (both[1] - both[0])
        short["input_ids"] = torch.cat([*more, short["input_ids"]], 1)
        short["attention_mask"] = torch.ones_like(short["input_ids"])
        level = {k: torch.cat([short[k], long[k]]) for k in short}
        whole = model.generate(**level, **options)[:, both[1] :]
        alone = model.generate(**short, **options)[0, both[1] :]
        assert torch.equal(whole[0], alone)


@torch.no_grad()
@pytest.mark.parametrize("where", ["compact", "original"])
def test_positions_start_at_one(where: str) -> None:
    model, one = PREFIX.model(), PREFIX.samples()[0]
    seen: list[torch.Tensor] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with patch(model, best_of(keep=4, positions=where)) as handle:
        model.generate(**one, max_new_tokens=3, do_sample=False)
        keep = handle.last.keep_mask[0]
    length = len(keep)
    want = torch.arange(1, int(keep.sum()) + 1) if where == "compact" else 1 + keep.nonzero()[:, 0]
    end = int(want[-1])
    assert end == (length if where == "original" else length - 12)
    # A hook that was there before the patch sees what the model itself hands over.
    assert seen[0].tolist() == [list(range(1, length + 1))]
    assert [int(step) for step in seen[1:]] == [end + 1, end + 2]


@torch.no_grad()
def test_what_is_refused() -> None:
    model, one = PREFIX.model(), PREFIX.samples()[0]
    with patch(model, best_of(keep=4)):
        with pytest.raises(ValueError, match="token_type_ids must come with the images"):
            model(**{k: v for k, v in one.items() if k != "token_type_ids"})
        with pytest.raises(NotImplementedError, match="static cache can't be pruned in a model"):
            model.generate(**one, max_new_tokens=2, cache_implementation="static")
    model, one = GEMMA3.model(), GEMMA3.samples()[0]
    with patch(model, best_of(keep=4)):
        with pytest.raises(NotImplementedError, match="static cache can't be pruned in a model"):
            model.generate(**one, max_new_tokens=2, cache_implementation="static")
        model.model.language_model.set_attn_implementation("flex_attention")
        with (
            torch.compiler.set_stance("force_eager"),  # the mask's making is compiled otherwise
            pytest.raises(NotImplementedError, match="block masks can't be shortened"),
        ):
            model(**one)
    model.config.vision_config.model_type = "clip_vision_model"
    with pytest.raises(ValueError, match="must be a siglip_vision_model, got clip_vision_model"):
        patch(model, best_of(keep=4))
