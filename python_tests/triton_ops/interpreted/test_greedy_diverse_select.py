"""The Triton kernels of `greedy_diverse_select`: every choice is the best there was."""

from __future__ import annotations

import math

import pytest
import torch
from ops import oracle_more
from ops.cases import LAYOUTS, Args, diverse_case, generator, random_mask
from ops.checks import assert_bitwise
from ops.checks_more import check_diverse

op = torch.ops.cdrop.greedy_diverse_select

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]
both = pytest.mark.parametrize("objective", ["maxmin", "dpp"])


def worth(batch: int, tokens: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=generator(seed))


@both
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("given", [False, True])
def test_shapes(objective, tokens, given):
    keep = max(1, min(tokens - 1, 6))
    relevance = worth(1, tokens) if given else None
    check_diverse(op, diverse_case(1, tokens, keep, 17, objective=objective, relevance=relevance))


@both
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "expanded"])
def test_layouts(objective, layout):
    check_diverse(op, diverse_case(2, 40, 5, 37, layout=layout, objective=objective))


@both
@pytest.mark.parametrize("width", [1, 2, 16, 65, 100, 128, 129, 256, 257, 600])
def test_widths(objective, width):
    keep = 5 if objective == "maxmin" else min(width, 5)  # no further than the rank goes
    args = diverse_case(1, 40, keep, width, objective=objective)
    strided = args["features"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_bitwise(check_diverse(op, {**args, "features": strided}), check_diverse(op, args))


@both
@pytest.mark.parametrize("batch", [0, 3])
def test_batches(objective, batch):
    """Each sample as if it were alone."""
    args = diverse_case(batch, 70, 5, 8, objective=objective)
    out = check_diverse(op, args)
    for b in range(batch):
        alone = {**args, "features": args["features"][b : b + 1]}
        assert_bitwise(op(**alone), out[b : b + 1])


@both
def test_masks(objective):
    valid = random_mask((4, 70), 1, 0.6)
    valid[1], valid[2] = False, torch.arange(70) < 5
    args = diverse_case(4, 70, 7, valid=valid, relevance=worth(4, 70), objective=objective)
    out = check_diverse(op, args)
    assert (out[1] == -1).all()
    assert out[2].tolist() == [0, 1, 2, 3, 4, -1, -1]
    args["features"] = args["features"].masked_fill(~valid[:, :, None], math.nan)
    assert_bitwise(op(**args), out)


@both
@pytest.mark.parametrize("size", [1e-38, 1e38])
def test_only_directions_matter(objective, size):
    args = diverse_case(1, 50, 6, objective=objective)
    out = op(**args)
    scaled = args["features"] * 2.0 ** round(math.log2(size))
    assert_bitwise(op(**{**args, "features": scaled.clamp(-3e38, 3e38)}), out)
    mixed = args["features"] * torch.logspace(-18, 18, 50)[:, None]
    check_diverse(op, {**args, "features": mixed})


@both
def test_copies_come_last_and_lower_indices_first(objective):
    base = torch.linalg.qr(torch.randn(5, 5, generator=generator(2)))[0].repeat(8, 1)
    args = {"features": base[None], "keep": 8, "objective": objective}
    assert op(**args).tolist() == [list(range(8))]
    late = torch.cat([base[:1].expand(10, -1), base[1:5]])[None]
    assert op(**{**args, "features": late, "keep": 6}).tolist() == [[0, 1, 10, 11, 12, 13]]
    assert op(torch.ones(1, 30, 7), 4, objective=objective).tolist() == [[0, 1, 2, 3]]


def test_past_the_rank_the_relevant_fill_up():
    args = diverse_case(2, 70, 10, 3, relevance=worth(2, 70) + 0.1, objective="dpp")
    first = op(**{**args, "keep": 3}).tolist()
    for row, spans, r in zip(op(**args).tolist(), first, args["relevance"], strict=True):
        best = r.clone()
        best[spans] = -1
        assert sorted(spans + best.topk(7).indices.tolist()) == row
    args = diverse_case(1, 40, 5, relevance=torch.zeros(1, 40), objective="dpp")
    args["relevance"][0, [7, 30]] = 0.5
    assert op(**args).tolist() == [[0, 1, 2, 7, 30]]


@both
def test_zero_vectors(objective):
    args = diverse_case(1, 40, 6, 30, objective=objective)
    args["features"] = args["features"].abs()  # all cosines are positive
    args["features"][0, 11] = 0
    assert (11 in op(**args)[0].tolist()) == (objective == "maxmin")
    zeros = {**args, "features": torch.zeros(1, 40, 30)}
    assert op(**zeros).tolist() == [[0, 1, 2, 3, 4, 5]]


@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_compared_comes_last(objective, value):
    args = diverse_case(1, 20, 12, objective=objective, relevance=worth(1, 20))
    args["features"][0, 8:, 2] = value
    assert op(**args).tolist() == [list(range(12))]
    args["keep"] = 5
    clean = {n: args[n][:, :8] for n in ("features", "relevance")}
    assert_bitwise(op(**args), op(**{**args, **clean}))
    every = {**args, "features": torch.full((1, 20, 24), value)}
    assert op(**every).tolist() == [[0, 1, 2, 3, 4]]


@both
def test_nan_relevance_is_the_lowest(objective):
    args = diverse_case(1, 20, 12, objective=objective, relevance=worth(1, 20))
    args["relevance"][0, 8:] = math.nan
    if objective == "dpp":
        assert op(**args).tolist() == [list(range(12))]
    else:
        none = torch.full((1, 20), math.nan)
        assert op(**{**args, "relevance": none, "keep": 1}).tolist() == [[0]]
    assert op(**{**args, "keep": 1}).item() == args["relevance"][0, :8].argmax()


@both
def test_equals_the_definition(objective):
    for seed in range(3):
        args = diverse_case(1, 25, 7, 12, seed=seed, objective=objective)
        for relevance in (None, worth(1, 25, seed)):
            call = {**args, "relevance": relevance}
            assert_bitwise(op(**call), oracle_more.greedy_diverse_select(**call))


PLAIN = diverse_case(1, 90, 6, 8)
WIDE = diverse_case(1, 40, 6, 300)
GIVEN = diverse_case(1, 90, 6, 8, relevance=worth(1, 90))
DPP = diverse_case(1, 90, 7, 10, objective="dpp")
DPP["features"] = DPP["features"].abs()  # all alike: what is left outside the span is little
DPP_GIVEN = {**DPP, "relevance": worth(1, 90) + 0.3}

#: The place in the kernels, what a mistake would make of it, and a call that shows it.
MISTAKES: dict[str, tuple[str, str, Args]] = {
    "the nearest is forgotten": ("tl.where(step == 1, -cosine, tl.minimum(score, -cosine))",
                                 "-cosine", PLAIN),
    "the start is in the distances": ("tl.where(step == 1, -cosine, tl.minimum(score, -cosine))",
                                      "tl.minimum(score, -cosine)",
                                      {**GIVEN, "relevance": worth(1, 90) - 1}),
    "a token is its own likest": (" & (own[:, None] != other[None, :])", "", PLAIN),
    "the last block is not offered": ("for start in range(0, tokens, BLOCK_N):\n"
                                      "            token = start + tl.arange(0, BLOCK_N)\n"
                                      "            inside",
                                      "for start in range(0, tokens - BLOCK_N, BLOCK_N):\n"
                                      "            token = start + tl.arange(0, BLOCK_N)\n"
                                      "            inside", PLAIN),
    "a chosen token stays open": ("tl.store(state_ptr + last, CHOSEN)",
                                  "tl.store(state_ptr + last, OPEN)", PLAIN),
    "a row of the factor is left out": ("range(0, step - 1)", "range(1, step - 1)", DPP),
    "rows are not divided": ("cosine = cosine / tl.sqrt(residual)", "cosine = cosine", DPP),
    "relevance counts once": ("worth * worth * score", "worth * score", DPP_GIVEN),
    "columns past the first are left out": ("range(0, width, CHUNKS * BLOCK_F)",
                                            "range(0, BLOCK_F, CHUNKS * BLOCK_F)", WIDE),
    "lengths for cosines": ("square * last_square", "square * 0 + last_square", DPP),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, broken):
    right, wrong, args = MISTAKES[name]
    check_diverse(op, args)
    module = broken("greedy_diverse_select", right, wrong)
    with pytest.raises(AssertionError):
        check_diverse(module.greedy_diverse_select, args)
