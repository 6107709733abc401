"""The lookahead probe against whole layers, run on the whole prompt, whose pictures are reset."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.hf.lookahead import Lookahead
from consensusdrop_kernels.hf.tap import Tap
from consensusdrop_kernels.methods import Method, Selection, Signals, TextProbe

from .contract import Sequence, Unpatched
from .families import FAMILIES, Family, loud, pad_left
from .families.gemma import gemma3, join, paligemma, sample
from .families.llava import sample as llava_sample
from .models import IMAGE, PAD, SIDE, TOKENS, VOCAB, batch, pixels, prompt, random_llava
from .test_contract import GREEDY, attend_by, placeholders
from .test_native import needs_native, run

Ask = tuple[int, str]  # a layer, and a context


@dataclass(frozen=True)
class Peek(Method):
    """Keeps what the first probe it asks for points at, and notes all of them."""

    keep: int | float = 4
    asks: tuple[Ask, ...] = ((1, "visual"),)
    probe: str = "lookahead"
    query: Any = "after_image"
    rotary: bool = True
    seen: list[dict[Ask, TextProbe]] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text"})

    @property
    def probed_layer(self) -> int | None:
        return max(layer for layer, _ in self.asks)

    def select(self, signals: Signals) -> Selection:
        assert signals.probe is not None
        probes = {
            (layer, context): signals.probe(
                layer=layer, rotary=self.rotary, context=context, query=self.query,
                lookahead=self.probe == "lookahead",
            )
            for layer, context in self.asks
        }  # fmt: skip
        self.seen.append(probes)
        saliency = heard(probes[self.asks[0]])
        rows, tokens = saliency.shape
        index = saliency.topk(self.budget(tokens)).indices.sort().values
        assign = torch.full((rows, tokens), -1).scatter_(
            1, index, torch.arange(index.shape[1]).expand_as(index)
        )
        kept = signals.x.gather(1, index[..., None].expand(-1, -1, signals.x.shape[2]))
        return Selection(kept, index, assign, torch.ones(index.shape))


def heard(probe: TextProbe) -> Tensor:
    return torch.ops.cdrop.attention_saliency(
        probe.q, probe.k, scale=probe.scale, lse=probe.lse, query_weight=probe.weight
    )


def groups(last: Any) -> list[list[int]]:
    """The images that a method is asked about at once: those of one size and grid, in order."""
    found: dict[Any, list[int]] = {}
    for image, grid in enumerate(last.grids):
        found.setdefault((len(last.columns[image]), grid), []).append(image)
    return list(found.values())


def queries(probe: TextProbe, image: int = 0) -> Tensor:
    """`[H, M', d]`, without the padding."""
    return probe.q[image][:, probe.weight[image] > 0]


@torch.no_grad()
def reset_run(
    plain: Unpatched, sequence: Sequence, visual: Tensor, depth: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys `[H, L, d]` of layer `depth`, the pictures reset before each layer."""

    def reset(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].clone()
        hidden[0, visual] = sequence.embeds[visual]
        return (hidden, *args[1:]), kwargs

    layers = plain.text.layers
    tap = Tap(layers[depth].self_attn)
    hooks = [one.register_forward_pre_hook(reset, with_kwargs=True) for one in layers]
    tap.install()
    try:
        with tap.recording() as tapped:
            plain.hidden(sequence)
    finally:
        tap.remove()
        for hook in hooks:
            hook.remove()
    return tapped[0].q[0], tapped[0].k[0]


