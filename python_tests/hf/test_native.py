"""`backend="native"`: what hooks give, without any in the decoder."""

from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
)

from consensusdrop_kernels.hf import patch, unpatch
from consensusdrop_kernels.methods import ConsensusDrop, Method, Random

from .families import FAMILIES, Family, Inputs
from .test_contract import GREEDY, STEPS, positions

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
WHOLE_MASKS = ("paligemma", "gemma3")

needs_native = pytest.mark.skipif(VERSION < (5, 18), reason="transformers is too old")
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def llava() -> Family:
    return FAMILIES["llava-llama"]


def method(family: Family, **options: Any) -> ConsensusDrop:
    return ConsensusDrop(
        **{"keep": family.keep, "size_attention": False, "positions": None} | options
    )


def run(family: Family, backend: str, inputs: Inputs, chosen: Any = None, **options: Any) -> Any:
    """What a patched model generates, and the handle."""
    model = family.model()
    with patch(model, chosen or method(family), backend=backend) as handle:
        return model.generate(**inputs, **options), handle


def test_transformers_before_5_18_is_refused() -> None:
    if VERSION >= (5, 18):
        pytest.skip("transformers is new enough")
    model = llava().model()
    with pytest.raises(RuntimeError, match=r"needs transformers >= 5.18, got 5.17"):
        patch(model, ConsensusDrop(keep=4), backend="native")
    patch(model, ConsensusDrop(keep=4)).remove()


@needs_native
@every_family
@torch.no_grad()
def test_a_padded_batch_is_what_the_hooks_give(family: Family) -> None:
    batch = family.join(family.samples())
    length = batch["input_ids"].shape[1]
    for where in positions(family):
        for chosen in (method(family, positions=where), Random(keep=family.keep, positions=where)):
            want, hooks = run(family, "hooks", batch, chosen, **GREEDY)
            got, native = run(family, "native", batch, chosen, **GREEDY)
            assert torch.equal(got.sequences, want.sequences)
            assert torch.equal(got.sequences[:, :length], batch["input_ids"])
            torch.testing.assert_close(
                torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
            )
            assert native.stats == hooks.stats
            assert native.stats.tokens_after < native.stats.tokens_before
            assert native.stats.kv_bytes_saved > 0
            for name in ("sample", "grids", "tokens_before", "tokens_after", "stages"):
                assert getattr(native.last, name) == getattr(hooks.last, name)
            assert torch.equal(native.last.keep_mask, hooks.last.keep_mask)
            for name in ("index", "assign", "size"):
                one, other = native.last.selection, hooks.last.selection
                assert torch.equal(getattr(one, name), getattr(other, name))
            if isinstance(chosen, ConsensusDrop):
                torch.testing.assert_close(native.last.scores.fused, hooks.last.scores.fused)


@needs_native
@every_family
@torch.no_grad()
def test_a_static_cache_gives_the_same(family: Family) -> None:
    """Prompt by prompt, and all of them padded, which hooks refuse."""
    samples = family.samples()
    static: dict[str, Any] = GREEDY | {"cache_implementation": "static"}
    try:
        family.model().generate(**samples[0], **static)
    except AttributeError:
        pytest.skip("the stock model can't")
    for where in positions(family):
        chosen = method(family, positions=where)
        for inputs in (*samples, family.join(samples)):
            want, _ = run(family, "hooks", inputs, chosen, **GREEDY)
            got, _ = run(family, "native", inputs, chosen, **static)
            assert isinstance(got.past_key_values, StaticCache)
            assert torch.equal(got.sequences, want.sequences)


@needs_native
@every_family
@torch.no_grad()
def test_without_a_cache_the_tokens_are_the_same(family: Family) -> None:
    batch = family.join(family.samples())
    want, _ = run(family, "hooks", batch, max_new_tokens=STEPS, do_sample=False)
    got, _ = run(family, "native", batch, max_new_tokens=STEPS, do_sample=False, use_cache=False)
    assert torch.equal(got, want)


