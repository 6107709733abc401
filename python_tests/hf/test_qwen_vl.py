"""Packed towers: what patches receive, which token they are, positions in space, early features."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.hf.adapter import Encoded, find
from consensusdrop_kernels.hf.layout import merge_alike
from consensusdrop_kernels.methods import Random, Signals

from .best import best_of
from .families import FAMILIES, Inputs
from .families.qwen_vl import IMAGE, MERGE, VIDEO, join, sample

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
METHOD = best_of(keep=0.4)
PICTURES = {"image": [("image", (1, 6, 8)), ("image", (1, 6, 4))], "video": [("video", (3, 4, 6))]}
SOURCES = [(name, kind) for name in NAMES for kind in PICTURES]


def model_of(name: str) -> Any:
    return FAMILIES[f"{name}-images"].model()


def pictures(name: str, kind: str) -> Inputs:
    """The arguments of the model's feature function for two images, or a video."""
    made = sample(name, 4, 1, *PICTURES[kind], 2)  # type: ignore[arg-type]
    return {n: v for n, v in made.items() if "pixel" in n or "grid" in n}


def features(model: Any, kind: str, inputs: Inputs) -> Any:
    return getattr(model.model, f"get_{kind}_features")(**inputs, return_dict=True)


def encoded(model: Any, kind: str, inputs: Inputs) -> tuple[Encoded, Any]:
    """What the adapter notes of pictures, and their features."""
    with patch(model, METHOD):
        output = features(model, kind, inputs)
    return output._cdrop, output


def tapped_layer(model: Any) -> Any:
    source = find(model.config).sources[0]
    return model.model.visual.blocks[source.tap_layer(model.config, {})]


def own_attention(model: Any, kind: str, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tapped block, from its weights: what it got `[T, D]`, what each of its rows receives
    `[T]` and its key `[T, d]`, all in the tower's own order."""
    attention = tapped_layer(model).attn
    caught: dict[str, Any] = {}

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs | ({"hidden_states": args[0]} if args else {}))

    hook = attention.register_forward_pre_hook(catch, with_kwargs=True)
    features(model, kind, inputs)
    hook.remove()
    hidden = caught["hidden_states"]
    heads = model.config.vision_config.num_heads
    q, k, _ = attention.qkv(hidden).view(len(hidden), 3, heads, -1).unbind(1)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    q, k = rotate(q, k, *caught["position_embeddings"])
    received = torch.zeros(len(hidden))
    edges = caught["cu_seqlens"].tolist()
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        here = slice(first, last)
        logits = torch.einsum("qhd,khd->hqk", q[here].double(), k[here].double())
        received[here] = (logits * q.shape[-1] ** -0.5).softmax(-1).mean((0, 1)).float()
    return hidden, received, k.mean(1)


def changed(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(-1).nonzero().flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "kind"), SOURCES)
def test_saliency_is_what_a_tokens_patches_receive(name: str, kind: str, attention: str) -> None:
    """Which row of the tower and which token a patch is, is found by changing its pixels where
    nothing mixes patches; what it receives is computed from the weights."""
    model, inputs = model_of(name), pictures(name, kind)
    model.set_attn_implementation(attention)
    note, _ = encoded(model, kind, inputs)
    _, received, keys = own_attention(model, kind, inputs)

    still = model_of(name)
    for block in still.model.visual.blocks:  # every patch for itself
        for weight in block.attn.proj.parameters():
            weight.zero_()
    rows, _, _ = own_attention(still, kind, inputs)
    tokens = torch.cat(features(still, kind, inputs).pooler_output)
    pixels = next(n for n in inputs if "pixel" in n)
    members: dict[int, list[int]] = {}
    for patch_number in range(len(inputs[pixels])):
        moved = inputs[pixels].clone()
        moved[patch_number] += 1.0
        other = inputs | {pixels: moved}
        row = changed(rows, own_attention(still, kind, other)[0])
        token = changed(tokens, torch.cat(features(still, kind, other).pooler_output))
        assert len(row) == len(token) == 1
        members.setdefault(token[0], []).append(row[0])

    assert note.visual is not None
    assert note.metric is not None
    got, metric = torch.cat(note.visual), torch.cat(note.metric)
    assert all(len(members[token]) == MERGE**2 for token in range(len(got)))
    want = torch.stack([received[members[token]].mean() for token in range(len(got))])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    want = torch.stack([keys[members[token]].mean(0) for token in range(len(got))])
    torch.testing.assert_close(metric, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), SOURCES)
