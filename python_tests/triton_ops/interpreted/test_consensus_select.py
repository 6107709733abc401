"""The Triton kernels of `consensus_select` against the oracle, by one program and by radix sort."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
from ops.cases import Args, generator, laid_out, random_mask, scores
from ops.checks import assert_bitwise, assert_same, check_select

from consensusdrop_kernels import reference

op = torch.ops.cdrop.consensus_select
FUSIONS = ("rank", "rrf", "sum", "zscore", "product", "max")
PACKAGE = "consensusdrop_kernels.triton"

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]


def make_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends every list through the radix sort, in tiles so small that there are many of them."""
    for module, name, value in (
        ("consensus_select", "ONE_PROGRAM", 0),
        ("select_merge", "ONE_PROGRAM", 0),
        ("token_merge", "COUNTED", 0),
        ("_radix", "TILE", 32),
        ("_radix", "SCAN_BLOCK", 256),
        ("_select_long", "BLOCK", 64),
        ("_select_long", "EMIT_BLOCK", 64),
    ):
        monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.{module}"), name, value)


@pytest.fixture(params=["one program", "radix sort"])
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "radix sort":
        make_long(monkeypatch)


def pair(batch: int, tokens: int, seed: int = 0) -> Args:
    return {
        "visual": scores(batch, tokens, seed=seed),
        "textual": scores(batch, tokens, seed=seed + 100),
    }


def levels(batch: int, tokens: int, count: int = 3) -> Args:
    """A few integer levels: nearly every comparison is a tie."""
    g = generator(count)
    draw = [torch.randint(0, count, (batch, tokens), generator=g).float() for _ in range(2)]
    return {"visual": draw[0], "textual": draw[1]}


def hurt(fusion: str) -> Args:
    """Masks, NaN, ties and a priority at once."""
    args = levels(4, 60, 5)
    valid = random_mask((4, 60), seed=2, share=0.7)
    valid[1, 9:] = False
    valid[2] = False
    valid[3] = False
    valid[3, 5] = True
    args["visual"][0, [3, 17]] = math.nan
    args["textual"][0, [17, 25]] = math.nan
    priority = torch.rand(180, generator=generator(8))[::3]
    priority[4] = math.nan
    return {
        **args, "valid": valid, "keep": 12, "fusion": fusion, "priority": priority,
        "priority_keep": 5,
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 65, 257, 577])
def test_sizes(tokens):
    for keep in {1, (tokens + 3) // 4, max(1, tokens - 1), tokens}:
        check_select(op, {**pair(1, tokens, seed=keep), "keep": keep})


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 130])
def test_sizes_of_long_lists(tokens, monkeypatch):
    make_long(monkeypatch)
    for keep in {1, (tokens + 3) // 4}:
        check_select(op, {**pair(2, tokens, seed=keep), "keep": keep})


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("alpha", [0.3])
def test_fusions(fusion, alpha):
    check_select(op, {**pair(1, 70), "keep": 20, "fusion": fusion, "alpha": alpha})


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_many_ties(fusion):
    for keep in (1, 64):
        check_select(op, {**levels(1, 100), "keep": keep, "fusion": fusion})


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("fusion", ["rank", "rrf"])
@pytest.mark.parametrize("alpha", [0.5, 0.6])
def test_the_bits_of_the_definition(fusion, alpha):
    args = {**levels(2, 97, 40), "keep": 20, "fusion": fusion, "alpha": alpha}
    args["textual"][0, [3, 40, 50]] = math.nan
    index, score = op(**args)
    want, true = reference.consensus_select(**args)
    assert torch.equal(index, want)
    assert_bitwise(score.nan_to_num(7.0), true.nan_to_num(7.0))


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_masks_nan_and_priority(fusion):
    args = hurt(fusion)
    for reserved in (0, 5):
        check_select(op, {**args, "priority_keep": reserved})
    check_select(op, {**args, "textual": None})
    masked = ~args["valid"]
    clean = op(**args)
    for junk in (math.nan, math.inf):
        held = {n: args[n].masked_fill(masked, junk) for n in ("visual", "textual")}
        assert_same(op(**{**args, **held}), clean)


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("fusion", ["rank", "rrf"])
def test_infinities_denormals_and_the_two_zeros(fusion):
    args = {**pair(1, 40), "keep": 7, "fusion": fusion}
    args["visual"][0, [1, 7]] = math.inf
    args["visual"][0, [2, 9]] = -math.inf
    args["textual"][0, [1, 2]] = -math.inf
    check_select(op, args)
    small = torch.arange(40.0)[None] * 1.4e-45
    index, _ = check_select(op, {**args, "visual": small, "textual": small.clone()})
    assert index.tolist() == [list(range(33, 40))]
    zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -0.0]])
    for textual in (None, zeros.flip(1)):
        index, _ = check_select(op, {"visual": zeros, "textual": textual, "keep": 2})
        assert index.tolist() == [[0, 1]]


