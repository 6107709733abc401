"""Pruning inside the decoder, against a loop over the layers of an unpatched model."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop
from consensusdrop_kernels.methods.base import Method, Selection, Signals, keep_count

from .contract import Calls, Unpatched, images, shortened
from .families import FAMILIES, Family
from .models import batch, pixels, prompt, random_llava
from .test_contract import GREEDY, STEPS, placeholders


@dataclass(frozen=True)
class Staged(Method):
    """Keeps a share before the decoder, and the tokens the last question row looks at most after
    each stage, unmerged; remembers what it took."""

    keep: int | float = 1.0
    at: tuple[int, ...] = (1, 2)
    shares: tuple[float, ...] = (0.6, 0.3)
    positions: str | None = None
    query: str = "after_image"
    context: str = "visual"
    rotary: bool = True
    taken: list[tuple[int, Tensor]] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def select(self, signals: Signals) -> Selection:
        index = torch.arange(self.budget(signals.x.shape[1])).expand(len(signals.x), -1)
        return chosen(signals, index)

    def stages(self, layers: int) -> tuple[int, ...]:
        return self.at

    def stage_budget(self, stage: int, tokens: int) -> int:
        return keep_count(self.shares[stage], tokens)

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        assert signals.probe is not None
        probe = signals.probe(
            layer=0, rotary=self.rotary, context=self.context, query=self.query
        )  # fmt: skip
        score = torch.ops.cdrop.attention_saliency(
            probe.q, probe.k, scale=probe.scale, lse=probe.lse, query_weight=probe.weight,
            key_valid=signals.valid,
        )  # fmt: skip
        most = max(1, round(self.shares[stage] / (self.shares[stage - 1] if stage else self.first)
                            * signals.x.shape[1]))  # fmt: skip
        index, _ = torch.ops.cdrop.consensus_select(score, None, most, valid=signals.valid)
        self.taken.append((stage, index))
        return chosen(signals, index)

    @property
    def first(self) -> float:
        return self.keep if isinstance(self.keep, float) else 1.0


def chosen(signals: Signals, index: Tensor) -> Selection:
    """The tokens at `index`, every other one dropped for good."""
    index = index.contiguous()
    rows, tokens, width = signals.x.shape
    assign = torch.full((rows, tokens + 1), -1)
    place = torch.arange(index.shape[1]).expand_as(index)
    assign.scatter_(1, index.masked_fill(index < 0, tokens), place)
    here = index.clamp_min(0)[..., None].expand(-1, -1, width)
    size = (index >= 0).float()
    padded = signals.valid is not None
    return Selection(signals.x.gather(1, here), index, assign[:, :tokens], size, padded)


def full_attention(family: Family) -> bool:
    """Whether the decoder can have stages."""
    text = Unpatched(family.model()).text
    kinds = set(getattr(text.config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("keep", [1.0, 0.8])
@torch.no_grad()
def test_stages_are_a_loop_over_the_layers(family: Family, keep: float) -> None:
    """Padded batch, ragged counts, with and without pruning before the decoder."""
    if not full_attention(family):
        pytest.skip("layers that see a window")
    model, plain = family.model(), Unpatched(family.model())
    least = 1
    if getattr(model.config.vision_config, "deepstack_visual_indexes", None):
        least = len(model.config.vision_config.deepstack_visual_indexes)
    layers = len(plain.text.layers)
    if least + 1 >= layers:
        pytest.skip("too few layers for two stages")
    calls = Calls()
    method = calls.watch(Staged(keep=keep, at=(least, least + 1), shares=(0.6, 0.3)))
    samples = family.samples()
    joined = family.join(samples)
    length = joined["input_ids"].shape[1]
    with patch(model, method) as handle:
        out = model.generate(**joined, **GREEDY)
    assert len(handle.last.stages) == 2
    sequences = [plain.inputs(sample) for sample in samples]
    found = images(handle.last, calls, sequences)
    for row, sequence in enumerate(sequences):
        here = placeholders(family, samples[row]["input_ids"][0])
        own = [one for one in found if one.row == row]
        short, cuts, counts = shortened(
            sequence, own, (least, least + 1), here, not family.spatial
        )  # fmt: skip
        assert sorted(cuts) == [least, least + 1]
        assert sum(counts[2]) < sum(counts[1]) < sum(counts[0])
        ids, want = plain.greedy(short, STEPS, cuts)
        got = torch.stack(out.logits, 1)[row]
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        assert out.sequences[row, length:].tolist() == ids


WORDS = batch(prompt(2, 4, seed=1), prompt(5, 7, seed=2))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_cache_and_with_beams(attention: str) -> None:
    model = random_llava()
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 4, "do_sample": False}
    with patch(model, Staged()):
        cached = model.generate(**WORDS, pixel_values=pixels(2), **options)
        uncached = model.generate(**WORDS, pixel_values=pixels(2), use_cache=False, **options)
        beams = model.generate(**WORDS, pixel_values=pixels(2), num_beams=3, **options)
        one = prompt(5, 7, seed=2)
        alone = model.generate(**batch(one), pixel_values=pixels(2)[1:], num_beams=3, **options)
    assert torch.equal(cached, uncached)
    assert torch.equal(beams[1, -4:], alone[0, -4:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", [1, 3])
def test_drafts_of_the_prefill_that_are_cut_off(attention: str, cut: int) -> None:
    """As assisted decoding does: several tokens on a cache that holds less than its prefill."""
    model = random_llava()
    model.set_attn_implementation(attention)
    pictures, words = {"pixel_values": pixels(1)}, [5, 6, 7, 8]
    right, wrong = words[: 3 - cut], [11, 12, 13][:cut]
    with patch(model, Staged(keep=0.8)):
        plain = model(**batch(prompt(5, 7)), **pictures, logits_to_keep=1)
        want = model(torch.tensor([words]), past_key_values=plain.past_key_values).logits
        drafted = model(**batch(prompt(5, 7) + right + wrong), **pictures, logits_to_keep=4)
        drafted.past_key_values.crop(-cut)
        rest = torch.tensor([words[len(right) :]])
        got = model(rest, past_key_values=drafted.past_key_values).logits
    torch.testing.assert_close(got, want[:, len(right) :], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_probe_of_a_stage_is_the_attention_that_its_layer_computes() -> None:
    """Without a stage's own pruning: rows of the question over all keys they see."""
    model = random_llava()
    inputs = WORDS | {"pixel_values": pixels(2)}
    where = (WORDS["attention_mask"].cumsum(1) - 1).clamp_min(0)
    model.set_attn_implementation("eager")
    maps = model(**inputs, position_ids=where, output_attentions=True).attentions[2]
    method = Watching(at=(2,), shares=(0.5,), context="all")
    with patch(model, method):
        model(**inputs, position_ids=where)
    for row, after in enumerate((4, 7)):
        want = maps[row, :, -after:, -after - 16 : -after].mean((0, 1))
        torch.testing.assert_close(method.seen[0][row], want, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Watching(Staged):
    """Notes the saliency it goes by."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    def select_stage(self, stage: int, signals: Signals) -> Selection:
        assert signals.probe is not None
        probe = signals.probe(layer=0, rotary=True, context=self.context, query=self.query)
        self.seen.append(
            torch.ops.cdrop.attention_saliency(
                probe.q,
                probe.k,
                scale=probe.scale,
                lse=probe.lse,
                query_weight=probe.weight,
                causal=self.query == "visual" and probe.causal,
            )
        )
        return super().select_stage(stage, signals)


@torch.no_grad()
def test_visual_rows_ask() -> None:
    """The visual tokens' own attention to each other, among all keys they see."""
    model = random_llava()
    inputs = batch(prompt(2, 4, seed=1)) | {"pixel_values": pixels(1)}
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions[1]
    method = Watching(at=(1,), shares=(0.5,), context="all", query="visual")
    with patch(model, method):
        model(**inputs)
    want = maps[0, :, 3:19, 3:19].mean((0, 1))
    torch.testing.assert_close(method.seen[0][0], want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_visual_rows_of_a_model_whose_prompt_sees_itself_in_both_directions() -> None:
    """PaliGemma: what a row sees is in the mask, and not what comes before it."""
    family = FAMILIES["paligemma-gemma"]
    model, batched = family.model(), family.join(family.samples())
    model.set_attn_implementation("eager")
    maps = model(**batched, output_attentions=True).attentions[1]
    method = Watching(at=(1,), shares=(0.5,), context="all", query="visual")
    with patch(model, method) as handle:
        model(**batched)
    for image, row in enumerate(handle.last.sample):
        columns = handle.last.columns[image]
        want = maps[row][:, columns][..., columns].mean((0, 1))
        torch.testing.assert_close(method.seen[0][image], want, atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Backwards(Staged):
    """Lists the slots it keeps before the decoder from the last to the first."""

    def select(self, signals: Signals) -> Selection:
        index = torch.arange(self.budget(signals.x.shape[1])).flip(0).expand(len(signals.x), -1)
        return chosen(signals, index)


@torch.no_grad()
def test_a_stage_sees_tokens_in_the_order_of_the_prompt() -> None:
    """Whatever the order of slots before it, as contextual slots come after all others."""
    seen = []
    for kind in (Staged, Backwards):
        method = kind(keep=0.8, at=(1, 2), query="visual", context="all")
        with patch(random_llava(), method) as handle:
            out = handle._model(**WORDS, pixel_values=pixels(2))
        seen.append((out.logits, *(index for _, index in method.taken)))
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


def test_stages_of_layers_that_see_a_window() -> None:
    """By the kinds of layers a config names, or where it names none by its window."""
    for name in ("gemma3", "paligemma-gemma2"):
        with pytest.raises(NotImplementedError, match=r"whole sequence, .*sliding_attention"):
            patch(FAMILIES[name].model(), Staged(at=(1, 2)))
    model = FAMILIES["mistral3"].model()
    patch(model, Staged()).remove()
    model.config.text_config.sliding_window = 9
    with pytest.raises(NotImplementedError, match=r"this decoder has \['sliding_attention'\]"):
        patch(model, Staged())


def test_stages_while_features_are_still_added() -> None:
    model = FAMILIES["qwen3_vl-images"].model()
    with pytest.raises(ValueError, match=r"ascending layers in 2\.\.3 .* got \[1, 2\]"):
        patch(model, Staged(at=(1, 2)))
    patch(model, Staged(at=(2, 3))).remove()


@torch.no_grad()
def test_cache_bytes_and_tokens_of_every_stage_are_reported() -> None:
    model = random_llava()
    with patch(model, Staged(shares=(0.5, 0.25))) as handle:
        out = model.generate(
            **WORDS, pixel_values=pixels(2), max_new_tokens=1, return_dict_in_generate=True
        )
    assert handle.last.stages == ((8, 8), (4, 4))
    held = sum(
        layer.keys.numel() * layer.keys.element_size() * 2 for layer in out.past_key_values.layers
    )
    assert handle.stats.kv_bytes_after == held


@pytest.mark.parametrize(
    ("at", "says"), [((0, 1), "ascending layers in 1..2"), ((1, 3), "in 1..2"), ((2, 1), "asc")]
)
def test_stages_that_can_not_be(at: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        patch(random_llava(), Staged(at=at))


def test_stages_of_a_decoder_on_several_devices() -> None:
    model = random_llava()
    model.model.language_model.layers[2].to("meta")
    with pytest.raises(NotImplementedError, match=r"one device, this one is on \['cpu', 'meta'\]"):
        patch(model, Staged())


def test_a_static_cache_can_not_have_stages() -> None:
    with (
        patch(random_llava(), Staged()) as handle,
        pytest.raises(NotImplementedError, match="static cache"),
    ):
        handle._model.generate(
            **batch(prompt(2, 4, seed=1)), pixel_values=pixels(1), max_new_tokens=2,
            cache_implementation="static",
        )  # fmt: skip


def test_a_stage_after_pruning_before_the_decoder_loses_nothing_of_the_loss() -> None:
    """Logits come back at the prompt's length, for losses."""
    model = random_llava()
    inputs = batch(prompt(2, 4, seed=1)) | {"pixel_values": pixels(1)}
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with patch(model, Staged(keep=0.8)):
        out = model(**inputs, labels=labels)
    assert out.logits.shape[1] == labels.shape[1]
    want = torch.nn.functional.cross_entropy(out.logits[0, -3:-1], labels[0, -2:])
    torch.testing.assert_close(out.loss, want)


def test_gradient_checkpointing_changes_no_gradient_or_is_refused() -> None:
    inputs = WORDS | {"pixel_values": pixels(2)}
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    grads = []
    for checkpoints in (False, True):
        model = random_llava().train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with patch(model, Staged(keep=0.8)):
            if checkpoints and "__call__" in vars(GradientCheckpointingLayer):
                with pytest.raises(NotImplementedError, match="gradient checkpointing need"):
                    model(**inputs, labels=labels)
                return
            model(**inputs, labels=labels).loss.backward()
        grads.append(model.model.multi_modal_projector.linear_1.weight.grad)
    torch.testing.assert_close(*grads)


def test_methods_without_stages_have_no_hooks_on_layers() -> None:
    model = random_llava()
    with patch(model, ConsensusDrop(keep=4)):
        assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