def check_against_whole_layers(
    family: Family, attention: str, asks: tuple[Ask, ...], whole: str | None = None
) -> None:
    """A padded batch, patched; each prompt alone through whole layers, by the attention `whole`."""
    model, plain = family.model(), Unpatched(family.model())
    attend_by(model, attention)
    attend_by(plain.model, whole or attention)
    samples = family.samples()
    joined = family.join(samples)
    method = Peek(keep=family.keep, asks=asks)
    with patch(model, method) as handle:
        model.generate(**joined, max_new_tokens=1, do_sample=False)
        last = handle.last
    images = {
        image: (number, at)
        for number, members in enumerate(groups(last))
        for at, image in enumerate(members)
    }
    assert len(method.seen) == len(groups(last))
    for row, one in enumerate(samples):
        visual = placeholders(family, one["input_ids"][0])
        asking = slice(int(visual.nonzero()[-1]) + 1, None)
        shift = joined["input_ids"].shape[1] - len(visual)
        sequence = plain.inputs(one)
        for depth in {layer for layer, _ in asks}:
            q, k = reset_run(plain, sequence, visual, depth)
            for image in [i for i, s in enumerate(last.sample) if s == row]:
                number, at = images[image]
                columns = last.columns[image] - shift
                for context in [c for layer, c in asks if layer == depth]:
                    probe = method.seen[number][depth, context]
                    close(queries(probe, at), q[:, asking])
                    close(probe.k[at], k[:, columns])
                    if probe.lse is not None:
                        want = row_sums(q, k, probe.scale)[:, asking]
                        close(probe.lse[at][:, probe.weight[at] > 0], want)