@pytest.mark.parametrize("fusion", ["sum", "zscore", "product", "max"])
def test_infinities_in_a_sum(fusion):
    args = {**pair(2, 60), "keep": 15, "fusion": fusion}
    args["visual"][0, [3, 8]] = math.inf
    args["textual"][0, [8, 11]] = -math.inf
    index, score = op(**args)
    want, true = reference.consensus_select(**args)
    assert torch.equal(index, want)
    torch.testing.assert_close(score, true, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("length")
def test_a_constant_that_is_no_float_has_no_deviation():
    args = pair(1, 100)
    args["visual"] = torch.full((1, 100), 0.1)
    check_select(op, {**args, "keep": 10, "fusion": "zscore"})
    check_select(op, {**pair(1, 33), "visual": torch.zeros(1, 33), "keep": 9, "fusion": "sum"})


@pytest.mark.usefixtures("length")
@pytest.mark.parametrize("layout", ["transposed", "offset", "gapped", "expanded"])
def test_layouts(layout):
    args = pair(4, 50)
    if layout == "expanded":
        args = {name: value[:1].expand(4, 50) for name, value in args.items()}
    elif layout == "transposed":
        args = {name: value.t().contiguous().t() for name, value in args.items()}
    else:
        args = {name: laid_out(value, layout) for name, value in args.items()}
    valid = random_mask((50, 4), seed=1).t()
    priority = torch.rand(2, 100, generator=generator(1))[:, ::2].repeat(2, 1)
    check_select(op, {**args, "keep": 15, "valid": valid, "priority": priority, "priority_keep": 3})


@pytest.mark.parametrize("batch", [0, 3])
def test_batches(batch):
    check_select(op, {**pair(batch, 33), "keep": 9})


@pytest.mark.usefixtures("length")
def test_the_same_bits_again():
    args = hurt("zscore")
    assert_same(op(**args), op(**args))


NAN = hurt("rank")
SHORT = {**pair(1, 300), "keep": 290}
ZSCORE = {**pair(1, 50), "keep": 12, "fusion": "zscore"}
TIED = {**levels(2, 100), "keep": 30}
RRF = {**pair(1, 50), "keep": 12, "fusion": "rrf"}

#: Module, place in it, what a mistake would make of that, a call that shows it, for long lists.
MISTAKES: dict[str, tuple[str, str, str, Args, bool]] = {
    "the last tile of rivals is skipped": (
        "consensus_select", "range(0, tokens, BLOCK_J)", "range(0, tokens - BLOCK_J, BLOCK_J)",
        SHORT, False,
    ),
    "ties go to the higher index": (
        "_keys", "(0x7FFFFFFF - token)", "(token)", {**TIED, "fusion": "rrf"}, False
    ),
    "ties of rank go by index": ("consensus_select", "tie = rank_v", "tie = token", TIED, False),
    "one too few is kept": ("consensus_select", "reach >= count", "reach > count", RRF, False),
    "NaN is the best": ("_keys", "> 0x7F800000, -0x80000000", "> 0x7F800000, 0x7FFFFFFF",
                        {**NAN, "textual": None}, False),
    "empty slots are left": ("consensus_select", "& (token < keep))", "& (token < found))",
                             NAN, False),
    "the deviation of a sample": (
        "_scores", "tl.maximum(count, 1).to(tl.float64)).to",
        "tl.maximum(count - 1, 1).to(tl.float64)).to", ZSCORE, False
    ),
    "ranks from one": ("_scores", "tl.div_rn(one, 60.0 + rank_v", "tl.div_rn(one, 61.0 + rank_v",
                       RRF, False),
    "the sort is not stable": (
        "_radix", "other[None, :] < own[:, None]", "other[None, :] > own[:, None]", TIED, True
    ),
    "the last pass is left out": (
        "_radix", "range(0, bits, 8)", "range(0, bits - 8, 8)", {**SHORT, "keep": 20}, True
    ),
    "invalid before NaN": ("_select_long", "^ 0x7FFFFFFF, -2)", "^ 0x7FFFFFFF, -1)",
                           {**NAN, "keep": 45, "priority_keep": 0}, True),
    "the priority may repeat": (
        "_select_long", "lists.chosen = chosen", "lists.chosen = chosen * 0", NAN, True
    ),
    "the sort starts from the index": (
        "_select_long", 'start if fusion == "rank" else None', "None", TIED, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, broken, monkeypatch):
    place, right, wrong, args, long = MISTAKES[name]
    if long:
        make_long(monkeypatch)
    check_select(op, args)
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.{place}", broken(place, right, wrong))
    first = '"""`consensus_select`'
    if place == "consensus_select":
        module = sys.modules[f"{PACKAGE}.{place}"]
    else:  # import again what stands between the broken place and the op
        if place != "_select_long":
            again = broken("_select_long", '"""`consensus_select`', '"""')
            monkeypatch.setitem(sys.modules, f"{PACKAGE}._select_long", again)
        module = broken("consensus_select", first, '"""')
    if long:
        make_long(monkeypatch)
        monkeypatch.setattr(module, "ONE_PROGRAM", 0)
    with pytest.raises(AssertionError):
        check_select(module.consensus_select, args)
