"""AdaFV: worked examples, and its split against trying every one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consensusdrop_kernels.methods import AdaFV, Signals, Words

from .cases import draw, rows_of


def scene(visual: list[float]) -> Signals:
    """Six tokens and two words in three dimensions, as `test_worked_example` explains."""
    words = Words(torch.eye(3)[None, :2], torch.ones(1, 2, dtype=torch.bool), (True,))
    e1, e2, e3 = torch.eye(3)
    return Signals(
        x=torch.stack([2 * e1, 4 * e1, e2, 2 * e3, 6 * e3, e3])[None],
        grid=(2, 3),
        visual=torch.tensor([visual]),
        metric=torch.stack([e1, e1, e2, e3, e3, -e3])[None],
        words=lambda _: words,
    )


def test_worked_example() -> None:
    """One word points at tokens 0 and 1 (softmax 1/2 each), the other at token 2 alone (1).

    So the text's list is 2 0 1 with .5 .5 behind its first; the encoder's is 5 4 3 2 with .4 .3 .2
    .1. Of four places one is reserved in each; k1 of the other two to the text: 0 * .5, .5 * .3,
    1 * 0: one each, tokens 2 0 and 5 4. Of five, three are free: .5 * .5 < 1 * .3, so two to the
    text, tokens 2 0 1 and 5 4. Without a reserve, four free: 0, 1 * .9, 1.5 * .7, 2 * .4, 0: two
    each again. With half of the places reserved in each there is nothing to split.
    """
    signals = scene([0.0, 0.0, 0.1, 0.2, 0.3, 0.4])
    assert AdaFV(keep=4).select(signals).index.tolist() == [[0, 2, 4, 5]]
    assert AdaFV(keep=5).select(signals).index.tolist() == [[0, 1, 2, 4, 5]]
    assert AdaFV(keep=4, reserve=0.0).select(signals).index.tolist() == [[0, 2, 4, 5]]
    assert AdaFV(keep=2, reserve=0.5).select(signals).index.tolist() == [[2, 5]]
    chosen = AdaFV(keep=4).select(signals)
    assert chosen.assign.tolist() == [[0, -1, 1, -1, 2, 3]]
    assert torch.equal(chosen.tokens, signals.x[:, [0, 2, 4, 5]])


def test_what_both_lists_name_takes_one_place() -> None:
    """Both lists begin with token 2. Two places, none reserved: one to each list, the same token;
    the text's mass 1 is more than the encoder's .4, so its next token, 0, has the other place."""
    signals = scene([0.0, 0.0, 0.4, 0.3, 0.2, 0.1])
    assert AdaFV(keep=2).select(signals).index.tolist() == [[0, 2]]


def test_merging_by_hand() -> None:
    """Keys of 1 and 3 are those of 0 and 4, which become (2+4)/2 and (2+6)/2 long."""
    chosen = AdaFV(keep=4, merge=True).select(scene([0.0, 0.0, 0.1, 0.2, 0.3, 0.4]))
    assert chosen.assign.tolist() == [[0, 0, 1, 2, 2, 3]]
    assert chosen.size.tolist() == [[2.0, 1.0, 2.0, 1.0]]
    assert chosen.tokens[0].norm(dim=1).tolist() == [3.0, 1.0, 4.0, 1.0]
    assert AdaFV(keep=4, merge=True, size_attention=True).size_attention


def test_temperature() -> None:
    """Cosines 1, 1, 0 x 4 of the first word at temperature t: e^(1/t) / (2 e^(1/t) + 4) and
    1 / (2 e^(1/t) + 4); of the second e^(1/t) / (e^(1/t) + 5); the larger of the two counts."""
    textual = AdaFV(keep=2, temperature=0.5).scores(scene([0.1] * 6)).textual
    hot = math.exp(2.0)
    want = [hot / (2 * hot + 4)] * 2 + [hot / (hot + 5)] + [1 / (hot + 5)] * 3
    assert textual[0].tolist() == pytest.approx(want, rel=1e-5)


def tried(visual: list[float], textual: list[float], keep: int, reserve: float) -> list[int]:
    """The paper's rule by trying every split of the places that are not reserved."""
    lists = {}
    for name, scores in (("v", visual), ("t", textual)):
        lists[name] = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    held = math.floor(reserve * keep)
    free = keep - 2 * held

    def mass(name: str, scores: list[float], count: int) -> float:
        return math.fsum(scores[i] for i in lists[name][held : held + count])

    masses = [(mass("t", textual, k), mass("v", visual, free - k)) for k in range(free + 1)]
    products = [t * v for t, v in masses]
    split = products.index(max(products))
    taken = set(lists["t"][: held + split]) | set(lists["v"][: held + free - split])
    of_text, of_encoder = masses[split]
    for token in lists["t" if of_text >= of_encoder else "v"]:
        if len(taken) < keep:
            taken.add(token)
    return sorted(taken)