def row_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of plain causal rows, `[H, L]`."""
    logits = scale * q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(ahead, -torch.inf).logsumexp(-1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


BOTH: tuple[Ask, ...] = ((2, "visual"), (1, "all"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_it_is_whole_layers_with_the_pictures_reset(family: Family, attention: str) -> None:
    """Padded batch, ragged; several images, windows, whole masks, soft caps."""
    check_against_whole_layers(family, attention, BOTH)


def windowed_llava(text: Any) -> Any:
    """A LLaVA whose text model sees a window shorter than the prompts."""
    shared = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": 1,
        "eos_token_id": None, "sliding_window": 7,
    }  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIDE, patch_size=8,
    )  # fmt: skip
    more = {} if text is MistralConfig else {"use_sliding_window": True, "max_window_layers": 1}
    config = LlavaConfig(
        vision_config=vision, text_config=text(**shared, **more), image_token_index=IMAGE,
        image_seq_length=TOKENS,
    )  # fmt: skip
    model = loud(LlavaForConditionalGeneration(config), IMAGE)
    model.generation_config.pad_token_id = PAD
    return model


def bare() -> dict[str, Tensor]:
    ids = torch.full((1, TOKENS), IMAGE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(1)}


OTHERS = [
    *(
        Family(
            name=f"llava-{text.model_type}-windows",
            build=lambda text=text: windowed_llava(text),
            samples=lambda: [llava_sample(0, 3, 4), llava_sample(1, 1, 2, 9)],
            join=lambda samples: pad_left(samples, PAD),
        )
        for text in (MistralConfig, Qwen2Config)
    ),
    Family(  # a prompt without any text beside others
        name="llava-bare",
        build=FAMILIES["llava-llama"].model,
        samples=lambda: [llava_sample(0, 3, 4), bare()],
        join=lambda samples: pad_left(samples, PAD),
    ),
    Family(  # prompts that are all prefix, so that text sees pictures after it
        name="paligemma-prefix",
        build=lambda: paligemma("gemma"),
        samples=lambda: [sample(0, 1), sample(1, 2, before=3, after=6)],
        join=join,
    ),
    Family(  # no token types: plain causal masks, and windows
        name="gemma3-causal",
        build=gemma3,
        samples=lambda: [
            {k: v for k, v in one.items() if k != "token_type_ids"}
            for one in (sample(0, 1), sample(1, 2, before=4, after=5))
        ],
        join=lambda samples: pad_left(samples, PAD),
    ),
]


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_other_windows_and_masks(family: Family) -> None:
    check_against_whole_layers(family, "sdpa", BOTH, whole="eager")


@pytest.mark.parametrize(
    ("broken", "name"),
    [("pictures", "llava-llama"), ("masks", "paligemma-gemma"), ("windows", "gemma3")],
)
def test_mistakes_would_be_seen(broken: str, name: str, monkeypatch: Any) -> None:
    """Pictures that change, causal masks where there are others, windows that nobody minds."""
    through, mask = Lookahead._through, Lookahead._mask

    def changing(self: Any, layer: int, words: Tensor, pictures: Tensor) -> Tensor:
        return through(self, layer, words, pictures.roll(layer, 2))

    def causal(self: Any, layer: int) -> Tensor:
        self._masks = None
        return mask(self, layer)

    def wide(self: Any, layer: int) -> Tensor:
        self._masks = dict.fromkeys(self._masks, self._masks["full_attention"])
        return mask(self, layer)

    if broken == "pictures":
        monkeypatch.setattr(Lookahead, "_through", changing)
    else:
        monkeypatch.setattr(Lookahead, "_mask", causal if broken == "masks" else wide)
    with pytest.raises(AssertionError):
        check_against_whole_layers(FAMILIES[name], "sdpa", BOTH)


WORDS = batch(prompt(2, 4, seed=1), prompt(5, 7, 3, seed=2))
TEXT = 1 + 5 + 7 + 3  # of the longer prompt


@torch.no_grad()
def test_only_text_passes_a_layer_and_once_for_allgroups() -> None:
    family = FAMILIES["llava_onevision-images"]  # images of several sizes
    model, rows, calls = family.model(), [], []
    joined = family.join(family.samples())
    layers = model.model.language_model.layers
    for layer in layers:
        layer.mlp.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))
        layer.register_forward_pre_hook(lambda m, args: calls.append(m))
    method = Peek(keep=0.4, asks=((2, "visual"), (2, "all"), (1, "visual")))
    with patch(model, method) as handle:
        model.generate(**joined, max_new_tokens=1, do_sample=False)
        assert len(groups(handle.last)) > 1
    here = placeholders(family, joined["input_ids"])
    text = int((joined["attention_mask"].bool() & ~here).sum(1).max())
    before, prefill = rows[: -len(layers)], rows[-len(layers) :]
    assert before == [text] * 2  # layers 0 and 1, for both depths
    assert all(count > text for count in prefill)
    assert calls == list(layers)


@torch.no_grad()
def test_depth_0_is_the_static_probe_bit_for_bit() -> None:
    model = random_llava()
    found = []
    for probe in ("lookahead", "static"):
        method = Peek(asks=((0, "visual"), (0, "all")), probe=probe)
        with patch(model, method):
            model(**WORDS, pixel_values=pixels(3))
        found.append(method.seen[0])
    for ask, ahead in found[0].items():
        assert torch.equal(ahead.q, found[1][ask].q)
        assert torch.equal(ahead.k, found[1][ask].k)


@torch.no_grad()
def test_what_is_to_be_predicted_does_not_show() -> None:
    """Other answers, to this question and to one before it: the same probe."""
    ids = WORDS["input_ids"][1:]
    labels = torch.full_like(ids, -100)
    answers = (1 + 5 + TOKENS + torch.arange(3)).tolist() + [ids.shape[1] - 1]
    labels[:, answers] = 5
    found = []
    for word in (11, 12):
        changed = ids.clone()
        changed[:, answers] = word
        method = Peek(asks=BOTH)
        with patch(random_llava(), method) as handle:
            handle._model(input_ids=changed, labels=labels, pixel_values=pixels(2))
        found.append(method.seen[0])
    for ask in BOTH:
        assert queries(found[0][ask]).shape[1] == 2
        for name in ("q", "k", "lse", "weight"):
            one, other = (getattr(seen[ask], name) for seen in found)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


@torch.no_grad()
def test_words_before_it_do_show() -> None:
    """The static probe doesn't know them."""
    found = {}
    for probe in ("lookahead", "static"):
        for word in (11, 12):
            changed = {name: value[1:].clone() for name, value in WORDS.items()}
            changed["input_ids"][0, 2] = word
            method = Peek(probe=probe)
            with patch(random_llava(), method) as handle:
                handle._model(**changed, pixel_values=pixels(2))
            found[probe, word] = queries(method.seen[0][1, "visual"])
    assert torch.equal(found["static", 11], found["static", 12])
    assert (found["lookahead", 11] - found["lookahead", 12]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-llama", "gemma3", "paligemma-gemma2", "qwen2_5_vl-images"])
def test_without_a_cache_the_tokens_are_the_same(name: str) -> None:
    family = FAMILIES[name]
    model, joined = family.model(), family.join(family.samples())
    with patch(model, Peek(keep=family.keep, asks=((2, "visual"),))):
        cached = model.generate(**joined, max_new_tokens=5, do_sample=False)
        uncached = model.generate(**joined, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-llama", "gemma3", "paligemma-gemma", "paligemma-gemma2",
                                  "qwen2_5_vl-mixed", "llava_next-images"])  # fmt: skip
