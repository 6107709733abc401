"""Generation of the patched model against the oracle: uncached, unpadded, hook-free."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import consensusdrop_kernels.hf.hooks as hooks
from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.hf.cache import state_of
from consensusdrop_kernels.methods import Random

from . import reference
from .best import best_of
from .models import TOKENS, batch, pixels, prompt, random_llava

STEPS = 6
KEEP = 5
SHORT, LONG, TEXT = prompt(2, 4, seed=1), prompt(5, 9, seed=2), prompt(7, seed=3)
TWO = prompt(2, 3, 6, seed=4)


def generate(model: Any, inputs: dict[str, Tensor], images: Tensor, **options: Any) -> Any:
    return model.generate(
        **inputs, pixel_values=images, max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def check(out: Any, model: Any, prompts: list[list[int]], per: list[Tensor], **how: Any) -> None:
    """The new tokens and their logits are the oracle's, sample by sample."""
    logits = torch.stack(out.logits, 1)
    for row, (words, images) in enumerate(zip(prompts, per, strict=True)):
        with torch.no_grad():
            sequence = reference.pruned(model, torch.tensor(words), images, keep=KEEP, **how)
        ids, want = reference.greedy(model, sequence, STEPS)
        assert out.sequences[row, -STEPS:].tolist() == ids
        torch.testing.assert_close(logits[row], want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_padded_batch_equals_the_oracle(text: str, positions: str) -> None:
    plain, model, images = random_llava(text), random_llava(text), pixels(2)
    inputs = batch(SHORT, LONG)
    with patch(model, best_of(keep=KEEP, positions=positions)):
        out = generate(model, inputs, images)
    assert torch.equal(out.sequences[:, : len(LONG)], inputs["input_ids"])
    check(out, plain, [SHORT, LONG], [images[:1], images[1:]], compact=positions == "compact")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_several_images_beside_one_and_beside_text_alone(attention: str) -> None:
    plain, model, images = random_llava(), random_llava(), pixels(3)
    model.set_attn_implementation(attention)
    with patch(model, best_of(keep=KEEP)) as handle:
        out = generate(model, batch(TWO, TEXT, SHORT), images)
    check(out, plain, [TWO, TEXT, SHORT], [images[:2], images[:0], images[2:]])
    assert handle.last is not None
    assert handle.last.sample == (0, 0, 2)
    assert handle.last.tokens_after == (2 * KEEP, 0, KEEP)


@pytest.mark.parametrize(
    "how",
    [
        {"layer": 1, "rotary": False},
        {"context": "all", "reduce": "mean"},
        {"alpha": 0.0},
        {"alpha": 1.0, "layer": 2},
    ],
)
def test_probe_options_equal_the_oracle(how: dict[str, Any]) -> None:
    plain, model, images = random_llava(), random_llava(), pixels(2)
    names = {"layer": "probe_layer", "context": "probe_context", "reduce": "rows"}
    method = best_of(keep=KEEP, **{names.get(k, k): v for k, v in how.items()})
    with patch(model, method):
        out = generate(model, batch(SHORT, LONG), images)
    check(out, plain, [SHORT, LONG], [images[:1], images[1:]], **how)


def test_random_keeps_its_draw_unmerged() -> None:
    plain, model, images = random_llava(), random_llava(), pixels(2)
    with patch(model, Random(keep=KEEP, seed=3)) as handle:
        out = generate(model, batch(SHORT, LONG), images)
    kept = handle.last.selection.index[0]
    check(out, plain, [SHORT, LONG], [images[:1], images[1:]], merging=False, kept=kept)


def test_vision_feature_layer_counts_from_either_end() -> None:
    plain, model, images = random_llava(), random_llava(), pixels(1)
    for one in (plain, model):
        one.config.vision_feature_layer = 2
    with patch(model, best_of(keep=KEEP)):
        out = generate(model, batch(SHORT), images)
    check(out, plain, [SHORT], [images])


def _leave(*what: str) -> Any:
    """`continue_call` that forgets to correct some of the inputs."""
    correct = hooks.continue_call

    def forgetful(given: dict[str, Any], state: Any, cache: Any) -> None:
        before = {name: given.get(name) for name in what}
        correct(given, state, cache)
        given.update(before)

    return forgetful


@pytest.mark.parametrize("what", ["attention_mask", "position_ids"])
def test_control_uncorrected_decoding_is_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model, images = random_llava(), random_llava(), pixels(2)
    monkeypatch.setattr(hooks, "continue_call", _leave(what))
    with patch(model, best_of(keep=KEEP)):
        out = generate(model, batch(TWO, TEXT), images)
    with pytest.raises(AssertionError):
        check(out, plain, [TWO, TEXT], [images, images[:0]])


def test_control_another_choice_gives_other_logits() -> None:
    plain, model, images = random_llava(), random_llava(), pixels(1)
    with patch(model, best_of(keep=KEEP)):
        out = generate(model, batch(SHORT), images)
    with pytest.raises(AssertionError):
        check(out, plain, [SHORT], [images], kept=torch.arange(KEEP))
    with pytest.raises(AssertionError):
        check(out, plain, [SHORT], [images], merging=False)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_without_cache_the_tokens_are_the_same(positions: str, beams: int) -> None:
    """What was generated must not join the question, however often the prompt runs anew."""
    model = random_llava()
    with patch(model, best_of(keep=KEEP, alpha=1.0, positions=positions)):
        for seed in range(3):
            inputs, images = batch(prompt(3, 1, seed=seed), prompt(1, 5, seed=9)), pixels(2, seed)
            cached = generate(model, inputs, images, num_beams=beams)
            anew = generate(model, inputs, images, num_beams=beams, use_cache=False)
            assert torch.equal(cached.sequences, anew.sequences)
            if beams == 1:
                torch.testing.assert_close(
                    torch.stack(cached.logits), torch.stack(anew.logits), atol=2e-4, rtol=1e-4
                )


@torch.no_grad()
def test_after_generation_a_plain_call_is_a_prompt_of_its_own() -> None:
    model, images = random_llava(), pixels(1)
    longer = torch.tensor([[*SHORT, 5, 6]])
    with patch(model, best_of(keep=KEEP, alpha=1.0)) as handle:
        model(input_ids=longer, pixel_values=images, use_cache=False)
        want = handle.last.scores.textual
        generate(model, batch(SHORT), images, use_cache=False)
        model(input_ids=longer, pixel_values=images, use_cache=False)
        assert torch.equal(handle.last.scores.textual, want)


def test_without_cache_and_mask_gaps_are_no_packed_sequences() -> None:
    model, images = random_llava(), pixels(1)
    ids = torch.tensor([SHORT])
    with patch(model, best_of(keep=KEEP, positions="original")), torch.no_grad():
        with_mask = model(
            input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids)
        ).logits
        without = model(input_ids=ids, pixel_values=images, use_cache=False).logits
    torch.testing.assert_close(without, with_mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_beams_equal_the_beams_of_the_pruned_prompt(images_per_prompt: int) -> None:
    """Beam search over the decoder alone, fed the oracle's sequence, finds the same beams."""
    plain, model, images = random_llava(), random_llava(), pixels(2)
    words = SHORT if images_per_prompt == 1 else TWO
    images = images[:1] if images_per_prompt == 1 else images[:1].expand(2, -1, -1, -1)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": STEPS}
    with patch(model, best_of(keep=KEEP)):
        out = model.generate(**batch(words), pixel_values=images, do_sample=False, **options)
    with torch.no_grad():
        sequence = reference.pruned(plain, torch.tensor(words), images, keep=KEEP)
    want = plain.generate(
        inputs_embeds=sequence.embeds[None],
        attention_mask=torch.ones(1, len(sequence.embeds), dtype=torch.long),
        do_sample=False,
        **options,
    )
    assert out[:, len(words) :].tolist() == want.tolist()
    assert out[0].tolist() != out[1].tolist()


def test_beams_of_a_batch_are_those_of_each_prompt() -> None:
    model, images = random_llava(), pixels(2)
    options: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}
    with patch(model, best_of(keep=KEEP)):
        both = model.generate(**batch(SHORT, LONG), pixel_values=images, do_sample=False, **options)
        for at, words in enumerate((SHORT, LONG)):
            alone = model.generate(
                **batch(words), pixel_values=images[at : at + 1], do_sample=False, **options
            )
            assert both[2 * at : 2 * at + 2, -4:].tolist() == alone[:, -4:].tolist()


