"""Every family keeps the same promises: see `contract.py` for what is computed beside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import ConsensusDrop, Random

from .best import best_of
from .contract import Unpatched, choices, pruned
from .families import FAMILIES, Family

STEPS = 5
GREEDY: dict[str, Any] = {
    "max_new_tokens": STEPS, "do_sample": False, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip

pytestmark = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def placeholders(family: Family, ids: torch.Tensor) -> torch.Tensor:
    """Which tokens of a prompt are pictures', by the ids the model itself looks for."""
    config = family.model().config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    known = {getattr(config, name, None) for name in names} - {None}
    return torch.isin(ids, torch.tensor(sorted(known)))


def wanted(
    family: Family, model: Any, handle: Any, row: int, total: int, *, merged: bool = True,
    weighed: bool = False,
) -> tuple[list[int], torch.Tensor]:  # fmt: skip
    """Tokens and logits of one prompt of the last prefill, without our hooks."""
    sample = family.samples()[row]
    plain = Unpatched(model)
    sequence = plain.inputs(sample)
    shift = total - sample["input_ids"].shape[1]
    chosen = choices(handle.last, row, shift)
    compact = handle.method.positions != "original" and not family.spatial
    here = placeholders(family, sample["input_ids"][0])
    return plain.greedy(pruned(sequence, chosen, here, compact, merged, weighed), STEPS)


def positions(family: Family) -> tuple[str | None, ...]:
    return (None,) if family.spatial else ("compact", "original")


def attend_by(model: Any, attention: str) -> None:
    if attention == "sdpa" and not Unpatched(model).text._supports_sdpa:
        pytest.skip("this decoder has no sdpa in this version of transformers")
    model.set_attn_implementation(attention)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["consensus", "random"])
def test_a_padded_batch_is_what_each_prompt_is_alone(family: Family, kind: str) -> None:
    """Left padding, different counts: the tokens and logits of an uncached loop over each."""
    plain = family.model()
    for where in positions(family):
        method = (
            best_of(keep=family.keep, positions=where)
            if kind == "consensus"
            else Random(keep=family.keep, positions=where)
        )
        model = family.model()
        batch = family.join(family.samples())
        length = batch["input_ids"].shape[1]
        with patch(model, method) as handle:
            out = model.generate(**batch, **GREEDY)
            assert handle.stats.tokens_after < handle.stats.tokens_before
            logits = torch.stack(out.logits, 1)
            for row in range(len(batch["input_ids"])):
                ids, want = wanted(
                    family, plain, handle, row, length, merged=kind == "consensus"
                )  # fmt: skip
                torch.testing.assert_close(logits[row], want, atol=2e-4, rtol=1e-4)
                assert out.sequences[row, length:].tolist() == ids
        assert torch.equal(out.sequences[:, :length], batch["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merged_tokens_are_attended_to_by_their_sizes(family: Family, attention: str) -> None:
    """Through the prefill and every step, with padding and several images; without a cache too."""
    plain, model = family.model(), family.model()
    attend_by(model, attention)
    attend_by(plain, attention)  # of a soft cap, sdpa knows nothing
    batch = family.join(family.samples())
    length = batch["input_ids"].shape[1]
    with patch(model, ConsensusDrop(keep=family.keep, size_attention=True)) as handle:
        out = model.generate(**batch, **GREEDY)
        for row in range(len(batch["input_ids"])):
            ids, want = wanted(family, plain, handle, row, length, weighed=True)
            got = torch.stack(out.logits, 1)[row]
            torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
            assert out.sequences[row, length:].tolist() == ids
        uncached = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, use_cache=False)
    assert torch.equal(uncached, out.sequences)


@torch.no_grad()
def test_the_saliency_of_a_prompt_does_not_depend_on_its_batch(family: Family) -> None:
    samples = family.samples()
    batch = family.join(samples)
    model = family.model()
    with patch(model, ConsensusDrop(keep=family.keep)) as handle:
        model.generate(**batch, max_new_tokens=1, do_sample=False)
        whole = handle.last
        for row, sample in enumerate(samples):
            model.generate(**sample, max_new_tokens=1, do_sample=False)
            alone = handle.last
            images = [i for i, s in enumerate(whole.sample) if s == row]
            for mine, image in enumerate(images):
                count = len(whole.columns[image])
                for name in ("visual", "textual"):
                    one, other = getattr(alone.scores, name), getattr(whole.scores, name)
                    torch.testing.assert_close(
                        one[mine, :count], other[image, :count], atol=1e-5, rtol=1e-4
                    )


@torch.no_grad()
def test_beams_and_several_answers(family: Family) -> None:
    """A batch with beams is each prompt with beams."""
    if not family.beams:
        pytest.skip("the stock model can't")
    model = family.model()
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    samples = family.samples()
    batch = family.join(samples)
    with patch(model, ConsensusDrop(keep=family.keep)):
        whole = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        for row, sample in enumerate(samples):
            alone = model.generate(**sample, **options)[:, sample["input_ids"].shape[1] :]
            assert torch.equal(whole[2 * row : 2 * row + 2], alone)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_cache_the_tokens_are_the_same(family: Family, attention: str) -> None:
    model = family.model()
    attend_by(model, attention)
    batch = family.join(family.samples())
    with patch(model, ConsensusDrop(keep=family.keep)):
        cached = model.generate(**batch, max_new_tokens=STEPS, do_sample=False)
        uncached = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_removed_it_is_bit_for_bit_what_it_was(family: Family) -> None:
    model = family.model()
    before = copy.deepcopy(model.state_dict())
    batch = family.join(family.samples())
    want = model(**batch).logits
    handle = patch(model, ConsensusDrop(keep=family.keep))
    assert model(**batch).logits.shape == want.shape
    handle.remove()
    assert torch.equal(model(**batch).logits, want)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_with_every_token_kept_nothing_changes(family: Family) -> None:
    model = family.model()
    batch = family.join(family.samples())
    want = model.generate(**batch, **GREEDY)
    with patch(model, ConsensusDrop(keep=1.0)):
        got = model.generate(**batch, **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
    )


def test_the_loss_is_that_of_the_shorter_sequence(family: Family) -> None:
    """Of the last two tokens of each prompt alone."""
    model, plain = family.model(), Unpatched(family.model())
    for sample in family.samples():
        labels = torch.full_like(sample["input_ids"], -100)
        labels[:, -2:] = sample["input_ids"][:, -2:]
        with patch(model, best_of(keep=family.keep)) as handle:
            out = model(**sample, labels=labels)
            sequence, chosen = plain.inputs(sample), choices(handle.last, 0, 0)
        here = placeholders(family, sample["input_ids"][0])
        short = pruned(sequence, chosen, here, not family.spatial)
        logits = plain.model.get_output_embeddings()(plain.hidden(short))
        want = torch.nn.functional.cross_entropy(logits[-3:-1], labels[0, -2:])
        assert out.logits.shape[1] == sample["input_ids"].shape[1]
        torch.testing.assert_close(out.loss, want, atol=1e-4, rtol=1e-4)