def test_the_native_backend_looks_ahead_alike(name: str) -> None:
    family = FAMILIES[name]
    joined = family.join(family.samples())
    probes, tokens = [], []
    for backend in ("hooks", "native"):
        method = Peek(keep=family.keep, asks=BOTH)
        out, _ = run(family, backend, joined, method, **GREEDY)
        probes.append(method.seen)
        tokens.append(out.sequences)
    assert torch.equal(*tokens)
    for one, other in zip(*probes, strict=True):
        for ask in BOTH:  # queries and keys may be rotated further, if both are
            torch.testing.assert_close(heard(one[ask]), heard(other[ask]), atol=1e-5, rtol=1e-4)


# Attention that takes no mask.


@pytest.fixture
def flash() -> Iterator[list[str]]:
    """An attention named "my_flash" that is causal and refuses whole masks; notes who calls it."""
    seen: list[str] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        assert mask is None
        seen.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, **kwargs)

    AttentionInterface.register("my_flash", attend)
    yield seen
    AttentionInterface._global_mapping.pop("my_flash")


def flashing(model: Any) -> Any:
    """The decoder's layers run "my_flash"."""
    for layer in Unpatched(model).text.layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation_internal = "my_flash"
    return model


ONE = batch(prompt(2, 4, seed=1)) | {"pixel_values": pixels(1)}


@torch.no_grad()
def test_flash_attention_gives_way_while_text_runs_ahead(flash: list[str]) -> None:
    model, methods = flashing(random_llava()), (Peek(asks=BOTH), Peek(asks=BOTH))
    configs = [layer.self_attn.config for layer in model.model.language_model.layers]
    with patch(random_llava(), methods[0]) as handle:
        want = handle._model(**ONE).logits
    with patch(model, methods[1]):
        got = model(**ONE).logits
    assert flash == ["my_flash"] * 3  # of the prefill, under its own name
    assert [layer.self_attn.config for layer in model.model.language_model.layers] == configs
    close(got, want)
    for ask in BOTH:
        close(methods[1].seen[0][ask].q, methods[0].seen[0][ask].q)


@torch.no_grad()
def test_another_thread_keeps_its_flash_attention_meanwhile(flash: list[str]) -> None:
    model = flashing(random_llava())
    words = {"input_ids": torch.tensor([[3, 4, 5]])}
    counts = []

    def meanwhile(module: Any, args: Any, output: Any) -> None:
        hook.remove()
        other = threading.Thread(target=lambda: model(**words))
        other.start()
        other.join()
        counts.append(len(flash))

    with patch(model, Peek(asks=((2, "visual"),))):
        hook = model.model.language_model.layers[0].mlp.register_forward_hook(meanwhile)
        model(**ONE)
    assert counts == [3]
    assert len(flash) == 6