def test_the_metric_of_a_token_is_of_its_patches(name: str, kind: str) -> None:
    """With nothing mixed, a patch's pixels change one token and that token's metric."""
    model, inputs = model_of(name), pictures(name, kind)
    for block in model.model.visual.blocks:
        for weight in block.attn.proj.parameters():
            weight.zero_()
    pixels = next(n for n in inputs if "pixel" in n)
    before, plain = encoded(model, kind, inputs)
    for patch_number in range(0, len(inputs[pixels]), 5):
        moved = inputs[pixels].clone()
        moved[patch_number] += 1.0
        after, output = encoded(model, kind, inputs | {pixels: moved})
        assert before.metric is not None
        assert after.metric is not None
        token = changed(torch.cat(plain.pooler_output), torch.cat(output.pooler_output))
        assert changed(torch.cat(before.metric), torch.cat(after.metric)) == token


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_one_call_for_all_frames_gives_the_same(name: str) -> None:
    """Flash attention gets all frames at once."""
    model, inputs = model_of(name), pictures(name, "video")
    found = find(model.config)
    source = found.sources[1]
    calls: list[Any] = []

    def note(*given: Any) -> Encoded:
        calls.append(given)
        return source.encode(*given)

    noting = replace(found, sources=(found.sources[0], replace(source, encode=note)))
    with patch(model, METHOD, adapter=noting):
        features(model, "video", inputs)
    _, tapped, output, arguments = calls[0]
    assert len(tapped) == 3
    packed = tapped[0]._replace(
        q=torch.cat([t.q for t in tapped], 2), k=torch.cat([t.k for t in tapped], 2)
    )
    one = source.encode(model, [packed], output, arguments)
    each = source.encode(model, tapped, output, arguments)
    assert one.visual is not None
    assert each.visual is not None
    assert torch.equal(one.visual[0], each.visual[0])
    with pytest.raises(RuntimeError, match="must see the 72 patches"):
        source.encode(model, tapped[:2], output, arguments)


@torch.no_grad()
def test_sizes_computed_ahead() -> None:
    """Windows and frames that a caller hands to the tower are those the scores are undone by."""
    model, inputs = model_of("qwen2_5_vl"), pictures("qwen2_5_vl", "image")
    plain, _ = encoded(model, "image", inputs)
    tower = model.config.vision_config
    index, edges = get_vision_window_index(
        inputs["image_grid_thw"], MERGE, tower.window_size, tower.patch_size
    )
    frames = get_vision_cu_seqlens(inputs["image_grid_thw"])
    ahead = {"window_index": index, "cu_window_seqlens": edges, "cu_seqlens": frames}
    given, _ = encoded(model, "image", inputs | {f"image_{n}": v for n, v in ahead.items()})
    assert plain.visual is not None
    assert given.visual is not None
    assert torch.equal(torch.cat(plain.visual), torch.cat(given.visual))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_probe_over_all_keys_is_the_first_layers_attention(name: str) -> None:
    """Positions in space, grouped heads, padding: what layer 0 computes on the whole prompt."""
    family = FAMILIES[f"{name}-images"]
    model, samples = family.model(), family.samples()
    method = best_of(keep=0.4, probe_context="all", rows="last")
    with patch(model, method) as handle:
        model.generate(**family.join(samples), max_new_tokens=1, do_sample=False)
        last = handle.last
    model.set_attn_implementation("eager")
    for row, one in enumerate(samples):
        maps = model(**one, output_attentions=True).attentions[0][0, :, -1].mean(0)
        shift = last.keep_mask.shape[1] - one["input_ids"].shape[1]
        for image, place in enumerate(last.sample):
            if place == row:
                columns = last.columns[image] - shift
                got = last.scores.textual[image, : len(columns)]
                torch.testing.assert_close(got, maps[columns], atol=1e-6, rtol=1e-4)


# Positions.

ENDS: dict[str, list[Any]] = {
    "text": [2, ("image", (1, 6, 8)), 4],
    "picture": [6, ("image", (1, 4, 8))],
    "long video": [2, ("video", (6, 4, 4)), 3],
}


