"""The tapped encoder attention and the question probe against the attention really computed."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from consensusdrop_kernels.hf import patch, probe
from consensusdrop_kernels.hf.adapter import find
from consensusdrop_kernels.hf.query import question_places

from . import reference
from .best import best_of
from .families import FAMILIES, Family
from .models import TOKENS, batch, pixels, prompt, random_llava

WORDS = prompt(2, 4, seed=1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tap_is_the_eager_attention_of_the_class_row(attention: str) -> None:
    model, images = random_llava(), pixels(2)
    model.set_attn_implementation(attention)
    words = batch(WORDS, WORDS)
    with patch(model, best_of(keep=3)) as handle:
        model(**words, pixel_values=images)
        visual = handle.last.scores.visual
    model.set_attn_implementation("eager")
    maps = model.model.vision_tower(images, output_attentions=True).attentions[-2]
    torch.testing.assert_close(visual, maps[:, :, 0, 1:].mean(1), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_probe_over_all_keys_is_the_first_layers_attention(text: str) -> None:
    """Padded, with grouped heads: what layer 0 computes on the whole prompt, to rounding."""
    model, images = random_llava(text), pixels(2)
    inputs = batch(WORDS, prompt(5, 7, seed=2))
    method = best_of(keep=3, probe_context="all", rows="mean")
    with patch(model, method) as handle:
        model.generate(**inputs, pixel_values=images, max_new_tokens=1)
        got = handle.last.scores.textual
    model.set_attn_implementation("eager")
    where = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = model(**inputs, pixel_values=images, position_ids=where, output_attentions=True)
    for row, after in enumerate((4, 7)):
        maps = out.attentions[0][row, :, -after:]
        want = maps[:, :, -after - TOKENS : -after].mean((0, 1))
        torch.testing.assert_close(got[row], want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_tap_leaves_the_towers_output_bit_for_bit() -> None:
    model, images = random_llava(), pixels(2)
    before = model.model.get_image_features(pixel_values=images, return_dict=True).pooler_output
    with patch(model, best_of(keep=3)):
        after = model.model.get_image_features(pixel_values=images, return_dict=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after.pooler_output, strict=True))


@torch.no_grad()
def test_only_one_module_is_tapped_and_none_runs_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = random_llava(), []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return stock(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", counted)
    with patch(model, best_of(keep=3)):
        tapped = [m for m in model.modules() if "tap" in str(getattr(m, "_cdrop_tap", "")).lower()]
        model(**batch(WORDS), pixel_values=pixels(1))
    assert len(tapped) == 1
    assert len(calls) == 4 + 3  # every layer of the tower and of the decoder


@torch.no_grad()
def test_a_flash_implementation_still_reads_its_own_name() -> None:
    """Flash attention looks at `module.config` again; it must find what it was called by."""
    model, seen = random_llava(), []

    def fake_flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append((module.config._attn_implementation, module.training, module.num_heads))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)

    AttentionInterface.register("my_flash", fake_flash)
    try:
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.config._attn_implementation_internal = "my_flash"
        with patch(model, best_of(keep=3)):
            model(**batch(WORDS), pixel_values=pixels(1))
    finally:
        AttentionInterface._global_mapping.pop("my_flash")
    assert seen == [("my_flash", False, 4)] * 4


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 5, 0.5])
def test_the_choice_is_the_oracles(keep: int | float) -> None:
    model, images = random_llava(), pixels(1)
    with patch(model, best_of(keep=keep)) as handle:
        model(input_ids=torch.tensor([WORDS]), pixel_values=images)
        selection = handle.last.selection
    count = keep if isinstance(keep, int) else 8
    embeds = model.get_input_embeddings()(torch.tensor(WORDS))
    columns = torch.arange(3, 3 + TOKENS)
    embeds[columns] = reference.image_tokens(model, images)[0]
    visual, _ = reference.encoder_scores(model, images)
    textual = reference.question_scores(
        model, embeds, torch.arange(3 + TOKENS, len(WORDS)), columns
    )
    assert selection.index[0].tolist() == reference.choose(visual[0], textual, count, 0.5).tolist()
    assert selection.size.sum() == TOKENS


IDS = torch.tensor([[0, 1, 5, 9, 9, 6, 7], [1, 5, 6, 7, 9, 9, 2]])
VISUAL, VALID, SPECIAL = IDS == 9, IDS != 0, torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("rule", "special", "want"),
    [
        ("after_image", None, [[5, 6], [6]]),
        ("after_image", SPECIAL, [[5, 6], [1, 2, 3]]),  # nothing follows: all text
        ("all_text", None, [[1, 2, 5, 6], [0, 1, 2, 3, 6]]),
        ("all_text", SPECIAL, [[2, 5, 6], [1, 2, 3]]),
        ("last_token", SPECIAL, [[6], [6]]),
        (lambda ids, visual, valid: ids == 7, None, [[6], [3]]),
        (lambda ids, visual, valid: torch.ones_like(visual), None, [[1, 2, 5, 6], [0, 1, 2, 3, 6]]),
    ],
)
def test_question_tokens(rule: Any, special: Tensor | None, want: list[list[int]]) -> None:
    assert question_places(rule, IDS, VISUAL, VALID, special) == want


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "gemma3", "mistral", "glm4v"])
def test_turning_halves_is_what_the_family_does(name: str) -> None:
    """Where the plain rotation stands in for a family's own, they agree; GLM turns neighbours."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    assert probe.turns_halves(module.apply_rotary_pos_emb) == (name != "glm4v")
    heads, cos, sin = torch.randn(2, 3, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    theirs = module.apply_rotary_pos_emb(heads, heads[:, :0], cos, sin)[0]
    same = torch.allclose(theirs, probe.turned(heads, cos, sin), atol=1e-6)
    assert same == (name != "glm4v")


@torch.no_grad()
def test_an_image_without_any_question_goes_by_the_encoder() -> None:
    model, images = random_llava(), pixels(2)
    bare = prompt(0, 0)[1:]  # image tokens alone
    with patch(model, best_of(keep=3, alpha=1.0)) as handle:
        with pytest.warns(UserWarning, match="no text"):
            model(**batch(WORDS, bare), pixel_values=images)
        both = handle.last
        model(**batch(WORDS), pixel_values=images[:1])
        alone = handle.last
    top = both.scores.visual[1].topk(3).indices.sort().values
    assert both.selection.index[1].tolist() == top.tolist()
    assert torch.equal(both.selection.index[0], alone.selection.index[0])
    assert torch.equal(both.scores.fused[1], both.scores.visual[1])


@torch.no_grad()
def test_text_before_the_image_sees_none_of_it_in_causal_context() -> None:
    model = random_llava()
    words = prompt(4, 0)
    with (
        patch(model, best_of(keep=3, probe_context="all")),
        pytest.warns(UserWarning, match="no text"),
    ):
        model(**batch(words), pixel_values=pixels(1))
    with patch(model, best_of(keep=3)) as handle:
        model(**batch(words), pixel_values=pixels(1))
        assert handle.last.scores.textual.sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_of_an_attention_that_returns_them_are_used(
    family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: then a sum that is twice the true one halves every score. In half precision a sum
    would blur the scores, and is not used."""
    off = 0.0

    def with_lse(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        mask = attention_mask
        out = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)[0]
        logits = q @ k.transpose(2, 3) * kwargs["scaling"]
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else (
                logits + mask
            )  # fmt: skip
        return out, (logits.logsumexp(-1) + off).to(dtype)

    monkeypatch.setitem(AttentionInterface._global_mapping, "with_lse", with_lse)
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, "with_lse", masks["sdpa"])
    model = family.model()
    inputs = family.join(family.samples())
    found = []
    for change, name in ((0.0, "sdpa"), (0.0, "with_lse"), (math.log(2), "with_lse")):
        off = change
        for source in find(model.config).sources:
            for layer in model.get_submodule(source.layers):
                attention = layer.get_submodule(source.attention)
                attention.config._attn_implementation_internal = name
        with patch(model, best_of(keep=family.keep)) as handle:
            model(**inputs)
            found.append(handle.last.scores.visual)
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)
    share = 0.5 if dtype == torch.float32 else 1.0
    torch.testing.assert_close(found[2], found[0] * share, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_sums_of_rows_in_parts_are_those_of_all(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8)
    index = torch.randint(0, 9, (2, 7))
    valid = torch.rand(2, 9) < 0.8 if shared else torch.rand(2, 7, 9) < 0.8
    want = probe.row_lse(q, k, index, valid, 0.3)
    monkeypatch.setattr(probe, "_LOGITS", 80)  # two rows at once
    torch.testing.assert_close(probe.row_lse(q, k, index, valid, 0.3), want)
    logits = 0.3 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
    seen = (torch.arange(9) <= index[:, :, None]) & (valid[:, None] if shared else valid)
    torch.testing.assert_close(want, logits.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1))