@needs_native
@every_family
@torch.no_grad()
def test_beams_and_several_answers(family: Family) -> None:
    """A batch with beams is each prompt with beams, all of which start from the same features."""
    if not family.beams:
        pytest.skip("the stock model can't")
    options: dict[str, Any] = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    samples = family.samples()
    batch = family.join(samples)
    length = batch["input_ids"].shape[1]
    uneven = ("paligemma", "gemma3", "idefics3", "smolvlm", "internvl", "video_llava-images",
              "video_llava-videos")  # fmt: skip
    if VERSION < (5, 19) and family.name.startswith(uneven):
        with pytest.raises(NotImplementedError, match="as many visual tokens left in each prompt"):
            run(family, "native", batch, **options)
        return
    whole, _ = run(family, "native", batch, **options)
    first = whole.logits[0].unflatten(0, (len(samples), 3))
    torch.testing.assert_close(first[:, 1:], first[:, :1].expand_as(first[:, 1:]))
    assert torch.equal(whole.sequences[:, :length], batch["input_ids"].repeat_interleave(2, 0))
    for row, sample in enumerate(samples):
        alone, _ = run(family, "native", sample, **options)
        new = alone.sequences[:, sample["input_ids"].shape[1] :]
        assert torch.equal(whole.sequences[2 * row : 2 * row + 2, length:], new)
    if VERSION < (5, 19):
        return  # mixes up the features of beams, or finds no videos
    # Hooks give the same, unless the stock model mixes up the features of their beams.
    want, _ = run(family, "hooks", samples[0], **options)
    if torch.allclose(want.logits[0], want.logits[0][:1], atol=1e-4):
        got, _ = run(family, "native", samples[0], **options)
        assert torch.equal(got.sequences, want.sequences)


@needs_native
@every_family
@torch.no_grad()
def test_several_sampled_answers(family: Family) -> None:
    sample = family.samples()[0]
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": True}
    found = []
    for backend in ("hooks", "native"):
        torch.manual_seed(3)
        found.append(run(family, backend, sample, **options)[0])
    assert torch.equal(*found)
    if not family.beams:
        return
    torch.manual_seed(3)
    several, _ = run(family, "native", sample, num_return_sequences=3, **options)
    length = sample["input_ids"].shape[1]
    assert torch.equal(several[:, :length], sample["input_ids"].expand(3, -1))
    assert len({tuple(row) for row in several.tolist()}) > 1


@needs_native
@every_family
@torch.no_grad()
def test_chunked_prefill(family: Family) -> None:
    batch = family.join(family.samples())
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    refusal = None
    if VERSION < (5, 23):
        refusal = "needs transformers >= 5.23"
    elif family.name.startswith(WHOLE_MASKS):
        refusal = "hide image tokens from each other"
    elif family.name == "glm4v-videos":
        refusal = "video features at placeholders of their own"
    if refusal is not None:
        with pytest.raises(NotImplementedError, match=refusal):
            run(family, "native", batch, prefill_chunk_size=7, **options)
        return
    want, _ = run(family, "hooks", batch, **options)
    for size in (1, 7):
        got, _ = run(family, "native", batch, prefill_chunk_size=size, **options)
        assert torch.equal(got, want)


@needs_native
@every_family
@torch.no_grad()
def test_removed_it_is_bit_for_bit_what_it_was(family: Family) -> None:
    model = family.model()
    batch = family.join(family.samples())
    before, state = dict(vars(model)), copy.deepcopy(model.state_dict())
    want, logits = model.generate(**batch, **GREEDY), model(**batch).logits
    patch(model, method(family), backend="native")
    assert "generate" in vars(model)
    assert inspect.signature(model.generate) == inspect.signature(family.model().generate)
    model.generate(**batch, **GREEDY)
    unpatch(model)
    assert set(vars(model)) - set(before) <= {"_cache"}
    assert not model.model._forward_pre_hooks
    got = model.generate(**batch, **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    assert torch.equal(model(**batch).logits, logits)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@needs_native
@every_family
@torch.no_grad()
def test_with_every_token_kept_nothing_changes(family: Family) -> None:
    batch = family.join(family.samples())
    want = family.model().generate(**batch, **GREEDY)
    got, handle = run(
        family, "native", batch, ConsensusDrop(keep=1.0, size_attention=False), **GREEDY
    )
    assert torch.equal(got.sequences, want.sequences)
    assert handle.last.tokens_after == handle.last.tokens_before
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
    )


