"""Logits, losses and reports speak of the whole prompt."""

from __future__ import annotations

import pytest
import torch

from consensusdrop_kernels.hf import patch
from consensusdrop_kernels.methods import Method, Random, Selection, Signals

from . import reference
from .best import best_of
from .models import TOKENS, batch, pixels, prompt, random_llava, trained

SHORT, LONG, TEXT = prompt(2, 4, seed=1), prompt(5, 9, seed=2), prompt(7, seed=3)
KEEP = 5


@torch.no_grad()
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_logits_of_every_place(positions: str) -> None:
    """A place that was dropped shows the logits of the last token left before it."""
    plain, model, images = random_llava(), random_llava(), pixels(1)
    ids = torch.tensor([SHORT])
    with patch(model, best_of(keep=KEEP, positions=positions)) as handle:
        got = model(input_ids=ids, pixel_values=images).logits[0]
        keep = handle.last.keep_mask[0]
        tail = model(input_ids=ids, pixel_values=images, logits_to_keep=1).logits
        some = model(input_ids=ids, pixel_values=images, logits_to_keep=torch.tensor([0, 8])).logits
    sequence = reference.pruned(plain, ids[0], images, keep=KEEP, compact=positions == "compact")
    hidden = plain.model.language_model(
        inputs_embeds=sequence.embeds[None], position_ids=sequence.positions[None],
        attention_mask=torch.ones(1, len(sequence.embeds), dtype=torch.long),
    ).last_hidden_state[0]  # fmt: skip
    want = plain.lm_head(hidden)
    assert len(got) == len(SHORT)
    torch.testing.assert_close(got[keep], want, atol=2e-4, rtol=1e-4)
    last = [max(i for i in range(at + 1) if keep[i]) for at in range(len(SHORT))]
    torch.testing.assert_close(got, got[last], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tail[0, 0], want[-1], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(some[0], got[[0, 8]], atol=1e-5, rtol=1e-5)


def test_loss_and_gradient_are_those_of_the_pruned_prompt() -> None:
    """Pruned by the question alone, as it is when the answer is yet to come."""
    plain, model, images, after = random_llava(), random_llava(), pixels(1), 2
    ids = torch.tensor([SHORT])
    labels = supervise(ids, after)
    with patch(model, best_of(keep=KEEP)):
        loss = model(input_ids=ids, pixel_values=images, labels=labels).loss
        loss.backward()
    sequence = reference.pruned(plain, ids[0], images, keep=KEEP, answer=after)
    hidden = plain.model.language_model(inputs_embeds=sequence.embeds[None]).last_hidden_state[0]
    want = torch.nn.functional.cross_entropy(
        plain.lm_head(hidden)[-after - 1 : -1], torch.tensor(SHORT[-after:])
    )
    want.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    for name in ("model.multi_modal_projector.linear_1.weight", "lm_head.weight"):
        got, expected = (dict(m.named_parameters())[name].grad for m in (model, plain))
        assert expected.norm() > 0
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def supervise(ids: torch.Tensor, *answers: int) -> torch.Tensor:
    """Labels of the last tokens, as many per row as given."""
    labels = torch.full_like(ids, -100)
    for row, count in enumerate(answers):
        labels[row, -count:] = ids[row, -count:]
    return labels


@torch.no_grad()
@pytest.mark.parametrize("context", ["visual", "all"])
def test_labelled_tokens_do_not_choose(context: str) -> None:
    """Answers of several lengths, one of them amid the prompt: other words, the same choice."""
    model, images = random_llava(), pixels(2)
    inputs = batch(SHORT, LONG)
    labels = supervise(inputs["input_ids"], 2, 5)
    labels[1, -8:-6] = inputs["input_ids"][1, -8:-6]
    answer = labels != -100
    other = inputs["input_ids"].masked_fill(answer, 7)
    method = best_of(keep=KEEP, alpha=1.0, probe_context=context)
    with patch(model, method) as handle:

        def scores(ids: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
            model(**inputs | {"input_ids": ids}, pixel_values=images, **options)
            return handle.last.scores.textual

        one = scores(inputs["input_ids"], labels=labels)
        two = scores(other, labels=labels.masked_fill(answer, 7))
        assert torch.equal(one, two)
        plain = [scores(ids) for ids in (inputs["input_ids"], other)]
        assert not torch.allclose(plain[0][0], plain[1][0])
        assert not torch.allclose(plain[0][1], plain[1][1])


@torch.no_grad()
def test_without_unlabelled_text_after_the_image() -> None:
    """The text before it asks; with no text at all, the encoder decides."""
    model, images, ids = random_llava(), pixels(1), torch.tensor([SHORT])
    after = len(SHORT) - 3 - TOKENS

    def before_image(ids: torch.Tensor, visual: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return valid & (visual.cumsum(1) == 0)

    with patch(model, best_of(keep=KEEP, query=before_image)) as handle:
        model(input_ids=ids, pixel_values=images)
        want = handle.last.scores.textual
    with patch(model, best_of(keep=KEEP)) as handle:
        model(input_ids=ids, pixel_values=images, labels=supervise(ids, after))
        torch.testing.assert_close(handle.last.scores.textual, want)
        with pytest.warns(UserWarning, match="no text"):
            model(input_ids=ids, pixel_values=images, labels=ids)
        assert handle.last.scores.textual is None


@torch.no_grad()
def test_labels_of_the_last_tokens_alone() -> None:
    model, images, ids = random_llava(), pixels(1), torch.tensor([SHORT])
    with patch(model, best_of(keep=KEEP)) as handle:
        model(input_ids=ids, pixel_values=images, labels=supervise(ids, 2))
        want = handle.last.scores.textual
        tail = {"labels": supervise(ids, 2)[:, -3:], "logits_to_keep": 3}
        assert model(input_ids=ids, pixel_values=images, **tail).logits.shape[1] == 3
        torch.testing.assert_close(handle.last.scores.textual, want)
        with pytest.raises(ValueError, match="labels must be"):
            model(input_ids=ids, pixel_values=images, labels=ids.repeat(1, 2))


@torch.no_grad()
def test_hidden_states_are_those_of_the_tokens_left() -> None:
    model, images, ids = random_llava(), pixels(1), torch.tensor([SHORT])
    with patch(model, best_of(keep=KEEP)):
        out = model(input_ids=ids, pixel_values=images, output_hidden_states=True)
    assert out.logits.shape[1] == len(SHORT)
    assert {h.shape[1] for h in out.hidden_states} == {len(SHORT) - TOKENS + KEEP}


@torch.no_grad()
def test_an_answer_to_be_scored_does_not_choose() -> None:
    """With `logits_to_keep = answer + 1` the choice is the one the prompt alone leads to."""
    model, images, answer = random_llava(), pixels(1), [7, 8, 9]
    ids = torch.tensor([[*SHORT, *answer]])
    with patch(model, best_of(keep=KEEP, alpha=1.0)) as handle:
        model(input_ids=torch.tensor([SHORT]), pixel_values=images)
        prompt_alone = handle.last.selection.index
        out = model(input_ids=ids, pixel_values=images, logits_to_keep=4).logits
        assert torch.equal(handle.last.selection.index, prompt_alone)
        assert out.shape[1] == 4
        model(input_ids=ids, pixel_values=images)
        assert not torch.equal(handle.last.selection.index, prompt_alone)


def test_report() -> None:
    model, images = random_llava(), pixels(2)
    inputs = batch(SHORT, TEXT, LONG)
    method = best_of(keep=KEEP, contextual=2)
    with patch(model, method) as handle:
        assert handle.last is None
        assert handle.method is method
        model.generate(**inputs, pixel_values=images, max_new_tokens=3)
    last, stats = handle.last, handle.stats
    assert last.tokens_before == (TOKENS, 0, TOKENS)
    assert last.tokens_after == (KEEP + 2, 0, KEEP + 2)
    assert last.sample == (0, 2)
    assert last.grid == (4, 4)
    visual = inputs["input_ids"] == 98
    text = inputs["attention_mask"].bool() & ~visual
    assert torch.equal(last.keep_mask & ~visual, text)
    for image, row in enumerate(last.sample):
        kept = (last.keep_mask & visual)[row][visual[row]].nonzero().flatten()
        assert kept.tolist() == last.selection.index[image].sort().values.tolist()
    assert last.selection.tokens.shape == (2, KEEP + 2, 48)
    for score in last.scores:
        assert score.shape == (2, TOKENS)
        assert score.dtype == torch.float32
    # 3 rows, 2 sides, 3 layers, 2 key heads of 12, float32
    per_token = 3 * 2 * 3 * 2 * 12 * 4
    longest = len(LONG)
    assert stats.prefills == 1
    assert (stats.tokens_before, stats.tokens_after) == (2 * TOKENS, 2 * (KEEP + 2))
    assert stats.kv_bytes_before == per_token * longest
    assert stats.kv_bytes_saved == per_token * (TOKENS - KEEP - 2)


@torch.no_grad()
def test_cache_bytes_are_those_of_the_real_cache() -> None:
    model, images = random_llava(), pixels(2)
    with patch(model, best_of(keep=KEEP)) as handle:
        cache = model(**batch(SHORT, LONG), pixel_values=images).past_key_values
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert handle.stats.kv_bytes_after == held
        model(**batch(SHORT, LONG), pixel_values=images, use_cache=False)
        assert handle.stats.kv_bytes_after == held
        assert handle.stats.prefills == 2
    with patch(model, best_of(keep=1.0)) as handle:
        model(**batch(SHORT, LONG), pixel_values=images, use_cache=False)
        assert handle.stats.kv_bytes_before == handle.stats.kv_bytes_after == 0
        model(**batch(SHORT, LONG), pixel_values=images)
        assert handle.stats.kv_bytes_before == handle.stats.kv_bytes_after > held


@torch.no_grad()
def test_scores_need_kept_signals() -> None:
    model, images = random_llava(), pixels(1)
    with patch(model, best_of(keep=KEEP), keep_signals=False) as handle:
        model(**batch(SHORT), pixel_values=images)
        with pytest.raises(RuntimeError, match="keep_signals=True"):
            _ = handle.last.scores
    with patch(model, Random(keep=KEEP)) as handle:
        model(**batch(SHORT), pixel_values=images)
        with pytest.raises(RuntimeError, match="the method uses none"):
            _ = handle.last.scores


@torch.no_grad()
def test_scores_can_be_read_when_everything_is_kept() -> None:
    model, images = random_llava(), pixels(1)
    rows = []
    for keep in (1.0, KEEP):
        with patch(model, best_of(keep=keep)) as handle:
            model(**batch(SHORT), pixel_values=images)
            rows.append(handle.last)
    for every, few in zip(rows[0].scores, rows[1].scores, strict=True):
        assert torch.equal(every, few)
    assert rows[0].tokens_after == (TOKENS,)
    assert rows[0].keep_mask.all()


class EdgeTokens(Method):
    """A user's own method: the first image keeps two tokens, every other one."""

    keep = 2
    needs = frozenset()

    def select(self, signals: Signals) -> Selection:
        rows, tokens = signals.x.shape[:2]
        index = torch.tensor([[0, tokens - 1]] + [[3, -1]] * (rows - 1))
        assign = torch.full((rows, tokens), -1)
        kept = signals.x.gather(1, index.clamp_min(0)[:, :, None].expand(-1, -1, 48))
        kept = kept * (index >= 0)[:, :, None]
        return Selection(kept, index, assign, (index >= 0).float(), padded=True)


@torch.no_grad()
def test_ragged_selections_and_a_users_own_method() -> None:
    plain, model, images = random_llava(), random_llava(), pixels(2)
    with patch(model, EdgeTokens()) as handle:
        out = model.generate(
            **batch(SHORT, LONG), pixel_values=images, max_new_tokens=4, do_sample=False
        )
    assert handle.last.tokens_after == (2, 1)
    for row, (words, kept) in enumerate(((SHORT, [0, TOKENS - 1]), (LONG, [3]))):
        sequence = reference.pruned(
            plain, torch.tensor(words), images[row : row + 1], keep=2, merging=False,
            kept=torch.tensor(kept),
        )  # fmt: skip
        assert out[row, -4:].tolist() == reference.greedy(plain, sequence, 4)[0]


def test_control_tokens_are_no_question_with_a_processor() -> None:
    model, processor = trained()
    start, image = processor.tokenizer.bos_token_id, model.config.image_token_id
    inputs = {
        "input_ids": torch.tensor([[start] + [image] * 196]),
        "pixel_values": torch.zeros(1, 3, 112, 112),
    }
    method = best_of(keep=20)
    with patch(model, method) as handle, torch.no_grad():
        model(**inputs)
        assert handle.last.scores.textual is not None
    with patch(model, method, processor=processor) as handle, torch.no_grad():
        with pytest.warns(UserWarning, match="no text"):
            model(**inputs)
        assert handle.last.scores.textual is None
    with pytest.raises(ValueError, match="must have a tokenizer"):
        patch(model, method, processor=object())
