"""The Triton kernels of `adaptive_split_select`: the very tokens that trying every split finds."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from ops.cases import Args, generator, random_mask, scores
from ops.checks_more import check_split

op = torch.ops.cdrop.adaptive_split_select
PACKAGE = "consensusdrop_kernels.triton"

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]


@pytest.fixture(params=["one program", "radix sort"])
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to places; the second in tiles so small that there are many of them."""
    if request.param == "radix sort":
        for module, name, value in (
            ("adaptive_split_select", "ONE_PROGRAM", 0),
            ("adaptive_split_select", "TILE", 16),
            ("adaptive_split_select", "BLOCK", 64),
            ("_radix", "TILE", 32),
            ("_radix", "SCAN_BLOCK", 256),
            ("_select_long", "BLOCK", 64),
        ):
            monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.{module}"), name, value)


def lists(batch: int, tokens: int, keep: int, **more) -> Args:
    both = {"visual": scores(batch, tokens), "textual": scores(batch, tokens, seed=1)}
    return {**both, "keep": keep, **more}


@pytest.mark.parametrize("tokens", [1, 2, 16, 33, 257])
@pytest.mark.parametrize("reserve", [0.0, 0.29, 0.5])
def test_shapes(tokens, reserve):
    for keep in {1, (tokens + 1) // 2, tokens}:
        check_split(op, lists(2, tokens, keep, reserve=reserve))


def test_the_reserve_is_float64():
    """0.29 * 100 is below 29 in float64 and 29 in float32."""
    assert math.floor(0.29 * 100) == 28
    check_split(op, lists(1, 120, 100, reserve=0.29))


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.usefixtures("length")
def test_batches(batch):
    check_split(op, lists(batch, 70, 20))


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("reserve", [0.0, 0.25])
def test_ties_of_lists_products_and_masses(reserve):
    draw = torch.tensor([0.0, -0.0, 0.125, 0.25, 0.5, 1.0, math.nan])
    for seed in range(4):
        g = generator(seed)
        visual, textual = (draw[torch.randint(0, 7, (2, 40), generator=g)] for _ in range(2))
        args = {"visual": visual, "textual": textual, "keep": 4 + 9 * seed, "reserve": reserve}
        check_split(op, {**args, "valid": random_mask((2, 40), seed)})
    check_split(op, {**args, "visual": torch.ones(2, 40), "textual": torch.ones(2, 40)})


@pytest.mark.usefixtures("length")
def test_masked_samples():
    valid = random_mask((4, 70), 1, 0.4)
    valid[1], valid[2] = False, torch.arange(70) < 3
    args = lists(4, 70, 12, valid=valid)
    clean = check_split(op, args)
    assert (clean[0][1] == -1).all()
    for junk in (math.nan, math.inf):
        held = {n: args[n].masked_fill(~valid, junk) for n in ("visual", "textual")}
        for out, want in zip(op(**{**args, **held}), clean, strict=True):
            assert torch.equal(out, want)


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -1.0])
def test_odd_values(value):
    args = lists(2, 30, 10)
    args["visual"][0, ::3] = value
    args["textual"][1, 1::4] = value
    check_split(op, args)
    check_split(op, {**args, "visual": torch.full((2, 30), value)})


def test_equal_lists_have_equal_masses():
    """Sums that float64 rounds: symmetric products still tie, and the first split wins."""
    same = torch.rand(1, 300, generator=generator(3)).pow(12)
    index, split = op(same, same, 120, reserve=0.0)
    assert set(index[0].tolist()) == set(same[0].topk(120).indices.tolist())
    mirrored = op(same.flip(1), same.flip(1), 120, reserve=0.0)[1]
    assert split.tolist() == mirrored.tolist()
    assert int(split) <= 60


def test_strided_scores():
    args = lists(2, 30, 10)
    args["visual"] = torch.rand(30, 2, generator=generator(1)).t()
    check_split(op, {**args, "textual": scores(1, 30).expand(2, -1)})


PLAIN = lists(1, 40, 15)
HEAVY = {**PLAIN, "textual": scores(1, 40, seed=1) * 3}
ONES = {"visual": torch.ones(1, 9), "textual": torch.ones(1, 9), "keep": 3}
MASKED = lists(1, 40, 30, valid=random_mask((1, 40), 1, 0.5))
# All the mass of `textual` in one token: the best split reaches the NaN at the end of `visual`.
BLANK = lists(1, 40, 36, reserve=0.0, textual=torch.eye(40)[:1])
BLANK["visual"][0, ::3] = math.nan

#: The place in the kernels, what a mistake would make of it, and a call that shows it.
MISTAKES: dict[str, tuple[str, str, Args]] = {
    "the last of equal products": (
        "first = tl.min(tl.where(product == here, k1, 0x7FFFFFFF), 0)",
        "first = tl.max(tl.where(product == here, k1, -1), 0)", ONES
    ),
    "the reserved are in the mass": ("listed_ptr += line * tokens + held",
                                     "listed_ptr += line * tokens", PLAIN),
    "lists are swapped": ("of_text, of_visual = held + split, held + rest - split",
                          "of_visual, of_text = held + split, held + rest - split", HEAVY),
    "the lighter list fills": (") >= tl.load(mass_v + rest - split)",
                               ") < tl.load(mass_v + rest - split)", HEAVY),
    "freed places stay empty": ("below <= budget - found", "below < 0", HEAVY),
    "a place too few is filled": ("below <= budget - found", "below < budget - found", HEAVY),
    "a NaN adds to the sum": ("tl.where(v == v, v, 0.0)", "v", BLANK),
    "the reserve is float32": ("budget.to(tl.float64)).to(tl.int32)",
                               "budget.to(tl.float64)).to(tl.float32).to(tl.int32)",
                               lists(1, 120, 100, reserve=0.29)),
    "invalid tokens have places": ("budget = tl.minimum(count, keep)", "budget = keep", MASKED),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, broken):
    right, wrong, args = MISTAKES[name]
    check_split(op, args)
    module = broken("adaptive_split_select", right, wrong)
    with pytest.raises(AssertionError):
        check_split(module.adaptive_split_select, args)