@needs_native
@every_family
@torch.no_grad()
def test_a_direct_call_with_pictures_is_refused(family: Family) -> None:
    sample = family.samples()[0]
    words = torch.tensor([[1, 5, 7, 9]])
    model = family.model()
    want = model.generate(words, max_new_tokens=3, do_sample=False)
    logits = model(input_ids=words).logits
    with patch(model, method(family), backend="native") as handle:
        with pytest.raises(NotImplementedError, match=r"prunes in generate alone"):
            model(**sample)
        assert torch.equal(model.generate(words, max_new_tokens=3, do_sample=False), want)
        assert torch.equal(model(input_ids=words).logits, logits)
        assert handle.last is None
        missing = {n: v for n, v in sample.items() if "pixel" not in n}
        with pytest.raises(ValueError, match="no image came with it"):
            model.generate(**missing, max_new_tokens=3)


@needs_native
@pytest.mark.parametrize(
    "name",
    ["llava_next-images", "llava_onevision-mixed", "video_llava-mixed", "video_llava-videos"],
)
@torch.no_grad()
def test_breaks_that_stay(name: str) -> None:
    family = FAMILIES[name]
    batch = family.join(family.samples())
    found = []
    for backend in ("hooks", "native"):
        model = family.model()
        with patch(model, method(family), backend=backend, breaks="keep") as handle:
            found.append((model.generate(**batch, **GREEDY).sequences, handle.last.tokens_after))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# What `generate` takes and gives, on one family.


@needs_native
@torch.no_grad()
def test_prompts_without_a_mask_or_as_the_first_argument() -> None:
    """Padding is then told by its id, as `generate` does."""
    family = llava()
    batch = family.join(family.samples())
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    for pad in (0, None):
        config = GenerationConfig(pad_token_id=pad, max_new_tokens=STEPS, do_sample=False)
        found = []
        for backend in ("hooks", "native"):
            model = family.model()
            model.generation_config.pad_token_id = pad
            with patch(model, method(family), backend=backend):
                found.append(model.generate(ids, config, pixel_values=pixels))
        assert torch.equal(*found)


@needs_native
@torch.no_grad()
def test_positions_of_the_callers_own() -> None:
    family = llava()
    sample = family.samples()[0]
    sample["position_ids"] = torch.arange(sample["input_ids"].shape[1])[None] + 3
    for where in positions(family):
        chosen = method(family, positions=where)
        want, _ = run(family, "hooks", sample, chosen, **GREEDY)
        got, _ = run(family, "native", sample, chosen, **GREEDY)
        torch.testing.assert_close(
            torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
        )


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("place", ["argument", "config", "model"])
def test_total_lengths_count_the_prompt(place: str) -> None:
    family = llava()
    sample = family.samples()[0]
    length = sample["input_ids"].shape[1]
    new = run(family, "hooks", sample, max_new_tokens=8, do_sample=False)[0][0, length:]
    end = int(new[1])
    totals: dict[str, Any] = {
        "max_length": length + 6, "min_length": length + 4, "eos_token_id": end,
        "pad_token_id": 0, "do_sample": False,
    }  # fmt: skip
    found = []
    for backend in ("hooks", "native"):
        model = family.model()
        with patch(model, method(family), backend=backend):
            if place == "argument":
                found.append(model.generate(**sample, **totals))
            elif place == "config":
                config = GenerationConfig(**totals)
                found.append(model.generate(**sample, generation_config=config))
            else:
                model.generation_config.update(**totals)
                found.append(model.generate(**sample))
    assert torch.equal(*found)
    assert found[0].shape[1] in (length + 5, length + 6)
    with pytest.raises(ValueError, match=f"more than the prompt's {length} tokens, got 10"):
        run(family, "native", sample, max_length=10)


