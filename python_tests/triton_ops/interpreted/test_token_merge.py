"""The Triton kernels of `token_merge` against the oracle, lists by counting and by radix sort."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
from ops.cases import LAYOUTS, Args, generator, merge_case, random_mask
from ops.checks import assert_bitwise, assert_same, check_merge

op = torch.ops.cdrop.token_merge
PACKAGE = "consensusdrop_kernels.triton"

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]


@pytest.fixture(params=["counting", "radix sort"])
def lists(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "radix sort":
        monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.token_merge"), "COUNTED", 0)
        monkeypatch.setattr(importlib.import_module(f"{PACKAGE}._radix"), "TILE", 32)
        monkeypatch.setattr(importlib.import_module(f"{PACKAGE}._radix"), "SCAN_BLOCK", 256)


def weights(shape: tuple[int, ...], seed: int = 6) -> torch.Tensor:
    """Weights from 0 to 4, a fifth of them 0."""
    return (torch.rand(shape, generator=generator(seed)) * 5 - 1).clamp_min(0)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 130])
@pytest.mark.parametrize("contextual", [0, 1, 7])
def test_sizes(tokens, contextual):
    for keep in {1, (tokens + 3) // 4, (2 * tokens + 2) // 3, tokens}:
        check_merge(op, merge_case(1, tokens, keep, contextual=contextual, seed=keep))


@pytest.mark.parametrize("width", [1, 3, 100, 1031])
@pytest.mark.parametrize("features", [1, 5, 72, 1031])
def test_widths(width, features):
    check_merge(op, merge_case(1, 40, 9, width, features, contextual=5 * (width % 2)))


@pytest.mark.parametrize("layout", [*LAYOUTS, "columns"])
@pytest.mark.parametrize("contextual", [0, 4])
def test_layouts(layout, contextual):
    start = "contiguous" if layout == "columns" else layout
    args = merge_case(2, 50, 11, 40, 24, layout=start, contextual=contextual)
    if layout == "columns":
        for name in ("x", "metric"):
            args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    args["index"] = args["index"].t().contiguous().t()
    args["weight"] = weights((50, 2)).t()
    args["valid"] = torch.ones(1, 1, dtype=torch.bool).expand(2, 50)
    check_merge(op, args)


@pytest.mark.parametrize("contextual", [0, 1, 5, 23, 24, 25, 40])
def test_contextual_slots(contextual):
    """24 dropped tokens; with more slots than those, each is its own and the rest is padding."""
    _, assign, size = check_merge(op, merge_case(2, 33, 9, contextual=contextual))
    assert (size[:, 9:] > 0).sum(1).tolist() == [min(contextual, 24)] * 2
    assert (assign >= 0).all()


def test_more_contextual_slots_than_tokens():
    check_merge(op, merge_case(1, 20, 4, contextual=70))


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("contextual", [0, 5])
def test_index_in_any_order_and_with_gaps(contextual):
    args = merge_case(2, 40, 8, contextual=contextual)
    args["index"] = torch.tensor([[31, -1, 4, 0, -1, 39, 17, 5], [-1] * 7 + [20]])
    check_merge(op, args)
    check_merge(op, {**args, "index": torch.full((2, 8), -1)})


@pytest.mark.parametrize("contextual", [0, 4])
@pytest.mark.parametrize("ascending", [True, False])
def test_ties_go_to_the_lower_token_index(contextual, ascending):
    for features in (1, 7, 16, 33, 100):
        args = merge_case(1, 70, 9, contextual=contextual)
        args["metric"] = torch.randn(1, 1, features, generator=generator(2)).repeat(1, 70, 1)
        index = args["index"] if ascending else args["index"].flip(1)
        _, assign, _ = check_merge(op, {**args, "index": index.contiguous()})
        host = 9 if contextual else int(index.argmin())
        assert (assign[0] == host).sum() == 70 - (9 + contextual - 1)


def test_threshold():
    args = merge_case(2, 60, 15)
    for threshold in (-5.0, -0.2, 0.3, 1.0, math.inf):
        _, assign, _ = check_merge(op, {**args, "threshold": threshold})
        if threshold >= 1.0:
            assert (assign == -1).sum().item() == 2 * 45
    _, assign, _ = check_merge(op, {**args, "threshold": 0.99, "contextual": 4})
    assert (assign >= 0).all()


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("contextual", [0, 4])
def test_weights_and_blend(blend, contextual):
    args = merge_case(3, 60, 9, contextual=contextual, blend=blend)
    check_merge(op, args)
    args["weight"] = weights((3, 60))
    args["weight"][1] = 0
    args["weight"][2] = 0
    args["weight"][2, args["index"][2]] = 3.7
    tokens, _, _ = check_merge(op, args)
    for b in (1, 2):
        assert_bitwise(tokens[b, :9], args["x"][b, args["index"][b]])


@pytest.mark.parametrize("size", [1e-45, 1e-40, 3e38])
@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_weights_count_against_each_other_only(size, blend):
    args = merge_case(2, 40, 5, blend=blend)
    want = op(**args, weight=torch.ones(2, 40))
    got = op(**args, weight=torch.full((2, 40), size))
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("joining", [7, 8, 9, 15, 16, 17, 31, 32, 33, 100])
def test_everyone_joins_one_slot(joining, weighted):
    """Lists around every number of blocks that one step takes."""
    args = merge_case(1, joining + 3, 3, 300)
    args["metric"] = torch.ones(1, joining + 3, 5)
    if weighted:
        args["weight"] = weights((1, joining + 3))
    _, assign, _ = check_merge(op, args)
    assert (assign == 0).sum() == joining + 1


@pytest.mark.parametrize("contextual", [0, 4])
def test_invalid_tokens_do_not_take_part(contextual):
    args = merge_case(3, 40, 8, contextual=contextual)
    valid = random_mask((3, 40), seed=3, share=0.7)
    valid[1, 20:] = False
    valid[2] = False
    for b in range(3):
        chosen = valid[b].nonzero()[:, 0][::3][:8]
        args["index"][b] = -1
        args["index"][b, : len(chosen)] = chosen
    clean = check_merge(op, {**args, "valid": valid})
    for junk in (math.nan, math.inf):
        held = {n: args[n].masked_fill(~valid[:, :, None], junk) for n in ("x", "metric")}
        assert_same(check_merge(op, {**args, **held, "valid": valid}), clean)


@pytest.mark.parametrize("contextual", [0, 5])
def test_nan_and_zero_vectors(contextual):
    args = merge_case(1, 40, 6, contextual=contextual)
    args["index"] = torch.tensor([[0, 3, 9, 20, 30, 39]])
    for token in (0, 1, 25):  # kept, a contextual reference, dropped
        args["metric"][0, token, 3] = math.nan
    args["metric"][0, 28] = math.inf
    args["metric"][0, [9, 15, 16]] = 0
    args["x"][0, 24] = math.nan
    _, assign, _ = check_merge(op, args)
    assert (assign == 0).sum() == 1


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_the_length_of_a_metric_vector_does_not_matter(size):
    args = merge_case(1, 60, 9)
    clean = op(**args)
    assert_same(check_merge(op, {**args, "metric": args["metric"] * size})[1:], clean[1:])


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e30])
def test_extreme_tokens(size):
    args = merge_case(1, 40, 6)
    check_merge(op, {**args, "x": args["x"].clamp(-1, 1) * size})


def test_keep_all_is_the_identity():
    args = merge_case(2, 33, 33)
    args["x"][0, 3, 4] = -0.0
    args["x"][0, 5, 6] = math.inf
    args["x"][0, 5, 7] = math.nan
    tokens, _, _ = op(**args)
    assert_bitwise(tokens, args["x"])


def test_batches():
    check_merge(op, merge_case(0, 33, 9))
    check_merge(op, merge_case(3, 33, 9, contextual=2))


def test_gradients():
    args = merge_case(2, 20, 5, 8, 6, contextual=2)
    args["weight"] = weights((2, 20)) + 0.1
    x, w = (args[n].clone().requires_grad_() for n in ("x", "weight"))
    tokens, assign, size = op(**{**args, "x": x, "weight": w})
    (tokens.square().sum() + size.sum()).backward()
    assert x.grad is not None
    mean = torch.zeros(2, 7, 8, dtype=torch.float64)
    x2, w2 = (args[n].double().requires_grad_() for n in ("x", "weight"))
    mean = mean.scatter_add(1, assign[:, :, None].expand_as(x2), w2[:, :, None] * x2)
    whole = torch.zeros(2, 7, dtype=torch.float64).scatter_add(1, assign, w2)
    ((mean / whole[:, :, None]).square().sum() + whole.sum()).backward()
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w2.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("lists")
def test_the_same_bits_again():
    args = merge_case(2, 90, 9, contextual=3)
    assert_same(op(**args), op(**args))


PLAIN = merge_case(1, 110, 80)  # more targets than a tile has
EQUAL = {**PLAIN, "metric": torch.ones(1, 110, 7)}
FEW = merge_case(1, 70, 4)
ONE_LIST = {**FEW, "metric": torch.ones(1, 70, 7)}
EXTRA = merge_case(1, 70, 9, contextual=6)
WEIGHTED = {**merge_case(1, 40, 8), "weight": weights((1, 40))}
FAINT = {**WEIGHTED, "weight": WEIGHTED["weight"] * 1e-43}
WIDE = merge_case(1, 70, 20, 40, 100)
LONG = merge_case(1, 40, 9, 40, 1031)
LONG["metric"][:, :, 1024:] *= 100
HUGE = {**PLAIN, "metric": PLAIN["metric"] * 1e30}
NAN = {**PLAIN, "metric": PLAIN["metric"].clone()}
NAN["metric"][0, sorted({*range(110)} - {*PLAIN["index"][0].tolist()})[3]] = math.nan

#: Module, place in it, what a mistake would make of that, and a call that shows it.
MISTAKES: dict[str, tuple[str, str, str, Args]] = {
    "the last tile of targets is skipped": (
        "token_merge", "range(0, offered, BLOCK_T)", "range(0, offered - BLOCK_T, BLOCK_T)", PLAIN
    ),
    "a later tile wins a tie": ("token_merge", "better = most > best", "better = most >= best",
                                EQUAL),
    "the last columns of the metric are left out": (
        "token_merge", "range(0, F, BLOCK_F)", "range(0, F - BLOCK_F, BLOCK_F)", WIDE
    ),
    "one of many chunks is not measured": (
        "token_merge", "squares += tl.sum(more * more, 1)", "squares += 0.0 * tl.sum(more, 1)",
        {**LONG, "threshold": 0.02},
    ),
    "vectors are not scaled first": (
        "token_merge", "largest = tl.where(largest == 0, 1.0, largest)[:, None]",
        "largest = tl.where(largest == 0, 1.0, 1.0)[:, None]", HUGE
    ),
    "NaN may win": (
        "token_merge", "tl.where(fair, cosine, float(\"-inf\"))",
        "tl.where(number[None, :] < offered, tl.where(fair, cosine, 1.0), float(\"-inf\"))", NAN
    ),
    "the threshold is forgotten": ("token_merge", "(best >= threshold)", "(best >= -1.0)",
                                   {**FEW, "threshold": 0.3}),
    "a sum for the mean": ("token_merge", "own_share + pull)", "1.0)", FEW),
    "only one block of a list": ("token_merge", "range(whole_steps, end, BLOCK_R)",
                                 "range(whole_steps, tl.minimum(end, whole_steps + 8), 8)", FEW),
    "a long list has only its rest": ("token_merge", "range(begin, whole_steps, STEP)",
                                      "range(begin, begin, STEP)", ONE_LIST),
    "the blend is forgotten": ("token_merge", "pull = blend * (", "pull = (",
                               {**FEW, "blend": 0.5}),
    "the size is blended": ("token_merge", "own_weight + joined)", "own_weight + pull)",
                            {**FEW, "blend": 0.5}),
    "weights are not looked at": ("token_merge", "rows * weight[:, None]", "rows", WEIGHTED),
    "a list loses its first token": ("token_merge", "begin = tl.load(bound_ptr)",
                                     "begin = tl.load(bound_ptr) + 1", FEW),
    "weights are not scaled first": ("token_merge", "tl.where(largest > 0, largest, 1.0)", "1.0",
                                     FAINT),
    "a reference is in the wrong slot": (
        "_places", "slot = tl.where(reference, keep + before, slot)",
        "slot = tl.where(reference, before, slot)", EXTRA
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, broken, monkeypatch):
    place, right, wrong, args = MISTAKES[name]
    check_merge(op, args)
    module = broken(place, right, wrong)
    if place != "token_merge":
        monkeypatch.setitem(sys.modules, f"{PACKAGE}.{place}", module)
        module = broken("token_merge", '"""`token_merge`', '"""')
    with pytest.raises(AssertionError):
        check_merge(module.token_merge, args)
