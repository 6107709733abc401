"""`token_merge` against its definition: assignment, ties, means, sizes and empty slots."""

from __future__ import annotations

import math

import pytest
import torch

import consensusdrop_kernels as cdrop

from .cases import LAYOUTS, Args, generator, merge_case, random_mask
from .checks import assert_bitwise, assert_same, check_merge

op = torch.ops.cdrop.token_merge
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poison")


def check(backend, args: Args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(t.cpu() for t in check_merge(op, backend.place_all(args)))


def weights(shape: tuple[int, ...], seed: int = 6) -> torch.Tensor:
    """Weights from 0 to 4, a fifth of them 0."""
    w = torch.rand(shape, generator=generator(seed)) * 5 - 1
    return w.clamp_min(0)


@pytest.mark.parametrize("tokens", [1, 2, 31, 255, 256, 257, 577])
@pytest.mark.parametrize("contextual", [0, 1, 7])
def test_sizes(backend, tokens, contextual):
    for keep in {1, (tokens + 3) // 4, max(1, tokens - 1), tokens}:
        check(backend, merge_case(1, tokens, keep, contextual=contextual, seed=keep))


@pytest.mark.parametrize("width", [1, 3, 64, 100, 1031])
@pytest.mark.parametrize("features", [1, 5, 72, 1031])
def test_widths(backend, width, features):
    for contextual in (0, 5):
        check(backend, merge_case(1, 40, 9, width, features, contextual=contextual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contextual", [0, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_dtypes(backend, dtype, contextual, weighted):
    args = merge_case(2, 150, 30, 96, 64, dtype=dtype, contextual=contextual)
    if weighted:
        args["weight"] = weights((2, 150))
    check(backend, args)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("metric_dtype", DTYPES)
def test_the_metric_may_have_its_own_dtype(backend, x_dtype, metric_dtype):
    args = merge_case(1, 60, 12)
    args["x"], args["metric"] = args["x"].to(x_dtype), args["metric"].to(metric_dtype)
    check(backend, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contextual", [0, 4])
def test_layouts(backend, layout, dtype, contextual):
    args = merge_case(2, 50, 11, 40, 24, dtype=dtype, layout=layout, contextual=contextual)
    args["index"] = args["index"].t().contiguous().t()
    args["weight"] = weights((50, 2)).t()
    args["valid"] = torch.ones(1, 1, dtype=torch.bool).expand(2, 50)
    check(backend, args)


@pytest.mark.parametrize("contextual", [0, 4])
def test_columns_may_be_strided_too(backend, contextual):
    args = merge_case(2, 50, 11, 40, 24, contextual=contextual)
    clean = check(backend, args)
    for name in ("x", "metric"):
        args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(check(backend, args)[1:], clean[1:])


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("contextual", [0, 4])
def test_batches(backend, batch, contextual):
    check(backend, merge_case(batch, 33, 9, contextual=contextual))


@pytest.mark.parametrize("contextual", [0, 1, 5, 23, 24, 25, 40])
def test_contextual_slots(backend, contextual):
    """24 dropped tokens; with more slots than those, each is its own and the rest is padding."""
    _, assign, size = check(backend, merge_case(2, 33, 9, contextual=contextual))
    assert (size[:, 9:] > 0).sum(1).tolist() == [min(contextual, 24)] * 2
    assert (assign >= 0).all()


def test_contextual_references_are_spread_evenly(backend):
    """floor(c R / C) for R = 10, C = 4: numbers 0, 2, 5, 7 of the dropped tokens."""
    args = merge_case(1, 12, 2, contextual=4)
    args["index"] = torch.tensor([[0, 1]])
    tokens, assign, _ = check(backend, args)
    for slot, owner in enumerate((2, 4, 7, 9)):
        assert assign[0, owner] == 2 + slot
    metric_free = merge_case(1, 12, 2, contextual=4)
    metric_free["index"] = args["index"]
    metric_free["blend"] = 0.0
    tokens, _, _ = check(backend, metric_free)
    assert_bitwise(tokens[0], metric_free["x"][0, [0, 1, 2, 4, 7, 9]])


@pytest.mark.parametrize("contextual", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_all_is_the_identity(backend, contextual, dtype):
    args = merge_case(2, 33, 33, dtype=dtype, contextual=contextual)
    args["x"][0, 3, 4] = -0.0
    args["x"][0, 5, 6] = math.inf
    args["weight"] = weights((2, 33)) + 0.1
    tokens, assign, size = check(backend, args)
    assert_bitwise(tokens[:, :33], args["x"])
    assert assign.tolist() == [list(range(33))] * 2
    assert_bitwise(size[:, :33], args["weight"])


@pytest.mark.parametrize("contextual", [0, 5])
def test_index_in_any_order_and_with_gaps(backend, contextual):
    args = merge_case(2, 40, 8, contextual=contextual)
    args["index"] = torch.tensor([[31, -1, 4, 0, -1, 39, 17, 5], [-1] * 7 + [20]])
    tokens, _, size = check(backend, args)
    assert not tokens[0, 1].any()
    assert not size[0, 1].any()


@pytest.mark.parametrize("contextual", [0, 3])
def test_nothing_kept(backend, contextual):
    """Every slot empty: without contextual slots every token is dropped for good."""
    args = merge_case(1, 20, 4, contextual=contextual)
    args["index"] = torch.full((1, 4), -1)
    _, assign, _ = check(backend, args)
    assert (assign >= 4).all() if contextual else (assign == -1).all()


@pytest.mark.parametrize("contextual", [0, 4])
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_ties_go_to_the_lower_token_index(backend, contextual, order):
    """All metric vectors equal: everyone joins the first host by token, whatever its slot."""
    for features in (1, 7, 16, 33, 64, 100):
        args = merge_case(1, 70, 9, contextual=contextual)
        args["metric"] = torch.randn(1, 1, features, generator=generator(2)).repeat(1, 70, 1)
        index = args["index"] if order == "ascending" else args["index"].flip(1)
        _, assign, _ = check(backend, {**args, "index": index.contiguous()})
        host = 9 if contextual else int(index.argmin())
        others = 9 + contextual - 1  # the slots that hold their own token alone
        assert (assign[0] == host).sum() == 70 - others


def test_threshold(backend):
    args = merge_case(2, 80, 20)
    for threshold in (-1.0, -0.2, 0.0, 0.3, 0.9, 1.0, 2.0, -5.0, math.inf):
        _, assign, _ = check(backend, {**args, "threshold": threshold})
        if threshold >= 1.0:
            assert (assign == -1).sum().item() == 2 * 60


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_threshold_itself_is_enough(backend, threshold):
    """One-hot vectors: cosines are exactly 0 or 1."""
    args = merge_case(1, 24, 6)
    args["metric"] = torch.eye(8)[torch.arange(24) % 8][None].contiguous()
    args["index"] = torch.arange(6)[None]
    _, assign, _ = check(backend, {**args, "threshold": threshold})
    orphans = [i for i in range(6, 24) if i % 8 in (6, 7)]
    assert all((assign[0, i] == -1) == (threshold == 1.0) for i in orphans)
    assert (assign[0] == -1).sum() == (len(orphans) if threshold == 1.0 else 0)


def test_the_threshold_is_not_for_contextual_slots(backend):
    args = merge_case(1, 40, 9, contextual=4, threshold=0.99)
    _, assign, _ = check(backend, args)
    assert (assign >= 0).all()


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("contextual", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blend(backend, blend, contextual, dtype):
    args = merge_case(1, 60, 9, dtype=dtype, contextual=contextual, blend=blend)
    tokens, _, size = check(backend, args)
    if blend == 0.0:
        assert_bitwise(tokens[0, :9], args["x"][0, args["index"][0]])
    assert size.sum() == 60


@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("contextual", [0, 4])
def test_weights(backend, blend, contextual):
    args = merge_case(3, 60, 9, contextual=contextual, blend=blend)
    args["weight"] = weights((3, 60))
    args["weight"][1] = 0  # nothing weighs anything: every slot is its own token
    args["weight"][2] = 0
    args["weight"][2, args["index"][2]] = 3.7  # only the kept ones do
    tokens, _, size = check(backend, args)
    for b in (1, 2):
        assert_bitwise(tokens[b, :9], args["x"][b, args["index"][b]])
    assert not size[1].any()


@pytest.mark.parametrize("contextual", [0, 4])
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_invalid_tokens_do_not_take_part(backend, contextual, junk):
    args = merge_case(3, 40, 8, contextual=contextual)
    valid = random_mask((3, 40), seed=3, share=0.7)
    valid[1, 20:] = False
    valid[2] = False
    for b in range(3):
        chosen = valid[b].nonzero()[:, 0][::3][:8]
        args["index"][b] = -1
        args["index"][b, : len(chosen)] = chosen
    clean = check(backend, {**args, "valid": valid})
    assert (clean[1][~valid] == -1).all()
    assert not clean[0][2].any()
    for name in ("x", "metric"):
        args[name] = args[name].masked_fill(~valid[:, :, None], junk)
    assert_same(check(backend, {**args, "valid": valid}), clean)


def test_zero_vectors_have_cosine_zero(backend):
    args = merge_case(1, 40, 6)
    args["metric"][0, 20:30] = 0
    args["metric"][0, args["index"][0, 2]] = 0
    check(backend, args)
    _, assign, _ = check(backend, {**args, "threshold": 1e-6})
    moved = [i for i in range(20, 30) if i not in args["index"][0].tolist()]
    assert all(assign[0, i] == -1 for i in moved)


@pytest.mark.parametrize("contextual", [0, 5])
def test_nan_similarity_ranks_below_every_number(backend, contextual):
    args = merge_case(1, 40, 6, contextual=contextual)
    args["index"] = torch.tensor([[0, 3, 9, 20, 30, 39]])
    args["metric"][0, 0, 3] = math.nan  # a kept token: nobody joins it
    args["metric"][0, 1, 3] = math.nan  # the first contextual reference
    args["metric"][0, 25, 3] = math.nan  # a dropped one: similar to nobody
    _, assign, _ = check(backend, args)
    assert (assign == 0).sum() == 1
    if not contextual:
        assert assign[0, 25] == -1


def test_nan_tokens_stay_in_their_slot(backend):
    args = merge_case(1, 40, 6)
    args["x"][0, 25] = math.nan
    tokens, assign, _ = check(backend, args)
    spoilt = tokens[0].isnan().any(1).nonzero()[:, 0].tolist()
    assert spoilt == [assign[0, 25].item()]


def test_a_token_dropped_for_good_may_be_nan(backend):
    args = merge_case(1, 40, 6, threshold=2.0)
    args["x"][0, 25] = math.nan
    args["index"] = torch.arange(6)[None]
    tokens, _, _ = check(backend, args)
    assert not tokens.isnan().any()


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e30, 3e38])
def test_extreme_tokens(backend, size):
    """Denormal and huge values of x; the mean is no larger than its largest token."""
    args = merge_case(1, 40, 6)
    args["x"] = args["x"].clamp(-1, 1) * size
    if size == 3e38:  # a sum of two would overflow: kept tokens alone must pass through
        args["blend"] = 0.0
    check(backend, args)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_length_of_a_metric_vector_does_not_matter(backend, size):
    args = merge_case(1, 60, 9)
    clean = check(backend, args)
    scaled = check(backend, {**args, "metric": args["metric"] * size})
    assert_same(scaled[1:], clean[1:])


def test_a_real_size(backend):
    args = merge_case(1, 2880, 160, 256, 128, dtype=torch.bfloat16)
    check(backend, args)
    check(backend, {**args, "contextual": 32})


def test_the_function_is_the_op(backend):
    args = backend.place_all(merge_case(1, 33, 9, contextual=2))
    assert_same(cdrop.token_merge(**args), op(**args))


@pytest.mark.parametrize("size", [1e-45, 1e-40, 3e38])
@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_weights_count_against_each_other_only(backend, size, blend):
    """The mean does not change with the unit of the weights, however far that is from 1."""
    args = backend.place_all(merge_case(2, 40, 5, blend=blend))
    ones = torch.ones(args["x"].shape[:2], device=args["x"].device)
    want = op(**args | {"weight": ones})
    got = op(**args | {"weight": ones * size})
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