@torch.no_grad()
def test_capped_logits_in_place_of_flash_attention() -> None:
    """Flash attention caps them where sdpa does not: eager attention takes its place."""
    family = FAMILIES["paligemma-gemma2"]
    one = family.samples()[0]
    model, methods = family.model(), (Peek(asks=((1, "visual"),)), Peek(asks=((1, "visual"),)))
    model.set_attn_implementation("eager")
    model.model.language_model.layers[0].self_attn.attn_logit_softcapping = 0.5
    with patch(model, methods[0]):
        model(**one)
    with pytest.MonkeyPatch.context() as patched:
        eager = type(model.model.language_model.layers[0].self_attn).__module__
        attend = vars(__import__(eager, fromlist=["_"]))["eager_attention_forward"]
        patched.setitem(AttentionInterface._global_mapping, "my_flash", attend)
        flashing(model)
        with patch(model, methods[1]):
            model(**one)
    close(methods[1].seen[0][1, "visual"].q, methods[0].seen[0][1, "visual"].q)


@torch.no_grad()
def test_attention_changed_after_the_patch_is_refused(flash: list[str]) -> None:
    model = random_llava()
    with patch(model, Peek()):
        flashing(model)
        with pytest.raises(RuntimeError, match="it is now my_flash: patch again"):
            model(**ONE)


@torch.no_grad()
def test_a_deep_copy_looks_ahead_on_its_own(flash: list[str]) -> None:
    model, method = flashing(random_llava()), Peek()
    with patch(model, method):
        other = copy.deepcopy(model)
        model(**ONE)
    other(**ONE)  # still patched; its notes are a copy too
    twin = other._cdrop_handle.method
    assert torch.equal(twin.seen[0][1, "visual"].q, method.seen[0][1, "visual"].q)


# How the model is run.


def test_training_with_checkpoints_runs_ahead_alike() -> None:
    """Gradient checkpointing takes caches away; nothing of the probe is in the graph."""
    labels = WORDS["input_ids"].clone()
    labels[:, :-2] = -100
    probes, grads = [], []
    for reentrant in (None, False, True):
        model, method = random_llava().train(), Peek(asks=((2, "visual"),))
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with patch(model, method):
            model(**WORDS, pixel_values=pixels(3), labels=labels).loss.backward()
        probes.append(method.seen[0][2, "visual"])
        grads.append(model.model.multi_modal_projector.linear_1.weight.grad)
        assert not probes[-1].q.requires_grad
    for probe, grad in zip(probes[1:], grads[1:], strict=True):
        torch.testing.assert_close(probe.q, probes[0].q)
        torch.testing.assert_close(grad, grads[0])


