"""`greedy_diverse_select`: every choice is the best there was, and the corners of the rules."""

from __future__ import annotations

import math

import pytest
import torch

import consensusdrop_kernels as cdrop

from . import oracle_more
from .cases import LAYOUTS, Args, diverse_case, generator, overload, random_mask
from .checks import assert_bitwise
from .checks_more import check_diverse

op = overload("greedy_diverse_select")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OBJECTIVES = ("maxmin", "dpp")

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.parametrize("objective", OBJECTIVES),
]


def check(backend, args: Args) -> torch.Tensor:
    return check_diverse(op, backend.place_all(args))


def worth(batch: int, tokens: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=generator(seed))


@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 257])
@pytest.mark.parametrize("given", [False, True])
def test_shapes(backend, objective, tokens, given):
    keep = max(1, min(tokens - 1, 12))
    relevance = worth(2, tokens) if given else None
    check(backend, diverse_case(2, tokens, keep, 24, objective=objective, relevance=relevance))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "expanded"])
def test_layouts_and_dtypes(backend, objective, dtype, layout):
    check(backend, diverse_case(2, 50, 9, 37, dtype=dtype, layout=layout, objective=objective))


@pytest.mark.parametrize("width", [1, 2, 16, 100, 1000])
def test_widths(backend, objective, width):
    keep = 6 if objective == "maxmin" else min(width, 6)  # no further than the rank goes
    check(backend, diverse_case(1, 40, keep, width, objective=objective))


def test_a_last_stride_other_than_one_is_taken(backend, objective):
    args = diverse_case(2, 30, 7, objective=objective)
    strided = args["features"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_bitwise(check(backend, {**args, "features": strided}), check(backend, args))


@pytest.mark.parametrize("batch", [0, 3])
def test_batches(backend, objective, batch):
    """Each sample as if it were alone."""
    args = diverse_case(batch, 70, 11, objective=objective)
    out = check(backend, args)
    for b in range(batch):
        alone = {**args, "features": args["features"][b : b + 1]}
        assert_bitwise(op(**backend.place_all(alone)), out[b : b + 1])


def test_masks(backend, objective):
    valid = random_mask((4, 70), 1, 0.6)
    valid[1], valid[2] = False, torch.arange(70) < 5
    args = diverse_case(4, 70, 11, valid=valid, relevance=worth(4, 70), objective=objective)
    out = check(backend, args)
    assert (out[1] == -1).all()
    assert out[2].tolist() == [0, 1, 2, 3, 4] + [-1] * 6
    args["features"] = args["features"].masked_fill(~valid[:, :, None], math.nan)
    assert_bitwise(op(**backend.place_all(args)), out)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e38])
def test_only_directions_matter(backend, objective, size):
    args = diverse_case(2, 50, 9, objective=objective)
    out = op(**backend.place_all(args))
    # By a power of two the cosines are the same to the bit.
    scaled = args["features"] * 2.0 ** round(math.log2(size))
    assert_bitwise(op(**backend.place_all({**args, "features": scaled})), out)
    mixed = args["features"] * torch.logspace(-18, 18, 50)[:, None]
    check(backend, {**args, "features": mixed})


def test_permuting_tokens_permutes_the_choice(backend, objective):
    args = diverse_case(1, 60, 10, relevance=worth(1, 60), objective=objective)
    order = torch.randperm(60, generator=generator(1))
    out = set(op(**backend.place_all(args))[0].tolist())
    moved = {n: args[n][:, order] for n in ("features", "relevance")}
    found = op(**backend.place_all({**args, **moved}))[0].cpu()
    assert set(order[found].tolist()) == out


def test_keeping_all(backend, objective):
    out = op(**backend.place_all(diverse_case(2, 20, 20, objective=objective)))
    assert out.tolist() == [list(range(20))] * 2


def test_copies_come_last_and_lower_indices_first(backend, objective):
    """Five directions, eight copies of each: the first of each, then the lowest indices."""
    base = torch.linalg.qr(torch.randn(5, 5, generator=generator(2)))[0].repeat(8, 1)
    args = {"features": base[None], "keep": 8, "objective": objective}
    assert op(**backend.place_all(args)).tolist() == [list(range(8))]
    late = torch.cat([base[:1].expand(10, -1), base[1:5]])[None]
    args["features"], args["keep"] = late, 6
    assert op(**backend.place_all(args)).tolist() == [[0, 1, 10, 11, 12, 13]]