def loop(model: Any, inputs: Inputs, steps: int, **more: Any) -> tuple[list[Any], list[Tensor]]:
    """Greedy decoding by hand, without position_ids: the tokens, and the positions that enter the
    decoder stack."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    out = model(**inputs, use_cache=True)
    mask = inputs["attention_mask"]
    tokens = []
    for _ in range(steps):
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = {"attention_mask": mask} if more.get("masked") else {}
        out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, **given)
    hook.remove()
    return torch.cat(tokens, 1).tolist(), seen


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_without_positions_counts_on_as_the_stock_model(name: str, end: str) -> None:
    model = model_of(name)
    inputs = sample(name, 3, *ENDS[end])
    _, want = loop(model, inputs, 3)
    with patch(model, METHOD) as handle:
        _, got = loop(model, inputs, 3)
        assert handle.stats.tokens_after < handle.stats.tokens_before
        last = handle.last
    assert torch.equal(got[0][-3:], want[0][-3:][:, :, last.keep_mask[0]])
    for mine, stock in zip(got[1:], want[1:], strict=True):
        assert torch.equal(mine, stock)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_without_positions_is_generate(name: str) -> None:
    """Also padded, where the stock model can't count."""
    family = FAMILIES[f"{name}-images"]
    model, batch = family.model(), family.join(family.samples())
    length = batch["input_ids"].shape[1]
    with patch(model, METHOD):
        out = model.generate(**batch, max_new_tokens=4, do_sample=False)
        tokens, _ = loop(model, batch, 4, masked=True)
    assert out[:, length:].tolist() == tokens


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_by_its_own_positions(name: str, end: str) -> None:
    """Where the prompt's last token has not the largest position, `generate` counts on from it all
    the same; the patch takes that as well as what the model itself would do."""
    model = model_of(name)
    inputs = sample(name, 3, *ENDS[end])
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"][-3:, :, -1])

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    stock, seen = seen, []
    with patch(model, METHOD):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    hook.remove()
    assert len(seen) == len(stock) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[1:], stock[1:], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_gaps_in_the_text_positions_do_not_pass_for_packed_prompts(name: str) -> None:
    """Flash attention would look for a new prompt at every gap of the first row."""
    model = model_of(name)
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    with patch(model, METHOD) as handle:
        hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        model.generate(**sample(name, 3, *ENDS["text"]), max_new_tokens=1, do_sample=False)
        hook.remove()
        left = int(handle.last.keep_mask.sum())
    assert seen[0].shape == (4, 1, left)
    assert torch.equal(seen[0][0, 0], torch.arange(left))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_one_row_of_positions(name: str) -> None:
    """As the stock model takes them: the same for time, height and width."""
    model = model_of(name)
    inputs = sample(name, 3, *ENDS["text"])
    where = torch.arange(inputs["input_ids"].shape[1])[None]
    with patch(model, METHOD):
        one = model(**inputs, position_ids=where)
        three = model(**inputs, position_ids=where.expand(3, 1, -1))
        assert torch.equal(one.logits, three.logits)
        token = one.logits[:, -1].argmax(-1, keepdim=True)
        last = where[:, -1:] + 1
        alike = [
            model(input_ids=token, past_key_values=out.past_key_values, position_ids=at).logits
            for out, at in ((one, last), (three, last.expand(4, 1, 1)))
        ]
        assert torch.equal(*alike)
        with pytest.raises(NotImplementedError, match="do not continue"):
            model(input_ids=token, past_key_values=one.past_key_values, position_ids=last)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_another_turn_on_a_pruned_cache_is_refused(name: str) -> None:
    model = model_of(name)
    inputs = sample(name, 3, *ENDS["text"])
    with patch(model, METHOD):
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        more = torch.cat([out.sequences, torch.tensor([[5, 6, 7]])], 1)
        with pytest.raises(NotImplementedError, match="do not continue"):
            model.generate(more, past_key_values=out.past_key_values, max_new_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache(name: str) -> None:
    model = model_of(name)
    inputs = sample(name, 3, *ENDS["text"])
    options = {"max_new_tokens": 4, "do_sample": False}
    with patch(model, METHOD):
        want = model.generate(**inputs, **options)
        got = model.generate(**inputs, **options, cache_implementation="static")
        assert torch.equal(got, want)
        family = FAMILIES[f"{name}-images"]
        batch = family.join(family.samples())
        with pytest.raises(NotImplementedError, match="a static cache takes only prompts of one"):
            model.generate(**batch, **options, cache_implementation="static")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_decoding(name: str) -> None:
    model = model_of(name)
    inputs = sample(name, 3, *ENDS["text"])
    options = {"max_new_tokens": 6, "do_sample": False}
    with patch(model, METHOD):
        want = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=2), want)