@given(
    data=st.data(), tokens=st.integers(1, 9),
    reserve=st.sampled_from([0.0, 0.2, 0.25, 0.5]),
)  # fmt: skip
def test_equals_trying_every_split(data: Any, tokens: int, reserve: float) -> None:
    """Two images of few directions and few scores, so that lists and lengths tie and agree."""
    side = st.integers(-1, 1).map(float)

    def vectors(count: int) -> torch.Tensor:
        flat = data.draw(st.lists(side, min_size=2 * count * 2, max_size=2 * count * 2))
        return torch.tensor(flat).view(2, count, 2)

    some = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
    visual = data.draw(st.lists(some, min_size=2 * tokens, max_size=2 * tokens))
    words = Words(vectors(2), torch.ones(2, 2, dtype=torch.bool), (True, True))
    signals = Signals(
        x=vectors(tokens), grid=(1, tokens), visual=torch.tensor(visual).view(2, tokens),
        metric=torch.ones(2, tokens, 1), words=lambda _: words,
    )  # fmt: skip
    keep = data.draw(st.integers(1, tokens))
    # In powers of two, so that equal products are equal however they are summed.
    method = AdaFV(keep=keep, reserve=reserve, temperature=0.5)
    chosen, scores = method.select(signals), method.scores(signals)
    for row in range(2):
        lists = signals.visual[row].tolist(), scores.textual[row].tolist()
        assert chosen.index[row].tolist() == tried(*lists, keep, reserve)


def test_no_question_goes_by_the_encoder() -> None:
    """Of three images the second has no words, whatever stands in its padding."""
    signals = draw(3)
    words = signals.words("after_image")
    valid = words.valid.clone()
    valid[1] = False
    valid[2, :2] = False
    partly = Words(words.embeds, valid, (True, False, True))
    mixed = replace(signals, words=lambda _: partly)
    method = AdaFV(keep=5)
    with pytest.warns(UserWarning, match="no text: its image goes by the encoder alone"):
        chosen = method.select(mixed)
    scores = method.scores(mixed)
    assert chosen.index[1].tolist() == scores.visual[1].topk(5).indices.sort().values.tolist()
    assert torch.equal(chosen.index[0], method.select(rows_of(signals, [0])).index[0])
    short = Words(words.embeds[2:, 2:], valid[2:, 2:], (True,))
    alone = replace(rows_of(signals, [2]), words=lambda _: short)
    assert torch.equal(chosen.index[2], method.select(alone).index[0])
    nobody = Words(words.embeds, torch.zeros_like(valid), (False,) * 3)
    assert method.scores(replace(signals, words=lambda _: nobody)).textual is None


def test_scores_rank_as_chosen() -> None:
    """In the worked example of five, lists 2 0 1 3 4 5 and 5 4 3 2 0 1, all but 3 are kept."""
    fused = AdaFV(keep=5).scores(scene([0.0, 0.0, 0.1, 0.2, 0.3, 0.4])).fused
    want = [1 + 1 / 2, 1 + 1 / 3, 1 + 1, 1 / 3, 1 + 1 / 2, 1 + 1]
    assert fused[0].tolist() == pytest.approx(want)
    signals = draw(3)
    valid = torch.ones(3, 24, dtype=torch.bool)
    valid[1, 9:] = False
    signals = replace(signals, valid=valid)
    method = AdaFV(keep=6)
    scores, chosen = method.scores(signals), method.select(signals)
    assert torch.equal(scores.fused.topk(6).indices.sort().values, chosen.index)
    assert (scores.fused[1, 9:] == -torch.inf).all()
    assert (scores.textual[1, 9:] == 0).all()
    torch.testing.assert_close(scores.textual.sum(1) > 0.99, torch.ones(3, dtype=torch.bool))


def test_query_is_passed_on() -> None:
    asked: list[Any] = []
    signals = draw(1)
    words = signals.words("after_image")

    def find(query: Any) -> Words:
        asked.append(query)
        return words

    AdaFV(keep=3, query="all_text").select(replace(signals, words=find))
    AdaFV(keep=3).select(replace(signals, words=find))
    assert asked == ["all_text", "after_image"]


def test_crops_share_one_softmax() -> None:
    """A crop that the words do not mean gets no place of the text's, however alike within."""
    signals = scene([0.2] * 6)
    scores = AdaFV(keep=3).scores(replace(signals, crops=((1, 3), (1, 3))))
    assert scores.textual[0, :3].sum() == pytest.approx(2.0)
    assert scores.textual[0, 3:].sum() == pytest.approx(0.0, abs=1e-6)
