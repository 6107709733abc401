"""Size-aware attention beyond the contract: other attentions, stages, and what is refused."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.hf.sizes import weighted_mask
from consensusdrop_kernels.hf.stages import _joined
from consensusdrop_kernels.methods.base import Selection, Signals

from .best import best_of
from .models import batch, pixels, prompt, random_llava
from .test_stages import Staged

WORDS = batch(prompt(2, 4, seed=1), prompt(5, 7, seed=2))
INPUTS = WORDS | {"pixel_values": pixels(2)}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
METHOD = best_of(keep=4, size_attention=True)


@torch.no_grad()
def test_sizes_change_what_is_said() -> None:
    """And only where tokens were merged."""
    model = random_llava()
    with patch(model, METHOD):
        weighed = model(**INPUTS).logits
    with patch(model, best_of(keep=4)):
        plain = model(**INPUTS).logits
    assert (weighed - plain).abs().max() > 1e-2
    with patch(model, best_of(keep=4, threshold=1.0, size_attention=True)):
        alone = model(**INPUTS).logits
    with patch(model, best_of(keep=4, threshold=1.0)):
        torch.testing.assert_close(alone, model(**INPUTS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beams_take_the_sizes_along() -> None:
    model = random_llava()
    with patch(model, METHOD):
        whole = model.generate(**INPUTS, num_beams=3, **GREEDY)
        one = batch(prompt(5, 7, seed=2)) | {"pixel_values": pixels(2)[1:]}
        alone = model.generate(**one, num_beams=3, **GREEDY)
    assert torch.equal(whole[1, -4:], alone[0, -4:])


@torch.no_grad()
def test_several_tokens_at_once_on_a_cache() -> None:
    """A hand-written loop, two tokens a call, is one call with all of them."""
    model = random_llava()
    one = batch(prompt(5, 7, seed=2)) | {"pixel_values": pixels(1)}
    more = torch.tensor([[5, 6, 7, 8]])
    with patch(model, METHOD):
        out = model(**one, use_cache=True)
        first = model(input_ids=more[:, :2], past_key_values=out.past_key_values)
        second = model(input_ids=more[:, 2:], past_key_values=first.past_key_values)
        again = model(**one, use_cache=True)
        whole = model(input_ids=more, past_key_values=again.past_key_values)
    got = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(got, whole.logits, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class MergingStages(Staged):
    """Merges what it drops at each stage into what it keeps."""

    size_attention: bool = True

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        chosen = super().select_stage(stage, signals)
        tokens, assign, size = torch.ops.cdrop.token_merge(
            signals.x, signals.x, chosen.index, weight=signals.size, valid=signals.valid
        )
        return Selection(tokens, chosen.index, assign, size, chosen.padded)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stages_weigh_what_they_merged(attention: str) -> None:
    """Layers behind a stage add the logarithm of how many patches each token stands for."""
    model = random_llava()
    model.set_attn_implementation(attention)
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[2]
    method = MergingStages(keep=0.8)
    with patch(model, method):
        hook = layer.register_forward_pre_hook(
            lambda m, a, k: seen.append(k["attention_mask"]), with_kwargs=True
        )
        cached = model.generate(**INPUTS, **GREEDY)
        hook.remove()
        uncached = model.generate(**INPUTS, use_cache=False, **GREEDY)
    assert torch.equal(cached, uncached)
    for mask in seen:
        patches = mask[:, 0, -1].exp()  # of the keys that the last row sees; hidden ones are 0
        new = mask.shape[-1] - seen[0].shape[-1]
        text = torch.tensor([7, 13]) + new
        # 12 of 16 patches enter the decoder, unmerged; the stages merge, they lose none.
        torch.testing.assert_close(patches.sum(1), (text + 13).float(), atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("context", ["visual", "all"])
def test_autocast_leaves_sizes_and_normalisers_exact(context: str) -> None:
    """They are float32 whatever autocast makes of matmuls: bfloat16 can't count past 256."""
    model = random_llava()
    with torch.autocast("cpu", torch.bfloat16):
        with patch(model, MergingStages(keep=0.8, context=context)):
            assert model(**INPUTS).logits.isfinite().all()
        with patch(model, best_of(keep=4, probe_context=context)) as handle:
            assert model(**INPUTS).logits.isfinite().all()
            assert handle.last.scores.fused.isfinite().all()
    assign = (torch.arange(600) >= 300).long()[None]
    chosen = Selection(torch.zeros(1, 2, 1), torch.tensor([[0, 300]]), assign, torch.ones(1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert _joined(chosen, torch.full((1, 600), 3.0)).tolist() == [[900.0, 900.0]]


def test_flash_attention_gives_way_to_sdpa_and_comes_back() -> None:
    model = random_llava()
    layers = model.model.language_model.layers
    for layer in layers:
        layer.self_attn.config._attn_implementation_internal = "flash_attention_2"
    before = [layer.self_attn.config for layer in layers]
    with pytest.warns(UserWarning, match="run sdpa instead"):
        handle = patch(model, METHOD)
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"sdpa"}
    handle.remove()
    assert all(layer.self_attn.config is own for layer, own in zip(layers, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("words", [(9,), (4, 9)])
def test_text_alone_is_right_where_sdpa_stands_in_for_flash_attention(
    words: tuple[int, ...],
) -> None:
    """The decoder makes its masks for flash attention: none, or what is padding."""
    text = batch(*(prompt(n, seed=n) for n in words))
    more = torch.tensor([[5, 6, 7]] * len(words))
    longer = torch.cat([text["attention_mask"], torch.ones_like(more)], 1)

    def logits(model: Any) -> Tensor:
        out = model(**text)
        then = model(more, attention_mask=longer, past_key_values=out.past_key_values)
        return torch.cat([out.logits, then.logits], 1)[longer.bool()]

    want = logits(random_llava())
    model = random_llava()
    decoder = model.model.language_model
    for module in (decoder, *(layer.self_attn for layer in decoder.layers)):
        module.config._attn_implementation_internal = "flash_attention_2"
    with pytest.warns(UserWarning, match="run sdpa instead"):
        patch(model, METHOD)
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_flex_attention_adds_the_same(monkeypatch) -> None:
    """As torch computes it uncompiled: compiled for a CPU, torch 2.13 reads past the end of any
    mask of a few rows that stock Transformers hands it."""
    model = random_llava()
    with patch(model, METHOD):
        want = model(**INPUTS).logits
    integration = importlib.import_module("transformers.integrations.flex_attention")

    def uncompiled(q: Tensor, k: Tensor, v: Tensor, *, training: bool, **options: Any) -> Any:
        return flex_attention.flex_attention(q, k, v, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    model.set_attn_implementation({"text_config": "flex_attention"})
    with patch(model, METHOD):
        got = model(**INPUTS).logits
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_static_cache_is_refused() -> None:
    model = random_llava()
    one = batch(prompt(2, 4, seed=1)) | {"pixel_values": pixels(1)}
    with patch(model, METHOD), pytest.raises(NotImplementedError, match="static cache"):
        model.generate(**one, cache_implementation="static", **GREEDY)


def test_masks_of_other_kinds_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="mask of type str"):
        weighted_mask("causal", torch.zeros(1, 3), torch.zeros(1, 3, 2))


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match="size_attention must be True or False, got 1"):
        best_of(keep=4, size_attention=1)  # type: ignore[arg-type]
