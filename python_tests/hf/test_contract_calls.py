"""The ways in which a patched model of any family is called, beyond plain batches."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from consensusdrop_kernels.hf import hooks, patch
from consensusdrop_kernels.methods import ConsensusDrop

from .families import FAMILIES, Family, Inputs
from .test_contract import GREEDY, STEPS, placeholders

#: One family of each kind: plain, tiles, spatial positions, early features, whole masks, shuffled.
COMPILED = (
    "llava-llama", "llava_next-images", "qwen2_5_vl-images", "qwen3_vl-images", "gemma3",
    "internvl",
)  # fmt: skip
if Version(transformers.__version__) >= Version("5.18"):  # what compiles is the same
    COMPILED = ("llava-llama", "qwen3_vl-images")

pytestmark = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def method(family: Family, **options: Any) -> ConsensusDrop:
    return ConsensusDrop(keep=family.keep, **options)


@torch.no_grad()
@pytest.mark.parametrize("forgotten", ["attention_mask", "position_ids"])
def test_control_uncorrected_decoding_is_wrong(
    family: Family, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hooks correct in every step matters: left as it is, the logits are others."""
    batch = family.join(family.samples())
    right, wrong = [], []
    correct = hooks.continue_call

    def forget(kwargs: dict[str, Any], state: Any, cache: Any) -> None:
        given = kwargs.get(forgotten)
        correct(kwargs, state, cache)
        if forgotten == "position_ids":  # as counted from the entries of the cache
            new = kwargs["input_ids"].shape[1]
            held = cache.get_seq_length() + torch.arange(new)
            kwargs[forgotten] = held.expand_as(kwargs[forgotten])
        else:
            kwargs[forgotten] = given

    for logits, uncorrected in ((right, False), (wrong, True)):
        with monkeypatch.context() as m:
            if uncorrected:
                m.setattr(hooks, "continue_call", forget)
            with patch(family.model(), method(family)) as handle:
                try:
                    out = handle._model.generate(**batch, **GREEDY)
                except (RuntimeError, IndexError, ValueError):
                    return  # a mask of another length may be refused by the attention itself
                logits += out.logits[1:]
                last = handle.last
                lost = [b - a for b, a in zip(last.tokens_before, last.tokens_after, strict=True)]
    if forgotten == "attention_mask" and len(set(lost)) == 1:
        pytest.skip("every row lost as many tokens: the first columns of the mask fit by chance")
    assert max(float((a - b).abs().max()) for a, b in zip(right, wrong, strict=True)) > 1e-3


@torch.no_grad()
def test_a_row_of_text_beside_a_row_with_pictures(family: Family) -> None:
    model = family.model()
    sample = family.samples()[0]
    length = sample["input_ids"].shape[1]
    here = placeholders(family, sample["input_ids"])
    words = sample["input_ids"][:, ~here[0]][:, :4]
    text = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    both: Inputs = {}
    for name, value in family.join([sample]).items():
        both[name] = value
        if value.shape == sample["input_ids"].shape:
            text.setdefault(name, torch.zeros_like(words))
            padded = torch.nn.functional.pad(text[name], (length - words.shape[1], 0), value=0)
            both[name] = torch.cat([value, padded])
    with patch(model, method(family)):
        whole = model.generate(**both, **GREEDY)
        alone = model.generate(**sample, **GREEDY)
        plain = model.generate(**text, **GREEDY)
    logits = torch.stack(whole.logits)
    torch.testing.assert_close(logits[:, :1], torch.stack(alone.logits), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits[:, 1:], torch.stack(plain.logits), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_hand_written_loop(family: Family) -> None:
    """`model(...)` and its cache, positions left to the model."""
    model = family.model()
    for sample in family.samples():
        with patch(model, method(family)):
            want = model.generate(**sample, **GREEDY)
            out = model(**sample, use_cache=True, logits_to_keep=1)
            for step in range(1, STEPS):
                word = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=word, past_key_values=out.past_key_values)
                torch.testing.assert_close(
                    out.logits[:, -1], want.logits[step], atol=2e-4, rtol=1e-4
                )


@torch.no_grad()
def test_prompt_lookup_decoding_gives_the_greedy_tokens(family: Family) -> None:
    model = family.model()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    lookup = {"prompt_lookup_num_tokens": 2}
    for sample in family.samples():
        try:
            model.generate(**sample, **lookup, **options)
        except (ValueError, RuntimeError, IndexError) as error:
            pytest.skip(f"the stock model can't: {error}")
        with patch(model, method(family)):
            want = model.generate(**sample, **options)
            got = model.generate(**sample, **lookup, **options)
        assert torch.equal(got, want)


@torch.no_grad()
def test_sampling_draws_from_the_shorter_sequence(family: Family) -> None:
    """The same draws from the same logits, several answers to each prompt."""
    model = family.model()
    batch = family.join(family.samples())
    answers = 2 if family.beams else 1  # more than the stock model can
    options: dict[str, Any] = {
        "max_new_tokens": 3, "do_sample": True, "num_return_sequences": answers,
    }  # fmt: skip
    with patch(model, method(family)):
        torch.manual_seed(0)
        cached = model.generate(**batch, **options)
        torch.manual_seed(0)
        uncached = model.generate(**batch, use_cache=False, **options)
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_a_compiled_forward_gives_the_same(family: Family) -> None:
    if family.name not in COMPILED:
        pytest.skip("compilation takes seconds: one family of each kind")
    model = family.model()
    batch = family.join(family.samples())
    with patch(model, method(family)):
        want = model(**batch).logits
        torch.compiler.reset()
        got = torch.compile(model, backend="eager")(**batch).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_threads_do_not_mix(family: Family) -> None:
    model = family.model()
    samples = family.samples()
    found: list[Any] = [None] * len(samples)

    def run(at: int) -> None:
        with torch.no_grad():
            found[at] = [
                model.generate(**samples[at], max_new_tokens=3, do_sample=False) for _ in range(3)
            ]

    with patch(model, method(family)):
        want = [model.generate(**s, max_new_tokens=3, do_sample=False) for s in samples]
        threads = [threading.Thread(target=run, args=(at,)) for at in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, right in zip(found, want, strict=True):
        assert mine is not None
        assert all(torch.equal(one, right) for one in mine)