def test_all_alike(backend, objective):
    args = {"features": torch.ones(1, 30, 7), "keep": 4, "objective": objective}
    assert op(**backend.place_all(args)).tolist() == [[0, 1, 2, 3]]
    args["relevance"] = torch.zeros(1, 30)
    args["relevance"][0, 20] = 1
    assert op(**backend.place_all(args)).tolist() == [[0, 1, 2, 20]]


def test_past_the_rank_the_relevant_fill_up(backend, objective):
    """Three dimensions, so three gains at most; what dpp adds then is the most relevant."""
    if objective != "dpp":
        return
    args = diverse_case(3, 40, 10, 3, relevance=worth(3, 40) + 0.1, objective="dpp")
    out = op(**backend.place_all(args)).cpu()
    first = op(**backend.place_all({**args, "keep": 3})).cpu()
    for row, spans, r in zip(out.tolist(), first.tolist(), args["relevance"], strict=True):
        best = r.clone()
        best[spans] = -1
        assert sorted(spans + best.topk(7).indices.tolist()) == row


def test_no_relevance_no_gain(backend, objective):
    if objective != "dpp":
        return
    args = diverse_case(1, 40, 5, relevance=torch.zeros(1, 40), objective="dpp")
    args["relevance"][0, [7, 30]] = 0.5
    assert op(**backend.place_all(args)).tolist() == [[0, 1, 2, 7, 30]]


def test_zero_vectors(backend, objective):
    """Cosine 0 with all: far from every token for maxmin, without gain for dpp."""
    args = diverse_case(1, 40, 6, 30, objective=objective)
    args["features"] = args["features"].abs()  # all cosines are positive
    args["features"][0, 11] = 0
    assert (11 in op(**backend.place_all(args))[0].tolist()) == (objective == "maxmin")
    zeros = {**args, "features": torch.zeros(1, 40, 30)}
    assert op(**backend.place_all(zeros)).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_compared_comes_last(backend, objective, value):
    args = diverse_case(1, 20, 12, objective=objective, relevance=worth(1, 20))
    args["features"][0, 8:, 2] = value
    assert op(**backend.place_all(args)).tolist() == [list(range(12))]
    args["keep"] = 5
    out = op(**backend.place_all(args))
    clean = {n: args[n][:, :8] for n in ("features", "relevance")}
    assert_bitwise(out, op(**backend.place_all({**args, **clean})))
    every = {**args, "features": torch.full((1, 20, 24), value)}
    assert op(**backend.place_all(every)).tolist() == [[0, 1, 2, 3, 4]]


def test_nan_relevance_is_the_lowest(backend, objective):
    args = diverse_case(1, 20, 12, objective=objective, relevance=worth(1, 20))
    args["relevance"][0, 8:] = math.nan
    out = op(**backend.place_all(args))
    if objective == "dpp":
        assert out.tolist() == [list(range(12))]
    one = op(**backend.place_all({**args, "keep": 1}))
    assert one.item() == args["relevance"][0, :8].argmax()


def test_equals_the_definition(backend, objective):
    """Where no two scores are near, the whole loop, token by token."""
    for seed in range(4):
        args = diverse_case(1, 25, 7, 12, seed=seed, objective=objective)
        for relevance in (None, worth(1, 25, seed)):
            call = {**args, "relevance": relevance}
            ref = oracle_more.greedy_diverse_select(**call)
            assert_bitwise(op(**backend.place_all(call)).cpu(), ref)


def test_by_hand(objective):
    """Directions at 0, 10, 90 and 200 degrees. Farthest from its likest is 200 (110 from 90), then
    0 and 10 are 160 and 170 away: 10. For dpp equal gains begin with 0; then 90 is orthogonal."""
    angles = torch.tensor([0.0, 10.0, 90.0, 200.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1)[None]
    out = cdrop.greedy_diverse_select(features, 2, objective=objective)
    assert out.tolist() == [[1, 3] if objective == "maxmin" else [0, 2]]
