"""Methods on bare tensors: options, budgets, worked examples."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from consensusdrop_kernels.methods import ConsensusDrop, Method, Random, Signals, TextProbe


def signals(rows: int = 2, tokens: int = 12, *, seed: int = 0, weights: Any = None) -> Signals:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    weight = torch.ones(rows, 3) if weights is None else torch.tensor(weights)
    q, k = normal(rows, 4, 3, 8), normal(rows, 2, tokens, 8)

    def probe(**options: Any) -> TextProbe:
        assert {"context", "layer", "query", "rotary"} <= set(options)
        return TextProbe(q, k, 8**-0.5, None, weight, tuple((weight.sum(1) > 0).tolist()))

    return Signals(
        x=normal(rows, tokens, 6),
        grid=(3, tokens // 3),
        q_vis=normal(rows, 2, 1, 4),
        k_vis=normal(rows, 2, tokens + 1, 4),
        prefix=1,
        scale_vis=0.5,
        probe=probe,
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 0}, "keep must be"),
        ({"keep": -3}, "keep must be"),
        ({"keep": 0.0}, "keep must be"),
        ({"keep": 1.5}, "keep must be"),
        ({"keep": float("nan")}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"keep": "all"}, "keep must be"),
        ({"alpha": 1.1}, r"alpha must be a number in 0..1, got 1.1"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"fusion": "mean"}, "fusion must be one of rank, rrf"),
        ({"probe_layer": -1}, "probe_layer must be"),
        ({"rows": "min"}, "rows must be one of max, mean, last"),
        ({"rotary": 1}, "rotary must be True or False"),
        ({"probe_context": "text"}, "probe_context must be one of"),
        ({"contextual": -1}, "contextual must be"),
        ({"threshold": -1.5}, "threshold must be"),
        ({"blend": 2}, "blend must be"),
        ({"positions": "same"}, "positions must be one of None, compact, original"),
        ({"budget_scope": "frame"}, "budget_scope must be one of image, crop"),
        ({"query": "last_turn"}, "query must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ConsensusDrop(**({"keep": 4} | options))


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"seed": -1}, {"seed": 0.5}, {"positions": "same"}]
)
def test_options_of_random_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Random(**({"keep": 4} | options))


def test_a_method_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ConsensusDrop(keep=4).keep = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("keep", "tokens", "want"),
    [(7, 576, 7), (576, 576, 576), (0.25, 576, 144), (0.25, 196, 49), (1.0, 9, 9), (1e-6, 9, 1)],
)
def test_budgets(keep: int | float, tokens: int, want: int) -> None:
    assert ConsensusDrop(keep=keep).budget(tokens) == want
    assert Random(keep=keep).budget(tokens) == want
    if want + 3 <= tokens:
        assert ConsensusDrop(keep=keep, contextual=3).budget(tokens) == want + 3


def test_needs() -> None:
    assert ConsensusDrop(keep=1).needs == {"encoder", "text"}
    assert ConsensusDrop(keep=1, alpha=0).needs == {"encoder"}
    assert ConsensusDrop(keep=1, alpha=0, probe_layer=2).probed_layer is None
    assert ConsensusDrop(keep=1, probe_layer=2).probed_layer == 2
    assert Random(keep=1).needs == frozenset()


@pytest.mark.parametrize("rows", ["max", "mean", "last"])
@pytest.mark.parametrize("fusion", ["rank", "rrf", "sum", "zscore", "product", "max"])
def test_selection_follows_its_own_scores(fusion: str, rows: str) -> None:
    """The fused op and the separate ones behind `scores` agree on what is best."""
    method = ConsensusDrop(keep=4, fusion=fusion, rows=rows, alpha=0.4, diversity=0.0)
    given = signals()
    chosen, scores = method.select(given), method.scores(given)
    best = scores.fused.topk(4, dim=1).values  # values, since ranks can tie
    torch.testing.assert_close(scores.fused.gather(1, chosen.index).sort(1, True).values, best)
    assert chosen.tokens.shape == (2, 4, 6)
    assert torch.equal(chosen.size.sum(1), torch.full((2,), 12.0))
    whole = (chosen.size[:, :, None] * chosen.tokens).sum(1)
    torch.testing.assert_close(whole, given.x.sum(1), atol=1e-5, rtol=1e-5)


def test_last_row_is_the_last_row() -> None:
    given = signals()
    last = ConsensusDrop(keep=4, rows="last").scores(given).textual
    probe = given.probe(layer=0, rotary=True, context="visual", query="after_image")
    k = probe.k.repeat_interleave(2, 1)
    maps = (probe.q[:, :, -1:] @ k.transpose(2, 3) * probe.scale).softmax(-1)
    torch.testing.assert_close(last, maps.mean((1, 2)))


def test_worked_example() -> None:
    """Four tokens, one head of width 1, scores that can be ranked by eye.

    Encoder logits 3, 2, 1, 0 (ranks 0, 1, 2, 3); question logits 0, 2, 3, 1 (ranks 3, 1, 0, 2).
    Rank sums at alpha 0.5: 1.5, 1, 1, 2.5; the tie at 1 is no tie for two places: tokens 1, 2 stay.
    Keys 3, 2, 1, 0 give cosine 1 to the kept ones (token 3, a zero key, 0 to both): lower slot.
    So slot 0 is the mean of tokens 0, 1, 3 and slot 1 is token 2.
    """
    probe = TextProbe(
        torch.ones(1, 1, 1, 1), torch.tensor([0.0, 2.0, 3.0, 1.0]).view(1, 1, 4, 1), 1.0, None,
        torch.ones(1, 1), (True,),
    )  # fmt: skip
    given = Signals(
        x=torch.tensor([[[3.0], [6.0], [5.0], [9.0]]]),
        grid=(2, 2),
        q_vis=torch.ones(1, 1, 1, 1),
        k_vis=torch.tensor([3.0, 2.0, 1.0, 0.0]).view(1, 1, 4, 1),
        probe=lambda **_: probe,
    )
    chosen = ConsensusDrop(keep=2).select(given)
    assert chosen.index.tolist() == [[1, 2]]
    assert chosen.assign.tolist() == [[0, 0, 1, 0]]
    assert chosen.size.tolist() == [[3.0, 1.0]]
    assert chosen.tokens.flatten().tolist() == [6.0, 5.0]
    encoder_alone = ConsensusDrop(keep=2, alpha=0.0).select(given)
    assert encoder_alone.index.tolist() == [[0, 1]]
    question_alone = ConsensusDrop(keep=2, alpha=1.0).select(given)
    assert question_alone.index.tolist() == [[1, 2]]
    unmerged = ConsensusDrop(keep=2, blend=0.0).select(given)
    assert unmerged.tokens.flatten().tolist() == [6.0, 5.0]
    strict = ConsensusDrop(keep=2, threshold=0.5).select(given)
    assert strict.assign.tolist() == [[0, 0, 1, -1]]
    assert strict.tokens.flatten().tolist() == [4.5, 5.0]


def test_images_without_a_question_go_by_the_encoder() -> None:
    given = signals(rows=3, weights=[[1.0, 1, 0], [0, 0, 0], [0, 1, 1]])
    method = ConsensusDrop(keep=3, alpha=0.7, diversity=0.0)
    with pytest.warns(UserWarning, match="no text"):
        chosen = method.select(given)
    blind = replace(method, alpha=0.0).select(given)
    assert torch.equal(chosen.index[1], blind.index[1])
    assert torch.equal(chosen.tokens[1], blind.tokens[1])
    scores = method.scores(given)
    assert torch.equal(chosen.index, scores.fused.topk(3, dim=1).indices.sort(1).values)
    assert torch.equal(scores.fused[1], scores.visual[1])


def test_permuting_the_batch_permutes_the_choice() -> None:
    given, order = signals(rows=4), torch.tensor([2, 0, 3, 1])
    method = ConsensusDrop(keep=3, contextual=2)
    probe = given.probe(layer=0, rotary=True, context="visual", query="after_image")
    moved = TextProbe(
        probe.q[order], probe.k[order], probe.scale, None, probe.weight[order], (True,) * 4
    )
    one = method.select(given)
    two = method.select(replace(given.rows(order), probe=lambda **_: moved))
    assert torch.equal(one.index[order], two.index)
    assert torch.equal(one.tokens[order], two.tokens)


def test_random() -> None:
    given = signals(rows=3)
    chosen = Random(keep=5, seed=1).select(given)
    again = Random(keep=5, seed=1).select(signals(rows=1, seed=9))
    assert torch.equal(chosen.index[:1], again.index)
    assert torch.equal(chosen.index, chosen.index.sort(1).values)
    assert len(set(chosen.index[0].tolist())) == 5
    assert torch.equal(chosen.tokens, given.x[:, chosen.index[0]])
    assert (chosen.size == 1).all()
    for token, slot in enumerate(chosen.assign[0].tolist()):
        assert (slot == -1) == (token not in chosen.index[0])
        assert slot == -1 or chosen.index[0, slot] == token
    draws = {tuple(Random(keep=5, seed=s).select(given).index[0].tolist()) for s in range(20)}
    assert len(draws) > 10
    with pytest.raises(ValueError, match="equal token counts"):
        Random(keep=5).select(replace(given, valid=torch.ones(3, 12, dtype=torch.bool)))


def test_padding_tokens_are_never_kept() -> None:
    given = signals()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 3:] = False
    chosen = ConsensusDrop(keep=4).select(replace(given, valid=valid))
    assert chosen.padded
    assert (chosen.index[1] < 3).all()
    assert chosen.index[1].tolist().count(-1) == 1
    scores = ConsensusDrop(keep=4).scores(replace(given, valid=valid))
    assert (scores.fused[1, 3:] == -torch.inf).all()
    assert (scores.visual[1, 3:] == 0).all()


def test_identity_and_missing_scores() -> None:
    given = signals()
    same = ConsensusDrop(keep=12).identity(given)
    assert same.tokens is given.x
    assert same.index.tolist() == same.assign.tolist() == [list(range(12))] * 2
    with pytest.raises(RuntimeError, match="there are no scores"):
        _ = same.scores
    assert Random(keep=1).scores(given) is None


def test_a_method_must_select() -> None:
    class Half(Method):
        keep = 0.5

    with pytest.raises(TypeError, match="select"):
        Half()  # type: ignore[abstract]


def test_methods_need_no_transformers() -> None:
    code = (
        "import sys, consensusdrop_kernels.methods; "
        "print([m for m in ('transformers', 'triton') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