class Stream:
    """Keeps what is put."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@needs_native
@torch.no_grad()
def test_a_streamer_sees_the_prompt_once() -> None:
    family = llava()
    sample = family.samples()[1]
    streams = []
    for backend in ("hooks", "native"):
        streams.append(Stream())
        out, _ = run(
            family, backend, sample, max_new_tokens=3, do_sample=False, streamer=streams[-1]
        )
        assert streams[-1].ended
        assert [i for part in streams[-1].seen for i in part] == out[0].tolist()
    assert streams[0].seen == streams[1].seen


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
def test_processors_and_criteria_see_the_prompt(options: dict[str, Any]) -> None:
    """And find what was generated behind it."""
    family = llava()
    batch = family.join(family.samples()[:1] * 2)
    prompt = batch["input_ids"]
    length = prompt.shape[1]
    shapes: list[tuple[str, int]] = []

    def look(name: str, ids: torch.Tensor) -> None:
        rows = prompt.repeat_interleave(len(ids) // len(prompt), 0)
        assert torch.equal(ids[:, :length], rows)
        shapes.append((name, ids.shape[1]))

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        look("processor", ids)
        return scores

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        look("criterion", ids)
        return torch.full((len(ids),), ids.shape[1] >= length + 3, device=ids.device)

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        assert torch.equal(ids[:length], prompt[row])
        shapes.append(("allowed", len(ids)))
        return list(range(40, 60))

    found = []
    for backend in ("hooks", "native"):
        out, _ = run(
            family, backend, batch, max_new_tokens=6, do_sample=False,
            logits_processor=LogitsProcessorList([process]),
            stopping_criteria=StoppingCriteriaList([stop]), prefix_allowed_tokens_fn=allowed,
            **options,
        )  # fmt: skip
        found.append((out, list(shapes)))
        shapes.clear()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][0].shape[1] == length + 3


@needs_native
@torch.no_grad()
def test_a_criterion_of_the_total_length() -> None:
    family = llava()
    sample = family.samples()[0]
    length = sample["input_ids"].shape[1]
    stop = StoppingCriteriaList([MaxLengthCriteria(length + 2)])
    out, _ = run(family, "native", sample, do_sample=False, stopping_criteria=stop)
    assert out.shape[1] == length + 2
    assert stop[0].max_length == length + 2


@needs_native
@torch.no_grad()
def test_drafts_from_the_prompt() -> None:
    family = llava()
    sample = family.samples()[0]
    want, _ = run(family, "native", sample, max_new_tokens=8, do_sample=False)
    got, _ = run(
        family, "native", sample, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
    )
    assert torch.equal(got, want)


@needs_native
@torch.no_grad()
def test_an_assistant_with_the_same_pictures() -> None:
    family = llava()
    sample = family.samples()[0]
    want, _ = run(family, "native", sample, max_new_tokens=8, do_sample=False)
    got, _ = run(
        family, "native", sample, max_new_tokens=8, do_sample=False, assistant_model=family.model()
    )
    assert torch.equal(got, want)


@needs_native
@every_family
@torch.no_grad()
def test_features_computed_ahead(family: Family) -> None:
    """Those of the patched model are pruned, those of another model are not to be had."""
    sample = family.samples()[0]
    want, _ = run(family, "native", sample, **GREEDY)
    model, other = family.model(), family.model()
    with patch(model, method(family), backend="native"):
        pixels = {n for n in sample if "pixel" in n}
        kind = "video" if pixels == {"pixel_values_videos"} else "image"
        rest = {n: v for n, v in sample.items() if n not in pixels}
        features = []
        for one in (model, other):
            encode = getattr(one.model, f"get_{kind}_features")
            names = set(inspect.signature(encode).parameters) & set(sample)
            features.append(encode(**{n: sample[n] for n in names}, return_dict=True))
        got = model.generate(**rest, mm_encoder_outputs={kind: features[0]}, **GREEDY)
        assert torch.equal(got.sequences, want.sequences)
        with pytest.raises(NotImplementedError, match="computed outside the patched model"):
            model.generate(**rest, mm_encoder_outputs={kind: features[1]}, **GREEDY)
        with pytest.raises(ValueError, match="either the .* pixels or their features"):
            model.generate(**sample, mm_encoder_outputs={kind: features[0]}, **GREEDY)


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-llama", "qwen3_vl-images"])
def test_compiled_decoding(name: str) -> None:
    """The steps that `generate` compiles for a static cache hold no break, twice the same cache."""
    family = FAMILIES[name]
    config = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True
    model = family.model()
    samples = family.samples()[:2]
    want = [run(family, "hooks", s, **GREEDY)[0].sequences for s in samples]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with patch(model, method(family), backend="native"):
        for _ in range(2):
            for sample, right in zip(samples, want, strict=True):
                got = model.generate(
                    **sample, cache_implementation="static", compile_config=config, **GREEDY
                )
                assert torch.equal(got.sequences, right)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_native
@torch.no_grad()
def test_a_compiled_forward() -> None:
    """`torch.compile(model.forward)` before the patch and after it."""
    family = llava()
    sample = family.samples()[0]
    want, _ = run(family, "hooks", sample, **GREEDY)
    for first in (True, False):
        torch.compiler.reset()
        model = family.model()
        if first:
            model.forward = torch.compile(model.forward, backend="eager")
        with patch(model, method(family), backend="native"):
            if not first:
                model.forward = torch.compile(model.forward, backend="eager")
            got = model.generate(**sample, cache_implementation="static", **GREEDY)
        assert torch.equal(got.sequences, want.sequences)


@needs_native
@torch.no_grad()
def test_a_static_cache_of_the_callers_own_is_used_again() -> None:
    family = llava()
    model = family.model()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with patch(model, method(family), backend="native"):
        for sample in family.samples():
            cache.reset()
            got = model.generate(**sample, past_key_values=cache, **GREEDY)
            want, _ = run(family, "hooks", sample, **GREEDY)
            assert torch.equal(got.sequences, want.sequences)
        with pytest.raises(NotImplementedError, match="filled this cache with a pruned prompt"):
            model.generate(**sample, past_key_values=cache, **GREEDY)


@needs_native
@torch.no_grad()
def test_a_pruned_cache_can_not_be_gone_on_with() -> None:
    family = llava()
    model = family.model()
    sample = family.samples()[0]
    with patch(model, method(family), backend="native"):
        out = model.generate(**sample, **GREEDY)
        turn = torch.cat([out.sequences, torch.tensor([[5, 6, 7]])], 1)
        for inputs in ({"input_ids": turn}, {"input_ids": turn} | {"pixel_values": None}):
            with pytest.raises(NotImplementedError, match="start without past_key_values"):
                model.generate(**inputs, past_key_values=out.past_key_values, max_new_tokens=2)
        with pytest.raises(NotImplementedError, match="start without past_key_values"):
            model(input_ids=turn[:, -1:], past_key_values=out.past_key_values)
        # A text's cache is nobody's business.
        words = torch.tensor([[1, 5, 7, 9]])
        first = model.generate(words, **GREEDY)
        more = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
        again = model.generate(more, past_key_values=first.past_key_values, **GREEDY)
        assert torch.equal(again.sequences, model.generate(more, **GREEDY).sequences)
    hooked = family.model()
    with patch(hooked, method(family)):
        cache = hooked.generate(**sample, **GREEDY).past_key_values
        patch(hooked, method(family), backend="native", replace=True)
        with pytest.raises(NotImplementedError, match="start without past_key_values"):
            hooked.generate(turn, past_key_values=cache, max_new_tokens=2)


@needs_native
@torch.no_grad()
def test_a_deep_copy_has_a_patch_of_its_own() -> None:
    family = llava()
    sample = family.samples()[0]
    want, _ = run(family, "native", sample, **GREEDY)
    model = family.model()
    handle = patch(model, method(family), backend="native")
    twin = copy.deepcopy(model)
    handle.remove()
    got = twin.generate(**sample, **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
    assert twin._cdrop_handle.stats.prefills == 1
    assert handle.stats.prefills == 0
    plain = model.generate(**sample, **GREEDY)
    unpatch(twin)
    assert torch.equal(twin.generate(**sample, **GREEDY).sequences, plain.sequences)


@needs_native
def test_threads_do_not_mix() -> None:
    family = FAMILIES["llava_next-images"]
    model, samples = family.model(), family.samples()
    found: list[Any] = [None] * len(samples)

    def go(at: int) -> None:
        found[at] = [model.generate(**samples[at], max_new_tokens=3, do_sample=False)] * 2

    with patch(model, method(family), backend="native"):
        want = [model.generate(**s, max_new_tokens=3, do_sample=False) for s in samples]
        threads = [threading.Thread(target=go, args=(at,)) for at in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, right in zip(found, want, strict=True):
        assert mine is not None
        assert all(torch.equal(one, right) for one in mine)


@dataclass(frozen=True)
class Staged(Method):
    """Prunes before the last layer."""

    keep: float = 0.5

    def stages(self, layers: int) -> tuple[int, ...]:
        return (layers - 1,)

    def select(self, signals: Any) -> Any:
        raise NotImplementedError


@needs_native
@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (Staged(), r"before its layers \[2\] too; use backend='hooks'"),
        (ConsensusDrop(keep=4, size_attention=True), "can't use size_attention"),
    ],
)
def test_methods_that_change_the_decoder_are_refused(chosen: Method, says: str) -> None:
    model = llava().model()
    with pytest.raises(ValueError, match=says):
        patch(model, chosen, backend="native")
    assert "generate" not in vars(model)
    patch(model, ConsensusDrop(keep=4, size_attention=False), backend="native").remove()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of hooks, native, got 'kernel'"):
        patch(llava().model(), ConsensusDrop(keep=4), backend="kernel")


@needs_native
def test_a_model_that_takes_no_features_is_refused() -> None:
    model = llava().model()
    forward = model.model.forward
    model.model.forward = lambda input_ids=None, pixel_values=None: forward(input_ids)
    with pytest.raises(ValueError, match="takes mm_encoder_outputs, and LlavaModel does not"):
        patch(model, ConsensusDrop(keep=4, size_attention=False), backend="native")


@needs_native
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"custom_generate": lambda *a, **k: None}, "can't prune with custom_generate"),
        ({"token_healing": True}, "can't prune with token_healing"),
        ({"cache_implementation": "paged"}, "paged attention"),
    ],
)
def test_ways_to_generate_that_are_refused(options: dict[str, Any], says: str) -> None:
    family = llava()
    with pytest.raises(NotImplementedError, match=says):
        run(family, "native", family.samples()[0], **options)


@needs_native
@torch.no_grad()
def test_prompts_that_are_refused() -> None:
    family = llava()
    sample = family.samples()[0]
    embeds = torch.zeros(1, 4, 48)
    with pytest.raises(NotImplementedError, match="images with inputs_embeds"):
        run(
            family, "native", {"pixel_values": sample["pixel_values"]}, inputs_embeds=embeds,
        )  # fmt: skip
    with pytest.raises(ValueError, match="as inputs or as input_ids, got both"):
        run(family, "native", sample | {"inputs": sample["input_ids"]})
    # What follows a picture at the end counts on from its last token, which may be gone.
    count = int((sample["input_ids"] == 98).nonzero()[-1, 1]) + 1
    cut = {n: v[:, :count] if v.dim() == 2 else v for n, v in sample.items()}
    chosen = method(family, positions="original")
    with pytest.raises(NotImplementedError, match="needs a prompt that ends in text"):
        run(family, "native", cut, chosen, **GREEDY)
    with pytest.raises(NotImplementedError, match="takes a gap in the positions for the start"):
        run(family, "native", sample, chosen, use_cache=False, **GREEDY)
    want, _ = run(family, "hooks", cut, method(family), **GREEDY)
    got, _ = run(family, "native", cut, method(family), **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