def test_sampling_draws_from_the_pruned_distribution() -> None:
    model, images = random_llava(), pixels(1)
    with patch(model, best_of(keep=KEEP)):
        greedy = generate(model, batch(SHORT), images)
        torch.manual_seed(0)
        out = model.generate(
            **batch(SHORT), pixel_values=images, do_sample=True, num_return_sequences=3,
            max_new_tokens=STEPS, top_k=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    for row in out.logits[0]:
        torch.testing.assert_close(row, greedy.logits[0][0], atol=2e-4, rtol=1e-4)
    assert len({tuple(row) for row in out.sequences.tolist()}) > 1


def test_prompt_lookup_decoding_gives_the_greedy_tokens() -> None:
    """Drafts come with the first call already; they must not pass for the question."""
    model, images = random_llava(), pixels(1)
    words = [*SHORT, 5, 6, 7, 5, 6]
    with patch(model, best_of(keep=KEEP)):
        plain = generate(model, batch(words), images)
        looked = generate(model, batch(words), images, prompt_lookup_num_tokens=2)
    assert torch.equal(plain.sequences, looked.sequences)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("given", ["mask", "mask and positions"])
def test_hand_written_loop(given: str, positions: str) -> None:
    plain, model, images = random_llava(), random_llava(), pixels(2)
    inputs = batch(TWO, TEXT) if given == "mask and positions" else batch(SHORT)
    per = [images, images[:0]] if given == "mask and positions" else [images[:1]]
    words = [TWO, TEXT] if given == "mask and positions" else [SHORT]
    mask, ids, cache, logits = inputs["attention_mask"], inputs["input_ids"], None, []
    new: list[Tensor] = []
    first: dict[str, Any] = {"pixel_values": torch.cat(per)}
    with patch(model, best_of(keep=KEEP, positions=positions)), torch.no_grad():
        for _ in range(STEPS):
            where = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            if given == "mask and positions":
                first["position_ids"] = where
            out = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **first
            )
            cache, first = out.past_key_values, {}
            logits.append(out.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
            new.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
    result = type("Out", (), {"sequences": torch.cat(new, 1), "logits": logits})
    check(result, plain, words, per, compact=positions == "compact")


def test_hand_written_loop_without_mask_or_positions() -> None:
    plain, model, images = random_llava(), random_llava(), pixels(1)
    ids, cache, logits, new = torch.tensor([SHORT]), None, [], []
    first: dict[str, Any] = {"pixel_values": images}
    with patch(model, best_of(keep=KEEP)), torch.no_grad():
        for _ in range(STEPS):
            out = model(input_ids=ids, past_key_values=cache, **first)
            cache, first = out.past_key_values, {}
            logits.append(out.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
            new.append(ids)
    result = type("Out", (), {"sequences": torch.cat(new, 1), "logits": logits})
    check(result, plain, [SHORT], [images])


def test_right_padded_rows_answer_as_if_alone() -> None:
    model, images = random_llava(), pixels(2)
    inputs = batch(SHORT, LONG, side="right")
    with patch(model, best_of(keep=KEEP)), torch.no_grad():
        both = model(**inputs, pixel_values=images).logits
        alone = model(input_ids=torch.tensor([SHORT]), pixel_values=images[:1]).logits
    torch.testing.assert_close(both[0, : len(SHORT)], alone[0], atol=1e-4, rtol=1e-4)


def test_a_new_image_beside_it_changes_nothing() -> None:
    model = random_llava()
    with patch(model, best_of(keep=KEEP)) as handle:
        rows = []
        for seed in (1, 2):
            images = torch.cat([pixels(1), pixels(1, seed)])
            generate(model, batch(SHORT, LONG), images)
            rows.append(handle.last.selection.index)
    assert torch.equal(rows[0][0], rows[1][0])
    assert not torch.equal(rows[0][1], rows[1][1])


def test_threads_do_not_mix() -> None:
    model = random_llava()
    cases = [(prompt(n, 3 + n, seed=n), pixels(1, n)) for n in range(6)]
    with patch(model, best_of(keep=KEEP)):
        want = [generate(model, batch(w), i).sequences.tolist() for w, i in cases]
        got: list[Any] = [None] * len(cases)

        def run(at: int) -> None:
            words, images = cases[at]
            got[at] = [generate(model, batch(words), images).sequences.tolist() for _ in range(3)]

        threads = [threading.Thread(target=run, args=(at,)) for at in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == [[one] * 3 for one in want]


def test_a_copied_cache_continues_like_the_original() -> None:
    model, images = random_llava(), pixels(1)
    with patch(model, best_of(keep=KEEP)), torch.no_grad():
        out = model(input_ids=torch.tensor([SHORT]), pixel_values=images)
        twin = copy.deepcopy(out.past_key_values)
        step = torch.tensor([[5]])
        one = model(input_ids=step, past_key_values=out.past_key_values).logits
        two = model(input_ids=step, past_key_values=twin).logits
    assert torch.equal(one, two)


def prefill(model: Any, *prompts: list[int]) -> tuple[Any, Tensor]:
    """A pruned cache and the mask of the prompts, which have one image each."""
    inputs = batch(*prompts)
    where = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = model(**inputs, pixel_values=pixels(len(prompts)), position_ids=where)
    return out.past_key_values, inputs["attention_mask"]


def longer(mask: Tensor, *rows: list[int]) -> Tensor:
    return torch.cat([mask, torch.tensor(rows)], 1)


@torch.no_grad()
def test_padding_among_several_new_tokens_stays_hidden() -> None:
    """A row whose new turn is shorter answers as if it were alone, then and one token later."""
    model, turn = random_llava(), torch.tensor([[5, 6, 7], [0, 8, 9]])
    with patch(model, best_of(keep=KEEP)):
        cache, mask = prefill(model, SHORT, SHORT)
        alone = copy.deepcopy(cache)
        alone.batch_select_indices(torch.tensor([1]))
        mask = longer(mask, [1, 1, 1], [0, 1, 1])
        where = mask.cumsum(1) - 1
        both = model(
            input_ids=turn, attention_mask=mask, position_ids=where[:, -3:], past_key_values=cache
        ).logits
        want = model(input_ids=turn[1:, 1:], past_key_values=alone).logits
        torch.testing.assert_close(both[1:, 1:], want, atol=1e-4, rtol=1e-4)
        step = {"input_ids": torch.tensor([[3], [4]]), "attention_mask": longer(mask, [1], [1])}
        then = model(**step, position_ids=where[:, -1:] + 1, past_key_values=cache).logits
        want = model(input_ids=step["input_ids"][1:], past_key_values=alone).logits
    torch.testing.assert_close(then[1:], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_the_state_follows_the_rows_of_the_cache(static: bool) -> None:
    model, words, step = random_llava(), (SHORT, LONG), torch.tensor([[5], [6]])
    if static:  # which takes no padding
        words = (SHORT, SHORT)
    with patch(model, best_of(keep=KEEP)):
        inputs = batch(*words)
        cache = None
        if static:
            cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        cache = model(**inputs, pixel_values=pixels(2), past_key_values=cache).past_key_values
        mask = longer(inputs["attention_mask"], [1], [1])
        want = model(
            input_ids=step, attention_mask=mask, past_key_values=copy.deepcopy(cache)
        ).logits
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))
        got = model(input_ids=step.flip(0), attention_mask=mask.flip(0), past_key_values=twin)
        torch.testing.assert_close(got.logits.flip(0), want, atol=1e-5, rtol=1e-5)
        if static:
            return
        twin = pickle.loads(pickle.dumps(cache))
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([3, 0]))
        got = model(input_ids=step.flip(0), attention_mask=mask.flip(0), past_key_values=twin)
        torch.testing.assert_close(got.logits.flip(0), want, atol=1e-5, rtol=1e-5)
        again = model(input_ids=step, attention_mask=mask, past_key_values=cache).logits
        assert torch.equal(again, want)  # the copies moved, not the original


def test_a_pruned_cache_is_still_one_of_its_class() -> None:
    model = random_llava()
    with patch(model, best_of(keep=KEEP)), torch.no_grad():
        cache, _ = prefill(model, SHORT)
    assert isinstance(cache, DynamicCache)
    assert type(cache).__name__ == "DynamicCache"
    alive = weakref.ref(cache)
    del cache
    assert alive() is None  # no reference cycle keeps its memory


@torch.no_grad()
def test_a_row_that_has_ended_may_stand_still() -> None:
    """Loops that pad ended rows count their positions by the mask."""
    model = random_llava()
    with patch(model, best_of(keep=KEEP)):
        cache, mask = prefill(model, SHORT, LONG)
        for _ in range(3):
            mask = longer(mask, [1], [0])
            where = (mask.cumsum(1) - 1)[:, -1:]
            step = torch.tensor([[5], [0]])
            out = model(
                input_ids=step, attention_mask=mask, position_ids=where, past_key_values=cache
            ).logits
        alone, _ = prefill(model, SHORT)
        for _ in range(3):
            want = model(input_ids=step[:1], past_key_values=alone).logits
    torch.testing.assert_close(out[:1], want, atol=1e-4, rtol=1e-4)


def test_static_cache_without_padding() -> None:
    model, images = random_llava(), pixels(1)
    with patch(model, best_of(keep=KEEP)):
        want = generate(model, batch(SHORT), images)
        options = {"cache_implementation": "static", "disable_compile": True}
        out = generate(model, batch(SHORT), images, **options)
        assert torch.equal(out.sequences, want.sequences)


def test_a_reset_cache_has_forgotten_the_pruning() -> None:
    model, images = random_llava(), pixels(1)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with patch(model, best_of(keep=KEEP)):
        want = generate(model, batch(SHORT), images)
        for _ in range(2):
            out = generate(model, batch(SHORT), images, past_key_values=cache, disable_compile=True)
            assert torch.equal(out.sequences, want.sequences)
            cache.reset()


@torch.no_grad()
@pytest.mark.parametrize("pruned", [True, False])
def test_a_decode_step_does_not_ask_a_static_cache_for_its_length(
    pruned: bool, monkeypatch
) -> None:
    """It counts on the device, so that each answer is a synchronisation, and breaks a graph."""
    model, words = random_llava(), SHORT if pruned else TEXT
    cache: Any = StaticCache(config=model.config.text_config, max_cache_len=64)
    given = {"pixel_values": pixels(1)} if pruned else {}
    with patch(model, best_of(keep=KEEP)) as handle:
        model(**batch(words), **given, past_key_values=cache)
        monkeypatch.setattr("consensusdrop_kernels.hf.cache._may_look", lambda t: False)
        monkeypatch.setattr(type(cache), "get_seq_length", lambda *args: pytest.fail("asked"))
        step = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
        assert (state_of(cache) is not None) == pruned
        handle._hooks._before_outer(
            model.model, (), step | {"position_ids": torch.tensor([[len(words)]])}
        )


@pytest.mark.parametrize("beams", [1, 2])
def test_modules_that_accelerate_dispatches(beams: int) -> None:
    """Weights that come and go with each call, inputs that are rebuilt on their way."""
    accelerate = pytest.importorskip("accelerate")
    model, images = random_llava(), pixels(3)
    with patch(model, best_of(keep=KEEP)):
        want = generate(model, batch(TWO, SHORT), images, num_beams=beams)
    spread = accelerate.cpu_offload(random_llava(), execution_device=torch.device("cpu"))
    with patch(spread, best_of(keep=KEEP)):
        out = generate(spread, batch(TWO, SHORT), images, num_beams=beams)
    assert torch.equal(out.sequences, want.sequences)


def test_budget_of_everything_is_the_unpatched_model() -> None:
    model, images = random_llava(), pixels(3)
    inputs = batch(TWO, TEXT, SHORT)
    before = generate(model, inputs, images)
    for method in (
        best_of(keep=1.0),
        best_of(keep=TOKENS - 3, contextual=3),
        Random(keep=TOKENS),
    ):
        with patch(model, method):
            after = generate(model, inputs, images)
        assert torch.equal(before.sequences, after.sequences)
        assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))
