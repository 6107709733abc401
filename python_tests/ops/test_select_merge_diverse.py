"""`select_merge` with `diversity`: the consensus is the relevance of a diverse choice."""

from __future__ import annotations

import math

import pytest
import torch

import consensusdrop_kernels as cdrop
from consensusdrop_kernels.reference import relevance_of_places

from . import oracle_more
from .cases import Args, random_mask, scores, select_merge_case
from .checks import assert_bitwise, assert_same
from .checks_more import check_diverse_merge

op = torch.ops.cdrop.select_merge
fused = cdrop.reference.select_merge
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def not_in_cuda(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend").name == "cuda":
        pytest.skip("the CUDA C++ kernel refuses a diverse choice (test_emulated.py)")


def case(*args, diversity: float = 0.65, **more) -> Args:
    return {**select_merge_case(*args, **more), "diversity": diversity}


def check(backend, args: Args) -> tuple[torch.Tensor, ...]:
    return tuple(t.cpu() for t in check_diverse_merge(backend.own(op), backend.place_all(args)))


@pytest.mark.parametrize("tokens", [1, 2, 31, 130])
@pytest.mark.parametrize("contextual", [0, 7])
def test_sizes(backend, tokens, contextual):
    for keep in {1, (tokens + 3) // 4, tokens}:
        check(backend, case(1, tokens, keep, contextual=contextual, prefix=1))


@pytest.mark.parametrize("fusion", ["rank", "rrf", "sum", "zscore", "product", "max"])
@pytest.mark.parametrize("diversity", [0.1, 0.5, 1.0])
def test_fusions(backend, fusion, diversity):
    check(backend, case(2, 60, 14, fusion=fusion, alpha=0.3, diversity=diversity))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gapped"])
@pytest.mark.parametrize("text", [False, True])
def test_layouts_and_dtypes(backend, dtype, layout, text):
    check(backend, case(2, 50, 12, dtype=dtype, layout=layout, text=text, prefix=1, seed=3))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("heads", [1, 5])
def test_batches_and_heads(backend, batch, heads):
    check(backend, case(batch, 33, 9, heads=heads, groups=1, head_dim=40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_metric(backend, dtype):
    args = case(2, 60, 12, contextual=4, prefix=1)
    check(backend, {**args, "metric": torch.randn(2, 60, 33).to(dtype)})


@pytest.mark.parametrize("contextual", [0, 6])
def test_masked(backend, contextual):
    args = case(4, 60, 12, prefix=1, contextual=contextual)
    valid = random_mask((4, 60), seed=5, share=0.7)
    valid[1, 7:] = False
    valid[2] = False
    valid[3, 14:] = False
    clean = check(backend, {**args, "valid": valid})
    assert (clean[1][2] == -1).all()
    junk = ~valid
    args["x"] = args["x"].masked_fill(junk[:, :, None], math.nan)
    args["k_vis"] = args["k_vis"].clone()
    args["k_vis"][:, :, 1:].masked_fill_(junk[:, None, :, None], math.nan)
    args["k_txt"] = args["k_txt"].masked_fill(junk[:, None, :, None], math.inf)
    assert_same(check(backend, {**args, "valid": valid}), clean)


def test_padding_changes_nothing(backend):
    """Relevance goes by the share of the valid tokens, not of all places."""
    args = case(1, 40, 9)
    _, index, assign, _ = check(backend, args)
    wide = {**args, "valid": (torch.arange(70) < 40)[None]}
    for name in ("x", "k_vis", "k_txt"):
        wide[name] = torch.nn.functional.pad(args[name], (0, 0, 0, 30))
    again = check(backend, wide)
    assert torch.equal(again[1], index)
    assert torch.equal(again[2][:, :40], assign)


def test_equal_tokens_are_kept_once(backend):
    """Each of ten vectors four times: ten different ones, though the best of the consensus
    are alike."""
    args = case(1, 40, 10)
    for name in ("k_vis", "k_txt"):
        args[name] = args[name][:, :, :10].repeat_interleave(4, 2)
    _, index, _, size = check(backend, args)
    assert (index // 4).tolist() == [list(range(10))]
    assert (size == 4).all()
    _, plain, _, _ = backend.own(op)(**backend.place_all({**args, "diversity": 0.0}))
    assert len(set((plain // 4).flatten().tolist())) < 10


def test_at_one_the_metric_alone_decides(backend):
    args = case(2, 50, 12, diversity=1.0)
    _, index, _, _ = check(backend, args)
    for change in ({"alpha": 0.0}, {"alpha": 1.0, "fusion": "max"}):
        assert torch.equal(check(backend, {**args, **change})[1], index)


def test_keep_all_is_the_identity(backend):
    args = case(2, 40, 40)
    tokens, index, _, size = check(backend, args)
    assert_bitwise(tokens, args["x"])
    assert index.tolist() == [list(range(40))] * 2
    assert (size == 1).all()


def test_scores_that_are_no_numbers(backend):
    """A row of infinite queries makes every saliency NaN: then places are those of the raster."""
    args = case(1, 30, 6)
    args["q_txt"] = torch.full_like(args["q_txt"], math.inf)
    tokens, index, _, _ = backend.own(op)(**backend.place_all(args))
    best = torch.zeros(1, 30) - torch.arange(30)
    metric = args["k_vis"].mean(1)
    expected = oracle_more.greedy_diverse_select(
        metric, 6, relevance=oracle_more.relevance_of_places(best, 0.65), objective="dpp"
    )
    assert index.tolist() == expected.tolist()
    assert tokens.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_is_the_composition_of_the_parts(backend, masked):
    args = case(2, 120, 20, contextual=5, prefix=1)
    valid = random_mask((2, 120), seed=2) if masked else None
    args = backend.place_all({**args, "valid": valid})
    _, index, assign, size = backend.own(op)(**args)
    ops = torch.ops.cdrop
    keys = None if valid is None else torch.nn.functional.pad(args["valid"], (1, 0), value=True)
    vis = ops.attention_saliency(args["q_vis"], args["k_vis"], prefix=1, key_valid=keys)
    txt = ops.attention_saliency(args["q_txt"], args["k_txt"], key_valid=args["valid"])
    _, score = ops.consensus_select(vis, txt, 20, valid=args["valid"])
    metric = args["k_vis"][:, :, 1:].mean(1)
    kept = ops.greedy_diverse_select(
        metric, 20, relevance=relevance_of_places(score, 0.65, args["valid"]), objective="dpp",
        valid=args["valid"],
    )  # fmt: skip
    parts = ops.token_merge(args["x"], metric, kept, contextual=5, valid=args["valid"])
    assert torch.equal(index[:, :20], kept)
    assert torch.equal(assign, parts[1])
    assert torch.equal(size, parts[2])


def test_the_same_in_every_run_and_on_any_number_of_threads(backend):
    # On a CPU each greedy step of so many samples is shared among threads, of one sample not.
    args = backend.place_all(case(8, 577, 40, prefix=1, width=16))
    first = backend.own(op)(**args)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same(backend.own(op)(**args), first)
    finally:
        torch.set_num_threads(threads)


def test_gradient(backend):
    """That of the same merge with the choice a constant."""
    args = backend.place_all(case(2, 30, 7, prefix=1))
    x = args["x"].clone().requires_grad_()
    tokens, index, _, size = backend.own(op)(**{**args, "x": x})
    tokens.square().sum().backward()
    again = args["x"].clone().requires_grad_()
    metric = args["k_vis"][:, :, 1:].mean(1)
    merged, _, _ = torch.ops.cdrop.token_merge(again, metric, index)
    merged.square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    assert not index.requires_grad
    assert not size.requires_grad


def test_compiled(backend):
    args = backend.place_all(case(1, 33, 9, prefix=1))
    compiled = torch.compile(lambda **a: cdrop.select_merge(**a), fullgraph=True, backend="eager")
    assert_same(compiled(**args), cdrop.select_merge(**args))


def test_relevance_of_places():
    """By hand: places 0, 1, 2, 3 of four, with 1 - 1 / diversity = -1."""
    score = torch.tensor([[0.2, 0.9, 0.2, math.nan], [-math.inf, 0.5, 0.1, 0.3]])
    valid = torch.tensor([[True] * 4, [False, True, True, False]])
    e = [math.exp(-place / 4) for place in range(4)]
    expected = torch.tensor([[e[1], e[0], e[2], e[3]], [0, 1, math.exp(-0.5), 0]])
    torch.testing.assert_close(relevance_of_places(score, 0.5, valid), expected)
    assert torch.equal(relevance_of_places(score, 1.0), torch.ones(2, 4))


def by_the_scores_themselves(diversity: float, **args):
    """The consensus as it is, not the places in it."""
    return _by(lambda score: score.softmax(1), args)


def by_the_worst(diversity: float, **args):
    return _by(lambda score: relevance_of_places(-score, diversity), args)


def without_relevance(diversity: float, **args):
    return _by(torch.ones_like, args)


def the_best_alone(diversity: float, **args):
    return fused(**args)


def _by(relevance, args: Args):
    ops = torch.ops.cdrop
    vis = ops.attention_saliency(args["q_vis"], args["k_vis"])
    txt = ops.attention_saliency(args["q_txt"], args["k_txt"])
    _, score = ops.consensus_select(vis, txt, args["keep"])
    metric = args["k_vis"].mean(1)
    index = ops.greedy_diverse_select(
        metric, args["keep"], relevance=relevance(score), objective="dpp"
    )
    tokens, assign, size = ops.token_merge(args["x"], metric, index)
    return tokens, index, assign, size


@pytest.mark.parametrize(
    "wrong", [by_the_scores_themselves, by_the_worst, without_relevance, the_best_alone]
)
def test_one_mistake_is_seen(wrong):
    args = case(1, 60, 12, diversity=0.6, head_dim=16)
    check_diverse_merge(fused, args)
    with pytest.raises(AssertionError):
        check_diverse_merge(wrong, args)


def test_relevance_has_an_oracle():
    score = scores(3, 50, seed=4)
    valid = random_mask((3, 50), seed=1)
    torch.testing.assert_close(
        relevance_of_places(score, 0.3, valid),
        oracle_more.relevance_of_places(score.masked_fill(~valid, -math.inf), 0.3, valid),
    )