# Pictures.


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_frames_with_budgets_of_their_own(name: str) -> None:
    model = model_of(name)
    inputs = sample(name, 3, 2, ("video", (3, 4, 6)), 4)
    with patch(model, Random(keep=2, budget_scope="crop")) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.last.grids == ((2, 3),) * 3
        assert handle.last.tokens_after == (6,)
        here = torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, VIDEO])).nonzero().flatten()
        assert torch.equal(torch.cat(handle.last.columns), here)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_without_pictures_in_the_batch(name: str) -> None:
    model = model_of(name)
    samples = [sample(name, 3, *ENDS["text"]), sample(name, 7, 9)]
    batch = join(samples)
    with patch(model, METHOD) as handle:
        whole = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert handle.last.tokens_before == (12, 0)
        alone = [model.generate(**s, max_new_tokens=3, do_sample=False) for s in samples]
    assert [row[-3:].tolist() for row in whole] == [a[0, -3:].tolist() for a in alone]


@torch.no_grad()
@pytest.mark.parametrize("contextual", [0, 3])
@pytest.mark.parametrize(
    ("threshold", "blend"), [(-1.0, 1.0), (0.2, 1.0), (-1.0, 0.5), (-1.0, 0.0)]
)
def test_what_early_layers_add_is_merged_as_the_tokens_are(
    threshold: float, blend: float, contextual: int
) -> None:
    torch.manual_seed(3)
    method = best_of(keep=5, alpha=0.0, threshold=threshold, blend=blend, contextual=contextual)
    x = torch.randn(2, 20, 6)
    signals = Signals(x, (4, 5), visual=torch.rand(2, 20), metric=torch.randn(2, 20, 4))
    chosen = method.select(signals)
    torch.testing.assert_close(merge_alike(chosen, x, blend), chosen.tokens)
    dropped = Random(keep=5).select(signals)
    torch.testing.assert_close(merge_alike(dropped, x, 1.0), dropped.tokens)


# Refusals.


@pytest.mark.parametrize("name", NAMES)
def test_compact_positions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="height and width, got 'compact'"):
        patch(model_of(name), best_of(keep=4, positions="compact"))


def test_a_tower_of_windows_alone_is_refused() -> None:
    model = model_of("qwen2_5_vl")
    model.config.vision_config.fullatt_block_indexes = []
    with pytest.raises(ValueError, match=r"must name one of the 3 blocks .*, got \[\]"):
        patch(model, METHOD)


def test_qwen25_listens_to_the_last_block_that_sees_whole_frames() -> None:
    model = model_of("qwen2_5_vl")
    assert tapped_layer(model) is model.model.visual.blocks[1]


@torch.no_grad()
def test_images_and_videos_with_one_placeholder() -> None:
    """GLM-4V can't tell them apart, and neither does the stock model take both in a call."""
    model = model_of("glm4v")
    both = sample("glm4v", 3, 2, ("image", (1, 4, 4)), 1, ("video", (2, 4, 4)), 4)
    with pytest.raises(ValueError, match="do not match"):
        model(**both)
    with patch(model, METHOD), pytest.raises(ValueError, match="do not match"):
        model(**both)


@torch.no_grad()
def test_beams_over_videos_of_glm4v_fail_without_the_patch_too() -> None:
    """The contract leaves them out where this is so."""
    family = FAMILIES["glm4v-videos"]
    options = {"max_new_tokens": 2, "num_beams": 2, "do_sample": False}
    if family.beams:
        family.model().generate(**family.samples()[0], **options)
        return
    with pytest.raises(ValueError, match="non-empty list"):
        family.model().generate(**family.samples()[0], **options)
