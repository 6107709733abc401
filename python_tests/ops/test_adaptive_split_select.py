"""`adaptive_split_select`: the very split that trying all of them finds, and distinct tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import consensusdrop_kernels as cdrop

from .cases import Args, generator, overload, random_mask, scores
from .checks_more import check_split

op = overload("adaptive_split_select")
pytestmark = pytest.mark.usefixtures("poison")


def lists(batch: int, tokens: int, keep: int, **more) -> Args:
    both = {"visual": scores(batch, tokens), "textual": scores(batch, tokens, seed=1)}
    return {**both, "keep": keep, **more}


def check(backend, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    return check_split(op, backend.place_all(args))


@pytest.mark.parametrize("tokens", [1, 2, 33, 257, 576])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("reserve", [0.0, 0.25, 0.29, 0.5])
def test_shapes(backend, tokens, share, reserve):
    check(backend, lists(2, tokens, max(1, int(share * tokens)), reserve=reserve))


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches(backend, batch):
    check(backend, lists(batch, 40, 12))


score = st.sampled_from([0.0, -0.0, 0.125, 0.25, 0.5, 1.0, 3.0, math.nan])


@given(data=st.data(), tokens=st.integers(1, 14), reserve=st.sampled_from([0.0, 0.2, 0.25, 0.5]))
def test_equals_trying_every_split(data, tokens, reserve):
    """Few values, so that lists, products and masses tie; NaN and masks among them."""
    draw = lambda kind: torch.tensor(  # noqa: E731
        [data.draw(st.lists(kind, min_size=tokens, max_size=tokens)) for _ in range(2)]
    )
    args = {"visual": draw(score), "textual": draw(score), "valid": draw(st.booleans())}
    args |= {"keep": data.draw(st.integers(1, tokens)), "reserve": reserve}
    for name in [n for n in ("reference", "cpu") if cdrop.backends()[n].available]:
        with cdrop.use_backend(name):
            index, split = check_split(op, args)
        for b, row in enumerate(index.tolist()):
            budget = min(args["keep"], int(args["valid"][b].sum()))
            chosen = [i for i in row if i >= 0]
            assert len(set(chosen)) == len(chosen) == budget
            assert 0 <= int(split[b]) <= budget - 2 * math.floor(reserve * budget)


@pytest.mark.parametrize("seed", range(5))
def test_real_scores(backend, seed):
    g = generator(seed)
    visual, textual = (torch.rand(3, 200, generator=g).pow(8) for _ in range(2))
    check(backend, {"visual": visual, "textual": textual, "keep": 50})


def test_agreeing_lists_are_filled_up(backend):
    """All duplicates: both parts are the same tokens, the list goes on to the budget."""
    same = scores(1, 30)
    index, _ = check(backend, {"visual": same, "textual": same, "keep": 12})
    assert set(index[0].tolist()) == set(same[0].topk(12).indices.tolist())


def test_masked_samples(backend):
    valid = random_mask((4, 40), 1, 0.4)
    valid[1], valid[2] = False, torch.arange(40) < 3
    index, split = check(backend, lists(4, 40, 12, valid=valid))
    assert (index[1] == -1).all()
    assert index[2].tolist() == [0, 1, 2] + [-1] * 9


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -1.0, 0.0])
def test_odd_values(backend, value):
    args = lists(2, 30, 10)
    args["visual"][0, ::3] = value
    args["textual"][1, 1::4] = value
    check(backend, args)
    check(backend, {**args, "visual": torch.full((2, 30), value)})


def test_strided_scores(backend):
    args = lists(2, 30, 10)
    check(
        backend, {**args, "visual": torch.rand(30, 2).t(), "textual": scores(1, 30).expand(2, -1)}
    )


def test_by_hand():
    """Of 4 places one is reserved in each list; masses after it: visual .3 .2, textual .2 .2.
    k1 = 1 has .2 * .3, the others 0: textual takes 0, 1 and visual 5, 4."""
    visual = torch.tensor([[0.0, 0.0, 0.1, 0.2, 0.3, 0.4]])
    textual = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1, 0.0]])
    index, split = cdrop.adaptive_split_select(visual, textual, 4)
    assert index.tolist() == [[0, 1, 4, 5]]
    assert split.tolist() == [1]
    # Now both lists begin with tokens 5, 4: the two freed places go on in the heavier, visual.
    textual = torch.tensor([[0.1, 0.1, 0.0, 0.0, 0.2, 0.4]])
    index, split = cdrop.adaptive_split_select(visual, textual, 4)
    assert index.tolist() == [[2, 3, 4, 5]]
    assert split.tolist() == [1]