@torch.no_grad()
def test_modules_that_accelerate_dispatches() -> None:
    accelerate = pytest.importorskip("accelerate")
    found = []
    for spread in (False, True):
        model, method = random_llava(), Peek(asks=BOTH)
        if spread:
            model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with patch(model, method):
            model.generate(**WORDS, pixel_values=pixels(3), max_new_tokens=1, do_sample=False)
        found.append(method.seen[0])
    for ask in BOTH:
        assert torch.equal(found[0][ask].q, found[1][ask].q)
        assert torch.equal(found[0][ask].k, found[1][ask].k)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_under_autocast_it_rounds_no_more_than_whole_layers_do(attention: str) -> None:
    model, plain = random_llava(), Unpatched(random_llava())
    for one in (model, plain.model):
        one.set_attn_implementation(attention)
    method = Peek(asks=((2, "visual"),))
    visual = ONE["input_ids"][0] == IMAGE
    sequence = plain.inputs(ONE)
    right, _ = reset_run(plain, sequence, visual, 2)
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = reset_run(plain, plain.inputs(ONE), visual, 2)
        with patch(model, method):
            model(**ONE)
    got = queries(method.seen[0][2, "visual"])
    right, whole = right[:, -4:], whole[:, -4:]
    assert 0 < (got - right).norm() < 1.25 * (whole - right).norm()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llava-llama", "qwen3_vl-images", "gemma3", "qwen3_vl_moe-images"]
)
def test_it_leaves_no_trace_in_what_the_model_returns(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    model.set_attn_implementation("eager")
    joined = family.join(family.samples())
    kept = Peek(keep=0.4, asks=((0, "visual"),))
    ahead = Peek(keep=0.4, asks=((0, "visual"), (2, "visual")))
    outputs = []
    for method in (kept, ahead):
        with patch(model, method):
            outputs.append(model(**joined, output_attentions=True, output_hidden_states=True))
    for kind in ("attentions", "hidden_states"):
        one, other = (getattr(out, kind) for out in outputs)
        assert len(one) == len(other) > 0
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(outputs[0].logits, outputs[1].logits)


# Refusals.


def test_a_depth_past_the_last_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probe_layer must be in 0..2, got 3"):
        patch(random_llava(), Peek(asks=((3, "visual"),)))


def test_layers_on_the_way_must_have_their_parts() -> None:
    model = random_llava()
    del model.model.language_model.layers[0].self_attn.v_proj
    patch(model, Peek(asks=((0, "visual"),))).remove()
    patch(model, Peek(asks=((1, "visual"),), probe="static")).remove()
    with pytest.raises(ValueError, match="layer 0 of LlamaModel has no v_proj of its own"):
        patch(model, Peek(asks=((1, "visual"),)))


def test_layers_of_another_kind_are_refused() -> None:
    model = random_llava()
    model.model.language_model.config.layer_types = ["full_attention", "conv", "full_attention"]
    patch(model, Peek(asks=((1, "visual"),))).remove()
    with pytest.raises(NotImplementedError, match="layer 1 is of conv"):
        patch(model, Peek(asks=((2, "visual"),)))


def test_a_method_must_say_that_it_looks_ahead() -> None:
    @dataclass(frozen=True)
    class Silent(Peek):
        def select(self, signals: Signals) -> Selection:
            assert signals.probe is not None
            signals.probe(layer=1, rotary=True, context="visual", query=self.query, lookahead=True)
            raise AssertionError("not refused")

    model = random_llava()
    with (
        patch(model, Silent(probe="static")),
        pytest.raises(ValueError, match="`probe` is not 'lookahead', got True"),
    ):
        model(**ONE)


@torch.no_grad()
def test_no_row_of_a_mask_is_empty(monkeypatch: Any) -> None:
    """Of padding either: some kernels make that NaN, which would spread through its values."""
    mask, masks = Lookahead._mask, []
    monkeypatch.setattr(
        Lookahead, "_mask", lambda *args: masks.append(mask(*args)) or masks[-1]
    )  # fmt: skip
    with patch(random_llava(), Peek()) as handle:
        handle._model(**WORDS, pixel_values=pixels(3))
    assert masks[0].shape == (2, 1, TEXT, 2 * TOKENS + TEXT)
    assert masks[0].any(-1).all()


@torch.no_grad()
def test_block_masks_are_refused(monkeypatch: Any) -> None:
    """Which a model that makes whole masks would make for flex attention."""
    made = Lookahead.__init__
    monkeypatch.setattr(
        Lookahead, "__init__", lambda self, *given: made(self, *given[:-1], {"full_attention": 1})
    )
    with (
        patch(random_llava(), Peek()) as handle,
        pytest.raises(NotImplementedError, match="for the lookahead probe .* got a int"),
    ):
        handle._model(**ONE)


@torch.no_grad()
def test_flex_attention_gives_way_too() -> None:
    """The prefill, which would compile it, is not run."""

    def stop(*args: Any) -> None:
        raise InterruptedError

    model, methods = random_llava(), (Peek(asks=BOTH), Peek(asks=BOTH))
    with patch(random_llava(), methods[0]) as handle:
        handle._model(**ONE)
    model.set_attn_implementation({"text_config": "flex_attention"})
    with patch(model, methods[1]):
        model.model.language_model.register_forward_pre_hook(stop)
        with pytest.raises(InterruptedError):
            model(**ONE)
    for ask in BOTH:
        close(methods[1].seen[0][ask].q, methods[0].seen[0][ask].q)
